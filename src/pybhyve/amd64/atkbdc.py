"""The 8042 keyboard controller, with a PS/2 keyboard and mouse on it.

Intel 8242 datasheet; IBM PS/2 Hardware Interface Technical Reference, keyboard and
auxiliary device controller.  bhyve: atkbdc.c.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from pybhyve.amd64.acpi import Aml
from pybhyve.amd64.acpi.aml import eisaid
from pybhyve.amd64.acpi.resources import io, irq, template
from pybhyve.amd64.pci_irq import PirqRouter
from pybhyve.amd64.ps2kbd import Ps2Keyboard
from pybhyve.amd64.ps2mouse import Ps2Mouse
from pybhyve.device import Device

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

DATA_PORT: Final = 0x60
COMMAND_PORT: Final = 0x64  # reading: status
KBD_IRQ: Final = 1
AUX_IRQ: Final = 12

STATUS_OBF: Final = 0x01  # a byte for the guest is there
STATUS_SYS: Final = 0x04  # the self test has passed
STATUS_CMD: Final = 0x08  # the last byte written was a command
STATUS_UNLOCKED: Final = 0x10  # the lock on the case is open
STATUS_AUX: Final = 0x20  # the byte that is there comes from the mouse

RAM_SIZE: Final = 32  # byte 0 is the command byte
CB_KBD_INT: Final = 0x01
CB_AUX_INT: Final = 0x02
CB_SYS: Final = 0x04
CB_KBD_DISABLE: Final = 0x10
CB_AUX_DISABLE: Final = 0x20
CB_TRANSLATE: Final = 0x40

OUT_RESET: Final = 0x01  # low: the processor is in reset
OUT_A20: Final = 0x02
OUT_AUX_OBF: Final = 0x20
OUT_KBD_OBF: Final = 0x10

SELF_TEST_PASSED: Final = 0x55
# A guest may send commands and never read: answers beyond this are lost.
REPLIES_MAX: Final = 16

BREAK_PREFIX: Final = 0xF0
BREAK_BIT: Final = 0x80

# Scan code set 2 to set 1, for codes below 0x80; the others but two are the same.
_SET1: Final = bytes.fromhex(
    "ff 43 41 3f 3d 3b 3c 58 64 44 42 40 3e 0f 29 59 "
    "65 38 2a 70 1d 10 02 5a 66 71 2c 1f 1e 11 03 5b "
    "67 2e 2d 20 12 05 04 5c 68 39 2f 21 14 13 06 5d "
    "69 31 30 23 22 15 07 5e 6a 72 32 24 16 08 09 5f "
    "6b 33 25 17 18 0b 0a 60 6c 34 35 26 27 19 0c 61 "
    "6d 73 28 74 1a 0d 62 6e 3a 36 1c 1b 75 2b 63 76 "
    "55 56 77 78 79 7a 0e 7b 7c 4f 7d 4b 47 7e 7f 6f "
    "52 53 50 4c 4d 48 01 45 57 4e 51 4a 37 49 46 54 "
)


class Atkbdc(Device):
    """Controller, keyboard and mouse, all under one lock."""

    acpi_scope = "ISA"

    def __init__(self, machine: Machine, router: PirqRouter) -> None:
        self._machine = machine
        self._vm = machine.vm
        self._lock = threading.Lock()
        self.keyboard = Ps2Keyboard()
        self.mouse = Ps2Mouse()
        self._power_on()
        router.reserve(KBD_IRQ)
        router.reserve(AUX_IRQ)
        inout = machine.inout
        inout.register("atkbdc", DATA_PORT, 1, self._read_data, self._write_data)
        inout.register(
            "atkbdc", COMMAND_PORT, 1, self._read_status, self._write_command
        )

    def _power_on(self) -> None:
        self._ram = bytearray(RAM_SIZE)
        self._status = STATUS_UNLOCKED
        self._data = 0
        self._outport = OUT_RESET | OUT_A20
        self._argument_of = 0  # the command that waits for a byte at the data port
        self._replies: deque[tuple[int, bool]] = deque(maxlen=REPLIES_MAX)
        self._break = False  # the keyboard's last byte began a break code

    # -- people and programs on the host; any thread ---------------------------------

    def key(self, code: int, down: bool, extended: bool = False) -> None:
        """A key with its scan code of set 2 goes down or up."""
        with self._lock:
            self.keyboard.key(code, down, extended)
            self._fill()

    def move(self, dx: int, dy: int, buttons: int) -> None:
        """The mouse moves (right and up are positive), with bits 0-2 of buttons."""
        with self._lock:
            self.mouse.move(dx, dy, buttons)
            self._fill()

    # -- ports -----------------------------------------------------------------------

    def _read_data(self, _port: int, _size: int) -> int:
        with self._lock:
            value = self._data
            self._status &= ~(STATUS_OBF | STATUS_AUX)
            self._fill()
            return value

    def _read_status(self, _port: int, _size: int) -> int:
        with self._lock:
            return self._status

    def _write_data(self, _port: int, _size: int, value: int) -> None:
        value &= 0xFF
        with self._lock:
            self._status &= ~STATUS_CMD
            command, self._argument_of = self._argument_of, 0
            if 0x60 <= command < 0x80:
                self._ram[command - 0x60] = value
                if command == 0x60:
                    self._status &= ~STATUS_SYS
                    self._status |= STATUS_SYS if value & CB_SYS else 0
            elif command == 0xD1:
                self._write_output_port(value)
            elif command == 0xD2:
                self._reply(value)
            elif command == 0xD3:
                self._reply(value, aux=True)
            elif command == 0xD4:
                self.mouse.write(value)
            else:
                self._ram[0] &= ~CB_KBD_DISABLE
                self.keyboard.write(value)
            self._fill()

    def _write_command(self, _port: int, _size: int, value: int) -> None:
        value &= 0xFF
        with self._lock:
            self._status |= STATUS_CMD
            self._argument_of = 0
            self._command(value)
            self._fill()

    def _command(self, value: int) -> None:
        if 0x20 <= value < 0x40:
            self._reply(self._ram[value - 0x20])
            return
        if 0x60 <= value < 0x80 or 0xD1 <= value <= 0xD4:
            self._argument_of = value
            return
        match value:
            case 0xA7:
                self._ram[0] |= CB_AUX_DISABLE
            case 0xA8:
                self._ram[0] &= ~CB_AUX_DISABLE
            case 0xA9 | 0xAB:  # interface tests
                self._reply(0)
            case 0xAA:
                self._status |= STATUS_SYS
                self._ram[0] |= CB_SYS
                self._reply(SELF_TEST_PASSED)
            case 0xAD:
                self._ram[0] |= CB_KBD_DISABLE
            case 0xAE:
                self._ram[0] &= ~CB_KBD_DISABLE
            case 0xC0:
                self._reply(0)
            case 0xD0:
                self._reply(self._output_port())
            case pulse if pulse >= 0xF0 and not pulse & OUT_RESET:
                self._machine.request_reset()

    def _output_port(self) -> int:
        value = self._outport
        if self._status & STATUS_OBF:
            value |= OUT_AUX_OBF if self._status & STATUS_AUX else OUT_KBD_OBF
        return value

    def _write_output_port(self, value: int) -> None:
        # A20 is open always: the bit reads back and does nothing else.
        self._outport = value & (OUT_RESET | OUT_A20)
        if not value & OUT_RESET:
            self._outport |= OUT_RESET
            self._machine.request_reset()

    # -- bytes for the guest ---------------------------------------------------------

    def _reply(self, value: int, aux: bool = False) -> None:
        self._replies.append((value, aux))

    def _fill(self) -> None:
        """Put the next byte into the output buffer if it is empty, and interrupt."""
        while not self._status & STATUS_OBF:
            command_byte = self._ram[0]
            aux = False
            value: int | None
            if self._replies:
                value, aux = self._replies.popleft()
            elif not command_byte & CB_KBD_DISABLE and self.keyboard.output:
                value = self._translate(self.keyboard.output.popleft())
                if value is None:
                    continue
            elif not command_byte & CB_AUX_DISABLE and self.mouse.output:
                value, aux = self.mouse.output.popleft(), True
            else:
                return
            self._data = value
            self._status |= STATUS_OBF | (STATUS_AUX if aux else 0)
            if command_byte & (CB_AUX_INT if aux else CB_KBD_INT):
                irq_number = AUX_IRQ if aux else KBD_IRQ
                self._vm.isa_pulse_irq(irq_number, irq_number)

    def _translate(self, code: int) -> int | None:
        """A byte of the keyboard as the guest gets it; None: wait for the next."""
        if not self._ram[0] & CB_TRANSLATE:
            return code
        if code == BREAK_PREFIX:
            self._break = True
            return None
        if code < len(_SET1):
            code = _SET1[code]
        elif code in (0x83, 0x84):  # F7, and Alt with SysRq
            code = 0x41 if code == 0x83 else 0x54
        if self._break:
            self._break = False
            code |= BREAK_BIT
        return code

    # -- life ------------------------------------------------------------------------

    def reset(self) -> None:
        """As after power-on, keyboard and mouse too."""
        with self._lock:
            self._power_on()
            self.keyboard.reset()
            self.mouse.reset()

    def save(self) -> dict[str, Any]:
        """Controller, keyboard and mouse."""
        with self._lock:
            return {
                "version": 1,
                "ram": bytes(self._ram),
                "status": self._status,
                "data": self._data,
                "outport": self._outport,
                "argument_of": self._argument_of,
                "replies": [list(reply) for reply in self._replies],
                "break": self._break,
                "keyboard": self.keyboard.save(),
                "mouse": self.mouse.save(),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        if state["version"] != 1 or len(state["ram"]) != RAM_SIZE:
            raise ValueError(f"atkbdc: unknown state version {state['version']}")
        with self._lock:
            self._ram[:] = state["ram"]
            self._status = state["status"]
            self._data = state["data"]
            self._outport = state["outport"]
            self._argument_of = state["argument_of"]
            self._replies.clear()
            self._replies.extend((value, aux) for value, aux in state["replies"])
            self._break = state["break"]
            self.keyboard.restore(state["keyboard"])
            self.mouse.restore(state["mouse"])

    def dsdt(self, aml: Aml) -> None:
        """``KBD`` and ``MOU``."""
        with aml.device("KBD"):
            aml.name("_HID", eisaid("PNP0303"))
            ports = io(DATA_PORT, 1), io(COMMAND_PORT, 1)
            aml.name("_CRS", template(*ports, irq(KBD_IRQ)))
        with aml.device("MOU"):
            aml.name("_HID", eisaid("PNP0F13"))
            aml.name("_CRS", template(irq(AUX_IRQ)))
