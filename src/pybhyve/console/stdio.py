"""The console on standard input and output.

On a terminal: raw mode, and an escape key.  Otherwise input and output are plain
streams, and the end of the input is not an error.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from typing import Final

from pybhyve.console.backend import Backend, Port, Stream
from pybhyve.console.terminal import RawTerminal, say
from pybhyve.errors import DeviceError
from pybhyve.mevent import EventLoop

ESCAPE: Final = 0x1D  # Ctrl-]
HELP: Final = "[console on this terminal: Ctrl-] q quits, Ctrl-] Ctrl-] sends Ctrl-]]"


class EscapeFilter:
    """Takes the escape sequences out of what a person types."""

    def __init__(self, quit_vm: Callable[[], None]) -> None:
        self._quit_vm = quit_vm
        self._escaped = False

    def __call__(self, data: bytes) -> bytes:
        """What of ``data`` is for the guest; never more bytes than there were."""
        out = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte in b"qQ":
                    self._quit_vm()
                else:
                    out.append(byte)
            elif byte == ESCAPE:
                self._escaped = True
            else:
                out.append(byte)
        return bytes(out)


def open_nonblocking(fd: int) -> int:
    """A descriptor for what ``fd`` writes to, that does not block and is our own.

    O_NONBLOCK belongs to the open file, which other processes share: setting it on
    ``fd`` would break the shell that gave us its terminal.  A regular file never
    blocks, and opened again it would not share its position with who writes to it next.
    """
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.dup(fd)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # a socket, or a file that may not be opened again
        copy = os.dup(fd)
        os.set_blocking(copy, False)
        return copy


class StdioBackend(Backend):
    """Standard input and output; one port of a process can have them."""

    _taken = False

    def __init__(self, loop: EventLoop, quit_vm: Callable[[], None]) -> None:
        if StdioBackend._taken:
            raise DeviceError("stdio is the console of another port already")
        StdioBackend._taken = True
        self._loop = loop
        self._quit_vm = quit_vm
        self._terminal: RawTerminal | None = None
        self._stream: Stream | None = None
        self._out_fd = -1

    def start(self, port: Port) -> None:
        """Raw mode, where standard input is a terminal, and input begins to flow."""
        escape = None
        if os.isatty(0):
            say(HELP)
            self._terminal = RawTerminal(0)
            escape = EscapeFilter(self._quit_vm)
        sys.stdout.flush()
        self._out_fd = open_nonblocking(1)
        self._stream = Stream(self._loop, port, 0, self._out_fd, self._end, escape)

    def halt(self) -> None:
        """Write what is left and put the terminal back."""
        if self._stream is not None:
            self._stream.flush()
            self._stream.close()
            self._stream = None
            os.close(self._out_fd)
        if self._terminal is not None:
            self._terminal.restore()
            self._terminal = None
        StdioBackend._taken = False

    def write(self, byte: int) -> bool:
        """As Backend.write."""
        return self._stream is None or self._stream.write(byte)

    def resume_input(self) -> None:
        """As Backend.resume_input."""
        if self._stream is not None:
            self._stream.resume_input()

    def _end(self) -> None:
        """The input is at its end; the guest may go on printing."""
        if self._stream is not None:
            self._stream.close_input()
