"""Requests to a disk, done by a pool of threads."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final

from pybhyve.block.backing import Backing
from pybhyve.block.options import BlockOptions
from pybhyve.block.pool import NUMTHR, BlockReq, Done, Pool
from pybhyve.mevent import EventLoop
from pybhyve.vmmapi import Iov

MAXREQ: Final = 128 + NUMTHR
READ_NOW_MAX: Final = 128 << 10  # Linux reads ahead so much; more holds a vCPU up
RESIZE_SECONDS: Final = 1.0  # between looks at the size of the image
QUICK_SECONDS: Final = 0.0005  # a write that took longer waited for the host


class BlockIf:
    """A disk image and the threads that work on it.

    Offsets and lengths are bytes and lie within ``size``, which the device checks.
    ``iov`` are buffers in guest memory (`pybhyve.vmmapi.map_iov`); the device releases
    them in ``done``, before it tells the guest.

    - A request never waits and never fails at once: more than the pool has threads
      wait their turn.  ``queuesz`` is how many a device should let its guest start.
    - Requests complete in any order, overlapping ones too.  A device that promises its
      guest an order submits the second from the first one's ``done``.
    - A flush covers every write whose ``done`` came before the flush was submitted.
    - Errors are the host's, in addition to EROFS on a read-only disk, EOPNOTSUPP for a
      delete without ``candelete``, EIO beyond the end of an image that has shrunk.

    deviation: bhyve holds a request back that begins where another ends.

    ``ident`` names the threads and log lines.  Raises DeviceError as `Backing` does.
    """

    def __init__(self, options: BlockOptions, ident: str, mevent: EventLoop) -> None:
        self.ident = ident
        self.queuesz: Final = MAXREQ
        self._backing = Backing(options)
        self.size = self._backing.size()
        self.sectsz, self.psectsz = self._backing.sectors
        self.psectoff = self._backing.psectoff
        self.ro = self._backing.ro
        self.candelete = self._backing.candelete
        self._mevent = mevent
        self._pool = Pool(ident)
        self._quick_writes = True
        self._resized: list[Callable[[], object]] = []
        self._checking = False
        self._paused = False
        self._timer = mevent.add_timer(RESIZE_SECONDS, self._check_size, periodic=True)

    # -- requests --------------------------------------------------------------------

    def read(self, iov: Iov, offset: int, done: Done) -> BlockReq:
        """Fill the buffers from the image."""
        return self._pool.submit(self._read, iov, offset, done=done)

    def read_now(self, iov: Iov, offset: int) -> bool:
        """Read at once, on this thread, if the host has the data in memory.

        False: it has to wait, or it is more than READ_NOW_MAX bytes: `read` it then.
        A vCPU's thread may call this.
        """
        return self._backing.read_now(iov, offset, READ_NOW_MAX)

    def write(self, iov: Iov, offset: int, done: Done) -> BlockReq:
        """Write the buffers to the image."""
        return self._pool.submit(self._write, iov, offset, done=done)

    def flush(self, done: Done) -> BlockReq:
        """Have the disk itself keep what was written."""
        return self._pool.submit(self._pool.wait, self._backing.flush, done=done)

    def delete(self, offset: int, length: int, done: Done) -> BlockReq:
        """Trim: the guest does not need the contents of the range any more."""
        delete = self._backing.delete
        return self._pool.submit(self._pool.wait, delete, offset, length, done=done)

    def write_zeroes(self, offset: int, length: int, done: Done) -> BlockReq:
        """Have the range read as zeroes."""
        zero = self._backing.write_zeroes
        return self._pool.submit(self._pool.wait, zero, offset, length, done=done)

    def cancel(self, req: BlockReq) -> bool:
        """Take a request back; False: it was begun, or is done.

        True: it never was begun, and its ``done`` will not be called.
        """
        return self._pool.cancel(req)

    def _read(self, iov: Iov, offset: int) -> int:
        if self._backing.read_now(iov, offset, sys.maxsize):
            return 0
        return self._pool.wait(self._backing.read, iov, offset)

    def _write(self, iov: Iov, offset: int) -> int:
        # Most writes go to the host's cache; that they do not is seen when they wait.
        write = self._backing.write
        started = time.monotonic()
        if self._quick_writes:
            error = write(iov, offset)
        else:
            error = self._pool.wait(write, iov, offset)
        self._quick_writes = time.monotonic() - started < QUICK_SECONDS
        return error

    # -- life ------------------------------------------------------------------------

    def drain(self) -> None:
        """Wait until nothing is under way.  Not from a ``done``."""
        self._pool.drain()

    def pause(self) -> None:
        """Drain, and let no change of the size be noticed until `resume`."""
        self._paused = True
        self.drain()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False

    def on_resize(self, callback: Callable[[], object]) -> None:
        """Call back, on the event loop's thread, when ``size`` has changed."""
        self._resized.append(callback)

    def close(self) -> None:
        """Finish what is under way and give the image back.  Twice is harmless."""
        self._mevent.delete(self._timer)
        self._pool.close()
        self._backing.close()

    # -- size ------------------------------------------------------------------------

    def _check_size(self) -> None:
        # By a thread of the pool: on some file systems even this takes its time.
        if not self._checking and not self._paused:
            self._checking = True
            self._pool.submit(self._look_at_size, done=self._looked_at_size)

    def _look_at_size(self) -> int:
        try:
            size = self._pool.wait(self._backing.size)
        except OSError:
            return 0  # transfers will tell
        if size != self.size:
            self._mevent.call_soon_threadsafe(lambda: self._resize(size))
        return 0

    def _looked_at_size(self, _error: int) -> None:
        self._checking = False

    def _resize(self, size: int) -> None:
        # While paused nothing may change; the next look finds it again.
        if not self._paused and size != self.size:
            self.size = size
            for callback in self._resized:
                callback()
