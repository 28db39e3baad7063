"""Records in guest memory."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybhyve.layout import Layout

DESC = Layout("<QIHH", "addr len flags next")


class Memory:
    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def read_mem(self, gpa: int, length: int) -> bytes:
        return bytes(self.data[gpa : gpa + length])

    def write_mem(self, gpa: int, data: bytes) -> None:
        self.data[gpa : gpa + len(data)] = data


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**16 - 1),
)
def test_record_in_memory_round_trips(addr, length, flags, next_):
    mem = Memory(64)
    DESC.put(mem, 16, addr, length, flags, next_)

    assert DESC.at(mem, 16) == (addr, length, flags, next_)
    assert DESC.at(mem, 16).next == next_
    assert mem.data[16:24] == addr.to_bytes(8, "little")


def test_size_and_fields():
    assert DESC.size == 16
    assert DESC.fields == ("addr", "len", "flags", "next")


def test_unpack_at_an_offset():
    packed = b"xx" + DESC.pack(1, 2, 3, 4)

    assert DESC.unpack(packed, 2).flags == 3
    with pytest.raises(struct.error):
        DESC.unpack(packed, 3)


def test_byte_order_must_be_spelled():
    with pytest.raises(ValueError, match="byte order"):
        Layout("QI", "a b")


def test_fields_must_match_the_format():
    with pytest.raises(ValueError, match="fields"):
        Layout("<QI", "a b c")
