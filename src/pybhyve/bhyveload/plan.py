"""What a loader puts where in guest memory, worked out before a VM is touched.

Every piece of the guest (kernel segments, command line, page tables, ...) goes through
:class:`LoadPlan`, which knows the RAM and what is taken.  So an image whose segments
overlap each other or the loader's own structures, or lie outside the RAM, is refused
before anything is written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Final, NamedTuple

from pybhyve.amd64.e820 import E820, FOUR_GIB, RAM
from pybhyve.errors import ImageError
from pybhyve.vmmapi import LOWMEM_LIMIT, MB

Bytes = bytes | bytearray | memoryview

PAGE: Final = 4096
HIGH_START: Final = 0x100000

# Interrupt vectors and BIOS data area of real mode: a guest may go back there.
FIRST_FREE: Final = 0x1000


class Range(NamedTuple):
    """Guest physical addresses ``start`` up to, not including, ``end``."""

    start: int
    end: int


class Piece(NamedTuple):
    """Bytes ``data`` at ``gpa``, which own ``size`` bytes; those behind are zero."""

    gpa: int
    size: int
    name: str
    data: Bytes


class CpuState(NamedTuple):
    """What a boot protocol demands of vCPU 0; the rest is as after a reset."""

    registers: dict[str, int]
    descriptors: dict[str, tuple[int, int, int]]  # base, limit, access word


class LoadPlan:
    """Pieces of a guest and the RAM they share.

    ``lowmem`` is the number of bytes from address 0, ``highmem`` from 4 GiB.
    """

    def __init__(self, lowmem: int, highmem: int = 0) -> None:
        self.lowmem = lowmem
        self.highmem = highmem
        self.pieces: list[Piece] = []  # by rising gpa
        self.e820 = E820(lowmem, highmem)
        """The memory map for the guest."""
        self.ram = [
            Range(entry.base, entry.end)
            for entry in self.e820.entries
            if entry.type == RAM
        ]

    def place(self, name: str, gpa: int, data: Bytes, size: int = 0) -> int:
        """Put ``data`` at ``gpa``; it owns ``size`` bytes if that is more.

        Returns ``gpa``.  Raises ImageError where there is no RAM, or it is taken.
        """
        size = max(size, len(data))
        end = gpa + size
        if not any(start <= gpa and end <= stop for start, stop in self.ram):
            if self.lowmem < end <= LOWMEM_LIMIT:
                raise ImageError(
                    f"{name} needs {-(-end // MB)} MiB of memory,"
                    f" and the VM has {self.lowmem // MB}"
                )
            raise ImageError(
                f"{name} belongs at {gpa:#x} to {end:#x}, where the VM has no memory"
            )
        index = bisect_left(self.pieces, gpa, key=lambda piece: piece.gpa)
        for other in self.pieces[max(index - 1, 0) : index + 1]:
            if other.gpa < end and gpa < other.gpa + other.size:
                raise ImageError(
                    f"{name} at {gpa:#x} to {end:#x} overlaps {other.name}"
                    f" at {other.gpa:#x} to {other.gpa + other.size:#x}"
                )
        if size:
            self.pieces.insert(index, Piece(gpa, size, name, data))
        return gpa

    def find_lowest(
        self, name: str, size: int, align: int, start: int = FIRST_FREE
    ) -> int:
        """The lowest free address from ``start``, below 4 GiB, with room for it."""
        for free in self._free():
            gpa = -(-max(free.start, start) // align) * align
            if gpa + size <= min(free.end, FOUR_GIB):
                return gpa
        raise self._no_room(name, size)

    def place_lowest(self, name: str, data: Bytes, start: int = FIRST_FREE) -> int:
        """Put ``data`` on the lowest free page below 4 GiB, from ``start``."""
        return self.place(name, self.find_lowest(name, len(data), PAGE, start), data)

    def place_highest(self, name: str, data: Bytes, limit: int) -> int:
        """Put ``data`` on the highest free pages from 1 MiB that end by ``limit``."""
        for free in reversed(list(self._free())):
            gpa = (min(free.end, limit) - len(data)) // PAGE * PAGE
            if gpa >= max(free.start, HIGH_START):
                return self.place(name, gpa, data)
        raise self._no_room(name, len(data))

    def _free(self) -> Iterator[Range]:
        for start, end in self.ram:
            for piece in self.pieces:
                if start <= piece.gpa < end:
                    yield Range(start, piece.gpa)
                    start = piece.gpa + piece.size
            yield Range(start, end)

    @staticmethod
    def _no_room(name: str, size: int) -> ImageError:
        return ImageError(
            f"the VM's memory has no room for {name} of {size} bytes beside the kernel"
        )
