"""The page tables and the GDT, decoded as a processor does."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybhyve.bhyveload.entry import enter32, enter64, identity_page_tables
from pybhyve.bhyveload.plan import CpuState, LoadPlan

BASE = 0x3000
TABLES = identity_page_tables(BASE)


def walk(linear: int) -> int:
    """4-level paging, SDM vol. 3, 4.5."""
    table = BASE
    for shift in (39, 30, 21):
        index = linear >> shift & 511
        (entry,) = struct.unpack_from("<Q", TABLES, table - BASE + 8 * index)
        assert entry & 0b11 == 0b11, "present and writable"
        table = entry & 0xFFFFFFFFFF000
    assert entry & 0x80, "a 2 MiB page"
    return table | linear & 0x1FFFFF


@given(st.integers(0, (1 << 32) - 1))
def test_the_first_4_gib_are_mapped_to_themselves(linear: int) -> None:
    assert walk(linear) == linear


def gdt_descriptor(
    plan: LoadPlan, state: CpuState, register: str
) -> tuple[int, int, int]:
    """Base, limit and access word of a selector's descriptor in the GDT."""
    base, limit, _ = state.descriptors["gdtr"]
    selector = state.registers[register]
    assert selector + 7 <= limit
    (gdt,) = [piece.data for piece in plan.pieces if piece.gpa == base]
    (raw,) = struct.unpack_from("<Q", gdt, selector)
    access = raw >> 40 & 0xFF | (raw >> 52 & 0xF) << 12
    size = raw & 0xFFFF | (raw >> 48 & 0xF) << 16
    if access & 0x8000:
        size = size << 12 | 0xFFF
    return raw >> 16 & 0xFFFFFF | raw >> 56 << 24, size, access


@pytest.mark.parametrize("enter", [enter32, enter64])
@pytest.mark.parametrize("register", ["cs", "ds", "es", "fs", "gs", "ss", "tr"])
def test_hidden_parts_are_what_the_gdt_says(enter: type, register: str) -> None:
    plan = LoadPlan(1 << 20)
    state = enter(plan, 0x100000)

    assert gdt_descriptor(plan, state, register) == state.descriptors[register]


def test_64_bit_mode_is_on_and_consistent() -> None:
    registers = enter64(LoadPlan(1 << 20), 0x1000200, rsi=0x2000).registers

    assert registers["cr0"] & 0x80000001 == 0x80000001
    assert registers["cr4"] & 0x20
    assert registers["efer"] == 0x500
    assert registers["rflags"] == 2, "interrupts off"
    assert (registers["rip"], registers["rsi"]) == (0x1000200, 0x2000)


def test_32_bit_mode_has_no_paging() -> None:
    state = enter32(LoadPlan(1 << 20), 0x100000, rbx=0x2000)

    assert state.registers["cr0"] & 0x80000001 == 1
    assert (state.registers["cr4"], state.registers["efer"]) == (0, 0)
    assert state.descriptors["cs"] == (0, 0xFFFFFFFF, 0xC09B)
