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
from typing import Final, NamedTuple

from pybhyve.errors import DeviceError

log = logging.getLogger(__name__)

MEM_F_READ: Final = 1
MEM_F_WRITE: Final = 2
MEM_F_RW: Final = 3
MEM_F_IMMUTABLE: Final = 4  # never unregistered

ACCESS_MAX: Final = 8  # bytes; a wider access (a vector load) reaches a device in parts

ReadHandler = Callable[[int, int], int]
WriteHandler = Callable[[int, int, int], None]


def _ones(_gpa: int, size: int) -> int:
    return (1 << 8 * size) - 1


def _lost(_gpa: int, _size: int, _value: int) -> None:
    pass


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
    read: ReadHandler
    write: WriteHandler
    flags: int = MEM_F_RW

    @property
    def end(self) -> int:
        """The first address behind the range."""
        return self.base + self.size


class _Hint(NamedTuple):
    """A range that a vCPU has hit, together with the map it was found in.

    One found before a range went away is never believed afterwards.
    """

    map: _Map | None
    base: int
    end: int
    read: ReadHandler
    write: WriteHandler

    @classmethod
    def to(cls, main: _Map, found: MemRange) -> _Hint:
        """To a range, its flags applied."""
        read = found.read if found.flags & MEM_F_READ else _ones
        write = found.write if found.flags & MEM_F_WRITE else _lost
        return cls(main, found.base, found.base + found.size, read, write)


_NO_HINT: Final = _Hint(None, 0, 0, _ones, _lost)


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
        self._hints = [_NO_HINT] * ncpu
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

    def read(self, vcpu_id: int, gpa: int, size: int) -> int:
        """The value of a load of ``size`` bytes; all ones where there is no range."""
        main, base, end, read, _write = self._hints[vcpu_id]
        if main is not self._main or not base <= gpa <= end - size or size > ACCESS_MAX:
            return self._read_parts(vcpu_id, gpa, size)
        return read(gpa, size) & (1 << 8 * size) - 1

    def write(self, vcpu_id: int, gpa: int, size: int, value: int) -> None:
        """A store of the low ``size`` bytes of ``value``; lost where there is none."""
        main, base, end, _read, write = self._hints[vcpu_id]
        if main is not self._main or not base <= gpa <= end - size or size > ACCESS_MAX:
            self._write_parts(vcpu_id, gpa, size, value)
        else:
            write(gpa, size, value)

    def _read_parts(self, vcpu_id: int, gpa: int, size: int) -> int:
        value = 0
        for part, length, hint in self._parts(vcpu_id, gpa, size):
            if hint is None:
                self._unknown("read", part, length)
            read = hint.read if hint is not None else _ones
            ones = (1 << 8 * length) - 1
            value |= (read(part, length) & ones) << 8 * (part - gpa)
        return value

    def _write_parts(self, vcpu_id: int, gpa: int, size: int, value: int) -> None:
        for part, length, hint in self._parts(vcpu_id, gpa, size):
            if hint is None:
                self._unknown("write", part, length)
            else:
                piece = value >> 8 * (part - gpa) & ((1 << 8 * length) - 1)
                hint.write(part, length, piece)

    def _find(self, vcpu_id: int, gpa: int) -> _Hint | None:
        main = self._main
        found = main.find(gpa)
        if found is not None:
            self._hints[vcpu_id] = hint = _Hint.to(main, found)
            return hint
        found = self._fallback.find(gpa)
        return _Hint.to(main, found) if found is not None else None

    def _parts(
        self, vcpu_id: int, gpa: int, size: int
    ) -> list[tuple[int, int, _Hint | None]]:
        """Cut an access at the borders of ranges, into aligned powers of two.

        One that lies in a range and is no wider than ACCESS_MAX stays whole.
        """
        parts: list[tuple[int, int, _Hint | None]] = []
        end = gpa + size
        while gpa < end:
            found = self._find(vcpu_id, gpa)
            limit = min(end, self._main.following(gpa))
            if found is not None:
                limit = min(limit, found.end)
            else:
                limit = min(limit, self._fallback.following(gpa))
            if not parts and limit == end and size <= ACCESS_MAX:
                return [(gpa, size, found)]
            length = ACCESS_MAX
            while gpa % length or gpa + length > limit:
                length //= 2
            parts.append((gpa, length, found))
            gpa += length
        return parts

    def _unknown(self, direction: str, gpa: int, size: int) -> None:
        self.unknown += 1
        log.debug("unknown memory direction=%s gpa=%#x size=%d", direction, gpa, size)
