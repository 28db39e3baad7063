"""The console on a terminal device, or on a pseudo terminal made for it."""

from __future__ import annotations

import contextlib
import os
import select
import termios
from typing import Any, Final

from pybhyve.console.backend import Backend, Port, Stream
from pybhyve.console.terminal import make_raw, say
from pybhyve.errors import DeviceError
from pybhyve.mevent import EventLoop, Handle

POLL_SECONDS: Final = 0.25  # a pty master is not told when its other side is opened


class TtyBackend(Backend):
    """The terminal device at ``path``, in raw mode until the end."""

    def __init__(self, loop: EventLoop, path: str) -> None:
        self._loop = loop
        self._stream: Stream | None = None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise DeviceError(f"console {path} cannot be opened") from error
        if not os.isatty(self._fd):
            os.close(self._fd)
            raise DeviceError(
                f"console {path} is not a terminal; "
                "expected stdio, pty, tcp=IP:PORT or a terminal device"
            )
        self._saved: list[Any] = make_raw(self._fd)

    def start(self, port: Port) -> None:
        """Input begins to flow."""
        self._stream = Stream(self._loop, port, self._fd, self._fd, self._end)

    def halt(self) -> None:
        """Write what is left, put the modes back and close the device."""
        if self._stream is not None:
            self._stream.flush()
        self._end()
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)
        os.close(self._fd)

    def write(self, byte: int) -> bool:
        """As Backend.write."""
        stream = self._stream
        return stream is None or stream.write(byte)

    def resume_input(self) -> None:
        """As Backend.resume_input."""
        stream = self._stream
        if stream is not None:
            stream.resume_input()

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class PtyBackend(Backend):
    """A new pseudo terminal, whose name is printed.

    Output is lost while no one has it open, as on an unplugged cable.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._port: Port | None = None
        self._stream: Stream | None = None
        self._timer: Handle | None = None
        self._fd, other = os.openpty()
        self.path = os.ttyname(other)
        make_raw(other)
        # Closed once, the master hangs up: that is how an absent reader is seen.
        os.close(other)
        os.set_blocking(self._fd, False)

    def start(self, port: Port) -> None:
        """Print the name and wait for someone to open it."""
        self._port = port
        say(f"[console on {self.path}]")
        self._timer = self._loop.add_timer(POLL_SECONDS, self._look, periodic=True)

    def halt(self) -> None:
        """Close the pseudo terminal."""
        if self._timer is not None:
            self._loop.delete(self._timer)
            self._timer = None
        if self._stream is not None:
            self._stream.flush()
        self._hang_up()
        os.close(self._fd)

    def write(self, byte: int) -> bool:
        """As Backend.write."""
        stream = self._stream
        return stream is None or stream.write(byte)

    def resume_input(self) -> None:
        """As Backend.resume_input."""
        stream = self._stream
        if stream is not None:
            stream.resume_input()

    def _look(self) -> None:
        poll = select.poll()
        poll.register(self._fd, 0)
        connected = not poll.poll(0)
        if not connected:
            self._hang_up()
        elif self._stream is None and self._port is not None:
            self._stream = Stream(
                self._loop, self._port, self._fd, self._fd, self._hang_up
            )

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
