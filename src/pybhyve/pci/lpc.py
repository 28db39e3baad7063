"""The LPC bridge: PIRQ routing registers, and the devices behind it.

Intel PIIX3/PIIX4 datasheets, 4.1; PIRQE to PIRQH as on later bridges.
bhyve: pci_lpc.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pybhyve.amd64.acpi.aml import (
    BYTE_ACC,
    PCI_CONFIG,
    Aml,
    and_,
    arg,
    call,
    eisaid,
    find_set_right_bit,
    lless,
    lnot,
    local,
    shift_left,
)
from pybhyve.amd64.acpi.resources import irq_level_low_shared, template
from pybhyve.amd64.pci_irq import PERMITTED_IRQS, PIRQ_DIS, PIRQ_IRQ, PIRQS
from pybhyve.errors import DeviceError, NotAvailableError
from pybhyve.lpc.com import COM_PORTS, ComPort
from pybhyve.lpc.pctestdev import PcTestdev
from pybhyve.lpc.pvpanic import Pvpanic
from pybhyve.options import Options
from pybhyve.pci.emul import PciAddress, PciDevice
from pybhyve.pci.hostbridge import parse_id
from pybhyve.pci.pcireg import PCIC_BRIDGE, PCIS_BRIDGE_ISA
from pybhyve.pci.registry import pci_device

if TYPE_CHECKING:
    from pybhyve.amd64.acpi.dsdt import Dsdt
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.pci.bus import PciHost

# PIRQRC[A:D] and, on later bridges, PIRQRC[E:H], by PIRQ
PIRQ_REGS: Final = (0x60, 0x61, 0x62, 0x63, 0x68, 0x69, 0x6A, 0x6B)
_PIRQ_AT: Final = {reg: pirq for pirq, reg in enumerate(PIRQ_REGS)}
PIRQ_NAMES: Final = "ABCDEFGH"


@pci_device("lpc")
class PciLpc(PciDevice[Options]):
    """One a machine, on bus 0."""

    def __init__(
        self, machine: Machine, host: PciHost, address: PciAddress, options: Options
    ) -> None:
        super().__init__(machine, host, address, options)
        if address.bus != 0:
            raise DeviceError("LPC bridge can be present only on bus 0.")
        if host.isa_bridge is not None:
            raise DeviceError("Only one LPC bridge is allowed.")
        host.isa_bridge = rf"\_SB.{self.acpi_scope}.ISA"
        ids = machine.options
        self.set_ids(
            _pcireg("vendor", ids.lpc_pcireg_vendor),
            _pcireg("device", ids.lpc_pcireg_device),
            class_=PCIC_BRIDGE,
            subclass=PCIS_BRIDGE_ISA,
            revision=_pcireg("revid", ids.lpc_pcireg_revid) & 0xFF,
            subvendor=_pcireg("subvendor", ids.lpc_pcireg_subvendor),
            subdevice=_pcireg("subdevice", ids.lpc_pcireg_subdevice),
        )
        for spec in COM_PORTS:
            host.router.reserve(spec.irq)
            path = machine.config.get(f"lpc.{spec.name}.path")
            machine.add_device(spec.name, ComPort(machine, spec, path))
        if machine.options.lpc_pc_testdev:
            machine.add_device("pc-testdev", PcTestdev(machine))
        if machine.options.lpc_pvpanic:
            machine.add_device("pvpanic", Pvpanic(machine))

    def config_read(self, offset: int, size: int) -> int:
        """The routing registers are the router's."""
        value = super().config_read(offset, size)
        for at in range(size):
            pirq = _PIRQ_AT.get(offset + at)
            if pirq is not None:
                value |= self.host.router.read(pirq) << 8 * at
        return value

    def config_write(self, offset: int, size: int, value: int) -> None:
        """The routing registers are the router's."""
        super().config_write(offset, size, value)
        for at in range(size):
            pirq = _PIRQ_AT.get(offset + at)
            if pirq is not None:
                self.host.router.write(pirq, value >> 8 * at & 0xFF)

    def dsdt(self, aml: Dsdt) -> None:
        """``ISA``: the link devices, and what is behind the bridge."""
        with aml.device("ISA"):
            aml.name("_ADR", self.address.slot << 16 | self.address.func)
            aml.op_region("LPCR", PCI_CONFIG, 0, 0x100)
            units = [("", 8 * PIRQ_REGS[0])]
            units += [(f"PIR{name}", 8) for name in PIRQ_NAMES[:4]]
            units += [("", 8 * (PIRQ_REGS[4] - PIRQ_REGS[3] - 1))]
            units += [(f"PIR{name}", 8) for name in PIRQ_NAMES[4:]]
            aml.field("LPCR", BYTE_ACC, units)
            _link_helpers(aml)
            for pirq in range(PIRQS):
                _link_device(aml, pirq)
            aml.place("ISA")


def _pcireg(name: str, text: str) -> int:
    if text == "host":
        raise NotAvailableError(f"lpc.pcireg.{name}=host")
    try:
        return parse_id(text)
    except ValueError as error:
        raise DeviceError(f"lpc.pcireg.{name}={text}") from error


def _link_helpers(aml: Aml) -> None:
    """``PIRV (register)``: whether a PIRQ is routed to an interrupt."""
    with aml.method("PIRV", 1):
        with aml.if_(and_(arg(0), PIRQ_DIS)):
            aml.return_(0)
        aml.return_(lnot(lless(and_(arg(0), PIRQ_IRQ), 3)))


def _link_device(aml: Aml, pirq: int) -> None:
    """An interrupt link device (ACPI 6.5, 6.2.13), through which a guest routes."""
    name = PIRQ_NAMES[pirq]
    reg = f"PIR{name}"
    possible = [irq for irq in range(16) if PERMITTED_IRQS >> irq & 1]
    with aml.device(f"LNK{name}"):
        aml.name("_HID", eisaid("PNP0C0F"))
        aml.name("_UID", pirq + 1)
        with aml.method("_STA"):
            with aml.if_(call("PIRV", reg)):
                aml.return_(0x0B)
            with aml.else_():
                aml.return_(0x09)
        aml.name("_PRS", template(irq_level_low_shared(possible)))
        # The mask of the current interrupt is at offset 1 of its descriptor.
        aml.name(f"CB0{pirq}", template(irq_level_low_shared(())))
        aml.create_word_field(f"CB0{pirq}", 1, f"CIR{name}")
        with aml.method("_CRS"):
            with aml.if_(call("PIRV", reg)):
                aml.store(shift_left(1, and_(reg, PIRQ_IRQ)), f"CIR{name}")
            with aml.else_():
                aml.store(0, f"CIR{name}")
            aml.return_(f"CB0{pirq}")
        with aml.method("_DIS"):
            aml.store(PIRQ_DIS, reg)
        with aml.method("_SRS", 1):
            aml.create_word_field(arg(0), 1, f"SIR{name}")
            aml.store(find_set_right_bit(f"SIR{name}"), local(0))
            with aml.if_(local(0)):
                aml.decrement(local(0))
                aml.store(local(0), reg)
            with aml.else_():
                aml.store(PIRQ_DIS, reg)
