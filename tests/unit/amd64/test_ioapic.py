"""Which IOAPIC pins PCI interrupts get."""

from __future__ import annotations

from pybhyve.amd64.ioapic import IoapicPins


def test_without_firmware_pins_go_round():
    pins = IoapicPins(32, firmware=False)

    assert [pins.alloc(slot, 1) for slot in range(17)] == [*range(16, 32), 16]


def test_firmware_expects_a_pattern():
    pins = IoapicPins(32, firmware=True)

    assert [pins.alloc(3, pin) for pin in (1, 2, 3, 4)] == [16, 17, 18, 19]
    assert pins.alloc(4, 1) == 17


def test_an_ioapic_with_isa_pins_only_has_none():
    assert IoapicPins(16, firmware=False).alloc(1, 1) == -1
