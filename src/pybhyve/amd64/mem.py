"""Memory ranges with a device behind them (MMIO).

Two maps of ranges: the main one and a fallback one for whole windows such as the PCI
hole.  A vCPU's access is looked up in its hint (the last range it hit in the main map),
the main map, then the fallback map.  bhyve: mem.c.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Final

from pybhyve.errors import DeviceError

log = logging.getLogger(__name__)

MEM_F_READ: Final = 1
MEM_F_WRITE: Final = 2
MEM_F_RW: Final = 3
MEM_F_IMMUTABLE: Final = 4  # never unregistered

ACCESS_MAX: Final = 8  # bytes; a wider access (a vector load) reaches a device in parts


@dataclass(slots=True, frozen=True, eq=False)
class MemRange:
    """Guest-physical addresses [base, base + size) with a device behind them.

    ``read(gpa, size)`` returns the value, ``write(gpa, size, value)`` takes it, both
    with the guest-physical address, and 1, 2, 4 or 8 bytes that lie inside the range.
    They come from any vCPU thread, several at a time.  Without MEM_F_READ the range
    reads all ones, without MEM_F_WRITE writes are lost.
    """

    name: str
    base: int
    size: int
    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]
    flags: int = MEM_F_RW

    @property
    def end(self) -> int:
        """The first address behind the range."""
        return self.base + self.size


class _Map:
    """One state of the sorted ranges, never changed: lookups need no lock."""

    __slots__ = ("bases", "ranges")

    def __init__(self, ranges: list[MemRange]) -> None:
        self.ranges = ranges
        self.bases = [r.base for r in ranges]

    def find(self, gpa: int) -> MemRange | None:
        at = bisect_right(self.bases, gpa)
        if at:
            found = self.ranges[at - 1]
            if gpa < found.base + found.size:
                return found
        return None

    def following(self, gpa: int) -> int:
        """The base of the first range above ``gpa``, or far beyond any address."""
        at = bisect_right(self.bases, gpa)
        return self.bases[at] if at < len(self.bases) else 1 << 64

    def plus(self, new: MemRange) -> _Map:
        at = bisect_right(self.bases, new.base)
        for other in self.ranges[max(at - 1, 0) : at + 1]:
            if new.base < other.end and other.base < new.end:
                raise DeviceError(
                    f"{new.name}: memory {new.base:#x}-{new.end - 1:#x} overlaps "
                    f"{other.name} at {other.base:#x}-{other.end - 1:#x}"
                )
        return _Map([*self.ranges[:at], new, *self.ranges[at:]])


class MemBus:
    """All memory ranges of a machine."""

    def __init__(self, ncpu: int) -> None:
        self._lock = Lock()  # of those that register
        self._main = _Map([])
        self._fallback = _Map([])
        # A hint is a range together with the map it was found in, so that one found
        # before a range went away is never believed afterwards.
        self._hints: list[tuple[_Map, MemRange] | None] = [None] * ncpu
        self.unknown = 0
        """How often the guest used an address that no range has."""

    def register(self, new: MemRange) -> None:
        """Add a range to the main map; DeviceError where it overlaps another there."""
        self._check(new)
        with self._lock:
            self._main = self._main.plus(new)

    def register_fallback(self, new: MemRange) -> None:
        """Add a range to the fallback map; DeviceError where it overlaps one there."""
        self._check(new)
        with self._lock:
            self._fallback = self._fallback.plus(new)

    @staticmethod
    def _check(new: MemRange) -> None:
        if new.size < 1 or new.base < 0 or new.end > 1 << 64:
            raise DeviceError(f"{new.name}: no memory {new.base:#x}+{new.size:#x}")

    def unregister(self, old: MemRange) -> None:
        """Take a range, which must be in the main map and not IMMUTABLE, away."""
        if old.flags & MEM_F_IMMUTABLE:
            raise ValueError(f"{old.name} is immutable")
        with self._lock:
            ranges = list(self._main.ranges)
            ranges.remove(old)
            self._main = _Map(ranges)

    def ranges(self) -> list[MemRange]:
        """The ranges of the main map, by rising address."""
        return list(self._main.ranges)

    def _find(self, vcpu_id: int, gpa: int) -> MemRange | None:
        main = self._main
        hint = self._hints[vcpu_id]
        if hint is not None and hint[0] is main:
            last = hint[1]
            if last.base <= gpa < last.base + last.size:
                return last
        found = main.find(gpa)
        if found is not None:
            self._hints[vcpu_id] = (main, found)
            return found
        return self._fallback.find(gpa)

    def read(self, vcpu_id: int, gpa: int, size: int) -> int:
        """The value of a load of ``size`` bytes; all ones where there is no range."""
        found = self._find(vcpu_id, gpa)
        if found is not None and self._whole(vcpu_id, found, gpa, size):
            return self._read_whole(found, gpa, size)
        value = 0
        for part, length, where in self._parts(vcpu_id, gpa, size):
            if where is None:
                self._unknown("read", part, length)
                piece = (1 << 8 * length) - 1
            else:
                piece = self._read_whole(where, part, length)
            value |= piece << 8 * (part - gpa)
        return value

    def write(self, vcpu_id: int, gpa: int, size: int, value: int) -> None:
        """A store of the low ``size`` bytes of ``value``; lost where there is none."""
        found = self._find(vcpu_id, gpa)
        if found is not None and self._whole(vcpu_id, found, gpa, size):
            if found.flags & MEM_F_WRITE:
                found.write(gpa, size, value)
            return
        for part, length, where in self._parts(vcpu_id, gpa, size):
            if where is None:
                self._unknown("write", part, length)
            elif where.flags & MEM_F_WRITE:
                piece = value >> 8 * (part - gpa) & ((1 << 8 * length) - 1)
                where.write(part, length, piece)

    def _whole(self, vcpu_id: int, found: MemRange, gpa: int, size: int) -> bool:
        """Whether an access reaches the range it begins in undivided."""
        if size > ACCESS_MAX or gpa + size > found.base + found.size:
            return False
        hint = self._hints[vcpu_id]
        if hint is not None and hint[1] is found:  # of the main map: no other inside
            return True
        # A main range may begin inside an access that begins in a fallback range.
        return self._main.following(gpa) >= gpa + size

    @staticmethod
    def _read_whole(found: MemRange, gpa: int, size: int) -> int:
        if found.flags & MEM_F_READ:
            return found.read(gpa, size) & ((1 << 8 * size) - 1)
        return (1 << 8 * size) - 1

    def _parts(
        self, vcpu_id: int, gpa: int, size: int
    ) -> list[tuple[int, int, MemRange | None]]:
        """Cut an access at the borders of ranges, into aligned powers of two."""
        parts: list[tuple[int, int, MemRange | None]] = []
        end = gpa + size
        while gpa < end:
            found = self._find(vcpu_id, gpa)
            limit = min(end, self._main.following(gpa))
            if found is not None:
                limit = min(limit, found.end)
            else:
                limit = min(limit, self._fallback.following(gpa))
            length = ACCESS_MAX
            while gpa % length or gpa + length > limit:
                length //= 2
            parts.append((gpa, length, found))
            gpa += length
        return parts

    def _unknown(self, direction: str, gpa: int, size: int) -> None:
        self.unknown += 1
        log.debug("unknown memory direction=%s gpa=%#x size=%d", direction, gpa, size)
