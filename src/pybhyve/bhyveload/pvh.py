"""ELF kernels with a PVH entry: Linux' vmlinux, NetBSD, FreeBSD, Xen.

Xen docs/misc/pvh.pandoc and include/public/arch-x86/hvm/start_info.h, version 1.
"""

from __future__ import annotations

from typing import Final

from pybhyve.amd64.e820 import FOUR_GIB
from pybhyve.bhyveload import elf
from pybhyve.bhyveload.elf import Elf
from pybhyve.bhyveload.entry import enter32
from pybhyve.bhyveload.image import Image
from pybhyve.bhyveload.plan import CpuState, LoadPlan
from pybhyve.errors import ImageError
from pybhyve.layout import Layout

NOTE_NAME: Final = b"Xen"
XEN_ELFNOTE_PHYS32_ENTRY: Final = 18

START_INFO: Final = Layout(
    "<4I4Q2I",
    "magic version flags nr_modules modlist_paddr cmdline_paddr rsdp_paddr"
    " memmap_paddr memmap_entries reserved",
)
START_MAGIC: Final = 0x336EC578
START_VERSION: Final = 1
MODLIST_ENTRY: Final = Layout("<4Q", "paddr size cmdline_paddr reserved")
MEMMAP_ENTRY: Final = Layout("<2Q2I", "addr size type reserved")


def entry_point(image: Image, file: Elf) -> int | None:
    """The address in the PVH note, None without one.  Raises ImageError."""
    for name, type, contents in elf.notes(image, file):
        if name == NOTE_NAME and type == XEN_ELFNOTE_PHYS32_ENTRY:
            if len(contents) not in (4, 8):
                raise ImageError(f"its PVH note has {len(contents)} bytes, not 4 or 8")
            return elf.check_entry(file, int.from_bytes(contents, "little"))
    return None


def load(
    plan: LoadPlan,
    image: Image,
    file: Elf,
    entry: int,
    initrd: bytes | None,
    cmdline: bytes,
) -> CpuState:
    """Place the kernel and what it needs.  Raises ImageError."""
    elf.place(plan, image, file)
    cmdline_gpa = plan.place_lowest("the command line", cmdline + b"\0")
    modlist_gpa = 0
    if initrd is not None:
        module = plan.place_highest("the initrd", initrd, FOUR_GIB)
        modlist_gpa = plan.place_lowest(
            "the module list", MODLIST_ENTRY.pack(module, len(initrd), 0, 0)
        )
    memmap = [
        MEMMAP_ENTRY.pack(line.base, line.end - line.base, line.type, 0)
        for line in plan.e820.entries
    ]
    start_info = START_INFO.pack(
        START_MAGIC,
        START_VERSION,
        0,
        0 if initrd is None else 1,
        modlist_gpa,
        cmdline_gpa,
        0,  # rsdp_paddr: none known yet, the kernel looks for it
        plan.place_lowest("the memory map", b"".join(memmap)),
        len(memmap),
        0,
    )
    return enter32(plan, entry, rbx=plan.place_lowest("the start info", start_info))
