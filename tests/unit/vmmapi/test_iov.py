"""Scattered guest memory as buffers."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from pybhyve.vmmapi import MB, VmCtx, VmmError, map_iov, release_iov


@pytest.fixture
def ctx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VmCtx]:
    """Two NUMA domains: the mappings meet at 1 MiB."""
    monkeypatch.setenv("PYBHYVE_RUNDIR", str(tmp_path))
    ctx = VmCtx.create("vm", 1)
    ctx.setup_memory(0, [MB, MB])
    yield ctx
    ctx.destroy()


def test_buffers_are_the_guests_memory(ctx):
    ctx.write(0x1000, b"abcd")
    ctx.write(0x9000, b"efgh")

    iov = map_iov(ctx, [(0x9000, 4), (0x1000, 4)], writable=True)
    assert b"".join(iov) == b"efghabcd"
    iov[1][:2] = b"XY"
    release_iov(iov)

    assert ctx.read(0x1000, 4) == b"XYcd"
    with pytest.raises(ValueError, match="released"):
        iov[0][0]


def test_neighbours_are_merged(ctx):
    iov = map_iov(ctx.vm, [(0x1000, 0x1000), (0x2000, 16), (0x2010, 0), (0x2010, 4)])

    assert [len(buffer) for buffer in iov] == [0x1014]
    assert iov[0].readonly
    release_iov(iov)


@pytest.mark.parametrize("ranges", [[(MB - 6, 12)], [(MB - 6, 6), (MB, 6)]])
def test_a_range_may_cross_mappings(ctx, ranges):
    ctx.write(MB - 6, b"before")
    ctx.write(MB, b"behind")

    iov = map_iov(ctx, ranges)

    assert b"".join(iov) == b"beforebehind"
    release_iov(iov)


@pytest.mark.parametrize(
    "bad",
    [
        (2 * MB - 4, 8),
        (2 * MB, 1),
        (MB - 4, 2 * MB),
        (1 << 63, 1 << 63),
        ((1 << 64) - 4, 8),
        (1 << 64, 4),
    ],
)
def test_what_is_no_memory_is_refused_as_a_whole(ctx, bad):
    with pytest.raises(VmmError) as caught:
        map_iov(ctx, [(0x1000, 4), bad], writable=True)

    assert caught.value.errno == errno.EFAULT


def test_writes_make_pages_dirty_when_released(ctx):
    ctx.vm.dirty_pages(0, 2 * MB, clear=True)
    iov = map_iov(ctx, [(MB - 4096, 8192)], writable=True)
    release_iov(iov)

    dirty = ctx.vm.dirty_pages(0, 2 * MB)
    assert [page for page, mark in enumerate(dirty) if mark] == [255, 256]
