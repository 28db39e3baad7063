"""A PS/2 keyboard: commands from the controller, scan codes of set 2 to it.

IBM PS/2 Hardware Interface Technical Reference, keyboards (101 and 102 keys).
bhyve: ps2kbd.c.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

BUFFER_SIZE: Final = 16  # bytes of key strokes; answers to commands are beside

ACK: Final = 0xFA
RESEND: Final = 0xFE
ECHO: Final = 0xEE
SELF_TEST_PASSED: Final = 0xAA
KEYBOARD_ID: Final = (0xAB, 0x83)
SCAN_CODE_SET: Final = 2
EXTENDED_PREFIX: Final = 0xE0
BREAK_PREFIX: Final = 0xF0
# Commands and answers that a guest leaves unread must not pile up.
OUTPUT_MAX: Final = 2 * BUFFER_SIZE


class Ps2Keyboard:
    """What the keyboard sends is in ``output``; the controller takes it from there."""

    def __init__(self) -> None:
        self.output: deque[int] = deque(maxlen=OUTPUT_MAX)
        self.reset()

    def reset(self) -> None:
        """As after power-on: scanning, nothing to send."""
        self.output.clear()
        self._scanning = True
        self._argument_of = 0
        self._last = 0
        self.leds = 0

    def key(self, code: int, down: bool, extended: bool) -> None:
        """A key goes down or up; lost when not scanning or the buffer is full."""
        codes = [EXTENDED_PREFIX] * extended + [BREAK_PREFIX] * (not down) + [code]
        if self._scanning and len(self.output) + len(codes) <= BUFFER_SIZE:
            self._send(*codes)

    def write(self, value: int) -> None:
        """A byte from the controller."""
        command, self._argument_of = self._argument_of, 0
        if command and value < 0x80:
            self._argument(command, value)
            return
        match value:
            case 0xED | 0xF0 | 0xF3:  # LEDs, scan code set, typematic rate
                self._argument_of = value
                self._send(ACK)
            case 0xEE:
                self._send(ECHO)
            case 0xF2:
                self._send(ACK, *KEYBOARD_ID)
            case 0xF4:
                self._scanning = True
                self._send(ACK)
            case 0xF5:
                self._scanning = False
                self._send(ACK)
            case 0xF6 | 0xF7 | 0xF8 | 0xF9 | 0xFA | 0xFB | 0xFC | 0xFD:
                # Defaults; and typematic settings of keys, which only set 3 has.
                self._send(ACK)
            case 0xFE:
                self._send(self._last)
            case 0xFF:
                self.reset()
                self._send(ACK, SELF_TEST_PASSED)
            case _:
                self._send(RESEND)

    def _argument(self, command: int, value: int) -> None:
        self._send(ACK)
        if command == 0xED:
            self.leds = value
        elif command == 0xF0 and value == 0:
            # bhyve: other sets are accepted, and set 2 stays.
            self._send(SCAN_CODE_SET)

    def _send(self, *codes: int) -> None:
        self.output.extend(codes)
        self._last = codes[-1]

    def save(self) -> dict[str, Any]:
        """The whole state."""
        return {
            "output": list(self.output),
            "scanning": self._scanning,
            "argument_of": self._argument_of,
            "last": self._last,
            "leds": self.leds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        self.output.clear()
        self.output.extend(state["output"])
        self._scanning = state["scanning"]
        self._argument_of = state["argument_of"]
        self._last = state["last"]
        self.leds = state["leds"]
