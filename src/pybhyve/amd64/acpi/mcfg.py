"""MCFG: where PCI configuration space is in memory (PCI Firmware 3.0, 4.1.2)."""

from __future__ import annotations

import struct

from pybhyve.amd64.acpi.table import Table, build_table
from pybhyve.pci.bus import ECAM_BASE
from pybhyve.pci.pcireg import BUSES


def build_mcfg() -> Table:
    """All buses of segment 0."""
    return build_table("MCFG", 1, struct.pack("<8xQHBB4x", ECAM_BASE, 0, 0, BUSES - 1))
