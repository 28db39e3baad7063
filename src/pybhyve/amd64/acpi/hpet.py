"""The HPET's table (IA-PC HPET Specification 1.0a, 3.2.4)."""

from __future__ import annotations

import struct
from typing import Final

from pybhyve.amd64.acpi.table import SPACE_MEMORY, Table, address, build_table

HPET_BASE: Final = 0xFED00000
HPET_SIZE: Final = 0x400
PAGE_PROTECT_4K: Final = 1


def build_hpet(capabilities: int) -> Table:
    """``capabilities`` is the HPET's register; its low half is the block id."""
    body = struct.pack("<I", capabilities & 0xFFFFFFFF)
    body += address(SPACE_MEMORY, 0, HPET_BASE)
    body += struct.pack("<BHB", 0, 0, PAGE_PROTECT_4K)
    return build_table("HPET", 1, body)
