"""Requests to a disk, done by a pool of threads."""

from __future__ import annotations

import errno
import logging
import threading
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from pybhyve.block.backing import Backing
from pybhyve.block.options import BlockOptions
from pybhyve.errors import DeviceError
from pybhyve.mevent import EventLoop
from pybhyve.vmmapi import Iov

log = logging.getLogger(__name__)

NUMTHR: Final = 8
MAXREQ: Final = 128 + NUMTHR
RESIZE_SECONDS: Final = 1.0  # between looks at the size of the image

Done = Callable[[int], object]
"""Called once with an errno, 0 for success, on one of the pool's threads."""


class BlockReq:
    """A request under way; what `BlockIf.cancel` takes."""

    __slots__ = ("args", "call", "done")

    def __init__(
        self, call: Callable[..., int], args: tuple[Any, ...], done: Done
    ) -> None:
        self.call = call
        self.args = args
        self.done = done


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

    Raises DeviceError as `Backing` does, with ``ident``, the device's name, before it.
    """

    def __init__(self, options: BlockOptions, ident: str, mevent: EventLoop) -> None:
        self.ident = ident
        self.queuesz: Final = MAXREQ
        try:
            self._backing = Backing(options)
            self.size = self._backing.size()
        except DeviceError as error:
            raise DeviceError(ident) from error
        self.sectsz, self.psectsz = self._backing.sectors
        self.psectoff = self._backing.psectoff
        self.ro = self._backing.ro
        self.candelete = self._backing.candelete
        self.read_now = self._backing.read_now
        """``read_now(iov, offset)``: read at once if the host need not wait for its
        disk.  False where it must: `read` it then.  A vCPU's thread may call it."""
        self._mevent = mevent
        self._queue: deque[BlockReq] = deque()
        self._under_way: set[BlockReq] = set()
        self._idle: list[Callable[[], None]] = []  # wakes a thread; the latest is last
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self._drained: list[threading.Event] = []  # of those who wait in drain()
        self._closing = False
        self._resized: list[Callable[[], object]] = []
        self._checking = False
        self._paused = False
        self._timer = mevent.add_timer(RESIZE_SECONDS, self._check_size, periodic=True)
        self._start_thread()

    # -- requests --------------------------------------------------------------------

    def read(self, iov: Iov, offset: int, done: Done) -> BlockReq:
        """Fill the buffers from the image."""
        return self._submit(self._backing.read, (iov, offset), done)

    def write(self, iov: Iov, offset: int, done: Done) -> BlockReq:
        """Write the buffers to the image."""
        return self._submit(self._backing.write, (iov, offset), done)

    def flush(self, done: Done) -> BlockReq:
        """Have the disk itself keep what was written."""
        return self._submit(self._backing.flush, (), done)

    def delete(self, offset: int, length: int, done: Done) -> BlockReq:
        """Trim: the guest does not need the contents of the range any more."""
        return self._submit(self._backing.delete, (offset, length), done)

    def write_zeroes(self, offset: int, length: int, done: Done) -> BlockReq:
        """Have the range read as zeroes."""
        return self._submit(self._backing.write_zeroes, (offset, length), done)

    def cancel(self, req: BlockReq) -> bool:
        """Take a request back; False: it was begun, or is done.

        True: it never was begun, and its ``done`` will not be called.
        """
        try:
            self._queue.remove(req)
        except ValueError:
            return False
        self._end(req)
        return True

    def _submit(
        self, call: Callable[..., int], args: tuple[Any, ...], done: Done
    ) -> BlockReq:
        req = BlockReq(call, args, done)
        self._under_way.add(req)
        self._queue.append(req)
        self._wake()
        return req

    # -- life ------------------------------------------------------------------------

    def drain(self) -> None:
        """Wait until nothing is under way.  Not from a ``done``."""
        while self._under_way:
            event = threading.Event()
            self._drained.append(event)
            # It may have become empty before the event could be seen.
            if self._under_way:
                event.wait()

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
        if self._closing:
            return
        self._mevent.delete(self._timer)
        self.drain()
        self._closing = True
        while self._idle:
            self._idle.pop()()
        for thread in self._threads:
            thread.join()
        self._backing.close()

    # -- size ------------------------------------------------------------------------

    def _check_size(self) -> None:
        # By a thread of the pool: on some file systems even this takes its time.
        if not self._checking and not self._paused:
            self._checking = True
            self._submit(self._look_at_size, (), self._looked_at_size)

    def _look_at_size(self) -> int:
        size = self._backing.size()
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

    # -- threads ---------------------------------------------------------------------

    # The queue, the set and the stack are shared without a lock: each step on them is
    # one operation that the interpreter does not interrupt.  Waking the thread that
    # has slept for the shortest time takes half as long as a queue.SimpleQueue, whose
    # sleepers pass the lock on to each other after every item.

    def _wake(self) -> None:
        try:
            wake = self._idle.pop()
        except IndexError:
            return
        wake()

    def _start_thread(self) -> None:
        thread = threading.Thread(
            target=self._work,
            name=f"blk {self.ident} {len(self._threads)}",
            daemon=True,
        )
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        sleep = allocate_lock()
        sleep.acquire()
        while True:
            try:
                req = self._queue.popleft()
            except IndexError:
                self._idle.append(sleep.release)
                if self._queue or self._closing:
                    self._wake()  # myself or another: both look again
                sleep.acquire()
                if self._closing:
                    return
                continue
            if self._queue and not self._idle:
                self._start_thread()
            try:
                error = req.call(*req.args)
            except Exception:
                log.exception("%s: request failed", self.ident)
                error = errno.EIO
            try:
                req.done(error)
            except Exception:
                log.exception("%s: completion failed", self.ident)
            self._end(req)

    def _end(self, req: BlockReq) -> None:
        self._under_way.discard(req)
        if self._drained and not self._under_way:
            while self._drained:
                self._drained.pop().set()
