"""Looking at a busy queue now and then, so that its driver need not notify.

A notification stops the guest's processor for as long as some thousand of its
instructions take; a driver with several requests under way makes one for each.  While
that is so, a `Poller` looks at the queue from a thread of its own.  A driver that waits
for each request is answered where it notifies, which is soonest.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from pybhyve.virtio.virtqueue import VirtQueue
from pybhyve.vmmapi import Vm

log = logging.getLogger(__name__)

INTERVAL: Final = 0.001
"""Seconds between two looks, unless a vCPU goes to sleep, perhaps to wait for them."""
BUSY: Final = 2
"""Chains that a look has to find for it to be worth more than a notification."""
LOOKS: Final = 2
"""After so many looks in a row that found fewer, notifications are better."""
PROBE: Final = 32
"""After so many notifications it is tried whether a look finds several chains.

With a device that is done with each before the driver makes the next, nothing else
shows it.
"""


class Poller:
    """What runs one queue: notifications, or at busy times a thread."""

    def __init__(
        self, vm: Vm, vq: VirtQueue, run: Callable[[VirtQueue], None], name: str
    ) -> None:
        """``run(vq)`` takes all chains there are, on any thread."""
        self._vm = vm
        self._vq = vq
        self._run = run
        self._name = name
        self._notifications = 0
        self._looking = False
        self._stopping = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def notified(self) -> None:
        """The driver notifies; on a vCPU's thread."""
        under_way = self._vq.outstanding()
        self._run(self._vq)
        if not self._looking:
            self._notifications += 1
            if under_way or self._notifications == PROBE:
                self._begin()

    def stop(self) -> None:
        """Come to rest: on return the driver will notify.  No vCPU runs."""
        with self._changed:
            self._stopping = True
            self._changed.wait_for(lambda: not self._looking)
            self._stopping = False

    def close(self) -> None:
        """End the thread.  Twice is harmless."""
        self.stop()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _begin(self) -> None:
        with self._changed:
            if self._looking or self._stopping:
                return
            self._looking = True
            self._notifications = 0
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name=self._name, daemon=True
                )
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._looking or self._closing)
                if not self._looking:
                    return
            try:
                self._look()
            except Exception:
                log.exception("%s failed", self._name)
            with self._changed:
                self._looking = False
                self._changed.notify_all()

    def _look(self) -> None:
        vq = self._vq
        with vq.run_lock:
            vq.kick_disable()
        try:
            idle = 0
            halts = self._vm.wait_halt(0, 0.0)
            while idle < LOOKS and not self._stopping:
                halts = self._vm.wait_halt(halts, INTERVAL)
                before = vq.taken()
                self._run(vq)
                idle = idle + 1 if vq.taken() - before < BUSY else 0
        finally:
            with vq.run_lock:
                vq.kick_enable()
        self._run(vq)
