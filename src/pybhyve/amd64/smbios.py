"""SMBIOS: what the machine says it is (DMTF DSP0134, System Management BIOS 2.8).

The entry point and the structures are in memory at 0xF1000, and in fw_cfg for firmware
that has QEMU's.  bhyve: smbiostbl.c.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from pybhyve.amd64.acpi.table import checksum
from pybhyve.errors import BhyveError
from pybhyve.vmmapi import HIGHMEM_BASE

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.variables import GlobalOptions

SMBIOS_BASE: Final = 0xF1000
SMBIOS_LIMIT: Final = 0xF2400  # where the ACPI tables begin

# deviation: bhyve says 2.6, and has fields of 2.7 and 2.8.
VERSION: Final = (2, 8)
ENTRY_POINT: Final = struct.Struct("<4sBBBBHB5x5sBHIHB")  # 5.2.1
ENTRY_POINT_MIDDLE: Final = 0x10  # from here on the intermediate checksum counts
_CHECKSUM_AT: Final = 4
_MIDDLE_CHECKSUM_AT: Final = 0x15

HEADER: Final = struct.Struct("<BBH")  # type, length, handle: 6.1.2
NO_HANDLE: Final = 0xFFFF
NO_ERROR_INFORMATION: Final = 0xFFFE  # in place of a handle: 7.17, 7.18
ANCHOR_FILE: Final = "etc/smbios/smbios-anchor"
TABLES_FILE: Final = "etc/smbios/smbios-tables"

# 7.1: BIOS characteristics, and their two extension bytes
BIOS_ISA: Final = 1 << 4
BIOS_PCI: Final = 1 << 7
BIOS_SHADOWING: Final = 1 << 12
BIOS_BOOT_CD: Final = 1 << 15
BIOS_EDD: Final = 1 << 19
BIOS_EXT1_ACPI: Final = 1 << 0
BIOS_EXT2_BBS: Final = 1 << 0
BIOS_EXT2_VM: Final = 1 << 4
BIOS_SEGMENT: Final = 0xF000
NO_RELEASE: Final = 0xFF

WAKEUP_POWER_SWITCH: Final = 6  # 7.2.2
BOARD_HOSTING: Final = 1 << 0  # 7.3.1
BOARD_MOTHERBOARD: Final = 0x0A  # 7.3.2
CHASSIS_UNKNOWN: Final = 2  # 7.4.1
CHASSIS_SAFE: Final = 3  # 7.4.2
CHASSIS_SECURITY_NONE: Final = 3  # 7.4.3

PROCESSOR_CENTRAL: Final = 3  # 7.5.1
PROCESSOR_FAMILY_OTHER: Final = 1  # 7.5.2
PROCESSOR_ENABLED: Final = 0x41  # 7.5, status: the socket is populated too
PROCESSOR_UPGRADE_NONE: Final = 6  # 7.5.5
PROCESSOR_64BIT: Final = 1 << 2  # 7.5.9

ARRAY_ON_BOARD: Final = 3  # 7.17.1
ARRAY_SYSTEM: Final = 3  # 7.17.2
ARRAY_NO_ECC: Final = 3  # 7.17.3
ARRAY_EXTENDED: Final = 0x80000000  # KiB: the capacity is in the extended field
DEVICE_UNKNOWN: Final = 2  # form factor 7.18.1, type 7.18.2
DEVICE_DETAIL_UNKNOWN: Final = 1 << 2  # 7.18.3
DEVICE_EXTENDED: Final = 0x7FFF  # the size is in the extended field
DEVICE_IN_KIB: Final = 1 << 15
DEVICE_WIDTH: Final = 64
MAPPED_EXTENDED: Final = 0xFFFFFFFF  # the addresses are in the extended fields

KIB: Final = 1 << 10
MIB: Final = 1 << 20


class Structures:
    """The structures being written, handles counted from 1."""

    def __init__(self) -> None:
        self.count = 0
        self.longest = 0
        self.data = b""

    def add(self, type: int, layout: str, *values: int | str | bytes) -> int:
        """Append a structure and return its handle.

        ``layout`` is that of struct, for what follows the header.  A text goes behind
        the structure, its number where the text was; an empty one has the number 0.
        """
        strings: list[bytes] = []
        fields: list[int | bytes] = []
        for value in values:
            if not isinstance(value, str):
                fields.append(value)
            elif value:
                strings.append(value.encode(errors="surrogateescape") + b"\0")
                fields.append(len(strings))
            else:
                fields.append(0)
        self.count += 1
        body = struct.pack(f"<{layout}", *fields)
        structure = HEADER.pack(type, HEADER.size + len(body), self.count) + body
        structure += (b"".join(strings) or b"\0") + b"\0"
        self.longest = max(self.longest, len(structure))
        self.data += structure
        return self.count


def build_smbios(machine: Machine, address: int) -> tuple[bytes, bytes]:
    """The entry point, and the structures, which will be at ``address``.

    BhyveError: the structures do not fit in front of the ACPI tables.
    """
    structures = Structures()
    _firmware(structures, machine.options)
    _chassis(structures, machine.options)
    sockets, cores, threads, _ = machine.vm.get_topology()
    for socket in range(sockets):
        _processor(structures, socket, cores, cores * threads)
    _memory(structures, [*_ram(machine)])
    structures.add(32, "6xB", 0)  # 7.33: no errors detected
    structures.add(127, "")
    room = SMBIOS_LIMIT - SMBIOS_BASE - ENTRY_POINT.size
    if len(structures.data) > room:
        raise BhyveError(
            f"the SMBIOS tables need {len(structures.data)} bytes, {room} are there: "
            "use shorter texts or fewer sockets"
        )
    return _entry_point(structures, address), structures.data


def init_smbios(machine: Machine) -> bytes:
    """Put the tables into fw_cfg; what is to be at SMBIOS_BASE in memory.

    BhyveError: they do not fit.
    """
    address = SMBIOS_BASE + ENTRY_POINT.size
    entry_point, structures = build_smbios(machine, address)
    machine.fwcfg.add_file(ANCHOR_FILE, entry_point)
    machine.fwcfg.add_file(TABLES_FILE, structures)
    return entry_point + structures


def _entry_point(structures: Structures, address: int) -> bytes:
    major, minor = VERSION
    entry_point = bytearray(
        ENTRY_POINT.pack(
            b"_SM_",
            0,
            ENTRY_POINT.size,
            major,
            minor,
            structures.longest,
            0,
            b"_DMI_",
            0,
            len(structures.data),
            address,
            structures.count,
            major << 4 | minor,
        )
    )
    entry_point[_MIDDLE_CHECKSUM_AT] = checksum(entry_point[ENTRY_POINT_MIDDLE:])
    entry_point[_CHECKSUM_AT] = checksum(entry_point)
    return bytes(entry_point)


def _firmware(structures: Structures, options: GlobalOptions) -> None:
    """Types 0, BIOS, and 1, system."""
    structures.add(
        0,
        "BBHBBQBBBBBB",
        options.bios_vendor,
        options.bios_version,
        BIOS_SEGMENT,
        options.bios_release_date,
        0,
        BIOS_ISA | BIOS_PCI | BIOS_SHADOWING | BIOS_BOOT_CD | BIOS_EDD,
        BIOS_EXT1_ACPI,
        BIOS_EXT2_BBS | BIOS_EXT2_VM,
        0,
        0,
        NO_RELEASE,
        NO_RELEASE,
    )
    structures.add(
        1,
        "BBBB16sBBB",
        options.system_manufacturer,
        options.system_product_name,
        options.system_version,
        options.system_serial_number,
        system_uuid(options),
        WAKEUP_POWER_SWITCH,
        options.system_sku,
        options.system_family_name,
    )


def system_uuid(options: GlobalOptions) -> bytes:
    """The UUID as SMBIOS has it: the first three fields are little-endian (7.2.1).

    Made from the names of VM and host if there is none: as bhyve makes it, so that a
    guest finds the one that it had there.
    """
    if options.uuid is not None:
        return options.uuid.bytes_le
    hostname = os.fsencode(os.uname().nodename).ljust(256, b"\0")[:256]
    digest = bytearray(
        hashlib.md5(
            os.fsencode(options.name or "") + hostname, usedforsecurity=False
        ).digest()
    )
    digest[6] = digest[6] & 0x0F | 0x30
    digest[8] = digest[8] & 0x3F | 0x80
    return bytes(digest)


def _chassis(structures: Structures, options: GlobalOptions) -> None:
    """Types 2, board, and 3, chassis, which the board is in."""
    structures.add(
        2,
        "BBBBBBBHBB",
        options.board_manufacturer,
        options.board_product_name,
        options.board_version,
        options.board_serial_number,
        options.board_asset_tag,
        BOARD_HOSTING,
        options.board_location,
        structures.count + 2,  # deviation: bhyve has a 3 whatever the handle is
        BOARD_MOTHERBOARD,
        0,
    )
    structures.add(
        3,
        "BBBBBBBBBIBBBBB",
        options.chassis_manufacturer,
        CHASSIS_UNKNOWN,
        options.chassis_version,
        options.chassis_serial_number,
        options.chassis_asset_tag,
        CHASSIS_SAFE,
        CHASSIS_SAFE,
        CHASSIS_SAFE,
        CHASSIS_SECURITY_NONE,
        0,
        0,
        0,
        0,
        0,
        options.chassis_sku,
    )


def _processor(structures: Structures, socket: int, cores: int, threads: int) -> None:
    """Type 4: a socket."""
    structures.add(
        4,
        "BBBBQBBHHHBBHHHBBBBBBHH",
        f"CPU #{socket}",
        PROCESSOR_CENTRAL,
        PROCESSOR_FAMILY_OTHER,
        " ",
        0,
        " ",
        0,
        0,
        0,
        0,
        PROCESSOR_ENABLED,
        PROCESSOR_UPGRADE_NONE,
        NO_HANDLE,
        NO_HANDLE,
        NO_HANDLE,
        "None",
        "None",
        "None",
        cores,
        0,
        threads,
        PROCESSOR_64BIT,
        PROCESSOR_FAMILY_OTHER,
    )


def _ram(machine: Machine) -> Iterator[tuple[int, int]]:
    """The ranges that are RAM: address and size."""
    yield 0, machine.ctx.lowmem_size
    if machine.ctx.highmem_size:
        yield HIGHMEM_BASE, machine.ctx.highmem_size


def _memory(structures: Structures, ram: list[tuple[int, int]]) -> None:
    """Types 16, array, 17, its one device, and 19, where each range of it is.

    deviation: bhyve counts a device more where there are two ranges, gives the other
    two types a handle that is not the array's, and only has extended fields.
    """
    size = sum(each for _base, each in ram)
    in_kib = size < ARRAY_EXTENDED * KIB
    array = structures.add(
        16,
        "BBBIHHQ",
        ARRAY_ON_BOARD,
        ARRAY_SYSTEM,
        ARRAY_NO_ECC,
        size // KIB if in_kib else ARRAY_EXTENDED,
        NO_ERROR_INFORMATION,
        1,
        0 if in_kib else size,
    )
    short, extended = _device_size(size)
    structures.add(
        17,
        "HHHHHBBBBBHHBBBBBIHHHH",
        array,
        NO_ERROR_INFORMATION,
        DEVICE_WIDTH,
        DEVICE_WIDTH,
        short,
        DEVICE_UNKNOWN,
        0,
        " ",
        " ",
        DEVICE_UNKNOWN,
        DEVICE_DETAIL_UNKNOWN,
        0,
        " ",
        "None",
        "None",
        "None",
        0,
        extended,
        0,
        0,
        0,
        0,
    )
    for base, length in ram:
        last = base + length - 1
        where = (base // KIB, last // KIB, array, 1, 0, 0)
        if last // KIB >= MAPPED_EXTENDED:
            where = (MAPPED_EXTENDED, MAPPED_EXTENDED, array, 1, base, last)
        structures.add(19, "IIHBQQ", *where)


def _device_size(size: int) -> tuple[int, int]:
    """A memory device's size and extended size (7.18.4, 7.18.5)."""
    if size // KIB < DEVICE_EXTENDED:
        return size // KIB | DEVICE_IN_KIB, 0
    if size // MIB < DEVICE_EXTENDED:
        return size // MIB, 0
    return DEVICE_EXTENDED, size // MIB
