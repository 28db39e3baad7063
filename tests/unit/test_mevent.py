"""The event loop against real descriptors, timers and signals."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pybhyve.mevent import EventLoop


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    yield a, b
    a.close()
    b.close()


def test_stop_gives_run_its_result(loop):
    loop.call_soon_threadsafe(lambda: loop.stop(7))

    assert loop.run() == 7


def test_first_stop_wins(loop):
    loop.stop("first")
    loop.stop("second")

    assert loop.run() == "first"


def test_stop_from_another_thread_wakes_a_waiting_loop(loop):
    threading.Timer(0.05, loop.stop, ["late"]).start()

    assert loop.run() == "late"


def test_reader_gets_data_and_end_of_file(loop, pair):
    a, b = pair
    got = []

    def receive():
        data = b.recv(100)
        got.append(data)
        if data:
            a.close()
        else:
            loop.stop()

    loop.add_read(b.fileno(), receive)
    a.send(b"hello")
    loop.run()

    assert got == [b"hello", b""]


def test_reader_and_writer_share_a_descriptor(loop, pair):
    a, b = pair
    seen = set()

    def note(what):
        seen.add(what)
        if len(seen) == 2:
            loop.stop()

    loop.add_read(b.fileno(), lambda: note("read"))
    writer = loop.add_write(b.fileno(), lambda: note("write"))
    a.send(b"x")
    loop.run()

    assert seen == {"read", "write"}

    loop.delete(writer)
    seen.clear()
    loop.add_timer(0.02, loop.stop)
    loop.run()

    assert seen == {"read"}


def test_disabled_reader_is_silent_until_enabled(loop, pair):
    a, b = pair
    got = []
    handle = loop.add_read(b.fileno(), lambda: got.append(b.recv(10)))
    loop.disable(handle)
    a.send(b"x")
    loop.add_timer(0.02, loop.stop)
    loop.run()

    assert got == []

    loop.enable(handle)
    loop.add_timer(0.02, loop.stop)
    loop.run()

    assert got == [b"x"]


def test_disabled_reader_ignores_a_hang_up(loop, pair):
    """The kernel reports EPOLLHUP for a mask of 0, which must not spin the loop."""
    a, b = pair
    handle = loop.add_read(b.fileno(), lambda: pytest.fail("called"))
    loop.disable(handle)
    a.close()
    loop.add_timer(0.05, loop.stop)
    before = time.process_time()
    loop.run()

    assert time.process_time() - before < 0.04


def test_deleted_handle_of_the_same_batch_is_not_called(loop):
    a, b = socket.socketpair()
    c, d = socket.socketpair()
    called = []
    handles = {}

    def first(me, other):
        called.append(me)
        loop.delete(handles[other])
        loop.stop()

    handles["b"] = loop.add_read(b.fileno(), lambda: first("b", "d"))
    handles["d"] = loop.add_read(d.fileno(), lambda: first("d", "b"))
    a.send(b"x")
    c.send(b"x")
    loop.run()
    for sock in (a, b, c, d):
        sock.close()

    assert len(called) == 1


def test_a_second_reader_is_refused(loop, pair):
    loop.add_read(pair[0].fileno(), loop.stop)

    with pytest.raises(ValueError, match="already"):
        loop.add_read(pair[0].fileno(), loop.stop)


def test_regular_file_is_always_ready(loop, tmp_path: Path):
    path = tmp_path / "input"
    path.write_bytes(b"abc")
    fd = os.open(path, os.O_RDONLY)
    got = []

    def receive():
        got.append(os.read(fd, 2))
        if not got[-1]:
            loop.delete(handle)
            loop.stop()

    handle = loop.add_read(fd, receive)
    loop.run()
    os.close(fd)

    assert got == [b"ab", b"c", b""]


def test_one_shot_timer_fires_once_and_again_when_enabled(loop):
    fired = []
    handle = loop.add_timer(0.01, lambda: fired.append(1))
    loop.add_timer(0.05, loop.stop)
    loop.run()

    assert fired == [1]

    loop.enable(handle)
    loop.add_timer(0.05, loop.stop)
    loop.run()

    assert fired == [1, 1]


def test_periodic_timer_until_deleted(loop):
    fired = []

    def tick():
        fired.append(time.monotonic())
        if len(fired) == 3:
            loop.delete(handle)
            loop.add_timer(0.03, loop.stop)

    begin = time.monotonic()
    handle = loop.add_timer(0.01, tick, periodic=True)
    loop.run()

    assert len(fired) == 3
    assert fired[2] - begin >= 0.03


def test_timers_fire_in_order(loop):
    order = []
    loop.add_timer(0.02, lambda: (order.append("b"), loop.stop()))
    loop.add_timer(0.01, lambda: order.append("a"))
    loop.run()

    assert order == ["a", "b"]


def test_signal_runs_callback_and_delete_restores(loop):
    before = signal.getsignal(signal.SIGUSR1)
    handle = loop.add_signal(signal.SIGUSR1, lambda: loop.stop("signal"))
    os.kill(os.getpid(), signal.SIGUSR1)

    assert loop.run() == "signal"

    loop.delete(handle)

    assert signal.getsignal(signal.SIGUSR1) == before


def test_raising_callback_is_logged_and_disabled(loop, pair, caplog):
    a, b = pair
    calls = []

    def broken():
        calls.append(1)
        raise RuntimeError("boom")

    loop.add_read(b.fileno(), broken)
    a.send(b"x")
    loop.add_timer(0.03, loop.stop)
    with caplog.at_level(logging.ERROR):
        loop.run()

    assert calls == [1]
    assert "boom" in caplog.text


def test_callbacks_from_many_threads_all_run(loop):
    seen = []

    def post(n):
        for i in range(200):
            loop.call_soon_threadsafe(lambda v=(n, i): seen.append(v))

    threads = [threading.Thread(target=post, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()

    def check():
        if len(seen) == 800:
            loop.stop()

    loop.add_timer(0.005, check, periodic=True)
    loop.run()
    for thread in threads:
        thread.join()

    assert len(set(seen)) == 800
