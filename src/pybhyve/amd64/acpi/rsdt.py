"""RSDT and XSDT, the lists of all other tables (ACPI 6.5, 5.2.7 and 5.2.8)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from pybhyve.amd64.acpi.table import build_table


def build_rsdt(tables: Sequence[int]) -> bytes:
    """32-bit addresses of the tables."""
    return build_table("RSDT", 1, struct.pack(f"<{len(tables)}I", *tables))


def build_xsdt(tables: Sequence[int]) -> bytes:
    """64-bit addresses of the tables."""
    return build_table("XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables))
