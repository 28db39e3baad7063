"""A driver's view of functions that are there: guestside.pci finds what was put in."""

from __future__ import annotations

import pytest

from tests.guestside.pci import MSI_BASE, PciFunction


@pytest.mark.parametrize("ecam", [False, True], ids=["ports", "ecam"])
def test_bars_and_capabilities_are_found(build, ecam):
    function = PciFunction(build("3,dummy"), 3, ecam=ecam)

    bars = function.bars()

    assert [(bar.io, bar.wide, bar.addr, bar.size) for bar in bars.values()] == [
        (True, False, 0x2000, 8),
        (False, False, 0xC0000000, 0x1000),
        (False, False, 0xC0001000, 0x1000),
    ]
    assert list(function.capabilities()) == [(5, 0x40)]
    with pytest.raises(LookupError):
        function.capability(0x11)


def test_a_bar_that_moves_takes_its_registers_along(build):
    function = PciFunction(build("3,dummy"), 3)
    function.bar(1).write(8, 4, 0x12345678)

    moved = function.move_bar(1, 0xD0000000)

    assert moved.addr == 0xD0000000
    assert moved.read(8) == 0x12345678


def test_msi(build):
    machine = build("3,dummy")
    function = PciFunction(machine, 3)
    function.enable()
    function.enable_msi(0x40, count=4)
    machine.vm.take()

    function.bar(0).write(4, 4, 3)

    assert machine.vm.take() == [("lapic_msi", MSI_BASE, 0x43)]
