"""MP table: processors and interrupt wiring for a guest without ACPI.

Intel MultiProcessor Specification 1.4, chapter 4.  bhyve: mptbl.c.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pybhyve.amd64.acpi.madt import IOAPIC_BASE, LAPIC_BASE
from pybhyve.amd64.acpi.table import checksum
from pybhyve.amd64.pci_irq import SCI_IRQ
from pybhyve.errors import BhyveError

if TYPE_CHECKING:
    from pybhyve.pci.bus import PciHost

MPTABLE_BASE: Final = 0xF0000
MPTABLE_LIMIT: Final = 0xF1000  # SMBIOS is behind

SPEC_REV: Final = 4  # 1.4
OEM_ID: Final = b"BHyVe   "
PRODUCT_ID: Final = b"Hypervisor  "

LAPIC_VERSION: Final = 0x10
CPU_SIGNATURE: Final = 0x6A5  # family 6 model 26 stepping 5, in the bits there are
CPU_FEATURES: Final = 0xBFEBFBFF
CPU_ENABLED: Final = 1
CPU_BSP: Final = 2

BUS_PCI: Final = 0
BUS_ISA: Final = 1

IOAPIC_ID: Final = 0
IOAPIC_VERSION: Final = 0x11
IOAPIC_ENABLED: Final = 1

INT: Final = 0  # interrupt types
NMI: Final = 1
EXTINT: Final = 3
CONFORMS: Final = 0  # to the bus
ACTIVE_LOW_LEVEL: Final = 0xF

ISA_IRQS: Final = 16
PIT_IRQ: Final = 0
PIT_PIN: Final = 2
ALL_LAPICS: Final = 0xFF


def build_mptable(ncpu: int, host: PciHost, base: int = MPTABLE_BASE) -> bytes:
    """Floating pointer and configuration table, to be placed at ``base``.

    BhyveError: the machine is more than the table can describe.
    """
    if len(host.buses) > 1:
        raise BhyveError(
            "MPtable is incompatible with multiple PCI hierarchies. "
            "MPtable generation can be disabled by passing the -Y option to bhyve(8)"
        )
    entries = [_processor(cpu) for cpu in range(ncpu)]
    entries.append(struct.pack("<BB6s", 1, BUS_PCI, b"PCI   "))
    entries.append(struct.pack("<BB6s", 1, BUS_ISA, b"ISA   "))
    entries.append(
        struct.pack("<BBBBI", 2, IOAPIC_ID, IOAPIC_VERSION, IOAPIC_ENABLED, IOAPIC_BASE)
    )
    entries += _io_interrupts(host)
    entries.append(_interrupt(4, EXTINT, CONFORMS, BUS_ISA, 0, ALL_LAPICS, 0))
    entries.append(_interrupt(4, NMI, CONFORMS, BUS_ISA, 0, ALL_LAPICS, 1))

    body = b"".join(entries)
    config = bytearray(
        struct.pack(
            "<4sHBB8s12sIHHIHBx",
            b"PCMP",
            44 + len(body),
            SPEC_REV,
            0,
            OEM_ID,
            PRODUCT_ID,
            0,
            0,
            len(entries),
            LAPIC_BASE,
            0,
            0,
        )
        + body
    )
    config[7] = checksum(config)
    pointer = bytearray(
        struct.pack("<4sIBBB5s", b"_MP_", base + 16, 1, SPEC_REV, 0, bytes(5))
    )
    pointer[10] = checksum(pointer)
    table = bytes(pointer + config)
    if base + len(table) > MPTABLE_LIMIT:
        raise BhyveError(
            f"{ncpu} vCPUs are too many for an MP table: leave it out with -Y"
        )
    return table


def _processor(cpu: int) -> bytes:
    flags = CPU_ENABLED | (CPU_BSP if cpu == 0 else 0)
    return struct.pack(
        "<BBBBII8x", 0, cpu & 0xFF, LAPIC_VERSION, flags, CPU_SIGNATURE, CPU_FEATURES
    )


def _interrupt(
    entry: int, kind: int, flags: int, bus: int, irq: int, apic: int, pin: int
) -> bytes:
    """An I/O (3) or local (4) interrupt entry."""
    return struct.pack("<BBHBBBB", entry, kind, flags, bus, irq, apic, pin)


def _io_interrupts(host: PciHost) -> list[bytes]:
    entries = [_interrupt(3, EXTINT, CONFORMS, BUS_ISA, 0, IOAPIC_ID, 0)]
    for irq in range(ISA_IRQS):
        if irq == PIT_PIN:  # the cascade; its pin is the timer's
            continue
        pin = PIT_PIN if irq == PIT_IRQ else irq
        flags = ACTIVE_LOW_LEVEL if irq == SCI_IRQ else CONFORMS
        entries.append(_interrupt(3, INT, flags, BUS_ISA, irq, IOAPIC_ID, pin))
    for bus in host.buses.values():
        for slot, route in bus.routes():
            if route.ioapic_pin >= 0:
                source = slot << 2 | route.pin - 1
                entries.append(
                    _interrupt(
                        3, INT, CONFORMS, BUS_PCI, source, IOAPIC_ID, route.ioapic_pin
                    )
                )
    return entries
