"""FADT: the fixed hardware registers, all of them in pm.py (ACPI 6.5, 5.2.9)."""

from __future__ import annotations

import struct
from typing import Final

from pybhyve.amd64 import pm
from pybhyve.amd64.acpi.table import (
    ACCESS_BYTE,
    ACCESS_DWORD,
    ACCESS_WORD,
    NO_ADDRESS,
    SPACE_IO,
    Pointer,
    Table,
    address,
    build_table,
)
from pybhyve.amd64.pci_irq import SCI_IRQ
from pybhyve.amd64.rtc import RTC_CENTURY

# IA-PC boot architecture flags, table 5.10
BOOT_8042: Final = 1 << 1
BOOT_NO_VGA: Final = 1 << 2
BOOT_NO_ASPM: Final = 1 << 4

# Fixed feature flags, table 5.9
WBINVD: Final = 1 << 0
PROC_C1: Final = 1 << 2
SLP_BUTTON: Final = 1 << 5  # set: there is no sleep button among the fixed registers
TMR_VAL_EXT: Final = 1 << 8
RESET_REG_SUP: Final = 1 << 10
HEADLESS: Final = 1 << 12
FORCE_APIC_PHYSICAL: Final = 1 << 19

# Longer than these a state is taken to be absent.
LVL2_ABSENT: Final = 101
LVL3_ABSENT: Final = 1001


def build_fadt() -> Table:
    """Revision 5.1, with the addresses of FACS and DSDT in both widths.

    deviation: bhyve leaves out the flag for the 8042, which is there all the same.
    """
    body = struct.pack(
        "<BBHIBBBB",
        0,
        0,  # preferred profile: unspecified
        SCI_IRQ,
        pm.SMI_CMD,
        pm.ACPI_ENABLE,
        pm.ACPI_DISABLE,
        0,
        0,
    )
    body += struct.pack(
        "<IIIIIIII",
        pm.PM1A_EVT,
        0,
        pm.PM1A_CNT,
        0,
        0,
        pm.PM_TIMER,
        pm.GPE0,
        0,
    )
    body += struct.pack("<BBBBBBBB", 4, 2, 0, 4, pm.GPE0_LEN, 0, 0, 0)
    body += struct.pack(
        "<HHHHBBBBBHBI",
        LVL2_ABSENT,
        LVL3_ABSENT,
        0,
        0,
        0,
        0,
        0,
        0,
        RTC_CENTURY,
        BOOT_8042 | BOOT_NO_VGA | BOOT_NO_ASPM,
        0,
        WBINVD
        | PROC_C1
        | SLP_BUTTON
        | TMR_VAL_EXT
        | RESET_REG_SUP
        | HEADLESS
        | FORCE_APIC_PHYSICAL,
    )
    body += address(SPACE_IO, 8, pm.RESET_REG, ACCESS_BYTE)
    body += struct.pack("<BHB", pm.RESET_VALUE, 0, 1)  # minor version 1
    extended = address(SPACE_IO, 32, pm.PM1A_EVT, ACCESS_WORD)
    extended += NO_ADDRESS
    extended += address(SPACE_IO, 16, pm.PM1A_CNT, ACCESS_WORD)
    extended += NO_ADDRESS
    extended += NO_ADDRESS
    extended += address(SPACE_IO, 32, pm.PM_TIMER, ACCESS_DWORD)
    extended += address(SPACE_IO, 8 * pm.GPE0_LEN, pm.GPE0, ACCESS_BYTE)
    extended += NO_ADDRESS
    extended += NO_ADDRESS
    extended += NO_ADDRESS
    return build_table(
        "FACP",
        5,
        Pointer("FACS", 4),
        Pointer("DSDT", 4),
        body,
        Pointer("FACS", 8),
        Pointer("DSDT", 8),
        extended,
    )
