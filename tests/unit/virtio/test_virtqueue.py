"""Rings: order, wrap-around, and drivers that break the rules."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.virtio import (
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    split,
    total,
)
from tests.guestside.virtio import DESC, F_INDIRECT, F_NEXT, F_WRITE
from tests.unit.virtio.rig import AVAIL, BASE, DATA, SIZE, TABLE, USED

MIB = 1 << 20


def test_a_chain_is_what_the_driver_laid_out(rig):
    rig.desc(3, DATA, 16, F_NEXT, 1)
    rig.desc(1, DATA + 0x100, 512, F_NEXT | F_WRITE, 5)
    rig.desc(5, DATA + 0x400, 1, F_WRITE)
    rig.offer(3)

    chain = rig.vq.getchain()

    assert chain.head == 3
    assert chain.readable == [(DATA, 16)]
    assert chain.writable == [(DATA + 0x100, 512), (DATA + 0x400, 1)]
    assert rig.vq.getchain() is None


def test_an_indirect_table(rig):
    table = DESC.pack(DATA, 16, F_NEXT, 2)
    table += DESC.pack(DATA + 0x800, 1, F_WRITE, 0)
    table += DESC.pack(DATA + 0x400, 64, F_NEXT | F_WRITE, 1)
    rig.ctx.write(TABLE, table)
    rig.desc(0, DATA + 0x900, 4, F_NEXT, 1)
    rig.desc(1, TABLE, len(table), F_INDIRECT)
    rig.offer(0)

    chain = rig.vq.getchain()

    assert chain.readable == [(DATA + 0x900, 4), (DATA, 16)]
    assert chain.writable == [(DATA + 0x400, 64), (DATA + 0x800, 1)]


def test_empty_buffers_are_left_out(rig):
    rig.desc(0, 0, 0, F_NEXT, 1)
    rig.desc(1, DATA, 4, F_NEXT | F_WRITE, 2)
    rig.desc(2, 0, 0, F_WRITE)
    rig.offer(0)

    chain = rig.vq.getchain()

    assert (chain.readable, chain.writable) == ([], [(DATA, 4)])


def test_releases_show_together_and_in_their_order(rig):
    for index in range(4):
        rig.desc(index, DATA, 4, F_WRITE)
    rig.offer(0, 1, 2, 3)
    chains = [rig.vq.getchain() for _ in range(4)]
    for chain in (chains[2], chains[0]):
        rig.vq.relchain(chain, 10 + chain.head)
    assert rig.used()[0] == 0

    rig.vq.endchains()

    assert rig.used()[0] == 2
    assert rig.used()[1][:2] == [(2, 12), (0, 10)]
    assert rig.interrupts == 1
    rig.vq.endchains()
    assert rig.interrupts == 1


def test_the_used_ring_goes_around(rig):
    for index in range(SIZE):
        rig.desc(index, DATA, 4, F_WRITE)
    rig.offer(0, 1, 2, 3, 4)
    for _ in range(5):
        rig.vq.relchain(rig.vq.getchain(), 1)
    rig.vq.endchains()
    rig.offer(5, 6, 7, 0, 1, 2)
    for _ in range(6):
        rig.vq.relchain(rig.vq.getchain(), 2)
    rig.vq.endchains()

    index, pairs = rig.used()
    assert index == 11
    assert pairs[5:] + pairs[:3] == [(5, 2), (6, 2), (7, 2), (0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize("features", [0, VIRTIO_RING_F_EVENT_IDX])
def test_indexes_go_around_at_65536(rig, features):
    rig.start(features)
    rig.desc(0, DATA, 4, F_WRITE)
    for turn in range(0x10000 + 20):
        rig.offer(0)
        chain = rig.vq.getchain()
        assert chain is not None, turn
        rig.vq.relchain(chain, 4)
        rig.vq.endchains()

    assert rig.used()[0] == 20
    assert not rig.broken


def test_chains_can_be_taken_back(rig):
    for index in range(3):
        rig.desc(index, DATA, 4, F_WRITE)
    rig.offer(0, 1, 2)
    taken = [rig.vq.getchain().head for _ in range(3)]
    rig.vq.retchains(2)

    assert taken == [0, 1, 2]
    assert [rig.vq.getchain().head for _ in range(2)] == [1, 2]
    assert rig.vq.getchain() is None


def test_as_many_chains_as_there_must_be_room(rig):
    rig.start(VIRTIO_RING_F_EVENT_IDX)
    rig.desc(0, DATA, 100, F_WRITE)
    rig.desc(1, DATA + 0x1000, 100, F_WRITE | F_NEXT, 2)
    rig.desc(2, DATA + 0x2000, 100, F_WRITE)
    rig.desc(3, DATA + 0x3000, 0, F_WRITE)
    rig.desc(4, DATA + 0x4000, 50)
    rig.offer(3, 4, 0, 1)
    vq = rig.vq

    assert vq.getchains(301) == []
    assert [chain.head for chain in vq.getchains(1)] == [3, 4, 0]
    assert vq.getchains(201) == []

    rig.offer(0)
    chains = vq.getchains(201)
    vq.relchains((chain, number) for number, chain in enumerate(chains))
    vq.endchains()

    assert [chain.head for chain in chains] == [1, 0]
    assert rig.used() == (2, [(1, 0), (0, 1), *[(0, 0)] * 6])
    assert vq.getchains(1) == []
    assert not rig.broken


def test_with_too_little_room_the_driver_is_asked_for_more(rig):
    rig.start(VIRTIO_RING_F_EVENT_IDX)
    event = USED + 4 + 8 * SIZE
    rig.desc(0, DATA, 100, F_WRITE)
    rig.offer(0, 0)

    assert rig.vq.getchains(300) == []
    assert rig.ctx.read(event, 2) == b"\2\0", "the next one, not one that is there"

    rig.vq.kick_disable()
    rig.offer(0)
    assert len(rig.vq.getchains(300)) == 3


def test_a_driver_that_breaks_the_rules_among_others(rig):
    rig.desc(0, DATA, 100, F_WRITE)
    rig.desc(1, 1 << 40, 100, F_WRITE)
    rig.offer(0, 1)

    assert rig.vq.getchains(200) == []
    assert len(rig.broken) == 1
    assert rig.vq.getchains(1) == []


def test_the_driver_is_asked_once_for_a_notification(rig):
    rig.start(VIRTIO_RING_F_EVENT_IDX)
    rig.desc(0, DATA, 4, F_WRITE)
    event = USED + 4 + 8 * SIZE

    for turn in range(1, 4):
        rig.offer(0)
        assert rig.vq.getchain() is not None
        assert rig.vq.getchain() is None
        assert rig.ctx.read(event, 2) == turn.to_bytes(2, "little")


# -- drivers that break the rules ------------------------------------------------------

END = 4 * MIB


@pytest.mark.parametrize(
    ("descs", "head", "why"),
    [
        ([], SIZE, "index 8"),
        ([], 0xFFFF, "index 65535"),
        ([(DATA, 4, F_NEXT, 0)], 0, "more than 8"),
        ([(DATA, 4, F_NEXT, 1), (DATA, 4, F_NEXT, 0)], 0, "more than 8"),
        ([(DATA, 4, F_NEXT, 9)], 0, "index 9"),
        ([(END - 3, 4, 0, 0)], 0, "not in RAM"),
        ([(END, 0, 0, 0)] * 2, 0, None),
        ([(1 << 63, 4, 0, 0)], 0, "not in RAM"),
        ([((1 << 64) - 1, 0xFFFFFFFF, 0, 0)], 0, "not in RAM"),
        ([(0, 0xFFFFFFFF, F_WRITE, 0)], 0, "not in RAM"),
        ([(1 << 32, 4, 0, 0)], 0, "not in RAM"),
        ([(DATA, 4, F_WRITE | F_NEXT, 1), (DATA, 4, 0, 0)], 0, "to read behind"),
        ([(TABLE, 15, F_INDIRECT, 0)], 0, "15 bytes"),
        ([(TABLE, 0, F_INDIRECT, 0)], 0, "0 bytes"),
        ([(TABLE, 513 * 16, F_INDIRECT, 0)], 0, "8208 bytes"),
        ([(TABLE, 16, F_INDIRECT | F_NEXT, 1)], 0, "must be none"),
        ([(END - 8, 16, F_INDIRECT, 0)], 0, "not in RAM"),
    ],
)
def test_a_driver_that_breaks_the_rules_stops_the_queue(rig, descs, head, why):
    for index, desc in enumerate(descs):
        rig.desc(index, *desc)
    rig.offer(head)
    chain = rig.vq.getchain()

    if why is None:
        assert chain is not None
        return
    assert chain is None
    assert len(rig.broken) == 1
    assert why in rig.broken[0]
    assert rig.vq.getchain() is None
    assert not rig.vq.has_descs()
    assert len(rig.broken) == 1


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ([(TABLE, 16, F_INDIRECT, 0)], "must be none"),
        ([(DATA, 4, F_NEXT, 0)], "more than 1"),
        ([(DATA, 4, F_NEXT, 1)], "more than 1"),
        ([(DATA, 4, F_NEXT, 2), (DATA, 4, 0, 0)], "index 2"),
    ],
)
def test_a_table_that_breaks_the_rules(rig, table, why):
    data = b"".join(DESC.pack(*desc) for desc in table)
    rig.ctx.write(TABLE, data)
    rig.desc(0, TABLE, len(data), F_INDIRECT)
    rig.offer(0)

    assert rig.vq.getchain() is None
    assert why in rig.broken[0]


def test_a_table_that_was_not_negotiated(rig):
    rig.start(0)
    rig.desc(0, TABLE, 16, F_INDIRECT)
    rig.offer(0)

    assert rig.vq.getchain() is None
    assert "must be none" in rig.broken[0]


@pytest.mark.parametrize("index", [SIZE + 1, 0x8000, 0xFFFF])
def test_an_available_index_that_jumps(rig, index):
    rig.ctx.write(AVAIL + 2, index.to_bytes(2, "little"))

    assert rig.vq.getchain() is None
    assert "available ring" in rig.broken[0]


def test_more_chains_than_descriptors(rig):
    """A driver that offers what the device still has cannot fill the host's memory."""
    for index in range(SIZE):
        rig.desc(index, DATA, 4, F_WRITE)
    rig.offer(*range(SIZE))
    taken = [rig.vq.getchain() for _ in range(SIZE)]
    rig.vq.relchain(taken[0], 4)
    rig.vq.endchains()
    rig.offer(0)
    assert rig.vq.getchain() is not None
    rig.offer(0)

    assert rig.vq.getchain() is None
    assert "available ring" in rig.broken[0]


