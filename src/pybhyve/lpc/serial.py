"""A serial port: the chip, the lock around it, and the backend on its line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pybhyve.console import Backend
from pybhyve.lpc.ns16550 import Ns16550


class SerialPort:
    """An :class:`Ns16550` that vCPU threads and the event loop share.

    Lock order: this port's, then the backend's, then the event loop's.
    """

    def __init__(self, irq: Callable[[bool], None], backend: Backend) -> None:
        self._lock = threading.Lock()
        self._backend = backend
        self._chip = Ns16550(irq, backend)
        self._paused = False
        self._held = b""

    def read(self, offset: int, size: int) -> int:
        """A guest's read at register ``offset``."""
        with self._lock:
            return self._chip.regs.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write at register ``offset``."""
        with self._lock:
            self._chip.regs.write(offset, size, value)

    def room(self) -> int:
        """How many bytes the receiver can take now."""
        with self._lock:
            return 0 if self._paused else self._chip.room()

    def receive(self, data: bytes) -> None:
        """Bytes from the line; kept until :meth:`resume` if it was paused meanwhile."""
        with self._lock:
            if self._paused:
                self._held += data
            else:
                self._chip.receive(data)

    def drained(self) -> None:
        """The line can take output again."""
        with self._lock:
            if not self._paused:
                self._chip.drained()

    def start(self) -> None:
        """Connect the backend."""
        self._backend.start(self)

    def pause(self) -> None:
        """Have the line wait, so that nothing changes the chip."""
        with self._lock:
            self._paused = True

    def resume(self) -> None:
        """Go on; after a restore the line may not be the one that was waited for."""
        with self._lock:
            self._paused = False
            held, self._held = self._held, b""
            self._chip.receive(held)
            self._chip.drained()
        self._backend.resume_input()

    def halt(self) -> None:
        """Disconnect the backend."""
        self._backend.halt()

    def reset(self) -> None:
        """Master reset of the chip."""
        with self._lock:
            self._chip.reset()

    def save(self) -> dict[str, Any]:
        """The chip's state, and what the line has brought since the pause."""
        with self._lock:
            return {"version": 1, "chip": self._chip.save(), "held": self._held}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        if state["version"] != 1:
            raise ValueError(f"serial port: unknown version {state['version']}")
        with self._lock:
            self._chip.restore(state["chip"])
            self._held = bytes(state["held"])
