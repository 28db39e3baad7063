"""Resource descriptors, the contents of ``_CRS`` and ``_PRS`` (ACPI 6.5, 6.4)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from pybhyve.amd64.acpi.aml import buffer

_IRQ_LEVEL_LOW_SHARED: Final = 0x18

_MEMORY: Final = 0  # resource types of address space descriptors
_IO: Final = 1
_BUS: Final = 2
_MIN_MAX_FIXED: Final = 0x0C
_ENTIRE_RANGE: Final = 0x03
_READ_WRITE: Final = 0x01
_PREFETCHABLE: Final = 0x06


def template(*descriptors: bytes) -> bytes:
    """A resource template: the descriptors and an end tag, as a buffer."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(base: int, length: int) -> bytes:
    """Fixed I/O ports, 16-bit decoded."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def irq(number: int) -> bytes:
    """An ISA interrupt: edge, active high, exclusive."""
    return struct.pack("<BH", 0x22, 1 << number)


def irq_level_low_shared(numbers: Iterable[int]) -> bytes:
    """One of several ISA interrupts: level, active low, shared."""
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return struct.pack("<BHB", 0x23, mask, _IRQ_LEVEL_LOW_SHARED)


def memory32_fixed(base: int, length: int) -> bytes:
    """Fixed read-write memory below 4 GiB."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, length)


def bus_range(first: int, last: int) -> bytes:
    """Bus numbers that a host bridge passes on."""
    return _address_space("<HHHHH", 0x88, _BUS, 0, first, last)


def io_range(first: int, last: int) -> bytes:
    """Ports that a host bridge passes on, ``last`` included."""
    return _address_space("<HHHHH", 0x88, _IO, _ENTIRE_RANGE, first, last)


def memory32_range(first: int, last: int) -> bytes:
    """Memory below 4 GiB that a host bridge passes on, ``last`` included."""
    return _address_space("<IIIII", 0x87, _MEMORY, _READ_WRITE, first, last)


def memory64_range(first: int, last: int) -> bytes:
    """Prefetchable memory that a host bridge passes on, ``last`` included."""
    return _address_space(
        "<QQQQQ", 0x8A, _MEMORY, _READ_WRITE | _PREFETCHABLE, first, last
    )


def _address_space(
    layout: str, tag: int, kind: int, kind_flags: int, first: int, last: int
) -> bytes:
    body = struct.pack(layout, 0, first, last, 0, last - first + 1)
    head = struct.pack("<BHBBB", tag, 3 + len(body), kind, _MIN_MAX_FIXED, kind_flags)
    return head + body
