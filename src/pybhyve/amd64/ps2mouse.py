"""A PS/2 mouse: commands from the controller, packets of three bytes to it.

IBM PS/2 Hardware Interface Technical Reference, mouse.  bhyve: ps2mouse.c.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

ACK: Final = 0xFA
RESEND: Final = 0xFE
SELF_TEST_PASSED: Final = 0xAA
MOUSE_ID: Final = 0x00
# Commands and packets that a guest leaves unread must not pile up.
OUTPUT_MAX: Final = 32
PACKETS_MAX: Final = 16  # bytes of movement that wait; more is summed up
DELTA_MAX: Final = 0xFF

STATUS_SCALING21: Final = 0x10
STATUS_REPORTING: Final = 0x20
STATUS_REMOTE: Final = 0x40

PACKET_ALWAYS_1: Final = 0x08
PACKET_X_SIGN: Final = 0x10
PACKET_Y_SIGN: Final = 0x20
BUTTONS: Final = 0x07

DEFAULT_RATE: Final = 100  # samples a second
DEFAULT_RESOLUTION: Final = 4


class Ps2Mouse:
    """What the mouse sends is in ``output``; the controller takes it from there."""

    def __init__(self) -> None:
        self.output: deque[int] = deque(maxlen=OUTPUT_MAX)
        self.reset()

    def reset(self) -> None:
        """As after power-on: stream mode, reporting off."""
        self.output.clear()
        self._argument_of = 0
        self._last = 0
        self._wrap = False
        self._buttons = 0
        self._set_defaults()

    def _set_defaults(self) -> None:
        self._status = 0
        self._rate = DEFAULT_RATE
        self._resolution = DEFAULT_RESOLUTION
        self._dx = self._dy = 0

    def move(self, dx: int, dy: int, buttons: int) -> None:
        """Movement since the last call, right and up positive, and buttons now."""
        changed = bool(dx or dy or buttons != self._buttons)
        self._dx += dx
        self._dy += dy
        self._buttons = buttons & BUTTONS
        streaming = self._status & STATUS_REPORTING and not self._status & STATUS_REMOTE
        if changed and streaming and len(self.output) + 3 <= PACKETS_MAX:
            self._send(*self._packet())

    def _packet(self) -> tuple[int, int, int]:
        """Movement so far, as much as a packet can say, and buttons (9-bit deltas)."""
        dx = max(-DELTA_MAX, min(DELTA_MAX, self._dx))
        dy = max(-DELTA_MAX, min(DELTA_MAX, self._dy))
        self._dx -= dx
        self._dy -= dy
        head = PACKET_ALWAYS_1 | self._buttons
        head |= PACKET_X_SIGN if dx < 0 else 0
        head |= PACKET_Y_SIGN if dy < 0 else 0
        return head, dx & 0xFF, dy & 0xFF

    def write(self, value: int) -> None:
        """A byte from the controller."""
        if self._wrap and value not in (0xEC, 0xFF):
            self._send(value)
            return
        command, self._argument_of = self._argument_of, 0
        if command:
            if command == 0xF3:
                self._rate = value
            else:
                self._resolution = value
            self._send(ACK)
            return
        match value:
            case 0xE6 | 0xE7:
                self._status &= ~STATUS_SCALING21
                self._status |= STATUS_SCALING21 if value == 0xE7 else 0
                self._send(ACK)
            case 0xE8 | 0xF3:  # resolution, sample rate
                self._argument_of = value
                self._send(ACK)
            case 0xE9:
                # Here the left button is bit 2 and the right one bit 0.
                left, right = self._buttons & 1, self._buttons >> 1 & 1
                buttons = left << 2 | self._buttons >> 2 << 1 | right
                self._send(ACK, self._status | buttons, self._resolution, self._rate)
            case 0xEA | 0xF0:  # stream mode, remote mode
                self._status &= ~STATUS_REMOTE
                self._status |= STATUS_REMOTE if value == 0xF0 else 0
                self._send(ACK)
            case 0xEB:
                self._send(ACK, *self._packet())
            case 0xEC | 0xEE:  # leave, enter wrap mode
                self._wrap = value == 0xEE
                self._send(ACK)
            case 0xF2:
                self._send(ACK, MOUSE_ID)
            case 0xF4 | 0xF5:  # reporting on, off
                self._status &= ~STATUS_REPORTING
                self._status |= STATUS_REPORTING if value == 0xF4 else 0
                self._send(ACK)
            case 0xF6:
                self._set_defaults()
                self._send(ACK)
            case 0xFE:
                self._send(self._last)
            case 0xFF:
                self.reset()
                self._send(ACK, SELF_TEST_PASSED, MOUSE_ID)
            case _:
                self._send(RESEND)

    def _send(self, *codes: int) -> None:
        self.output.extend(codes)
        self._last = codes[-1]

    def save(self) -> dict[str, Any]:
        """The whole state."""
        return {
            "output": list(self.output),
            "argument_of": self._argument_of,
            "last": self._last,
            "wrap": self._wrap,
            "buttons": self._buttons,
            "status": self._status,
            "rate": self._rate,
            "resolution": self._resolution,
            "delta": [self._dx, self._dy],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        self.output.clear()
        self.output.extend(state["output"])
        self._argument_of = state["argument_of"]
        self._last = state["last"]
        self._wrap = state["wrap"]
        self._buttons = state["buttons"]
        self._status = state["status"]
        self._rate = state["rate"]
        self._resolution = state["resolution"]
        self._dx, self._dy = state["delta"]
