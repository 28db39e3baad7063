"""What userland has of vmm's devices: MMIO shims, and their part of the DSDT.

A guest's own access to the local APIC, the IOAPIC and the HPET ends in vmm.  The shims
are for accesses made on its behalf here, as by a debugger.  bhyve: kernemu_dev.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pybhyve.amd64.acpi import Aml
from pybhyve.amd64.acpi.aml import eisaid
from pybhyve.amd64.acpi.hpet import HPET_BASE, HPET_SIZE
from pybhyve.amd64.acpi.madt import IOAPIC_BASE, LAPIC_BASE
from pybhyve.amd64.acpi.resources import io, irq, memory32_fixed, template
from pybhyve.amd64.mem import MEM_F_IMMUTABLE, MEM_F_RW, MemRange
from pybhyve.device import Device

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

APIC_SIZE: Final = 0x1000
BSP: Final = 0  # a range does not learn which vCPU is asking

PIC_PORTS: Final = (0x20, 0xA0)
PIC_CASCADE_IRQ: Final = 2
PIT_PORT: Final = 0x40
PIT_IRQ: Final = 0
ELCR_PORT: Final = 0x4D0
NMISC_PORT: Final = 0x61


class KernelDevices(Device):
    """8259 pair, 8254, NMI status port, local APIC, IOAPIC and HPET."""

    acpi_scope = "ISA"
    acpi_resources = (io(ELCR_PORT, 2), io(NMISC_PORT, 1))

    def __init__(self, machine: Machine) -> None:
        vm = machine.vm

        def read(gpa: int, size: int) -> int:
            return vm.kernemu_read(BSP, gpa, size)

        def write(gpa: int, size: int, value: int) -> None:
            vm.kernemu_write(BSP, gpa, size, value)

        for name, base, size in (
            ("kern-lapic-mmio", LAPIC_BASE, APIC_SIZE),
            ("kern-ioapic-mmio", IOAPIC_BASE, APIC_SIZE),
            ("kern-hpet-mmio", HPET_BASE, HPET_SIZE),
        ):
            machine.mem.register(
                MemRange(name, base, size, read, write, MEM_F_RW | MEM_F_IMMUTABLE)
            )

    def dsdt(self, aml: Aml) -> None:
        """``PIC``, ``TIMR`` and ``HPET``."""
        with aml.device("PIC"):
            aml.name("_HID", eisaid("PNP0000"))
            ports = [io(port, 2) for port in PIC_PORTS]
            aml.name("_CRS", template(*ports, irq(PIC_CASCADE_IRQ)))
        with aml.device("TIMR"):
            aml.name("_HID", eisaid("PNP0100"))
            aml.name("_CRS", template(io(PIT_PORT, 4), irq(PIT_IRQ)))
        with aml.device("HPET"):
            aml.name("_HID", eisaid("PNP0103"))
            aml.name("_UID", 0)
            aml.name("_CRS", template(memory32_fixed(HPET_BASE, HPET_SIZE)))
