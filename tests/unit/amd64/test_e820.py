"""The memory map and its allocator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybhyve.amd64.e820 import ACPI, E820, ENTRY, RAM, RESERVED, Entry
from pybhyve.errors import DeviceError

GIB = 1 << 30
PAGE = 4096


def test_ram_and_the_holes():
    assert E820(GIB, 2 * GIB).entries == [
        Entry(0, 0xA0000, RAM),
        Entry(0xA0000, 0xC0000, RESERVED),
        Entry(0xC0000, 0x100000, RESERVED),
        Entry(0x100000, GIB, RAM),
        Entry(4 * GIB, 6 * GIB, RAM),
    ]


def test_records():
    records = E820(GIB, 0).to_bytes()

    assert len(records) == 4 * 20
    assert ENTRY.unpack_from(records, 60) == (0x100000, GIB - 0x100000, RAM)


def test_alloc_takes_the_highest_that_fits():
    table = E820(GIB, GIB)

    assert table.alloc(PAGE, PAGE, 4 * GIB, ACPI) == GIB - PAGE
    assert table.alloc(PAGE + 1, PAGE, 4 * GIB, ACPI) == GIB - 3 * PAGE
    assert table.alloc(PAGE, PAGE, 1 << 20, RESERVED) == 0xA0000 - PAGE
    with pytest.raises(DeviceError, match="no RAM"):
        table.alloc(3 * GIB, PAGE, 1 << 40, ACPI)


def test_add_refuses_what_is_taken():
    table = E820(GIB, 0)
    table.add(0xE0000000, 0xF0000000, RESERVED)

    with pytest.raises(DeviceError, match="reserved already"):
        table.add(0xEFFFFFFF, 0xF0000001, ACPI)
    with pytest.raises(ValueError, match="no addresses"):
        table.add(5, 5, ACPI)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 1 << 24),
            st.integers(0, 20),
            st.integers(0, 1 << 33),
        ),
        max_size=20,
    )
)
def test_entries_are_sorted_and_never_overlap(requests):
    table = E820(GIB, GIB)
    for size, align, below in requests:
        try:
            base = table.alloc(size, 1 << align, below, ACPI)
        except DeviceError:
            continue
        assert base % (1 << align) == 0
        assert base + size <= below
    for one, other in zip(table.entries, table.entries[1:], strict=False):
        assert one.base < one.end <= other.base
    total = sum(e.end - e.base for e in table.entries)
    assert total == 2 * GIB
