"""RSDT and XSDT, the lists of all other tables (ACPI 6.5, 5.2.7 and 5.2.8)."""

from __future__ import annotations

from collections.abc import Sequence

from pybhyve.amd64.acpi.table import Pointer, Table, build_table


def build_rsdt(tables: Sequence[str]) -> Table:
    """32-bit addresses of the tables with these names."""
    return build_table("RSDT", 1, *(Pointer(name, 4) for name in tables))


def build_xsdt(tables: Sequence[str]) -> Table:
    """64-bit addresses of the tables with these names."""
    return build_table("XSDT", 1, *(Pointer(name, 8) for name in tables))
