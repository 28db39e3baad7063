"""The tables as files of fw_cfg, and the script by which firmware puts them in memory.

QEMU hw/acpi/bios-linker-loader.c is the description there is.  bhyve: qemu_loader.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from pybhyve.amd64.acpi.table import Table
from pybhyve.amd64.qemu_fwcfg import FwCfg

SCRIPT: Final = "etc/table-loader"
ENTRY_SIZE: Final = 128  # a command's number and its arguments, zeros behind them

ALLOCATE: Final = struct.Struct("<I56sIB")  # 1: file, alignment, zone
ADD_POINTER: Final = struct.Struct("<I56s56sIB")  # 2: file, target, offset, size
ADD_CHECKSUM: Final = struct.Struct("<I56sIII")  # 3: file, offset, start, length
ZONE_HIGH: Final = 1
ZONE_FSEG: Final = 2  # 0xF0000 to 0xFFFFF


def add_acpi(fwcfg: FwCfg, tables: Sequence[Table]) -> None:
    """Have firmware install these tables."""
    for table in tables:
        fwcfg.add_file(_file(table.name).decode(), table.data)
    fwcfg.add_file(SCRIPT, loader_script(tables))


def loader_script(tables: Sequence[Table]) -> bytes:
    """The commands: room for all tables, then their pointers, then their checksums."""
    commands = [*_allocations(tables), *_pointers(tables), *_checksums(tables)]
    return b"".join(command.ljust(ENTRY_SIZE, b"\0") for command in commands)


def _file(name: str) -> bytes:
    return b"etc/acpi/" + name.encode()


def _allocations(tables: Sequence[Table]) -> Iterator[bytes]:
    for table in tables:
        # Where there is no EFI, systems look for the RSDP there and nowhere else.
        zone = ZONE_FSEG if table.name == "RSDP" else ZONE_HIGH
        yield ALLOCATE.pack(1, _file(table.name), table.align, zone)


def _pointers(tables: Sequence[Table]) -> Iterator[bytes]:
    for table in tables:
        for offset, (target, size) in table.pointers:
            yield ADD_POINTER.pack(2, _file(table.name), _file(target), offset, size)


def _checksums(tables: Sequence[Table]) -> Iterator[bytes]:
    for table in tables:
        for offset, length in table.checksums:
            yield ADD_CHECKSUM.pack(3, _file(table.name), offset, 0, length)
