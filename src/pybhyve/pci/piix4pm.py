"""The power management function of QEMU's i440fx machine, as far as OVMF looks for it.

Intel 82371AB (PIIX4) datasheet, 7.1 and 7.2.  bhyve has none.  edk2's OvmfPkg asks it
at 0:1.3 for the PM timer's port, and switches a machine off at a port that is fixed.
Nobody else finds it, unless there is a function 0 in that slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pybhyve.amd64.pm import PM_BASE
from pybhyve.options import Options
from pybhyve.pci.emul import PciAddress, PciDevice
from pybhyve.pci.pcireg import PCIC_BRIDGE, PCIS_BRIDGE_OTHER

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.pci.bus import PciHost

PIIX4_PM_ADDRESS: Final = PciAddress(0, 1, 3)
PIIX4_VENDOR: Final = 0x8086
PIIX4_DEVICE: Final = 0x7113

PMBA: Final = 0x40  # 7.1.10 power management base address
PMBA_RTE: Final = 1 << 0
PMREGMISC: Final = 0x80  # 7.1.24
PMIOSE: Final = 1 << 0

PMCNTRL: Final = 0xB004  # 7.2.3, where OVMF's ResetSystemLib looks for it
SUS_EN: Final = 1 << 13
SUS_TYP: Final = 7 << 10  # 0: soft off


class Piix4Pm(PciDevice[Options]):
    """Says where the registers of :mod:`pybhyve.amd64.pm` are."""

    NAME = "piix4pm"

    def __init__(self, machine: Machine, host: PciHost) -> None:
        super().__init__(machine, host, PIIX4_PM_ADDRESS, Options())
        self.set_ids(
            PIIX4_VENDOR,
            PIIX4_DEVICE,
            class_=PCIC_BRIDGE,
            subclass=PCIS_BRIDGE_OTHER,
        )
        self.set_config(PMBA, 4, PM_BASE | PMBA_RTE)
        self.set_config(PMREGMISC, 1, PMIOSE)
        machine.inout.register("piix4pm", PMCNTRL, 2, self._read, self._write)

    def _read(self, _port: int, _size: int) -> int:
        return 0

    def _write(self, port: int, size: int, value: int) -> None:
        if port == PMCNTRL and size == 2 and value & (SUS_EN | SUS_TYP) == SUS_EN:
            self.machine.request_poweroff()
