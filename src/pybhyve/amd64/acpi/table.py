"""What all ACPI tables share: the header, checksums, pointers, generic addresses.

A :class:`Table` does not know where tables will be: that is for whoever puts them into
memory (build.py), or for firmware that follows a loader script (loader.py).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

OEM_ID: Final = b"BHYVE "
CREATOR_ID: Final = b"BASL"
CREATOR_REVISION: Final = 0x20220504
HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")  # ACPI 6.5, table 5.4
_CHECKSUM_AT: Final = 9
_ALIGN: Final = 16

SPACE_IO: Final = 1  # address space ids (5.2.3.2)
SPACE_MEMORY: Final = 0
ACCESS_UNDEFINED: Final = 0
ACCESS_BYTE: Final = 1
ACCESS_WORD: Final = 2
ACCESS_DWORD: Final = 3


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of ``data``, with it, zero."""
    return -sum(data) & 0xFF


class Pointer(NamedTuple):
    """The address of table ``target``, in ``size`` bytes."""

    target: str
    size: int


class Checksum(NamedTuple):
    """A byte at ``offset`` that makes the sum of ``length`` bytes from 0 on zero."""

    offset: int
    length: int


@dataclass(slots=True, frozen=True)
class Table:
    """A table; its pointers and checksums are zero in ``data``."""

    name: str
    data: bytes
    pointers: tuple[tuple[int, Pointer], ...]  # with their offsets
    checksums: tuple[Checksum, ...]  # in the order in which they are to be made
    align: int

    def at(self, addresses: Mapping[str, int]) -> bytes:
        """The bytes when the tables have these addresses."""
        data = bytearray(self.data)
        for offset, (target, size) in self.pointers:
            data[offset : offset + size] = addresses[target].to_bytes(size, "little")
        for offset, length in self.checksums:
            data[offset] = checksum(data[:length])
        return bytes(data)


def make_table(
    name: str,
    *parts: bytes | Pointer,
    checksums: tuple[Checksum, ...] = (),
    align: int = _ALIGN,
) -> Table:
    """A table of these parts, without a header."""
    data = b""
    pointers = []
    for part in parts:
        if isinstance(part, Pointer):
            pointers.append((len(data), part))
            data += bytes(part.size)
        else:
            data += part
    return Table(name, data, tuple(pointers), checksums, align)


def build_table(signature: str, revision: int, *parts: bytes | Pointer) -> Table:
    """A table with header and checksum.

    The OEM table id is bhyve's: cut to seven characters and a NUL.
    """
    length = HEADER.size
    for part in parts:
        length += part.size if isinstance(part, Pointer) else len(part)
    header = HEADER.pack(
        signature.encode(),
        length,
        revision,
        0,
        OEM_ID,
        f"BV{signature}  "[:7].encode() + b"\0",
        1,
        CREATOR_ID,
        CREATOR_REVISION,
    )
    checksum = Checksum(_CHECKSUM_AT, length)
    return make_table(signature, header, *parts, checksums=(checksum,))


def address(space: int, bits: int, where: int, access: int = ACCESS_UNDEFINED) -> bytes:
    """A generic address structure for ``bits`` bits at ``where``."""
    return struct.pack("<BBBBQ", space, bits, 0, access, where)


NO_ADDRESS: Final = address(0, 0, 0)
