"""Requests to real images: contents, errors, growth."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.block import blockif
from tests.unit.block.conftest import Open
from tests.unit.block.requests import SIZE, Answer, do, read, write

PATTERN = bytes(range(256)) * (SIZE // 256)


def test_write_then_read(open_image, image):
    blk = open_image()

    assert write(blk, 4096, b"a" * 512, b"b" * 1024) == 0

    assert read(blk, 4096, 1000, 536) == b"a" * 512 + b"b" * 1024
    assert do(blk.flush) == 0
    assert image.read_bytes()[4096 : 4096 + 1536] == b"a" * 512 + b"b" * 1024
    assert (blk.size, blk.sectsz, blk.ro) == (SIZE, 512, False)
    assert image.stat().st_size == SIZE


def test_done_comes_on_a_thread_of_the_pool(open_image):
    blk = open_image()
    answer = Answer()

    blk.flush(answer)

    assert answer.error() == 0
    assert answer.thread.startswith("blk test")


def test_read_now_reads_what_the_host_has(open_image):
    blk = open_image()
    buffer = bytearray(1000)
    # Written just now, so it is in memory.
    assert blk.read_now([memoryview(buffer)], 4096)
    assert buffer == PATTERN[4096:5096]


def test_read_now_leaves_long_reads_to_read(open_image):
    blk = open_image()

    assert blk.read_now([memoryview(bytearray(128 << 10))], 0)
    assert not blk.read_now([memoryview(bytearray(129 << 10))], 0)
    assert read(blk, 0, 129 << 10) == PATTERN[: 129 << 10]


def test_read_now_leaves_the_end_to_read(open_image, image):
    blk = open_image()
    os.truncate(image, 4096)

    assert not blk.read_now([memoryview(bytearray(512))], 8192)


def test_more_buffers_than_one_call_takes(open_image):
    blk = open_image()
    parts = [bytes([index % 251]) * 64 for index in range(3000)]

    assert write(blk, 0, *parts) == 0

    assert read(blk, 0, *[64] * 3000) == b"".join(parts)


def test_nothing_to_transfer_is_done(open_image):
    blk = open_image()

    assert read(blk, SIZE) == b""
    assert do(blk.delete, 0, 0) == 0
    assert do(blk.write_zeroes, 0, 0) == 0


def test_close_finishes_what_is_under_way(open_image, image):
    blk = open_image()
    answers = [Answer() for _ in range(50)]
    for index, answer in enumerate(answers):
        blk.write([memoryview(b"Z" * 512)], index * 512, answer)

    blk.close()

    assert [answer.errors for answer in answers] == [[0]] * 50
    assert image.read_bytes()[: 50 * 512] == b"Z" * 50 * 512


def test_trim_gives_the_blocks_back(open_image, image):
    blk = open_image()
    before = image.stat().st_blocks

    assert blk.candelete
    assert do(blk.delete, 0, SIZE // 2) == 0

    assert image.stat().st_blocks <= before - SIZE // 2 // 512
    assert image.stat().st_size == SIZE
    assert read(blk, 0, SIZE) == bytes(SIZE // 2) + PATTERN[SIZE // 2 :]


def test_nodelete(open_image, image):
    blk = open_image(nodelete=True)

    assert not blk.candelete
    assert do(blk.delete, 0, 4096) == errno.EOPNOTSUPP
    assert image.read_bytes() == PATTERN


def test_zeroes_where_the_host_cannot_make_them(open_image, image, monkeypatch):
    blk = open_image()
    monkeypatch.setattr(blk._backing, "_zero_modes", [])
    monkeypatch.setattr("pybhyve.block.backing.ZEROES", bytes(5000))

    assert do(blk.write_zeroes, 1000, 12345) == 0

    assert read(blk, 0, SIZE) == PATTERN[:1000] + bytes(12345) + PATTERN[13345:]


def test_read_only(open_image, image):
    blk = open_image(ro=True)

    assert blk.ro
    assert not blk.candelete
    assert read(blk, 0, 512) == PATTERN[:512]
    assert write(blk, 0, b"x" * 512) == errno.EROFS
    assert do(blk.write_zeroes, 0, 512) == errno.EROFS
    assert do(blk.delete, 0, 512) == errno.EOPNOTSUPP
    assert do(blk.flush) == 0
    assert image.read_bytes() == PATTERN


# -- a host that fails ---------------------------------------------------------------


def test_beyond_the_end_of_a_truncated_image(open_image, image):
    blk = open_image()
    os.truncate(image, 5000)

    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        read(blk, 4096, 4096)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        read(blk, 8192, 512)
    assert read(blk, 0, 4096) == PATTERN[:4096]
    # What was lost must not come back as zeroes, as if nothing had happened.
    assert write(blk, 8192, b"x" * 512) == errno.EIO
    assert write(blk, 4608, b"x" * 512) == errno.EIO
    assert do(blk.write_zeroes, 8192, 512) == errno.EIO
    assert image.stat().st_size == 5000
    assert write(blk, 4096, b"x" * 512) == 0


def test_a_limit_of_the_host_is_passed_on(open_image, tmp_path):
    path = tmp_path / "sparse.img"
    path.touch()
    os.truncate(path, 1 << 20)
    blk = open_image(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 10, hard))
    try:
        whole = write(blk, 0, bytes(1 << 20))  # begins well and does not get to its end
        beyond = write(blk, 768 << 10, b"x" * 4096)
        within = write(blk, 256 << 10, b"x" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert (whole, beyond, within) == (errno.EFBIG, errno.EFBIG, 0)
    assert write(blk, 768 << 10, b"x" * 4096) == 0


def test_a_file_that_refuses_writes(open_image):
    fd = os.memfd_create("disk", os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, SIZE)
        blk = open_image(Path(f"/proc/self/fd/{fd}"))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)

        assert write(blk, 0, b"x" * 512) == errno.EPERM
        assert read(blk, 0, 512) == bytes(512)
    finally:
        os.close(fd)


# -- size ----------------------------------------------------------------------------


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockif, "RESIZE_SECONDS", 0.02)


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("size", [2 * SIZE, SIZE // 2])
def test_another_size_is_noticed(open_image, image, size):
    blk = open_image()
    seen = []
    noticed = threading.Event()
    blk.on_resize(lambda: (seen.append(blk.size), noticed.set()))

    os.truncate(image, size)

    assert noticed.wait(30)
    assert seen == [size]
    if size > SIZE:
        assert write(blk, SIZE, b"new") == 0


@pytest.mark.usefixtures("quick_looks")
def test_while_paused_the_size_stays(open_image, image, mevent):
    blk = open_image()
    noticed = threading.Event()
    blk.on_resize(noticed.set)
    blk.pause()

    os.truncate(image, 2 * SIZE)

    assert not noticed.wait(0.2)
    assert blk.size == SIZE
    blk.resume()
    assert noticed.wait(30)
    assert blk.size == 2 * SIZE


# -- a model -------------------------------------------------------------------------

OFFSETS = st.integers(0, SIZE // 512 - 1).map(lambda sector: sector * 512)
LENGTHS = st.integers(1, 40).map(lambda sectors: sectors * 512)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "delete", "write_zeroes", "flush"]),
        OFFSETS,
        LENGTHS,
        st.integers(1, 5),
    ),
    max_size=30,
)


@pytest.mark.parametrize(
    "options",
    [{}, {"nocache": True}, {"sync": True}],
    ids=["cached", "nocache", "sync"],
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS)
def test_a_disk_is_an_array_of_bytes(
    image: Path,
    open_image: Open,
    options: dict[str, bool],
    steps: list[tuple[str, int, int, int]],
) -> None:
    model = bytearray(PATTERN)
    image.write_bytes(PATTERN)
    blk = open_image(**options)
    for number, (what, offset, length, parts) in enumerate(steps):
        length = min(length, SIZE - offset)
        end = offset + length
        cuts = [length * part // parts for part in range(parts + 1)]
        if what == "read":
            lengths = [b - a for a, b in pairwise(cuts)]
            assert read(blk, offset, *lengths) == model[offset:end]
        elif what == "write":
            data = bytes([number + 1]) * length
            pieces = [data[a:b] for a, b in pairwise(cuts)]
            assert write(blk, offset, *pieces) == 0
            model[offset:end] = data
        elif what == "flush":
            assert do(blk.flush) == 0
        else:
            assert do(getattr(blk, what), offset, length) == 0
            model[offset:end] = bytes(length)
    blk.close()
    assert image.read_bytes() == model
