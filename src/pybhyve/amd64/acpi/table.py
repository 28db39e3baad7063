"""What all ACPI tables share: the header, checksums, generic addresses."""

from __future__ import annotations

import struct
from typing import Final

OEM_ID: Final = b"BHYVE "
CREATOR_ID: Final = b"BASL"
CREATOR_REVISION: Final = 0x20220504
HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")  # ACPI 6.5, table 5.4
_CHECKSUM_AT: Final = 9

SPACE_IO: Final = 1  # address space ids (5.2.3.2)
SPACE_MEMORY: Final = 0
ACCESS_UNDEFINED: Final = 0
ACCESS_BYTE: Final = 1
ACCESS_WORD: Final = 2
ACCESS_DWORD: Final = 3


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of ``data``, with it, zero."""
    return -sum(data) & 0xFF


def build_table(signature: str, revision: int, body: bytes) -> bytes:
    """A table with header and checksum.

    The OEM table id is bhyve's: cut to seven characters and a NUL.
    """
    table_id = f"BV{signature}  "[:7].encode() + b"\0"
    table = bytearray(
        HEADER.pack(
            signature.encode(),
            HEADER.size + len(body),
            revision,
            0,
            OEM_ID,
            table_id,
            1,
            CREATOR_ID,
            CREATOR_REVISION,
        )
        + body
    )
    table[_CHECKSUM_AT] = checksum(table)
    return bytes(table)


def address(space: int, bits: int, where: int, access: int = ACCESS_UNDEFINED) -> bytes:
    """A generic address structure for ``bits`` bits at ``where``."""
    return struct.pack("<BBBBQ", space, bits, 0, access, where)


NO_ADDRESS: Final = address(0, 0, 0)
