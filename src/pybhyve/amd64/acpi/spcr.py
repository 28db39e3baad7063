"""SPCR: the serial port that is the console, COM1 (Microsoft, SPCR table)."""

from __future__ import annotations

import struct
from typing import Final

from pybhyve.amd64.acpi.table import (
    ACCESS_BYTE,
    SPACE_IO,
    Table,
    address,
    build_table,
)

COM1_PORT: Final = 0x3F8
COM1_IRQ: Final = 4

INTERFACE_16550: Final = 0
INTERRUPT_8259: Final = 1
BAUD_115200: Final = 7
FLOW_CONTROL: Final = 3  # DCD and RTS/CTS
VT_UTF8: Final = 2
NO_PCI_ID: Final = 0xFFFF


def build_spcr() -> Table:
    """COM1 at 115200 baud, no parity, one stop bit."""
    body = struct.pack("<B3x", INTERFACE_16550)
    body += address(SPACE_IO, 8, COM1_PORT, ACCESS_BYTE)
    body += struct.pack("<BBI", INTERRUPT_8259, COM1_IRQ, 0)
    body += struct.pack("<BBBBBx", BAUD_115200, 0, 1, FLOW_CONTROL, VT_UTF8)
    body += struct.pack("<HHBBBIB4x", NO_PCI_ID, NO_PCI_ID, 0, 0, 0, 0, 0)
    return build_table("SPCR", 1, body)
