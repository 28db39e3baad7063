"""A device for tests: three BARs of memory, and registers that raise MSIs.

bhyve: pci_emul_dummy in pci_emul.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pybhyve.options import Options
from pybhyve.pci.emul import BAR_IO, BAR_MEM32, PciAddress, PciDevice
from pybhyve.pci.pcireg import PCIC_NETWORK
from pybhyve.pci.registry import pci_device

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.pci.bus import PciHost

IO_SIZE: Final = 8
MEM_SIZE: Final = 4096
MSI_COUNT: Final = 4
MSI_REG: Final = 4  # in BAR 0: the number of the message to send
MSI_ALL: Final = 0xABCDEF


@pci_device("dummy")
class PciDummy(PciDevice[Options]):
    """Reads give what was written."""

    def __init__(
        self, machine: Machine, host: PciHost, address: PciAddress, options: Options
    ) -> None:
        super().__init__(machine, host, address, options)
        self.set_ids(0x10DD, 0x0001, class_=PCIC_NETWORK, subclass=0)
        self.add_msi(MSI_COUNT)
        self.add_bar(0, BAR_IO, IO_SIZE)
        self.add_bar(1, BAR_MEM32, MEM_SIZE)
        self.add_bar(2, BAR_MEM32, MEM_SIZE)
        self._data = {0: bytearray(IO_SIZE), 1: bytearray(MEM_SIZE)}
        self._data[2] = bytearray(MEM_SIZE)

    def bar_read(self, index: int, offset: int, size: int) -> int:
        """What is stored there."""
        return int.from_bytes(self._data[index][offset : offset + size], "little")

    def bar_write(self, index: int, offset: int, size: int, value: int) -> None:
        """Store it; in the message register, send too."""
        self._data[index][offset : offset + size] = value.to_bytes(size, "little")
        if index == 0 and offset == MSI_REG and size == 4:
            if value == MSI_ALL:
                for message in range(self.msi_count()):
                    self.generate_msi(message)
            else:
                self.generate_msi(value)

    def reset_device(self) -> None:
        """All zero."""
        for data in self._data.values():
            data[:] = bytes(len(data))

    def save_device(self) -> dict[str, Any]:
        """The contents."""
        return {"data": [bytes(self._data[index]) for index in range(3)]}

    def restore_device(self, state: dict[str, Any]) -> None:
        """Take back what save_device() gave."""
        for index, data in enumerate(state["data"]):
            self._data[index][:] = data
