"""Multiboot 2 kernels for i386: ELF, or any file whose header says where it goes.

Multiboot2 Specification 2.0; section numbers below are its own.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from pybhyve.bhyveload.entry import enter32
from pybhyve.bhyveload.image import Image
from pybhyve.bhyveload.multiboot import (
    LOADER_NAME,
    Addresses,
    memory_kib,
    place_kernel,
    place_module,
)
from pybhyve.bhyveload.plan import CpuState, LoadPlan
from pybhyve.errors import ImageError
from pybhyve.layout import Layout

# 3.1 The header: 8-byte aligned in the first 32 KiB, then tags.
HEADER: Final = Layout("<4I", "magic architecture header_length checksum")
TAG: Final = Layout("<2HI", "type flags size")
ADDRESS_TAG: Final = Layout("<4I", "header_addr load_addr load_end_addr bss_end_addr")
MAGIC: Final = 0xE85250D6
SEARCH_SIZE: Final = 32768
ALIGN: Final = 8
ARCHITECTURE_I386: Final = 0
TAG_OPTIONAL: Final = 1 << 0
TAG_END: Final = 0
TAG_INFORMATION_REQUEST: Final = 1
TAG_ADDRESS: Final = 2
TAG_ENTRY_ADDRESS: Final = 3
TAG_CONSOLE_FLAGS: Final = 4  # a wish: EGA text, which is not there
TAG_FRAMEBUFFER: Final = 5  # a wish
TAG_MODULE_ALIGN: Final = 6  # modules always are page aligned
TAG_RELOCATABLE: Final = 10  # a permission, not used
HARMLESS: Final = (
    TAG_CONSOLE_FLAGS,
    TAG_FRAMEBUFFER,
    TAG_MODULE_ALIGN,
    TAG_RELOCATABLE,
)

# 3.6 What the kernel gets.
LOADER_MAGIC: Final = 0x36D76289
INFO_END: Final = 0
INFO_CMDLINE: Final = 1
INFO_LOADER_NAME: Final = 2
INFO_MODULE: Final = 3
INFO_BASIC_MEMORY: Final = 4
INFO_MMAP: Final = 6
GIVEN: Final = (
    INFO_CMDLINE,
    INFO_LOADER_NAME,
    INFO_MODULE,
    INFO_BASIC_MEMORY,
    INFO_MMAP,
)
MMAP_ENTRY: Final = Layout("<2Q2I", "base_addr length type reserved")


class Header(NamedTuple):
    """A multiboot 2 header: its address and entry tags if it has them."""

    addresses: Addresses | None
    entry: int | None


def find(image: Image) -> Header | None:
    """The multiboot 2 header; None without one.  Raises ImageError for a bad one."""
    data = image.data[:SEARCH_SIZE]
    pattern = struct.pack("<I", MAGIC)
    offset = data.find(pattern)
    while offset >= 0:
        if offset % ALIGN == 0 and offset + HEADER.size <= len(data):
            header = HEADER.unpack(data, offset)
            if sum(header) & 0xFFFFFFFF == 0:
                if header.architecture != ARCHITECTURE_I386:
                    raise ImageError("its multiboot 2 header is for another processor")
                return _parse(image, offset, header.header_length)
        offset = data.find(pattern, offset + 1)
    return None


def _parse(image: Image, offset: int, length: int) -> Header:
    what = "the multiboot 2 header"
    # Longer than where it must lie it cannot be, whatever it says.
    end = offset + min(length, SEARCH_SIZE)
    address_tag = entry = None
    position = offset + HEADER.size
    while position + TAG.size <= end:
        tag = TAG.unpack(image.bytes(position, TAG.size, what))
        if tag.type == TAG_END:
            break
        if tag.size < TAG.size:
            raise ImageError(
                f"a tag in {what} is {tag.size} bytes long, less than its head"
            )
        contents = image.bytes(position + TAG.size, tag.size - TAG.size, what)
        position += -(-tag.size // ALIGN) * ALIGN
        if tag.type == TAG_ADDRESS and len(contents) >= ADDRESS_TAG.size:
            address_tag = ADDRESS_TAG.unpack(contents)
        elif tag.type == TAG_ENTRY_ADDRESS and len(contents) >= 4:
            entry = int.from_bytes(contents[:4], "little")
        elif tag.type == TAG_INFORMATION_REQUEST:
            wanted = struct.unpack(
                f"<{len(contents) // 4}I", contents[: len(contents) & ~3]
            )
            missing = sorted(set(wanted) - set(GIVEN))
            if missing and not tag.flags & TAG_OPTIONAL:
                raise ImageError(
                    f"{what} demands information that is not there: {missing}"
                )
        elif tag.type not in HARMLESS and not tag.flags & TAG_OPTIONAL:
            raise ImageError(f"{what} demands an unknown feature (tag {tag.type})")
    if address_tag is None:
        return Header(None, entry)
    if entry is None:
        raise ImageError(f"{what} says where to load, but not where to start")
    header_addr, load, load_end, bss_end = address_tag
    if load == 0xFFFFFFFF:  # "from the beginning of the file"
        load = header_addr - offset
    file_offset = offset - (header_addr - load)
    return Header(Addresses(file_offset, load, load_end, bss_end, entry), entry)


def load(
    plan: LoadPlan, image: Image, header: Header, initrd: bytes | None, cmdline: bytes
) -> CpuState:
    """Place the kernel and what it needs.  Raises ImageError."""
    entry = place_kernel(plan, image, header.addresses)
    if header.entry is not None:
        entry = header.entry
    tags = [
        _tag(INFO_CMDLINE, cmdline + b"\0"),
        _tag(INFO_LOADER_NAME, LOADER_NAME),
        _tag(INFO_BASIC_MEMORY, struct.pack("<2I", *memory_kib(plan))),
    ]
    if initrd is not None:
        start = place_module(plan, initrd)
        module = struct.pack("<2I", start, start + len(initrd)) + b"\0"
        tags.append(_tag(INFO_MODULE, module))
    mmap = b"".join(
        MMAP_ENTRY.pack(line.base, line.end - line.base, line.type, 0)
        for line in plan.e820.entries
    )
    tags.append(_tag(INFO_MMAP, struct.pack("<2I", MMAP_ENTRY.size, 0) + mmap))
    tags.append(_tag(INFO_END, b""))
    body = b"".join(tags)
    info = struct.pack("<2I", 8 + len(body), 0) + body
    info_gpa = plan.place_lowest("the multiboot 2 information", info)
    return enter32(plan, entry, rax=LOADER_MAGIC, rbx=info_gpa)


def _tag(type: int, contents: bytes) -> bytes:
    tag = struct.pack("<2I", type, 8 + len(contents)) + contents
    return tag + bytes(-len(tag) % ALIGN)
