"""The threads that do a disk's requests."""

from __future__ import annotations

import errno
import logging
import threading
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from pybhyve.errors import HostError

log = logging.getLogger(__name__)

NUMTHR: Final = 8

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


class Pool:
    """Up to NUMTHR threads that begin requests in the order of their submission.

    Only as many threads are awake as have to be: one, and one more for each that waits
    for the host in `wait`.  With the interpreter's lock between them more would be
    slower: 32 reads from the host's cache take a sixth of the time this way.

    Queue, set and lists are shared without a lock: each step on them is one operation
    that the interpreter does not divide.  Who puts a request into the queue looks for a
    thread that is up afterwards, and a thread looks at the queue after it has signed
    off, so one of them sees the other.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: deque[BlockReq] = deque()
        self._under_way: set[BlockReq] = set()
        self._up: list[None] = []  # one for each thread that will look at the queue
        self._idle: list[Callable[[], None]] = []  # what wakes each of the others
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self._most = NUMTHR
        self._drained: list[threading.Event] = []  # of those who wait in drain()
        self._closing = False
        self._start_thread()
        if not self._threads:
            raise HostError("the host has no thread left for a disk")

    def submit(self, call: Callable[..., int], *args: Any, done: Done) -> BlockReq:
        """Have ``done(call(*args))`` called."""
        req = BlockReq(call, args, done)
        self._under_way.add(req)
        self._queue.append(req)
        if not self._up:
            self._wake()
        return req

    def cancel(self, req: BlockReq) -> bool:
        """Take a request back, if it was not begun."""
        try:
            self._queue.remove(req)
        except ValueError:
            return False
        self._end(req)
        return True

    def wait(self, call: Callable[..., int], *args: Any) -> int:
        """Inside of a request: call what may wait for the host."""
        self._up.pop()
        if not self._idle and len(self._threads) < self._most:
            self._start_thread()
        if self._queue and not self._up:
            self._wake()
        try:
            return call(*args)
        finally:
            self._up.append(None)

    def drain(self) -> None:
        """Wait until nothing is under way.  Not from a ``done``."""
        while self._under_way:
            event = threading.Event()
            self._drained.append(event)
            # It may have become empty before the event could be seen.
            if self._under_way:
                event.wait()

    def close(self) -> None:
        """End the threads, when nothing is under way any more."""
        self.drain()
        self._closing = True
        while self._idle:
            self._wake()
        for thread in self._threads:
            thread.join()

    def _wake(self) -> None:
        try:
            # The latest to fall asleep: what it works with is still in the caches.
            wake = self._idle.pop()
        except IndexError:
            return
        self._up.append(None)
        wake()

    def _start_thread(self) -> None:
        with self._starting:
            number = len(self._threads)
            if number < self._most:
                name = f"blk {self._name} {number}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._up.append(None)
                try:
                    thread.start()
                except RuntimeError as error:
                    self._up.pop()
                    self._most = number
                    log.warning("%s: %s: there are %d", self._name, error, number)
                else:
                    self._threads.append(thread)

    def _work(self) -> None:
        sleep = allocate_lock()
        sleep.acquire()
        while True:
            try:
                req = self._queue.popleft()
            except IndexError:
                self._up.pop()
                self._idle.append(sleep.release)
                if self._closing or (self._queue and not self._up):
                    self._wake()
                sleep.acquire()
                if self._closing:
                    return
                continue
            try:
                error = req.call(*req.args)
            except Exception:
                log.exception("%s: request failed", self._name)
                error = errno.EIO
            try:
                req.done(error)
            except Exception:
                log.exception("%s: completion failed", self._name)
            self._end(req)

    def _end(self, req: BlockReq) -> None:
        self._under_way.discard(req)
        if self._drained and not self._under_way:
            while self._drained:
                self._drained.pop().set()
