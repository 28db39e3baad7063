"""Which IOAPIC pin a PCI interrupt line gets.  bhyve: ioapic.c.

The IOAPIC itself is vmm's.  Pins 0 to 15 belong to the ISA interrupts.
"""

from __future__ import annotations

from typing import Final

ISA_PINS: Final = 16


class IoapicPins:
    """The pins of an IOAPIC that PCI devices share."""

    def __init__(self, pincount: int, firmware: bool) -> None:
        """``firmware``: a boot ROM expects pins in a fixed pattern."""
        self._pci_pins = max(pincount - ISA_PINS, 0)
        self._firmware = firmware
        self._next = 0

    def alloc(self, slot: int, pin: int) -> int:
        """The pin for INTA (1) to INTD (4) of a slot; -1 where there is none."""
        if not self._pci_pins:
            return -1
        if self._firmware:
            return ISA_PINS + (4 + slot + pin) % 8
        found = ISA_PINS + self._next % self._pci_pins
        self._next += 1
        return found
