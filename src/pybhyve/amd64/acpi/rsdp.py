"""RSDP, the pointer to the root tables (ACPI 6.5, 5.2.5.3)."""

from __future__ import annotations

import struct

from pybhyve.amd64.acpi.table import OEM_ID, Checksum, Pointer, Table, make_table


def build_rsdp() -> Table:
    """Revision 2, with both pointers and both checksums."""
    return make_table(
        "RSDP",
        struct.pack("<8sB6sB", b"RSD PTR ", 0, OEM_ID, 2),
        Pointer("RSDT", 4),
        struct.pack("<I", 36),
        Pointer("XSDT", 8),
        bytes(4),
        checksums=(Checksum(8, 20), Checksum(32, 36)),
    )
