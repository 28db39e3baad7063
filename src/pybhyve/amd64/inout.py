"""The table of I/O ports.

One flat table of 65536 entries for each direction.  An access belongs to the device
that has its first port; the device gets the access size and decides.  bhyve: inout.c.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Final

from pybhyve.errors import DeviceError, GuestAbortError

log = logging.getLogger(__name__)

PORTS: Final = 0x10000
ONES: Final = (0, 0xFF, 0xFFFF, 0xFFFFFF, 0xFFFFFFFF)  # by access size, 1 to 4 bytes

ReadHandler = Callable[[int, int], int]
WriteHandler = Callable[[int, int, int], None]


class InoutTable:
    """Which handler each port has.

    Reads and writes come from any vCPU thread, several at a time; a handler does its
    own locking.  Registration may happen while the guest runs (I/O BARs move).
    """

    def __init__(self, strict: bool = False) -> None:
        """``strict``: raise GuestAbortError at a port that no device has."""
        self._strict = strict
        self._reads: list[ReadHandler] = [self._unknown_read] * PORTS
        self._writes: list[WriteHandler] = [self._unknown_write] * PORTS
        self._names: list[str | None] = [None] * PORTS
        self.unknown: Counter[int] = Counter()
        """How often the guest used each port that no device has."""

    def register(
        self,
        name: str,
        port: int,
        size: int,
        read: ReadHandler | None,
        write: WriteHandler | None,
    ) -> None:
        """Give ``size`` ports from ``port`` on to a device.

        ``read(port, access size)`` returns the value, ``write(port, access size,
        value)`` takes it; None: the device does not answer in that direction.
        Raises DeviceError where a port is outside the table or in use; then no port
        has changed.
        """
        if size < 1 or port < 0 or port + size > PORTS:
            raise DeviceError(f"{name}: there are no I/O ports {port:#x}+{size}")
        ports = slice(port, port + size)
        for at, other in enumerate(self._names[ports], port):
            if other is not None:
                raise DeviceError(f"{name}: I/O port {at:#x} is in use by {other}")
        self._names[ports] = [name] * size
        self._reads[ports] = [read or self._unknown_read] * size
        self._writes[ports] = [write or self._unknown_write] * size

    def unregister(self, port: int, size: int) -> None:
        """Take ``size`` ports from ``port`` on away from the device that has them."""
        ports = slice(port, port + size)
        self._reads[ports] = [self._unknown_read] * size
        self._writes[ports] = [self._unknown_write] * size
        self._names[ports] = [None] * size

    def owner(self, port: int) -> str | None:
        """The name under which a port is registered."""
        return self._names[port]

    def read(self, port: int, size: int) -> int:
        """The answer to an IN of 1, 2 or 4 bytes; all ones where there is no device."""
        return self._reads[port](port, size) & ONES[size]

    def write(self, port: int, size: int, value: int) -> None:
        """An OUT of 1, 2 or 4 bytes; lost where there is no device."""
        self._writes[port](port, size, value)

    def _unknown_read(self, port: int, size: int) -> int:
        self._unknown("in", port, size)
        return ONES[size]

    def _unknown_write(self, port: int, size: int, value: int) -> None:
        self._unknown("out", port, size)

    def _unknown(self, direction: str, port: int, size: int) -> None:
        if self._strict:
            raise GuestAbortError(f"Unhandled {direction}{' bw l'[size]} {port:#06x}")
        self.unknown[port] += 1
        log.debug("unknown port direction=%s port=%#06x size=%d", direction, port, size)
