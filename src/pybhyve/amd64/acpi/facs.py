"""FACS, firmware control: the waking vector and the global lock (ACPI 6.5, 5.2.10)."""

from __future__ import annotations

import struct


def build_facs() -> bytes:
    """Version 2, 64 bytes, everything else zero; it has no checksum."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)
