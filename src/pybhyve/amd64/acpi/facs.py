"""FACS, firmware control: the waking vector and the global lock (ACPI 6.5, 5.2.10)."""

from __future__ import annotations

import struct
from typing import Final

from pybhyve.amd64.acpi.table import Table, make_table

FACS_ALIGN: Final = 64


def build_facs() -> Table:
    """Version 2, 64 bytes, everything else zero; it has no checksum."""
    body = struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)
    return make_table("FACS", body, align=FACS_ALIGN)
