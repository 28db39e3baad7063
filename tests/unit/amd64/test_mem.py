"""Memory ranges: lookup, fallback, hints, and accesses across borders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybhyve.amd64.mem import (
    MEM_F_IMMUTABLE,
    MEM_F_READ,
    MEM_F_RW,
    MEM_F_WRITE,
    MemBus,
    MemRange,
)
from pybhyve.errors import DeviceError


class Ram:
    """Memory behind a range, which notes the accesses that reach it."""

    def __init__(self, name: str, base: int, size: int, flags: int = MEM_F_RW) -> None:
        self.data = bytearray(size)
        self.accesses: list[tuple[int, int]] = []
        self.range = MemRange(name, base, size, self.read, self.write, flags)

    def read(self, gpa: int, size: int) -> int:
        self.accesses.append((gpa, size))
        at = gpa - self.range.base
        assert 0 <= at <= at + size <= len(self.data)
        return int.from_bytes(self.data[at : at + size], "little")

    def write(self, gpa: int, size: int, value: int) -> None:
        self.accesses.append((gpa, size))
        at = gpa - self.range.base
        assert 0 <= at <= at + size <= len(self.data)
        self.data[at : at + size] = value.to_bytes(size, "little")


def bus_of(*rams: Ram, fallback: Ram | None = None, ncpu: int = 2) -> MemBus:
    bus = MemBus(ncpu)
    for ram in rams:
        bus.register(ram.range)
    if fallback is not None:
        bus.register_fallback(fallback.range)
    return bus


def test_an_access_reaches_its_range():
    low, high = Ram("low", 0x1000, 0x100), Ram("high", 0x3000, 0x100)
    bus = bus_of(high, low)

    bus.write(0, 0x1010, 4, 0x12345678)
    bus.write(0, 0x3000, 8, 0x1122334455667788)

    assert bus.read(1, 0x1010, 4) == 0x12345678
    assert bus.read(1, 0x3004, 2) == 0x3344


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_nobody_reads_ones_and_is_counted(size):
    bus = bus_of(Ram("dev", 0x1000, 0x100))

    assert bus.read(0, 0x1100, size) == (1 << 8 * size) - 1
    bus.write(0, 0xFFF - size, size, 0)

    assert bus.unknown >= 2


def test_the_fallback_comes_last():
    hole = Ram("hole", 0, 0x10000)
    device = Ram("dev", 0x1000, 0x100)
    bus = bus_of(device, fallback=hole)

    bus.write(0, 0x1000, 1, 1)
    bus.write(0, 0x2000, 1, 2)

    assert (device.data[0], hole.data[0x1000], hole.data[0x2000]) == (1, 0, 2)


def test_a_hint_does_not_outlive_its_range():
    device, hole = Ram("dev", 0x1000, 0x100), Ram("hole", 0, 0x10000)
    bus = bus_of(device, fallback=hole)
    hole.data[0x1000] = 7
    assert bus.read(0, 0x1000, 1) == 0

    bus.unregister(device.range)

    assert bus.read(0, 0x1000, 1) == 7


@pytest.mark.parametrize(
    ("base", "size"),
    [(0xFFF, 2), (0x10FF, 1), (0x1010, 4), (0, 0x2000), (0x1000, 0x100)],
)
def test_overlap_is_refused(base, size):
    bus = bus_of(Ram("dev", 0x1000, 0x100))

    with pytest.raises(DeviceError, match=r"new: memory .* overlaps dev"):
        bus.register(Ram("new", base, size).range)

    assert [r.name for r in bus.ranges()] == ["dev"]


def test_neighbours_do_not_overlap():
    bus = bus_of(Ram("b", 0x1000, 0x100), Ram("a", 0xF00, 0x100), Ram("c", 0x1100, 1))

    assert [r.name for r in bus.ranges()] == ["a", "b", "c"]


@pytest.mark.parametrize(("base", "size"), [(0, 0), (-1, 2), (1 << 64, 1)])
def test_ranges_that_do_not_exist_are_refused(base, size):
    with pytest.raises(DeviceError, match="no memory"):
        bus_of(Ram("dev", base, size))


def test_an_immutable_range_stays():
    ram = Ram("rom", 0, 16, MEM_F_READ | MEM_F_IMMUTABLE)
    bus = bus_of(ram)

    with pytest.raises(ValueError, match="immutable"):
        bus.unregister(ram.range)


def test_a_range_that_cannot_be_written_loses_writes():
    rom = Ram("rom", 0, 16, MEM_F_READ)
    bus = bus_of(rom)

    bus.write(0, 0, 4, 0xFFFFFFFF)
    bus.write(0, 14, 4, 0xFFFFFFFF)

    assert rom.data == bytes(16)


def test_a_range_that_cannot_be_read_reads_ones():
    assert bus_of(Ram("wo", 0, 16, MEM_F_WRITE)).read(0, 0, 4) == 0xFFFFFFFF


def test_an_access_inside_a_range_is_not_divided():
    ram = Ram("dev", 0x1000, 0x100)
    bus = bus_of(ram)

    bus.read(0, 0x1003, 4)

    assert ram.accesses == [(0x1003, 4)]


def test_an_access_across_a_border_is_divided_into_aligned_parts():
    first, second = Ram("a", 0x1000, 0x100), Ram("b", 0x1100, 0x100)
    bus = bus_of(first, second)

    bus.write(0, 0x10FD, 8, 0x8877665544332211)

    assert first.accesses == [(0x10FD, 1), (0x10FE, 2)]
    assert second.accesses == [(0x1100, 4), (0x1104, 1)]
    assert bus.read(0, 0x10FD, 8) == 0x8877665544332211


def test_a_wide_access_reaches_a_device_in_eights():
    ram = Ram("dev", 0x1000, 0x100)
    bus = bus_of(ram)

    bus.write(0, 0x1000, 32, 1 << 255 | 1)

    assert ram.accesses == [(0x1000, 8), (0x1008, 8), (0x1010, 8), (0x1018, 8)]


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=6),
    st.lists(
        st.tuples(st.integers(0, 70), st.sampled_from([1, 2, 4, 8, 16])), max_size=12
    ),
    st.booleans(),
)
def test_any_access_is_the_bytes_of_the_ranges(places, accesses, with_fallback):
    bus = MemBus(1)
    model: dict[int, int] = {}
    if with_fallback:
        fallback = Ram("hole", 8, 40)
        bus.register_fallback(fallback.range)
        model.update(dict.fromkeys(range(8, 48), 0))
    taken: set[int] = set()
    for base, size in places:
        addresses = set(range(base, base + size))
        ram = Ram("dev", base, size)
        if addresses & taken:
            with pytest.raises(DeviceError):
                bus.register(ram.range)
            continue
        bus.register(ram.range)
        taken |= addresses
    model.update(dict.fromkeys(taken, 0))
    for step, (gpa, size) in enumerate(accesses):
        data = bytes((step * 16 + at) & 0xFF for at in range(size))

        bus.write(0, gpa, size, int.from_bytes(data, "little"))

        for at, byte in enumerate(data):
            if gpa + at in model:
                model[gpa + at] = byte
        expected = bytes(model.get(gpa + at, 0xFF) for at in range(size))
        assert bus.read(0, gpa, size).to_bytes(size, "little") == expected
