"""The pool's threads: how many, in which order, and how they end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pybhyve.block.pool import NUMTHR, Pool
from pybhyve.errors import HostError
from tests.unit.block.requests import Answer


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool("test")
    yield pool
    pool.close()


def threads() -> int:
    return len([t for t in threading.enumerate() if t.name.startswith("blk test")])


class Gate:
    """A call that waits until the test opens the gate."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self) -> int:
        self.entered.release()
        assert self._open.wait(30)
        return 0

    def open(self) -> None:
        self._open.set()


def test_one_thread_does_what_does_not_wait(pool):
    order = []
    for index in range(1000):
        pool.submit(lambda index=index: order.append(index) or 0, done=Answer())
    pool.drain()

    assert order == list(range(1000))
    assert threads() == 1


def test_those_that_wait_leave_a_thread_to_the_others(pool):
    gate = Gate()
    for _ in range(NUMTHR - 1):
        pool.submit(pool.wait, gate, done=Answer())
        assert gate.entered.acquire(timeout=30)
    answer = Answer()
    pool.submit(lambda: 7, done=answer)

    assert answer.error() == 7
    assert threads() == NUMTHR
    gate.open()


def test_what_all_threads_are_too_few_for_waits_its_turn(pool):
    gate = Gate()
    for _ in range(NUMTHR):
        pool.submit(pool.wait, gate, done=Answer())
    for _ in range(NUMTHR):
        assert gate.entered.acquire(timeout=30)
    first, second = Answer(), Answer()
    pool.submit(lambda: 0, done=first)
    request = pool.submit(lambda: 0, done=second)

    assert pool.cancel(request)
    assert not pool.cancel(request)
    assert first.errors == []
    gate.open()
    assert first.error() == 0
    pool.drain()
    assert second.errors == []
    assert threads() == NUMTHR


def test_drain_from_several_threads(pool):
    gate = Gate()
    pool.submit(pool.wait, gate, done=Answer())
    waiting = [threading.Thread(target=pool.drain) for _ in range(3)]
    for thread in waiting:
        thread.start()

    assert all(thread.is_alive() for thread in waiting)
    gate.open()
    for thread in waiting:
        thread.join(30)
    assert not any(thread.is_alive() for thread in waiting)


def test_cancelling_the_last_one_ends_a_drain(pool):
    gate = Gate()
    for _ in range(NUMTHR):
        pool.submit(pool.wait, gate, done=Answer())
        assert gate.entered.acquire(timeout=30)
    request = pool.submit(lambda: 0, done=Answer())
    draining = threading.Thread(target=pool.drain)
    draining.start()
    gate.open()
    pool.cancel(request)
    draining.join(30)

    assert not draining.is_alive()


def test_failures_of_the_caller_are_logged_and_answered(pool, caplog):
    answer = Answer()

    def fail(*_error: int) -> int:
        raise RuntimeError("a bug")

    pool.submit(fail, done=answer)
    assert answer.error() != 0
    pool.submit(lambda: 0, done=fail)
    pool.drain()

    assert "request failed" in caplog.text
    assert "completion failed" in caplog.text
    after = Answer()
    pool.submit(lambda: 0, done=after)
    assert after.error() == 0


def test_submitting_from_many_threads_loses_nothing(pool):
    count = 300
    answers = [[Answer() for _ in range(count)] for _ in range(6)]

    def submit(mine: list[Answer]) -> None:
        for index, answer in enumerate(mine):
            if index % 3:
                pool.submit(lambda: 0, done=answer)
            else:
                pool.submit(pool.wait, lambda: 0, done=answer)

    submitters = [threading.Thread(target=submit, args=[mine]) for mine in answers]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join(60)
    pool.drain()

    assert all(answer.errors == [0] for mine in answers for answer in mine)


def test_requests_from_a_done_are_done_too(pool):
    last = Answer()

    def again(left: int) -> None:
        if left:
            pool.submit(lambda: left - 1, done=again)
        else:
            last(0)

    pool.submit(lambda: 50, done=again)

    assert last.error() == 0
    pool.drain()


def test_a_host_without_threads_to_spare(pool, monkeypatch, caplog):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    answers = [Answer() for _ in range(20)]
    for answer in answers:
        pool.submit(pool.wait, lambda: 0, done=answer)
    pool.drain()

    assert [answer.errors for answer in answers] == [[0]] * 20
    assert threads() == 1
    assert caplog.text.count("can't start new thread") == 1
    with pytest.raises(HostError, match="no thread left"):
        Pool("other")


def test_close_ends_every_thread():
    pool = Pool("test")
    answers = [Answer() for _ in range(50)]
    for answer in answers:
        pool.submit(pool.wait, lambda: 0, done=answer)

    pool.close()

    assert [answer.errors for answer in answers] == [[0]] * 50
    assert threads() == 0
