"""The first processor's state at a kernel's entry: 64-bit paged, or 32-bit flat.

Boot protocols agree on the selectors of Linux (boot.rst, 1.14 and 1.15): code 0x10,
data 0x18, here in a GDT that is really in memory.  Other processors stay in reset.
"""

from __future__ import annotations

import struct
from typing import Final

from pybhyve.amd64.e820 import FOUR_GIB
from pybhyve.bhyveload.plan import PAGE, CpuState, LoadPlan

CODE_SELECTOR: Final = 0x10
DATA_SELECTOR: Final = 0x18
TSS_SELECTOR: Final = 0x20

CR0_PE: Final = 1 << 0
CR0_ET: Final = 1 << 4
CR0_NE: Final = 1 << 5
CR0_PG: Final = 1 << 31
CR4_PAE: Final = 1 << 5
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
RFLAGS_RESERVED: Final = 1 << 1

# Access words: type 3:0, S 4, P 7, L 13, D/B 14, G 15, unusable 16.
CODE64: Final = 0xA09B
CODE32: Final = 0xC09B
DATA: Final = 0xC093
BUSY_TSS: Final = 0x008B
UNUSABLE_LDT: Final = 0x10082
FLAT_LIMIT: Final = 0xFFFFFFFF
TSS_LIMIT: Final = 0x67

PTE_PRESENT_WRITABLE: Final = 0b11
PDE_LARGE: Final = 1 << 7
TWO_MIB: Final = 1 << 21
DIRECTORIES: Final = 4  # 1 GiB each
PAGE_TABLES_SIZE: Final = (2 + DIRECTORIES) * PAGE


def _gdt_entry(access: int, limit_in_units: int) -> int:
    """A descriptor with base 0 (SDM vol. 3, 3.4.5) from its access word."""
    return (
        limit_in_units & 0xFFFF
        | (access & 0xFF) << 40
        | (limit_in_units >> 16 & 0xF) << 48
        | (access >> 12 & 0xF) << 52
    )


def _gdt(code: int) -> bytes:
    entries = (0, 0, _gdt_entry(code, 0xFFFFF), _gdt_entry(DATA, 0xFFFFF))
    # The TSS descriptor is 16 bytes long in 64-bit mode.
    return struct.pack("<6Q", *entries, _gdt_entry(BUSY_TSS, TSS_LIMIT), 0)


def identity_page_tables(base: int) -> bytes:
    """Tables at ``base`` (page aligned) that map the first 4 GiB to themselves.

    A PML4, a PDPT and four page directories of 2 MiB pages, in this order.
    """
    pdpt, directories = base + PAGE, base + 2 * PAGE
    tables = bytearray(PAGE_TABLES_SIZE)
    struct.pack_into("<Q", tables, 0, pdpt | PTE_PRESENT_WRITABLE)
    for n in range(DIRECTORIES):
        entry = directories + n * PAGE | PTE_PRESENT_WRITABLE
        struct.pack_into("<Q", tables, PAGE + 8 * n, entry)
    pages = range(0, FOUR_GIB, TWO_MIB)
    entries = (page | PDE_LARGE | PTE_PRESENT_WRITABLE for page in pages)
    struct.pack_into(f"<{len(pages)}Q", tables, 2 * PAGE, *entries)
    return bytes(tables)


def _state(plan: LoadPlan, code: int, registers: dict[str, int]) -> CpuState:
    gdt = _gdt(code)
    gdt_base = plan.place_lowest("the GDT", gdt)
    data = (0, FLAT_LIMIT, DATA)
    return CpuState(
        registers={
            "rflags": RFLAGS_RESERVED,
            "cs": CODE_SELECTOR,
            **dict.fromkeys(("ds", "es", "fs", "gs", "ss"), DATA_SELECTOR),
            "tr": TSS_SELECTOR,
            "ldtr": 0,
            **dict.fromkeys(
                ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"), 0
            ),
            **registers,
        },
        descriptors={
            "cs": (0, FLAT_LIMIT, code),
            **dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data),
            "tr": (0, TSS_LIMIT, BUSY_TSS),
            "ldtr": (0, 0, UNUSABLE_LDT),
            "gdtr": (gdt_base, len(gdt) - 1, 0),
            "idtr": (0, 0, 0),
        },
    )


def enter64(plan: LoadPlan, rip: int, **registers: int) -> CpuState:
    """64-bit mode at ``rip``: the first 4 GiB mapped to themselves, interrupts off."""
    # The tables hold their own addresses, so the place comes before the contents.
    cr3 = plan.find_lowest("the page tables", PAGE_TABLES_SIZE, PAGE)
    plan.place("the page tables", cr3, identity_page_tables(cr3))
    paging = {
        "efer": EFER_LME | EFER_LMA,
        "cr4": CR4_PAE,
        "cr3": cr3,
        "cr0": CR0_PG | CR0_NE | CR0_ET | CR0_PE,
    }
    return _state(plan, CODE64, {**paging, "rip": rip, **registers})


def enter32(plan: LoadPlan, eip: int, **registers: int) -> CpuState:
    """32-bit protected mode at ``eip``: flat segments, no paging, interrupts off."""
    modes = {"efer": 0, "cr4": 0, "cr3": 0, "cr0": CR0_ET | CR0_PE}
    return _state(plan, CODE32, {**modes, "rip": eip, **registers})
