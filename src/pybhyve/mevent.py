"""The event loop: descriptors, timers and signals, one thread (bhyve: mevent.c).

Work that waits belongs here, so that a vCPU thread never waits on a device.  Every
method but :meth:`EventLoop.run` and :meth:`EventLoop.close` may be called from any
thread, and from a callback; :meth:`EventLoop.add_signal` only from the main thread,
which is Python's rule for signal handlers.  Callbacks take no arguments and run on the
thread that is in :meth:`EventLoop.run`, one at a time.
"""

from __future__ import annotations

import heapq
import logging
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

log = logging.getLogger(__name__)

Callback = Callable[[], object]

_READ: Final = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR
_WRITE: Final = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR


class Handle:
    """One registration with an :class:`EventLoop`; made by its ``add_*`` methods."""

    __slots__ = ("_period", "_when", "callback", "enabled", "kind", "target")

    def __init__(self, kind: str, target: int, callback: Callback) -> None:
        self.kind = kind
        self.target = target  # descriptor or signal number; 0 for a timer
        self.callback = callback
        self.enabled = True
        self._when = 0.0
        self._period = 0.0

    def __repr__(self) -> str:
        """The kind, what it watches, and whom it calls."""
        return f"<{self.kind} {self.target} -> {self.callback!r}>"


