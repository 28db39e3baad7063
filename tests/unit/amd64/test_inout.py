"""The port table: who gets an access, and what nobody gets."""

from __future__ import annotations

import pytest

from pybhyve.amd64.inout import InoutTable
from pybhyve.errors import DeviceError, GuestAbortError


@pytest.fixture
def table() -> InoutTable:
    return InoutTable()


def test_a_handler_gets_port_size_and_value(table):
    calls = []
    table.register("dev", 0x3F8, 8, lambda *a: 0x5A, lambda *a: calls.append(a))

    assert table.read(0x3FA, 1) == 0x5A
    table.write(0x3FF, 2, 0x1234)

    assert calls == [(0x3FF, 2, 0x1234)]


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF)])
def test_unknown_ports_read_ones_and_are_counted(table, size, ones):
    assert table.read(0x80, size) == ones
    table.write(0x80, size, 0)

    assert table.unknown[0x80] == 2


def test_an_answer_is_no_wider_than_the_access(table):
    table.register("dev", 0x10, 1, lambda port, size: -1, None)

    assert table.read(0x10, 2) == 0xFFFF


def test_a_port_of_one_direction_does_not_answer_in_the_other(table):
    table.register("post", 0x84, 1, lambda port, size: 0, None)

    table.write(0x84, 1, 3)

    assert table.unknown[0x84] == 1


@pytest.mark.parametrize(("port", "size"), [(0x3F7, 2), (0x3FF, 1), (0x3F0, 0x20)])
def test_ports_in_use_are_refused_and_nothing_changes(table, port, size):
    table.register("com1", 0x3F8, 8, lambda *a: 1, None)

    with pytest.raises(DeviceError, match="in use by com1"):
        table.register("dev", port, size, lambda *a: 2, None)

    assert table.read(0x3F8, 1) == 1
    assert table.owner(0x3F7) is None


@pytest.mark.parametrize(("port", "size"), [(-1, 1), (0xFFFF, 2), (0x10000, 1), (0, 0)])
def test_ports_that_do_not_exist_are_refused(table, port, size):
    with pytest.raises(DeviceError, match="there are no I/O ports"):
        table.register("dev", port, size, None, None)


def test_unregistered_ports_can_be_taken_again(table):
    table.register("a", 0x2000, 32, lambda *a: 1, None)

    table.unregister(0x2000, 32)

    assert table.read(0x2000, 1) == 0xFF
    table.register("b", 0x2010, 32, lambda *a: 2, None)
    assert table.owner(0x2010) == "b"


@pytest.mark.parametrize(("size", "letter"), [(1, "b"), (2, "w"), (4, "l")])
def test_strict_io_ends_at_an_unknown_port(size, letter):
    table = InoutTable(strict=True)

    with pytest.raises(GuestAbortError, match=f"Unhandled in{letter} 0x0080"):
        table.read(0x80, size)
    with pytest.raises(GuestAbortError, match=f"Unhandled out{letter} 0x0080"):
        table.write(0x80, size, 0)
