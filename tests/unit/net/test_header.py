"""Checksums, against a sum made word by word."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pybhyve.net import VnetHeader, internet_sum
from tests.guestside.frames import checksum


@given(st.binary(max_size=200))
def test_the_sum(data):
    assert internet_sum(data) % 0xFFFF == (checksum(data) ^ 0xFFFF) % 0xFFFF


@given(st.binary(min_size=40, max_size=200), st.integers(0, 38))
def test_finished_checksums_verify(frame, start):
    offset = 16 if start + 18 <= len(frame) else 0
    at = start + offset
    before = frame[:at] + bytes(2) + frame[at + 2 :]
    header = VnetHeader(flags=1, csum_start=start, csum_offset=offset)
    done = header.finish(before)

    assert done is not None
    assert checksum(done[start:]) == 0
    assert done[:at] + done[at + 2 :] == frame[:at] + frame[at + 2 :]


def test_a_checksum_outside_of_the_frame():
    assert VnetHeader(1, csum_start=50, csum_offset=9).finish(bytes(60)) is None
    assert VnetHeader(0, csum_start=50, csum_offset=9).finish(bytes(60)) == bytes(60)


def test_the_form():
    header = VnetHeader(1, 1, 54, 1460, 34, 16)

    assert header.pack() == bytes.fromhex("01013600b40522001000")
    assert VnetHeader.unpack(header.pack() + bytes(2)) == header