@pytest.mark.parametrize(
    ("desc", "avail", "used", "why"),
    [
        (BASE + 8, AVAIL, USED, "aligned to 16"),
        (BASE, AVAIL + 1, USED, "aligned to 2"),
        (BASE, AVAIL, USED + 2, "aligned to 4"),
        (END - 16, AVAIL, USED, "not in RAM"),
        (BASE, END - 4, USED, "not in RAM"),
        (BASE, AVAIL, (1 << 64) - 4, "not in RAM"),
        (BASE, AVAIL, 0xFFFFF000, "not in RAM"),
        (BASE, AVAIL, AVAIL, "overlap"),
        (BASE, AVAIL, BASE, "overlap"),
        (BASE, USED + 8, USED, "overlap"),
    ],
)
def test_rings_that_cannot_be(rig, desc, avail, used, why):
    vq = rig.vq
    vq.reset()
    vq.desc, vq.avail, vq.used = desc, avail, used
    vq.enable()

    assert why in rig.broken[0]
    assert vq.getchain() is None
    vq.endchains(used_all_avail=True)
    assert rig.interrupts == 0


def test_a_stopped_queue_still_gives_back_what_was_taken(rig):
    rig.desc(0, DATA, 4, F_WRITE)
    rig.offer(0, 99)
    chain = rig.vq.getchain()
    assert rig.vq.getchain() is None
    rig.vq.relchain(chain, 4)
    rig.vq.endchains()

    assert rig.used() == (1, [(0, 4)] + [(0, 0)] * 7)


