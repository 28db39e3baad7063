"""COM1 to COM4, the serial ports at their ISA addresses.  bhyve: pci_lpc.c."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pybhyve.amd64.acpi import Aml
from pybhyve.amd64.acpi.aml import eisaid
from pybhyve.amd64.acpi.resources import io, irq, template
from pybhyve.console import open_backend
from pybhyve.device import Device
from pybhyve.lpc.serial import SerialPort

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

PORTS: Final = 8


class ComSpec(NamedTuple):
    """Where a serial port is on every PC."""

    name: str
    base: int
    irq: int


COM_PORTS: Final = (
    ComSpec("com1", 0x3F8, 4),
    ComSpec("com2", 0x2F8, 3),
    ComSpec("com3", 0x3E8, 4),
    ComSpec("com4", 0x2E8, 3),
)


class ComPort(Device):
    """A serial port; without a backend its output is lost."""

    acpi_scope = "ISA"

    def __init__(self, machine: Machine, spec: ComSpec, path: str | None) -> None:
        self._vm = machine.vm
        self._spec = spec
        backend = open_backend(path, machine.mevent, machine.request_poweroff)
        self._port = SerialPort(self._irq, backend)
        machine.inout.register(spec.name, spec.base, PORTS, self._read, self._write)
        if spec is COM_PORTS[0] and path is not None:
            # For SeaBIOS, as long as there is no display: "screen" and keyboard.
            port = spec.base.to_bytes(8, "little")
            machine.fwcfg.add_file("etc/sercon-port", port)

    def _irq(self, level: bool) -> None:
        if level:
            self._vm.isa_assert_irq(self._spec.irq, self._spec.irq)
        else:
            self._vm.isa_deassert_irq(self._spec.irq, self._spec.irq)

    def _read(self, port: int, size: int) -> int:
        return self._port.read(port - self._spec.base, size)

    def _write(self, port: int, size: int, value: int) -> None:
        self._port.write(port - self._spec.base, size, value)

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

    def reset(self) -> None:
        """Master reset."""
        self._port.reset()

    def save(self) -> dict[str, Any]:
        """The chip."""
        return self._port.save()

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        self._port.restore(state)

    def dsdt(self, aml: Aml) -> None:
        """``COM1`` to ``COM4``."""
        spec = self._spec
        with aml.device(spec.name.upper()):
            aml.name("_HID", eisaid("PNP0501"))
            aml.name("_UID", COM_PORTS.index(spec) + 1)
            aml.name("_CRS", template(io(spec.base, PORTS), irq(spec.irq)))
