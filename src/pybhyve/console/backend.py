"""What a console backend is, and the stream of bytes most of them are made of."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from pybhyve.mevent import EventLoop, Handle

log = logging.getLogger(__name__)

# A guest may print faster than anyone reads.  From HIGH_WATER bytes of backlog on the
# port's transmitter is busy, until no more than LOW_WATER are left.
HIGH_WATER: Final = 64 * 1024
LOW_WATER: Final = 16 * 1024
FLUSH_SECONDS: Final = 1.0
# Output is passed on at most this often.  Each time costs the vCPU that prints the
# interpreter lock for as long as some ten characters take; nobody sees the delay.
PACE_SECONDS: Final = 0.005


class Port(Protocol):
    """A serial port as its backend sees it.  Any thread may call."""

    def room(self) -> int:
        """How many bytes it can receive now."""

    def receive(self, data: bytes, /) -> None:
        """Bytes from the line."""

    def drained(self) -> None:
        """A transmitter that write() made wait may go on."""


class Backend:
    """Nothing is connected: output is lost, and there is no input.

    Base of the others.  ``write`` and ``resume_input`` are called by vCPU threads that
    hold the port's lock, so they neither wait nor call the port; ``start`` and ``halt``
    by the main thread.
    """

    def start(self, port: Port) -> None:
        """Begin to move bytes between the line and ``port``."""

    def halt(self) -> None:
        """End and give everything back."""

    def write(self, byte: int) -> bool:
        """Send a byte; False: taken, but the next must wait for Port.drained()."""
        return True

    def resume_input(self) -> None:
        """The port has room for input again."""


class Stream:
    """Bytes between a port and a pair of descriptors, moved by the event loop.

    ``out_fd`` must not block.  Many small writes are gathered into few large ones: the
    first wakes the loop, which takes all there is, and then what came meanwhile every
    PACE_SECONDS until there is nothing.  ``ended`` is called once, on
    the loop's thread, when the input is at its end or either side has failed;
    ``filter_input`` may take bytes out of what was read.
    """

    def __init__(
        self,
        loop: EventLoop,
        port: Port,
        in_fd: int,
        out_fd: int,
        ended: Callable[[], None],
        filter_input: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._loop = loop
        self._port = port
        self._in_fd = in_fd
        self._out_fd = out_fd
        self._ended = ended
        self._filter = filter_input
        self._lock = threading.Lock()
        self._out = bytearray()
        self._flush_due = False
        self._stalled = False  # the port waits for drained()
        self._open = True
        self._writer: Handle | None = None
        self._pace = loop.add_timer(PACE_SECONDS, self._flush)
        self._reader: Handle | None = loop.add_read(in_fd, self._readable)

    def write(self, byte: int) -> bool:
        """As Backend.write."""
        with self._lock:
            if not self._open:
                return True
            self._out.append(byte)
            if not self._flush_due:
                self._flush_due = True
                self._loop.call_soon_threadsafe(self._flush)
            self._stalled = len(self._out) >= HIGH_WATER
            return not self._stalled

    def resume_input(self) -> None:
        """As Backend.resume_input."""
        reader = self._reader
        if reader is not None:
            self._loop.enable(reader)

    def flush(self) -> None:
        """Give the descriptor what is left, and some time to take it.

        On the loop's thread, which does not run any more: a guest's last words are
        worth FLUSH_SECONDS, a reader that has stopped is not worth more.
        """
        deadline = time.monotonic() + FLUSH_SECONDS
        poll = select.poll()
        poll.register(self._out_fd, select.POLLOUT)
        while self._open and self._out:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                return
            self._flush()

    def close(self) -> None:
        """Forget the descriptors, which stay open, and the backlog.  Loop's thread."""
        with self._lock:
            self._open = False
            self._out.clear()
            stalled, self._stalled = self._stalled, False
        self.close_input()
        if self._writer is not None:
            self._loop.delete(self._writer)
            self._writer = None
        self._loop.delete(self._pace)
        if stalled:
            self._port.drained()

    def close_input(self) -> None:
        """Read no more; output goes on.  Loop's thread."""
        if self._reader is not None:
            self._loop.delete(self._reader)
            self._reader = None

    def _readable(self) -> None:
        room = self._port.room()
        if room > 0:
            try:
                data = os.read(self._in_fd, room)
            except BlockingIOError:
                return
            except OSError:
                data = b""  # a terminal or connection that went away
            if not data:
                self._ended()
                return
            if self._filter is not None:
                data = self._filter(data)
            self._port.receive(data)
        reader = self._reader
        if reader is not None and self._port.room() <= 0:
            self._loop.disable(reader)
            # A vCPU may have made room before the reader was disabled.
            if self._port.room() > 0:
                self._loop.enable(reader)

    def _flush(self) -> None:
        with self._lock:
            data = bytes(self._out)
            self._flush_due = bool(data)
        if not data:
            return
        try:
            count = os.write(self._out_fd, data)
        except BlockingIOError:
            count = 0
        except OSError as error:
            log.warning("console output is lost: %s", error.strerror)
            self.close()
            self._ended()
            return
        with self._lock:
            del self._out[:count]
            left = len(self._out)
            drained = self._stalled and left <= LOW_WATER
            if drained:
                self._stalled = False
        if not left:
            if self._writer is not None:
                self._loop.disable(self._writer)
            self._loop.enable(self._pace)
        elif self._writer is None:
            self._writer = self._loop.add_write(self._out_fd, self._flush)
        else:
            self._loop.enable(self._writer)
        if drained:
            self._port.drained()
