"""A serial port on PCI: an NS16550A in an I/O BAR.  bhyve: pci_uart.c."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pybhyve.console import open_backend
from pybhyve.lpc.serial import SerialPort
from pybhyve.options import WHOLE, Options, key
from pybhyve.pci.emul import BAR_IO, PciAddress, PciDevice
from pybhyve.pci.pcireg import PCIC_SIMPLECOMM, PCIS_SIMPLECOMM_UART
from pybhyve.pci.registry import pci_device

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.pci.bus import PciHost

COM_VENDOR: Final = 0x131F
COM_DEVICE: Final = 0x2000
PORTS: Final = 8
PROGIF_16550: Final = 2


class UartOptions(Options):
    """``pci.B.S.F.…`` of ``uart``."""

    path: str | None = key(
        None, doc="stdio, pty, tcp=IP:PORT or a terminal device.", legacy=WHOLE
    )


@pci_device("uart", options=UartOptions)
class PciUart(PciDevice[UartOptions]):
    """The port in BAR 0, its interrupt on the function's pin."""

    def __init__(
        self, machine: Machine, host: PciHost, address: PciAddress, options: UartOptions
    ) -> None:
        super().__init__(machine, host, address, options)
        self.set_ids(
            COM_VENDOR,
            COM_DEVICE,
            class_=PCIC_SIMPLECOMM,
            subclass=PCIS_SIMPLECOMM_UART,
            progif=PROGIF_16550,
        )
        self.add_bar(0, BAR_IO, PORTS)
        self.add_intx()
        backend = open_backend(options.path, machine.mevent, machine.request_poweroff)
        self._port = SerialPort(self._irq, backend)

    def _irq(self, level: bool) -> None:
        if level:
            self.intx_assert()
        else:
            self.intx_deassert()

    def bar_read(self, index: int, offset: int, size: int) -> int:
        """A register of the chip."""
        return self._port.read(offset, size)

    def bar_write(self, index: int, offset: int, size: int, value: int) -> None:
        """A register of the chip."""
        self._port.write(offset, size, value)

    def start(self) -> None:
        """Connect the backend."""
        self._port.start()

    def pause(self) -> None:
        """Have the line wait."""
        self._port.pause()

    def resume(self) -> None:
        """Go on with whatever line is there now."""
        self._port.resume()

    def halt(self) -> None:
        """Disconnect the backend."""
        self._port.halt()

    def reset_device(self) -> None:
        """Master reset."""
        self._port.reset()

    def save_device(self) -> dict[str, Any]:
        """The chip."""
        return {"uart": self._port.save()}

    def restore_device(self, state: dict[str, Any]) -> None:
        """Take back what save_device() gave."""
        self._port.restore(state["uart"])