ADDRESSES = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, END),
    st.integers(BASE, BASE + 8192),
    st.just(TABLE),
)
DESCRIPTORS = st.tuples(
    ADDRESSES,
    st.one_of(st.integers(0, 0xFFFFFFFF), st.integers(0, 0x100), st.just(32)),
    st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)),
)


@settings(
    deadline=None,
    max_examples=400,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    ring=st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE),
    table=st.lists(DESCRIPTORS, min_size=2, max_size=2),
    avail=st.binary(min_size=6 + 2 * SIZE, max_size=6 + 2 * SIZE),
    index=st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)),
    features=st.sampled_from(
        [0, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, 0xFFFFFFFF]
    ),
)
def test_any_rings(rig, ring, table, avail, index, features):
    rig.start(features)
    rig.ctx.write(TABLE, b"".join(DESC.pack(*desc) for desc in table))
    rig.ctx.write(BASE, b"".join(DESC.pack(*desc) for desc in ring))
    heads = bytes(
        byte % (SIZE + 1) if at & 1 == 0 else 0 for at, byte in enumerate(avail)
    )
    rig.ctx.write(AVAIL, heads)
    rig.ctx.write(AVAIL + 2, index.to_bytes(2, "little"))

    taken = 0
    while (chain := rig.vq.getchain()) is not None:
        taken += 1
        for addr, length in chain.readable + chain.writable:
            assert length > 0
            assert addr + length <= END
        rig.vq.read(chain.readable, 64)
        rig.vq.relchain(chain, rig.vq.write(chain.writable, b"x" * 64))
        rig.vq.endchains(used_all_avail=True)
        assert taken <= 0x20000
    assert len(rig.broken) <= 1


# -- segments --------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 100), max_size=6),
    at=st.integers(0, 400),
)
def test_split_keeps_every_byte(lengths, at):
    segments = [(1000 * index, length) for index, length in enumerate(lengths)]

    def bytes_of(parts):
        return [addr + offset for addr, length in parts for offset in range(length)]

    head, rest = split(segments, at)

    assert total(head) == min(at, total(segments))
    assert bytes_of(head) + bytes_of(rest) == bytes_of(segments)
    assert all(length > 0 for _, length in head + rest)


def test_small_payloads_over_segments(rig):
    segments = [(DATA, 3), (DATA + 0x100, 5)]

    assert rig.vq.write(segments, b"abcdefghij") == 8
    assert rig.vq.read(segments, 100) == b"abcdefgh"
    assert rig.vq.read(segments, 4) == b"abcd"
    assert rig.vq.read(segments, 0) == b""
    assert rig.vq.write([], b"x") == 0
