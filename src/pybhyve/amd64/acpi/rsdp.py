"""RSDP, the pointer to the root tables (ACPI 6.5, 5.2.5.3)."""

from __future__ import annotations

import struct

from pybhyve.amd64.acpi.table import OEM_ID, checksum


def build_rsdp(rsdt: int, xsdt: int) -> bytes:
    """Revision 2, with both pointers and both checksums."""
    table = bytearray(
        struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, rsdt, 36, xsdt, 0)
    )
    table[8] = checksum(table[:20])
    table[32] = checksum(table)
    return bytes(table)
