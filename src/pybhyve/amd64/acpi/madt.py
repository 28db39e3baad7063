"""MADT: the interrupt controllers (ACPI 6.5, 5.2.12)."""

from __future__ import annotations

import struct
from typing import Final

from pybhyve.amd64.acpi.table import Table, build_table
from pybhyve.amd64.pci_irq import SCI_IRQ

LAPIC_BASE: Final = 0xFEE00000
IOAPIC_BASE: Final = 0xFEC00000

PCAT_COMPAT: Final = 1  # there is a pair of 8259 too
LAPIC_ENABLED: Final = 1
X2APIC_ID_MIN: Final = 255  # above, a processor does not fit a local APIC entry

# MPS INTI flags, table 5.26: polarity 1 high 3 low, trigger 1 edge 3 level, at bit 2.
HIGH_EDGE: Final = 0x5
LOW_LEVEL: Final = 0xF


def build_madt(ncpu: int) -> Table:
    """One local APIC a vCPU, the IOAPIC, two overrides, NMI on LINT1."""
    body = struct.pack("<II", LAPIC_BASE, PCAT_COMPAT)
    for cpu in range(ncpu):
        if cpu < X2APIC_ID_MIN:
            body += struct.pack("<BBBBI", 0, 8, cpu, cpu, LAPIC_ENABLED)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, cpu, LAPIC_ENABLED, cpu)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC_BASE, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, HIGH_EDGE)
    body += struct.pack("<BBBBIH", 2, 10, 0, SCI_IRQ, SCI_IRQ, LOW_LEVEL)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, HIGH_EDGE, 1)
    return build_table("APIC", 1, body)
