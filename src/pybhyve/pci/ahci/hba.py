"""A SATA adapter: AHCI with 1 to 32 ports, disks and CD drives at them.

Serial ATA AHCI 1.3.1; as Intel's ICH8 has it.  bhyve: pci_ahci.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pybhyve.block import BlockIf, BlockOptions
from pybhyve.config import Node
from pybhyve.errors import ConfigError, DeviceError
from pybhyve.options import Options, integer, key, numbered, one_of
from pybhyve.pci.ahci.ahcireg import (
    CAP_ISS_GEN3,
    CAP_NCS,
    CAP_PMD,
    CAP_PSC,
    CAP_S64A,
    CAP_SAL,
    CAP_SALP,
    CAP_SCLO,
    CAP_SMPS,
    CAP_SNCQ,
    CAP_SSC,
    CAP_SSNTF,
    CAP_SSS,
    CAP_SXS,
    GHC_AE,
    GHC_HR,
    GHC_IE,
    PORT_BASE,
    PORT_STEP,
    PORTS_MAX,
    HbaRegs,
)
from pybhyve.pci.ahci.ata import AtaDisk
from pybhyve.pci.ahci.atapi import AtapiCd
from pybhyve.pci.ahci.device import SataDevice
from pybhyve.pci.ahci.identify import Names, default_serial
from pybhyve.pci.ahci.port import Port
from pybhyve.pci.emul import BAR_MEM32, PciAddress, PciDevice
from pybhyve.pci.pcireg import (
    PCIC_STORAGE,
    PCIP_STORAGE_SATA_AHCI_1_0,
    PCIS_STORAGE_SATA,
)
from pybhyve.pci.registry import pci_device

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.pci.bus import PciHost

VENDOR: Final = 0x8086
DEVICE: Final = 0x2821
ABAR: Final = 5
PORTS_MIN: Final = 6  # what an ICH8 has
MSI_MAX: Final = 16
CAP: Final = (
    CAP_S64A
    | CAP_SNCQ
    | CAP_SSNTF
    | CAP_SMPS
    | CAP_SSS
    | CAP_SALP
    | CAP_SAL
    | CAP_SCLO
    | CAP_ISS_GEN3
    | CAP_PMD
    | CAP_SSC
    | CAP_PSC
    | CAP_NCS
    | CAP_SXS
)

TYPES: Final = ("hd", "cd")


class AhciPortOptions(BlockOptions):
    """``pci.B.S.F.port.N.…``."""

    type: str = key(parse=one_of(*TYPES), doc="A disk (hd) or a CD drive (cd).")
    nmrr: int = key(
        0, parse=integer(0, 0xFFFF), doc="Rotations a minute; 1 is a solid state disk."
    )
    ser: str | None = key(None, doc="Serial number, 20 characters.")
    rev: str = key("001", doc="Revision of the firmware, 8 characters.")
    model: str | None = key(None, doc="Model, 40 characters.")


class AhciOptions(Options):
    """``pci.B.S.F.…`` of ``ahci``."""

    port: Mapping[int, AhciPortOptions] = numbered(
        AhciPortOptions, doc="The device at port N, 0 to 31."
    )

    @classmethod
    def legacy_config(cls, node: Node, text: str) -> None:
        """``hd:PATH[,options][,cd:PATH…]``: each takes the next port, from 0.

        An entry without a path leaves its port out.
        """
        for number, entry in enumerate(_split_ports(text)):
            if number >= PORTS_MAX:
                raise ConfigError(f'more than {PORTS_MAX} ports: "{entry}"')
            if entry:
                kind, colon, rest = entry.partition(":")
                if not colon or kind not in TYPES:
                    raise ConfigError(
                        f'Missing or invalid type for port {number}: "{entry}"'
                    )
                if rest:
                    _configure_port(kind, number, node, rest)


def _split_ports(text: str) -> list[str]:
    """Cut ``hd:a,opt,cd:b`` at the commas that begin a port."""
    entries: list[str] = []
    for item in text.split(","):
        if not entries or (item.partition(":")[0] in TYPES and ":" in item):
            entries.append(item)
        else:
            entries[-1] += f",{item}"
    return entries


def _configure_port(kind: str, number: int, node: Node, text: str) -> None:
    port = node.create(f"port.{number}")
    port.set("type", kind)
    if text:
        AhciPortOptions.legacy_config(port, text)


def _one_disk(node: Node, text: str) -> None:
    """``ahci-hd,PATH[,options]``."""
    _configure_port("hd", 0, node, text)


def _one_cd(node: Node, text: str) -> None:
    """``ahci-cd,PATH[,options]``."""
    _configure_port("cd", 0, node, text)


@pci_device(
    "ahci", options=AhciOptions, aliases={"ahci-hd": _one_disk, "ahci-cd": _one_cd}
)
class PciAhci(PciDevice[AhciOptions]):
    """The adapter.

    Locks: a port's, then ``irq_lock``, which guards IS, GHC and what is sent for them.
    """

    def __init__(
        self, machine: Machine, host: PciHost, address: PciAddress, options: AhciOptions
    ) -> None:
        super().__init__(machine, host, address, options)
        highest = max(options.port, default=-1)
        if highest >= PORTS_MAX:
            raise DeviceError(
                f"{address.path}.port.{highest}: ports are 0 to {PORTS_MAX - 1}"
            )
        # deviation: any disk makes bhyve's an adapter with 32 ports.
        count = max(highest + 1, PORTS_MIN)
        self.set_ids(
            VENDOR,
            DEVICE,
            class_=PCIC_STORAGE,
            subclass=PCIS_STORAGE_SATA,
            progif=PCIP_STORAGE_SATA_AHCI_1_0,
        )
        self.add_bar(ABAR, BAR_MEM32, PORT_BASE + PORT_STEP * count)
        self.add_msi(1 << (min(count, MSI_MAX) - 1).bit_length())
        self.add_intx()
        self.regs = HbaRegs(self)
        self._level = False
        self._resetting = False
        self.ports: list[Port] = []
        try:
            for number in range(count):
                device = self._device(number, options.port.get(number))
                notify = partial(self._port_event, number)
                self.ports.append(Port(machine.ctx.vm, device, notify))
        except BaseException:
            self.halt()
            raise
        self._reset_regs()

    def _device(
        self, number: int, options: AhciPortOptions | None
    ) -> SataDevice | None:
        if options is None:
            return None
        self.add_boot_device(options.bootindex)
        _bus, slot, func = self.address
        blk = BlockIf(options, f"ahci {slot}:{func}:{number}", self.machine.mevent)
        disk = options.type == "hd"
        model = "BHYVE SATA DISK" if disk else "BHYVE SATA DVD ROM"
        names = Names(
            serial=options.ser or default_serial(options.path or ""),
            firmware=options.rev,
            model=options.model or model,
        )
        if disk:
            return AtaDisk(blk, names, options.nmrr)
        drive = AtapiCd(blk, names)
        blk.on_resize(drive.medium_changed)
        return drive

    # -- registers -------------------------------------------------------------------

    def bar_read(self, index: int, offset: int, size: int) -> int:
        """A register of the adapter's or of a port's."""
        if offset < PORT_BASE:
            return self.regs.read(offset, size)
        number, offset = divmod(offset - PORT_BASE, PORT_STEP)
        if number < len(self.ports):
            return self.ports[number].regs.read(offset, size)
        return 0

    def bar_write(self, index: int, offset: int, size: int, value: int) -> None:
        """A register of the adapter's or of a port's.

        deviation: bhyve takes aligned writes of 4 bytes only, and others end the VM.
        """
        if offset < PORT_BASE:
            self.regs.write(offset, size, value)
            return
        number, offset = divmod(offset - PORT_BASE, PORT_STEP)
        if number < len(self.ports):
            self.ports[number].write(offset, size, value)

    @HbaRegs.GHC.read
    def _control(self) -> int:
        if self._resetting and not any(port.resetting for port in self.ports):
            self._resetting = False
        return self.regs.GHC | (GHC_HR if self._resetting else 0)

    @HbaRegs.GHC.write
    def _set_control(self, value: int) -> None:
        if value & GHC_HR:
            self._reset_all()
            return
        with self.irq_lock:
            self.regs.GHC = GHC_AE | value & GHC_IE
            self._signal(self.regs.IS)

    @HbaRegs.IS.write
    def _acknowledge(self, value: int) -> None:
        with self.irq_lock:
            seen = self.regs.IS & value
            self.regs.IS &= ~seen
            again = 0
            while seen:
                bit = seen & -seen
                seen &= ~bit
                if self.ports[bit.bit_length() - 1].pending:
                    again |= bit
            # What has come up since the driver looked is a new event.
            self.regs.IS |= again
            self._signal(again)

    def _reset_regs(self) -> None:
        with self.irq_lock:
            self.regs.reset()
            self.regs.CAP = CAP | len(self.ports) - 1
            self.regs.PI = sum(
                1 << number
                for number, port in enumerate(self.ports)
                if port.device is not None
            )
            self._set_level()

    def _reset_all(self) -> None:
        """A reset of the adapter (10.4.3); it lasts until no I/O is under way."""
        self._resetting = True
        for port in self.ports:
            port.reset()
        self._reset_regs()

    # -- interrupts ------------------------------------------------------------------

    def _port_event(self, number: int) -> None:
        """Something has happened at a port that its driver wants to know."""
        with self.irq_lock:
            bit = 1 << number
            known = self.regs.IS & bit
            self.regs.IS |= bit
            if not self.regs.GHC & GHC_IE:
                return
            messages = self.msi_count()
            # 10.6.2.3: ports for which there are not enough share the last one, and
            # it is only sent when there was nothing to know of before.
            own = len(self.ports) <= messages or number < messages - 1
            if not messages:
                self._set_level()
            elif own or not known:
                self.generate_msi(min(number, messages - 1))

    def _signal(self, new: int) -> None:
        """Have the driver know of the ports whose bits are ``new`` in IS."""
        messages = self.msi_count()
        if not messages:
            self._set_level()
        elif new and self.regs.GHC & GHC_IE:
            ports = (number for number in range(PORTS_MAX) if new >> number & 1)
            for message in sorted({min(port, messages - 1) for port in ports}):
                self.generate_msi(message)

    def config_written(self, offset: int, size: int) -> None:
        """MSI may be on or off now."""
        with self.irq_lock:
            self._set_level()

    def _set_level(self) -> None:
        """Bring the interrupt line up or down, where there are no messages."""
        level = bool(self.regs.IS and self.regs.GHC & GHC_IE and not self.msi_enabled())
        if level != self._level:
            self._level = level
            if level:
                self.intx_assert()
            else:
                self.intx_deassert()

    # -- life ------------------------------------------------------------------------

    def pause(self) -> None:
        """Finish what is under way."""
        for port in self.ports:
            port.pause()

    def resume(self) -> None:
        """Go on with what has been issued."""
        for port in self.ports:
            port.resume()

    def halt(self) -> None:
        """Finish what is under way, and give the images back."""
        for port in self.ports:
            if port.device is not None:
                port.device.blk.close()

    def reset_device(self) -> None:
        """As after power-on."""
        self._resetting = False
        for port in self.ports:
            port.power_on()
        self._reset_regs()

    def save_device(self) -> dict[str, Any]:
        """The adapter's registers, and each port."""
        return {
            "version": 1,
            "regs": self.regs.save(),
            "level": self._level,
            "ports": [port.save() for port in self.ports],
        }

    def restore_device(self, state: dict[str, Any]) -> None:
        """Take back what save_device() gave."""
        if state["version"] != 1 or len(state["ports"]) != len(self.ports):
            raise ValueError(f"ahci: unknown state version {state['version']}")
        self.regs.restore(state["regs"])
        self._level = state["level"]
        for port, saved in zip(self.ports, state["ports"], strict=True):
            port.restore(saved)
