"""Multiboot 1 kernels: ELF, or any file whose header says where it goes.

Multiboot Specification 0.6.96; section numbers below are its own.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from pybhyve.bhyveload import elf
from pybhyve.bhyveload.entry import enter32
from pybhyve.bhyveload.image import Image
from pybhyve.bhyveload.plan import HIGH_START, CpuState, LoadPlan
from pybhyve.errors import ImageError
from pybhyve.layout import Layout

# 3.1 The header: 4-byte aligned in the first 8 KiB.
HEADER: Final = Layout("<3I", "magic flags checksum")
ADDRESSES: Final = Layout(
    "<5I", "header_addr load_addr load_end_addr bss_end_addr entry_addr"
)
MAGIC: Final = 0x1BADB002
SEARCH_SIZE: Final = 8192
ALIGN: Final = 4
FLAG_PAGE_ALIGN: Final = 1 << 0  # modules always are
FLAG_MEMORY_INFO: Final = 1 << 1  # always given
FLAG_VIDEO: Final = 1 << 2  # a wish; there is no graphics mode to give
FLAG_ADDRESSES: Final = 1 << 16
REQUIRED_MASK: Final = 0xFFFF  # a loader refuses a bit here that it does not know
KNOWN: Final = FLAG_PAGE_ALIGN | FLAG_MEMORY_INFO | FLAG_VIDEO

# 3.3 What the kernel gets.
LOADER_MAGIC: Final = 0x2BADB002
LOADER_NAME: Final = b"bhyveload\0"
INFO: Final = Layout(
    "<7I16x2I12xI48x",
    "flags mem_lower mem_upper boot_device cmdline mods_count mods_addr"
    " mmap_length mmap_addr boot_loader_name",
)
INFO_MEMORY: Final = 1 << 0
INFO_CMDLINE: Final = 1 << 2
INFO_MODS: Final = 1 << 3
INFO_MMAP: Final = 1 << 6
INFO_LOADER_NAME: Final = 1 << 9
MODULE: Final = Layout("<4I", "mod_start mod_end string reserved")
MMAP_ENTRY: Final = Layout("<I2QI", "size base_addr length type")
KIB: Final = 1024


class Addresses(NamedTuple):
    """Where a file without an ELF header goes."""

    offset: int  # in the file
    load: int
    load_end: int  # 0: to the end of the file
    bss_end: int  # 0: no bss
    entry: int


class Header(NamedTuple):
    """A multiboot header: what it asks for, and its address fields if it has any."""

    addresses: Addresses | None


def find(image: Image) -> Header | None:
    """The multiboot header; None without one.  Raises ImageError for a bad one."""
    data = image.data[:SEARCH_SIZE]
    pattern = struct.pack("<I", MAGIC)
    offset = data.find(pattern)
    while offset >= 0:
        if offset % ALIGN == 0 and offset + HEADER.size <= len(data):
            header = HEADER.unpack(data, offset)
            if sum(header) & 0xFFFFFFFF == 0:
                return _parse(image, offset, header.flags)
        offset = data.find(pattern, offset + 1)
    return None


def _parse(image: Image, offset: int, flags: int) -> Header:
    if unknown := flags & REQUIRED_MASK & ~KNOWN:
        raise ImageError(
            f"its multiboot header demands unknown features ({unknown:#x})"
        )
    if not flags & FLAG_ADDRESSES:
        return Header(None)
    fields = ADDRESSES.unpack(
        image.bytes(offset + HEADER.size, ADDRESSES.size, "the multiboot header")
    )
    if fields.load_addr > fields.header_addr:
        raise ImageError("its multiboot header is outside what it says to load")
    return Header(
        Addresses(
            offset - (fields.header_addr - fields.load_addr),
            fields.load_addr,
            fields.load_end_addr,
            fields.bss_end_addr,
            fields.entry_addr,
        )
    )


def place_kernel(plan: LoadPlan, image: Image, addresses: Addresses | None) -> int:
    """Place a kernel by its address fields or its ELF headers; return its entry.

    Raises ImageError.
    """
    if addresses is None:
        if not elf.recognise(image):
            raise ImageError(
                "its multiboot header has no addresses, and the file is not ELF"
            )
        file = elf.parse(image)
        elf.place(plan, image, file)
        return elf.physical_entry(file)
    offset, load, load_end, bss_end, entry = addresses
    if load_end == 0:
        load_end = load + len(image) - offset
    if load_end < load:
        raise ImageError(f"its header says to load from {load:#x} to {load_end:#x}")
    data = image.bytes(offset, load_end - load, "the kernel that its header describes")
    plan.place("the kernel", load, data, bss_end - load)
    if not load <= entry < load_end:
        raise ImageError(
            f"the entry point {entry:#x} is not in the kernel at {load:#x} to"
            f" {load_end:#x}"
        )
    return entry


def memory_kib(plan: LoadPlan) -> tuple[int, int]:
    """KiB from address 0, and KiB from 1 MiB up to the first hole."""
    lower = plan.ram[0].end // KIB if plan.ram else 0
    return lower, max(plan.lowmem - HIGH_START, 0) // KIB


def place_module(plan: LoadPlan, initrd: bytes) -> int:
    """Place the module behind the kernel, as GRUB does: some kernels map only there."""
    return plan.place_lowest("the initrd", initrd, HIGH_START)


def load(
    plan: LoadPlan, image: Image, header: Header, initrd: bytes | None, cmdline: bytes
) -> CpuState:
    """Place the kernel and what it needs.  Raises ImageError."""
    entry = place_kernel(plan, image, header.addresses)
    cmdline_gpa = plan.place_lowest("the command line", cmdline + b"\0")
    mods_addr = 0
    if initrd is not None:
        start = place_module(plan, initrd)
        # A module has its own command line; ours is the kernel's, theirs is empty.
        empty = cmdline_gpa + len(cmdline)
        module = MODULE.pack(start, start + len(initrd), empty, 0)
        mods_addr = plan.place_lowest("the module list", module)
    mmap = b"".join(
        MMAP_ENTRY.pack(MMAP_ENTRY.size - 4, line.base, line.end - line.base, line.type)
        for line in plan.e820.entries
    )
    info = INFO.pack(
        INFO_MEMORY | INFO_CMDLINE | INFO_MODS | INFO_MMAP | INFO_LOADER_NAME,
        *memory_kib(plan),
        0,
        cmdline_gpa,
        0 if initrd is None else 1,
        mods_addr,
        len(mmap),
        plan.place_lowest("the memory map", mmap),
        plan.place_lowest("the loader's name", LOADER_NAME),
    )
    info_gpa = plan.place_lowest("the multiboot information", info)
    return enter32(plan, entry, rax=LOADER_MAGIC, rbx=info_gpa)
