"""The far end of a network device's cable, in a test's hands."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pybhyve.bhyverun.machine import Machine
from pybhyve.mevent import EventLoop
from pybhyve.net import HEADER_LEGACY, Backend

WAIT_SECONDS = 5.0


class Wire(Backend):
    """Keeps what the device sends, and gives it what the test puts in."""

    link_up = True

    def __init__(self, loop: EventLoop) -> None:
        self.loop = loop
        self.sent: list[bytes] = []
        self.waiting: deque[bytes] = deque()
        self.enabled = False
        self.header = HEADER_LEGACY
        self.offloads = 0
        self._changed = threading.Condition()

    def start(self, receive, link_changed) -> None:
        self._receive, self._link_changed = receive, link_changed

    def set_header(self, length: int) -> None:
        self.header = length

    def set_offloads(self, offloads: int) -> None:
        assert offloads & 1 or not offloads, "the kernel refuses this"
        self.offloads = offloads

    def send(self, iov) -> None:
        with self._changed:
            self.sent.append(b"".join(iov))
            self._changed.notify()

    def receive(self, buffer: memoryview) -> int:
        if not self.waiting:
            return 0
        frame = self.waiting.popleft()
        buffer[: len(frame)] = frame
        return len(frame)

    def enable_receive(self) -> None:
        self.enabled = True
        self.loop.call_soon_threadsafe(self._deliver)

    def disable_receive(self) -> None:
        self.enabled = False

    def _deliver(self) -> None:
        if self.enabled and self.waiting:
            self._receive()
            self.loop.call_soon_threadsafe(self._deliver)

    # -- the test's hands ------------------------------------------------------------

    def put(self, *frames: bytes) -> None:
        """Have frames arrive, each with a header of zeros in front."""
        self.waiting += [bytes(self.header) + frame for frame in frames]
        self.loop.call_soon_threadsafe(self._deliver)

    def plug(self, up: bool) -> None:
        """Pull the cable, or put it back."""
        self.link_up = up
        self.loop.call_soon_threadsafe(self._link_changed)

    def wait_sent(self, count: int = 1) -> list[bytes]:
        """What the device has sent, at least so many frames."""
        self.wait(lambda: len(self.sent) >= count)
        with self._changed:
            sent, self.sent = self.sent, []
        return sent

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def settle(self) -> None:
        """Wait until the event loop has done all that it was told to by now."""
        for _ in range(3):  # what that led to as well
            done = threading.Event()
            self.loop.call_soon_threadsafe(done.set)
            assert done.wait(WAIT_SECONDS)


class _Failures(logging.Handler):
    """What the event loop says of callbacks that raised."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


@contextmanager
def running(machine: Machine, device: str) -> Iterator[None]:
    """Have a machine's event loop run, and one of its devices, but no vCPU.

    Fails if anything raised in there.
    """
    failures = _Failures()
    logging.getLogger("pybhyve.mevent").addHandler(failures)
    thread = threading.Thread(target=machine.mevent.run)
    machine.devices[device].start()
    thread.start()
    try:
        yield
    finally:
        machine.mevent.stop()
        thread.join()
        logging.getLogger("pybhyve.mevent").removeHandler(failures)
    assert not failures.records, failures.records[0]
