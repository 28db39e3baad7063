"""The guest's memory map, and an allocator of what is not given to anyone yet.

ACPI 6.5, 15 (INT 15h, E820h).  bhyve: e820.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from pybhyve.errors import DeviceError

RAM: Final = 1
RESERVED: Final = 2
ACPI: Final = 3
NVS: Final = 4
NAMES: Final = {RAM: "RAM", RESERVED: "reserved", ACPI: "ACPI", NVS: "NVS"}

ENTRY: Final = struct.Struct("<QQI")

VGA_HOLE: Final = (0xA0000, 0xC0000)
ROM_HOLE: Final = (0xC0000, 0x100000)
FOUR_GIB: Final = 1 << 32


@dataclass(slots=True, frozen=True, order=True)
class Entry:
    """Guest-physical addresses [base, end) of one type."""

    base: int
    end: int
    type: int


class E820:
    """The map, by rising address; entries never overlap."""

    def __init__(self, lowmem: int, highmem: int) -> None:
        """RAM of ``lowmem`` bytes from 0 and ``highmem`` from 4 GiB, less the holes."""
        self.entries = [Entry(0, lowmem, RAM)]
        if highmem:
            self.entries.append(Entry(FOUR_GIB, FOUR_GIB + highmem, RAM))
        for base, end in (VGA_HOLE, ROM_HOLE):
            if base < lowmem:
                self.add(base, min(end, lowmem), RESERVED)

    def add(self, base: int, end: int, type: int) -> None:
        """Give [base, end), which is RAM or nothing, another type.

        DeviceError: part of it is something else already.
        """
        if base >= end:
            raise ValueError(f"no addresses {base:#x}-{end:#x}")
        kept = []
        for entry in self.entries:
            if entry.end <= base or end <= entry.base:
                kept.append(entry)
                continue
            if entry.type != RAM:
                raise DeviceError(
                    f"memory {base:#x}-{end - 1:#x} is "
                    f"{NAMES[entry.type]} already at {entry.base:#x}"
                )
            if entry.base < base:
                kept.append(Entry(entry.base, base, RAM))
            if end < entry.end:
                kept.append(Entry(end, entry.end, RAM))
        kept.append(Entry(base, end, type))
        self.entries = sorted(kept)

    def alloc(self, size: int, align: int, below: int, type: int) -> int:
        """Take RAM for something else: the highest that fits below ``below``.

        ``align`` is a power of two.  DeviceError: there is none.
        """
        for entry in reversed(self.entries):
            base = (min(entry.end, below) - size) & -align
            if entry.type == RAM and base >= entry.base:
                self.add(base, base + size, type)
                return base
        raise DeviceError(f"there is no RAM for {size:#x} bytes below {below:#x}")

    def to_bytes(self) -> bytes:
        """The records that fw_cfg's ``etc/e820`` and the boot protocols use."""
        return b"".join(
            ENTRY.pack(entry.base, entry.end - entry.base, entry.type)
            for entry in self.entries
        )
