"""Requests to real images: contents, errors, order, locking, growth."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pybhyve.block import BlockIf, BlockOptions
from pybhyve.block.blockif import NUMTHR
from pybhyve.mevent import EventLoop

KB = 1024
SIZE = 256 * KB

Open = Callable[..., BlockIf]


@pytest.fixture
def mevent() -> Iterator[EventLoop]:
    loop = EventLoop()
    thread = threading.Thread(target=loop.run)
    thread.start()
    yield loop
    loop.stop()
    thread.join()
    loop.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@pytest.fixture
def open_image(image: Path, mevent: EventLoop) -> Iterator[Open]:
    opened = []

    def make(path: Path = image, **options: Any) -> BlockIf:
        blk = BlockIf(BlockOptions(path=str(path), **options), "test", mevent)
        opened.append(blk)
        return blk

    yield make
    for blk in opened:
        blk.close()


class Answer:
    """A done() to wait for."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.errors: list[int] = []
        self.thread = ""

    def __call__(self, error: int) -> None:
        self.errors.append(error)
        self.thread = threading.current_thread().name
        self._event.set()

    def error(self) -> int:
        assert self._event.wait(30)
        assert len(self.errors) == 1
        return self.errors[0]


def read(blk: BlockIf, offset: int, *lengths: int) -> bytes:
    iov = [memoryview(bytearray(length)) for length in lengths]
    answer = Answer()
    blk.read(iov, offset, answer)
    if error := answer.error():
        raise OSError(error, os.strerror(error))
    return b"".join(iov)


def write(blk: BlockIf, offset: int, *parts: bytes) -> int:
    answer = Answer()
    blk.write([memoryview(part) for part in parts], offset, answer)
    return answer.error()


def do(call: Callable[..., object], *arguments: object) -> int:
    answer = Answer()
    call(*arguments, answer)
    return answer.error()


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


def test_many_at_once_use_the_whole_pool_and_no_more(open_image):
    blk = open_image()
    gate = threading.Event()
    answers = [Answer() for _ in range(NUMTHR)]
    started = threading.Barrier(NUMTHR + 1)

    def hold(answer: Answer) -> Callable[[int], None]:
        def done(error: int) -> None:
            started.wait(30)
            gate.wait(30)
            answer(error)

        return done

    for answer in answers:
        blk.flush(hold(answer))
    started.wait(30)  # NUMTHR requests are in their done() at the same time
    late = Answer()
    request = blk.flush(late)
    assert blk.cancel(request)
    assert not blk.cancel(request)
    gate.set()
    blk.drain()

    assert [answer.error() for answer in answers] == [0] * NUMTHR
    assert late.errors == []
    assert len({answer.thread for answer in answers}) == NUMTHR


def test_a_request_that_is_done_cannot_be_cancelled(open_image):
    blk = open_image()
    answer = Answer()
    request = blk.flush(answer)
    answer.error()

    assert not blk.cancel(request)


def test_drain_waits_for_all(open_image):
    blk = open_image()
    answers = [Answer() for _ in range(200)]
    for index, answer in enumerate(answers):
        blk.write([memoryview(bytes([index]) * 512)], index * 512, answer)

    blk.drain()

    assert [answer.errors for answer in answers] == [[0]] * 200


def test_a_done_that_raises_harms_nobody(open_image, caplog):
    blk = open_image()

    def fail(error: int) -> None:
        raise RuntimeError("a bug")

    blk.flush(fail)
    blk.drain()

    assert "completion failed" in caplog.text
    assert do(blk.flush) == 0


def test_close_finishes_what_is_under_way(open_image, image):
    blk = open_image()
    answers = [Answer() for _ in range(50)]
    for index, answer in enumerate(answers):
        blk.write([memoryview(b"Z" * 512)], index * 512, answer)

    blk.close()

    assert [answer.errors for answer in answers] == [[0]] * 50
    assert image.read_bytes()[: 50 * 512] == b"Z" * 50 * 512
    assert not [t for t in threading.enumerate() if t.name.startswith("blk test")]
