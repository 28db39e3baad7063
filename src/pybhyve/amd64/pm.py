"""Power management: PM1 registers, SCI, GPE0, SMI command, reset and power button.

ACPI 6.5, 4.8 (fixed hardware) and, for the reset port, Intel PIIX4 datasheet 4.5.4.
The PM timer at 0x408 is vmm's.  bhyve: pm.c.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Final

from pybhyve.amd64.acpi.resources import io
from pybhyve.amd64.pci_irq import SCI_IRQ
from pybhyve.device import Device
from pybhyve.mevent import Handle
from pybhyve.regs import W1C, Reg, RegBlock

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

PM1A_EVT: Final = 0x400
PM1A_CNT: Final = 0x404
PM_TIMER: Final = 0x408
GPE0: Final = 0x40C
GPE0_LEN: Final = 2
PM_BASE: Final = PM1A_EVT

SMI_CMD: Final = 0xB2
ACPI_ENABLE: Final = 0xA0
ACPI_DISABLE: Final = 0xA1

RESET_REG: Final = 0xCF9
RESET_VALUE: Final = 0x06
RESET_CPU: Final = 1 << 2

PM1_GBL_EN: Final = 1 << 5
PM1_PWRBTN: Final = 1 << 8
PM1_SLPBTN: Final = 1 << 9
PM1_RTC: Final = 1 << 10
PM1_WAK_STS: Final = 1 << 15
PM1_BM_STS: Final = 1 << 4

PM1_SCI_EN: Final = 1 << 0
PM1_SLP_TYP: Final = 7 << 10
PM1_SLP_EN: Final = 1 << 13
PM1_ALWAYS_ZERO: Final = 0xC003
SLP_TYP_S5: Final = 5 << 10

GPE_VMGENC: Final = 1 << 0


class Regs(RegBlock, size=0x10, fill=0xFF):
    """Ports 0x400 to 0x40F."""

    PM1_STS = Reg(  # 4.8.3.1.1
        0x0,
        2,
        W1C,
        mask=PM1_WAK_STS | PM1_RTC | PM1_SLPBTN | PM1_PWRBTN | PM1_BM_STS,
    )
    PM1_EN = Reg(0x2, 2, mask=PM1_RTC | PM1_PWRBTN | PM1_GBL_EN)  # 4.8.3.1.2
    PM1_CNT = Reg(0x4, 2)  # 4.8.3.2.1
    GPE0_STS = Reg(0xC, 1, W1C)  # 4.8.4.1.1.1
    GPE0_EN = Reg(0xD, 1, mask=GPE_VMGENC)  # 4.8.4.1.1.2


class PowerManagement(Device):
    """The registers; a power button that SIGTERM presses once ACPI is enabled."""

    acpi_resources = (
        io(PM1A_EVT, 8),
        io(GPE0, GPE0_LEN),
        io(SMI_CMD, 1),
    )

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._vm = machine.vm
        self._lock = threading.Lock()
        self._reset_control = 0
        self._sci = False
        self._sigterm: Handle | None = None
        self._paused = False
        self._pressed_while_paused = False
        self.regs = Regs(self)
        self._vm.isa_set_irq_trigger(SCI_IRQ, True)

    def attach(self) -> None:
        """Take the ports."""
        inout = self._machine.inout
        for name, port, size in (("pm1", PM1A_EVT, 6), ("gpe0", GPE0, GPE0_LEN)):
            inout.register(name, port, size, self._read, self._write)
        inout.register("smi", SMI_CMD, 1, None, self._smi_command)
        inout.register(
            "reset", RESET_REG, 1, self._read_reset_control, self._write_reset_control
        )

    def start(self) -> None:
        """SIGTERM is the power button from now on."""
        # When all devices have started: a console on the terminal takes the signal to
        # put the terminal back, which is to happen when we let go of it.
        self._machine.mevent.call_soon_threadsafe(self._take_sigterm)

    def pause(self) -> None:
        """Have the power button wait."""
        with self._lock:
            self._paused = True

    def resume(self) -> None:
        """Press the power button if that was asked for meanwhile."""
        with self._lock:
            self._paused = False
            pressed, self._pressed_while_paused = self._pressed_while_paused, False
        if pressed:
            self.power_button()

    def halt(self) -> None:
        """Give SIGTERM back."""
        if self._sigterm is not None:
            self._machine.mevent.delete(self._sigterm)
            self._sigterm = None

    # -- events ----------------------------------------------------------------------

    def power_button(self) -> bool:
        """Press it; False: the guest has not enabled ACPI, nothing happens.

        Further presses before the guest has seen the first change nothing.
        """
        with self._lock:
            if not self.regs.PM1_CNT & PM1_SCI_EN:
                return False
            if self._paused:
                self._pressed_while_paused = True
                return True
            self.regs.PM1_STS |= PM1_PWRBTN
            self._update_sci()
            return True

    def general_event(self, bits: int) -> None:
        """Set bits of GPE0's status, which the guest may have enabled.  Any thread."""
        with self._lock:
            self.regs.GPE0_STS |= bits
            self._update_sci()

    def _take_sigterm(self) -> None:
        self._sigterm = self._machine.mevent.add_signal(signal.SIGTERM, self._terminate)

    def _terminate(self) -> None:
        if not self.power_button() and self._sigterm is not None:
            # A guest without ACPI: the signal means what it meant before us.
            self._machine.mevent.delete(self._sigterm)
            self._sigterm = None
            os.kill(os.getpid(), signal.SIGTERM)

    def _update_sci(self) -> None:
        level = bool(
            self.regs.PM1_STS & self.regs.PM1_EN
            or self.regs.GPE0_STS & self.regs.GPE0_EN
        )
        if level != self._sci:
            self._sci = level
            if level:
                self._vm.isa_assert_irq(SCI_IRQ, SCI_IRQ)
            else:
                self._vm.isa_deassert_irq(SCI_IRQ, SCI_IRQ)

    # -- ports -----------------------------------------------------------------------

    def _read(self, port: int, size: int) -> int:
        with self._lock:
            return self.regs.read(port - PM_BASE, size)

    def _write(self, port: int, size: int, value: int) -> None:
        with self._lock:
            self.regs.write(port - PM_BASE, size, value)
            self._update_sci()

    @Regs.PM1_CNT.write
    def _control(self, value: int) -> None:
        enabled = self.regs.PM1_CNT & PM1_SCI_EN
        self.regs.PM1_CNT = enabled | value & ~(PM1_SLP_EN | PM1_ALWAYS_ZERO)
        if value & PM1_SLP_EN and value & PM1_SLP_TYP == SLP_TYP_S5:
            self._machine.request_poweroff()

    def _smi_command(self, _port: int, _size: int, value: int) -> None:
        with self._lock:
            match value & 0xFF:
                case 0xA0:
                    self.regs.PM1_CNT |= PM1_SCI_EN
                case 0xA1:
                    self.regs.PM1_CNT &= ~PM1_SCI_EN

    def _read_reset_control(self, _port: int, _size: int) -> int:
        return self._reset_control

    def _write_reset_control(self, _port: int, _size: int, value: int) -> None:
        self._reset_control = value & 0xFF
        if value & RESET_CPU:
            self._machine.request_reset()

    # -- state -----------------------------------------------------------------------

    def reset(self) -> None:
        """All registers zero; ACPI is not enabled."""
        self.regs.reset()
        self._reset_control = 0
        self._sci = False
        self._vm.isa_set_irq_trigger(SCI_IRQ, True)

    def save(self) -> dict[str, Any]:
        """Registers, and the SCI's level."""
        return {
            "version": 1,
            "regs": self.regs.save(),
            "reset_control": self._reset_control,
            "sci": self._sci,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave; the interrupt is the controllers' state."""
        if state["version"] != 1:
            raise ValueError(f"pm: unknown state version {state['version']}")
        self.regs.restore(state["regs"])
        self._reset_control = state["reset_control"]
        self._sci = state["sci"]
