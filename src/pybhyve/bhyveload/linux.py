"""Linux bzImage, and what else speaks its boot protocol (memtest86+).

Linux Documentation/arch/x86/boot.rst and zero-page.rst; section names below are theirs.
Real-mode code is skipped: the kernel is entered by the 64-bit boot protocol, or by the
32-bit one where XLF_KERNEL_64 is not set.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from pybhyve.amd64.e820 import FOUR_GIB
from pybhyve.bhyveload.entry import enter32, enter64
from pybhyve.bhyveload.image import Image
from pybhyve.bhyveload.plan import HIGH_START, CpuState, LoadPlan
from pybhyve.errors import ImageError

DEFAULT_CMDLINE: Final = "console=ttyS0"

# The real-mode kernel header: offsets in the file, and the same in the zero page.
SETUP_SECTS: Final = 0x1F1
SYSSIZE: Final = 0x1F4
VID_MODE: Final = 0x1FA
BOOT_FLAG: Final = 0x1FE
HEADER_LENGTH: Final = 0x201  # operand of the jump at 0x200, which ends the header
HEADER_MAGIC: Final = 0x202
VERSION: Final = 0x206
TYPE_OF_LOADER: Final = 0x210
LOADFLAGS: Final = 0x211
RAMDISK_IMAGE: Final = 0x218
RAMDISK_SIZE: Final = 0x21C
EXT_LOADER_VER: Final = 0x226
EXT_LOADER_TYPE: Final = 0x227
CMD_LINE_PTR: Final = 0x228
INITRD_ADDR_MAX: Final = 0x22C  # 2.03
KERNEL_ALIGNMENT: Final = 0x230  # 2.05
RELOCATABLE_KERNEL: Final = 0x234  # 2.05
XLOADFLAGS: Final = 0x236  # 2.12
CMDLINE_SIZE: Final = 0x238  # 2.06
SETUP_DATA: Final = 0x250
PREF_ADDRESS: Final = 0x258  # 2.10
INIT_SIZE: Final = 0x260  # 2.10
HEADER_END: Final = 0x290  # the zero page has other things from here

# The zero page only.
EXT_RAMDISK_IMAGE: Final = 0x0C0
EXT_RAMDISK_SIZE: Final = 0x0C4
E820_ENTRIES: Final = 0x1E8
E820_TABLE: Final = 0x2D0
ZERO_PAGE_SIZE: Final = 4096

BOOT_FLAG_VALUE: Final = 0xAA55
MAGIC: Final = b"HdrS"
OLDEST: Final = 0x0202  # the first with cmd_line_ptr
LOADED_HIGH: Final = 1 << 0
XLF_KERNEL_64: Final = 1 << 0
XLF_CAN_BE_LOADED_ABOVE_4G: Final = 1 << 1
LOADER_UNDEFINED: Final = 0xFF  # "no ID assigned"
VID_MODE_NORMAL: Final = 0xFFFF
ENTRY64_OFFSET: Final = 0x200

# What a field means in protocols that do not have it.
OLD_CMDLINE_SIZE: Final = 255
OLD_INITRD_ADDR_MAX: Final = 0x37FFFFFF

SECTOR: Final = 512
PARAGRAPH: Final = 16


class Header(NamedTuple):
    """What a loader needs of the kernel header, with defaults for old protocols."""

    setup_size: int  # bytes of real-mode code at the file's start
    system_size: int  # bytes of protected-mode code behind it
    load_address: int
    run_address: int  # where the kernel moves itself before it starts
    run_size: int  # bytes it needs there before it looks at the memory map
    initrd_addr_max: int  # highest address of an initrd's last byte
    initrd_above_4g: bool
    cmdline_size: int  # without its NUL
    is_64bit: bool


def recognise(image: Image) -> bool:
    """Whether this is for Linux' boot protocol, well-formed or not."""
    return image.data[HEADER_MAGIC : HEADER_MAGIC + len(MAGIC)] == MAGIC


