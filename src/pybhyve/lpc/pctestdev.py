"""The device of kvm-unit-tests: scratch registers, exit, interrupt lines.

QEMU hw/misc/pc-testdev.c is what the tests are written for.  bhyve: pctestdev.c.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from pybhyve.amd64.mem import MemRange
from pybhyve.device import Device

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

SCRATCH_PORT: Final = 0xE0
SCRATCH_PORTS: Final = 4
EXIT_PORT: Final = 0xF4
EXIT_PORTS: Final = 4
IRQ_PORT: Final = 0x2000
IRQ_PORTS: Final = 32
IOMEM_BASE: Final = 0xFF000000
IOMEM_SIZE: Final = 0x10000
ISA_IRQS: Final = 16
PIC_ONLY: Final = -1


class PcTestdev(Device):
    """Only with ``lpc.pc-testdev``: a guest can end the program with it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._vm = machine.vm
        self._lock = threading.Lock()
        self._scratch = bytearray(SCRATCH_PORTS)
        self._iomem = bytearray(IOMEM_SIZE)
        self._lines = 0  # that we hold
        inout = machine.inout
        inout.register(
            "pc-testdev scratch",
            SCRATCH_PORT,
            SCRATCH_PORTS,
            self._read_scratch,
            self._write_scratch,
        )
        inout.register(
            "pc-testdev exit", EXIT_PORT, EXIT_PORTS, lambda _port, _size: 0, self._exit
        )
        inout.register(
            "pc-testdev irq",
            IRQ_PORT,
            IRQ_PORTS,
            lambda _port, _size: 0,
            self._set_line,
        )
        machine.mem.register(
            MemRange(
                "pc-testdev",
                IOMEM_BASE,
                IOMEM_SIZE,
                self._read_iomem,
                self._write_iomem,
            )
        )

    def _read_scratch(self, port: int, size: int) -> int:
        at = port - SCRATCH_PORT
        return int.from_bytes(self._scratch[at : at + size], "little")

    def _write_scratch(self, port: int, size: int, value: int) -> None:
        at = port - SCRATCH_PORT
        end = min(at + size, SCRATCH_PORTS)
        self._scratch[at:end] = value.to_bytes(size, "little")[: end - at]

    def _exit(self, _port: int, _size: int, value: int) -> None:
        self._machine.exit((value << 1 | 1) & 0xFF)

    def _set_line(self, port: int, _size: int, value: int) -> None:
        pin = port - IRQ_PORT
        with self._lock:
            held = self._lines >> pin & 1
            if bool(value) == bool(held):
                return  # the controllers count holders, and we are one
            self._lines ^= 1 << pin
            if pin >= ISA_IRQS:
                if value:
                    self._vm.ioapic_assert_irq(pin)
                else:
                    self._vm.ioapic_deassert_irq(pin)
            elif value:
                self._vm.isa_assert_irq(pin, pin)
            else:
                self._vm.isa_deassert_irq(pin, pin)

    def _read_iomem(self, gpa: int, size: int) -> int:
        at = gpa - IOMEM_BASE
        return int.from_bytes(self._iomem[at : at + size], "little")

    def _write_iomem(self, gpa: int, size: int, value: int) -> None:
        at = gpa - IOMEM_BASE
        self._iomem[at : at + size] = value.to_bytes(size, "little")

    def reset(self) -> None:
        """Contents zero; no line is held."""
        self._scratch[:] = bytes(SCRATCH_PORTS)
        self._iomem[:] = bytes(IOMEM_SIZE)
        self._lines = 0

    def save(self) -> dict[str, Any]:
        """Contents and lines."""
        return {
            "version": 1,
            "scratch": bytes(self._scratch),
            "iomem": bytes(self._iomem),
            "lines": self._lines,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave; the lines are the controllers' state."""
        if state["version"] != 1:
            raise ValueError(f"pc-testdev: unknown state version {state['version']}")
        self._scratch[:] = state["scratch"]
        self._iomem[:] = state["iomem"]
        self._lines = state["lines"]