class EventLoop:
    """Dispatches events until :meth:`stop`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._epoll = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wakeup, select.EPOLLIN)
        self._readers: dict[int, Handle] = {}
        self._writers: dict[int, Handle] = {}
        # Regular files and /dev/null cannot be polled, they are always ready.
        self._unpollable: set[int] = set()
        self._timers: list[tuple[float, int, Handle]] = []
        self._timer_seq = 0
        self._signals: dict[int, tuple[Handle, Any]] = {}
        self._soon: deque[Callback] = deque()
        self._stopped = False
        self._result: Any = None

    # -- registration ----------------------------------------------------------------

    def add_read(self, fd: int, callback: Callback) -> Handle:
        """Call back whenever ``fd`` can be read, is at its end, or has an error.

        Delete the handle before closing ``fd``.  Files that cannot be polled, such as
        regular ones and /dev/null, are always ready.

        ValueError: ``fd`` has a reader already.
        """
        return self._add_fd(self._readers, Handle("read", fd, callback))

    def add_write(self, fd: int, callback: Callback) -> Handle:
        """Call back whenever ``fd`` can be written or has an error.

        ValueError: ``fd`` has a writer already.
        """
        return self._add_fd(self._writers, Handle("write", fd, callback))

    def add_timer(
        self, seconds: float, callback: Callback, periodic: bool = False
    ) -> Handle:
        """Call back once after ``seconds``, or with that period until deleted.

        A one-shot timer stays registered after it fired: :meth:`enable` starts it
        again with the same delay.
        """
        handle = Handle("periodic" if periodic else "timer", 0, callback)
        handle._period = seconds
        with self._lock:
            self._start_timer(handle)
        self._wake()
        return handle

    def add_signal(self, signo: int, callback: Callback) -> Handle:
        """Call back (on the loop's thread) after each arrival of ``signo``.

        Deleting the handle puts the previous disposition back.
        """
        handle = Handle("signal", signo, callback)

        def deliver(_signo: int, _frame: object) -> None:
            if handle.enabled:
                self.call_soon_threadsafe(callback)

        with self._lock:
            if signo in self._signals:
                raise ValueError(f"signal {signo} has a handler already")
            self._signals[signo] = (handle, signal.signal(signo, deliver))
        return handle

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """Run ``callback`` once on the loop's thread.  Safe in a signal handler."""
        self._soon.append(callback)
        self._wake()

    def delete(self, handle: Handle) -> None:
        """Forget ``handle``; deleting twice is harmless.

        On the loop's thread its callback is not called again; seen from another
        thread, a call already under way may still finish.
        """
        with self._lock:
            handle.enabled = False
            fd = handle.target
            if handle.kind == "signal":
                if fd in self._signals and self._signals[fd][0] is handle:
                    signal.signal(fd, self._signals.pop(fd)[1])
            elif handle.kind in ("read", "write"):
                table = self._readers if handle.kind == "read" else self._writers
                if table.get(fd) is handle:
                    del table[fd]
                    self._update_fd(fd)

    def enable(self, handle: Handle) -> None:
        """Undo :meth:`disable`; restarts a timer with its full delay."""
        with self._lock:
            if handle.kind in ("timer", "periodic"):
                handle.enabled = True
                self._start_timer(handle)
            elif not handle.enabled:
                handle.enabled = True
                if handle.kind in ("read", "write"):
                    self._update_fd(handle.target)
        self._wake()

    def disable(self, handle: Handle) -> None:
        """Keep the registration but stop calling back."""
        with self._lock:
            if handle.enabled:
                handle.enabled = False
                if handle.kind in ("read", "write"):
                    self._update_fd(handle.target)

    # -- running ---------------------------------------------------------------------

    def run(self) -> Any:
        """Dispatch events on this thread until :meth:`stop`; returns its argument.

        A callback that raises is logged with its traceback and disabled, because a
        level-triggered event would raise it again at once; the others go on.
        """
        while not self._stopped:
            for fd, events in self._poll():
                if fd == self._wakeup:
                    os.eventfd_read(fd)
                    continue
                if events & _READ:
                    self._dispatch(self._readers.get(fd))
                if events & _WRITE:
                    self._dispatch(self._writers.get(fd))
            self._run_timers()
            for _ in range(len(self._soon)):
                self._call(self._soon.popleft())
        self._stopped = False
        return self._result

    def stop(self, result: Any = None) -> None:
        """Make :meth:`run` return ``result`` after the callbacks now due.

        The first call decides: one that follows before :meth:`run` has returned is
        ignored.
        """
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._result = result
        self._wake()

    def close(self) -> None:
        """Restore signal dispositions and close the loop's own descriptors."""
        for handle, _previous in list(self._signals.values()):
            self.delete(handle)
        self._epoll.close()
        os.close(self._wakeup)

    # -- inside ----------------------------------------------------------------------

    def _wake(self) -> None:
        os.eventfd_write(self._wakeup, 1)

    def _add_fd(self, table: dict[int, Handle], handle: Handle) -> Handle:
        with self._lock:
            if handle.target in table:
                raise ValueError(f"descriptor {handle.target} is {handle.kind} already")
            table[handle.target] = handle
            self._update_fd(handle.target)
        self._wake()
        return handle

    def _update_fd(self, fd: int) -> None:
        """Bring the kernel's interest in ``fd`` in line with the two tables."""
        reader, writer = self._readers.get(fd), self._writers.get(fd)
        mask = 0
        if reader is not None and reader.enabled:
            mask |= select.EPOLLIN
        if writer is not None and writer.enabled:
            mask |= select.EPOLLOUT
        self._unpollable.discard(fd)
        try:
            if mask == 0:
                # Not modify(fd, 0): the kernel reports a hang-up whatever the mask.
                self._epoll.unregister(fd)
            else:
                try:
                    self._epoll.modify(fd, mask)
                except FileNotFoundError:
                    self._epoll.register(fd, mask)
        except PermissionError:
            if mask:
                self._unpollable.add(fd)
        except OSError:
            if mask:
                raise
            # Never registered, or closed by its owner before the handle was deleted.

    def _poll(self) -> list[tuple[int, int]]:
        timeout = -1.0
        with self._lock:
            ready = [(fd, _READ | _WRITE) for fd in self._unpollable]
            while self._timers and not self._is_current(self._timers[0]):
                heapq.heappop(self._timers)
            if ready or self._soon or self._stopped:
                timeout = 0.0
            elif self._timers:
                timeout = max(0.0, self._timers[0][0] - time.monotonic())
        return ready + self._epoll.poll(timeout)

    def _dispatch(self, handle: Handle | None) -> None:
        # Looked up anew for each event: an earlier callback may have deleted it.
        if handle is not None and handle.enabled and not self._call(handle.callback):
            self.disable(handle)

    def _start_timer(self, handle: Handle) -> None:
        handle._when = time.monotonic() + handle._period
        self._push_timer(handle)

    def _push_timer(self, handle: Handle) -> None:
        self._timer_seq += 1
        heapq.heappush(self._timers, (handle._when, self._timer_seq, handle))

    @staticmethod
    def _is_current(entry: tuple[float, int, Handle]) -> bool:
        """Whether a heap entry is not left over from an earlier start."""
        when, _seq, handle = entry
        return handle.enabled and when == handle._when

    def _run_timers(self) -> None:
        now = time.monotonic()
        while True:
            with self._lock:
                if not self._timers or self._timers[0][0] > now:
                    return
                entry = heapq.heappop(self._timers)
                if not self._is_current(entry):
                    continue
                handle = entry[2]
                if handle.kind == "periodic":
                    # From the time it was due, so that periods do not drift; a loop
                    # that fell behind by more than one period drops the lost ones.
                    handle._when = max(handle._when + handle._period, now)
                    self._push_timer(handle)
                else:
                    handle.enabled = False
            if not self._call(handle.callback):
                self.disable(handle)

    @staticmethod
    def _call(callback: Callback) -> bool:
        try:
            callback()
        except Exception:
            log.exception("event callback failed and is disabled: %r", callback)
            return False
        return True