def parse(image: Image) -> Header:
    """Check the header and read it.  Raises ImageError."""
    header_end = HEADER_MAGIC + image.uint(HEADER_LENGTH, 1)
    image.bytes(0, header_end, "the kernel header")

    def field(offset: int, size: int, since: int, default: int) -> int:
        if version < since or offset + size > header_end:
            return default
        return image.uint(offset, size)

    version = image.uint(VERSION, 2)
    if image.uint(BOOT_FLAG, 2) != BOOT_FLAG_VALUE:
        raise ImageError("a Linux kernel header without the boot sector's mark 0xaa55")
    if version < OLDEST:
        raise ImageError(
            f"speaks Linux boot protocol {version >> 8}.{version & 0xFF:02},"
            " and the oldest known is 2.02"
        )
    if not image.uint(LOADFLAGS, 1) & LOADED_HIGH:
        raise ImageError(
            "is a zImage, which only a BIOS can start; a bzImage is needed"
        )

    setup_size = ((image.uint(SETUP_SECTS, 1) or 4) + 1) * SECTOR
    # Before 2.04 the upper half of this field is something else.
    system_size = image.uint(SYSSIZE, 4 if version >= 0x0204 else 2) * PARAGRAPH
    image.bytes(0, setup_size + 1, "the protected-mode kernel")
    present = len(image) - setup_size
    if version < 0x0204:
        system_size = present
    # The size counts paragraphs, so the last one may be incomplete.
    if system_size - present >= PARAGRAPH:
        raise ImageError(
            f"truncated: the header announces {system_size} bytes of kernel,"
            f" the file has {present}"
        )
    system_size = min(system_size, present)
    if system_size == 0:
        raise ImageError("has a header, but no kernel behind it")

    xloadflags = field(XLOADFLAGS, 2, 0x020C, 0)
    run_address = field(PREF_ADDRESS, 8, 0x020A, HIGH_START)
    load_address = HIGH_START
    if field(RELOCATABLE_KERNEL, 1, 0x0205, 0):
        alignment = field(KERNEL_ALIGNMENT, 4, 0x0205, 1)
        if alignment == 0 or alignment & (alignment - 1):
            raise ImageError(f"kernel_alignment {alignment:#x} is not a power of two")
        # Loaded below pref_address it would only move itself there.
        run_address = -(-run_address // alignment) * alignment
        load_address = run_address
    return Header(
        setup_size=setup_size,
        system_size=system_size,
        load_address=load_address,
        run_address=run_address,
        run_size=field(INIT_SIZE, 4, 0x020A, 0),
        initrd_addr_max=field(INITRD_ADDR_MAX, 4, 0x0203, OLD_INITRD_ADDR_MAX),
        initrd_above_4g=bool(xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G),
        cmdline_size=field(CMDLINE_SIZE, 4, 0x0206, OLD_CMDLINE_SIZE),
        is_64bit=bool(xloadflags & XLF_KERNEL_64),
    )


def load(
    plan: LoadPlan, image: Image, initrd: bytes | None, cmdline: bytes
) -> CpuState:
    """Place the kernel and what it needs.  Raises ImageError."""
    header = parse(image)
    if len(cmdline) > header.cmdline_size:
        raise ImageError(
            f"the command line has {len(cmdline)} bytes, and this kernel takes at most"
            f" {header.cmdline_size}"
        )
    kernel = image.bytes(header.setup_size, header.system_size, "the kernel")
    _place_kernel(plan, header, kernel)
    cmdline_gpa = plan.place_lowest("the command line", cmdline + b"\0")
    initrd_gpa = 0
    if initrd is not None:
        initrd_gpa = _place_initrd(plan, header, initrd)
    zero_page = plan.place_lowest(
        "the zero page",
        _zero_page(plan, image, cmdline_gpa, initrd_gpa, len(initrd or b"")),
    )
    if header.is_64bit:
        entry = header.load_address + ENTRY64_OFFSET
        return enter64(plan, entry, rsi=zero_page)
    return enter32(plan, header.load_address, rsi=zero_page)


def _place_kernel(plan: LoadPlan, header: Header, kernel: memoryview) -> None:
    load, run = header.load_address, header.run_address
    if load == run:
        plan.place("the kernel", load, kernel, header.run_size)
        return
    plan.place("the kernel", load, kernel)
    # A kernel that cannot relocate is loaded at 1 MiB and moves itself: what it does
    # not overwrite with its own image must stay free of the rest.
    run = max(run, load + len(kernel))
    end = header.run_address + header.run_size
    if end > run:
        plan.place("the kernel's working memory", run, b"", end - run)


def _place_initrd(plan: LoadPlan, header: Header, initrd: bytes) -> int:
    limit = min(header.initrd_addr_max + 1, FOUR_GIB)
    try:
        return plan.place_highest("the initrd", initrd, limit)
    except ImageError:
        if not header.initrd_above_4g:
            raise
    return plan.place_highest("the initrd", initrd, FOUR_GIB + plan.highmem)


def _zero_page(
    plan: LoadPlan, image: Image, cmdline: int, initrd: int, initrd_size: int
) -> bytes:
    page = bytearray(ZERO_PAGE_SIZE)
    end = min(HEADER_MAGIC + image.uint(HEADER_LENGTH, 1), HEADER_END)
    page[SETUP_SECTS:end] = image.bytes(SETUP_SECTS, end - SETUP_SECTS, "the header")
    for offset, format, value in (
        (VID_MODE, "<H", VID_MODE_NORMAL),
        (TYPE_OF_LOADER, "<B", LOADER_UNDEFINED),
        (EXT_LOADER_VER, "<B", 0),
        (EXT_LOADER_TYPE, "<B", 0),
        (CMD_LINE_PTR, "<I", cmdline),
        (RAMDISK_IMAGE, "<I", initrd & 0xFFFFFFFF),
        (EXT_RAMDISK_IMAGE, "<I", initrd >> 32),
        (RAMDISK_SIZE, "<I", initrd_size & 0xFFFFFFFF),
        (EXT_RAMDISK_SIZE, "<I", initrd_size >> 32),
        (SETUP_DATA, "<Q", 0),
        (E820_ENTRIES, "<B", len(plan.e820.entries)),
    ):
        struct.pack_into(format, page, offset, value)
    # acpi_rsdp_addr stays 0: whether `bhyve` will make ACPI tables is not known here,
    # and it puts them where a kernel without an address looks (0xF2400).
    e820 = plan.e820.to_bytes()
    page[E820_TABLE : E820_TABLE + len(e820)] = e820
    return bytes(page)
