"""Console backends with real pseudo terminals, pipes and sockets."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pybhyve.console import Backend, open_backend
from pybhyve.console.backend import HIGH_WATER, PACE_SECONDS, Stream
from pybhyve.console.stdio import EscapeFilter
from pybhyve.console.tcp import TcpBackend, parse_address
from pybhyve.console.tty import PtyBackend, TtyBackend
from pybhyve.errors import DeviceError
from pybhyve.mevent import EventLoop

SRC = Path(__file__).parents[3] / "src"


class Guest:
    """A port with room for ``size`` bytes, that a test reads out."""

    def __init__(self, size: int = 16) -> None:
        self.size = size
        self.got = bytearray()
        self.drains = 0

    def room(self) -> int:
        return self.size - len(self.got)

    def receive(self, data: bytes) -> None:
        assert len(data) <= self.room()
        self.got += data

    def drained(self) -> None:
        self.drains += 1


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


def run_until(loop: EventLoop, condition: Callable[[], object], limit: float = 5):
    """Run the loop until ``condition`` holds; the test fails after ``limit``."""
    deadline = time.monotonic() + limit
    outcome = []

    def look():
        if condition():
            outcome.append(True)
            loop.stop()
        elif time.monotonic() > deadline:
            loop.stop()

    timer = loop.add_timer(0.002, look, periodic=True)
    loop.run()
    loop.delete(timer)
    assert outcome, "the condition never held"


def unwanted() -> None:
    pytest.fail("quit")


def send(backend: Backend, data: bytes) -> bool:
    more = True
    for byte in data:
        more = backend.write(byte)
    return more


def test_nothing_connected(loop):
    backend = open_backend(None, loop, unwanted)
    backend.start(Guest())

    assert backend.write(0x41)
    backend.resume_input()
    backend.halt()


def test_tcp_moves_bytes_both_ways_and_refuses_a_second_client(loop):
    backend = open_backend("tcp=127.0.0.1:0", loop, unwanted)
    assert isinstance(backend, TcpBackend)
    guest = Guest()
    backend.start(guest)
    send(backend, b"lost")
    with socket.create_connection(backend.address) as client:
        client.sendall(b"hello")
        run_until(loop, lambda: guest.got == b"hello")
        send(backend, b"world")
        run_until(loop, lambda: select.select([client], [], [], 0)[0])

        assert client.recv(100) == b"world"

        with socket.create_connection(backend.address) as second:
            run_until(loop, lambda: select.select([second], [], [], 0)[0])

            assert second.recv(100) == b"Socket already connected\n"

    run_until(loop, lambda: backend._client is None)
    with socket.create_connection(backend.address) as third:
        third.sendall(b"again")
        run_until(loop, lambda: guest.got == b"helloagain")
    backend.halt()


def test_input_waits_while_the_port_is_full(loop):
    backend = TcpBackend(loop, "tcp=127.0.0.1:0")
    guest = Guest()
    backend.start(guest)
    with socket.create_connection(backend.address) as client:
        client.sendall(bytes(range(40)))
        run_until(loop, lambda: len(guest.got) == 16)
        got = bytes(guest.got)
        while len(got) < 40:
            guest.got.clear()
            backend.resume_input()
            run_until(loop, lambda: guest.got)
            got += guest.got

        assert got == bytes(range(40))
    backend.halt()


def test_a_slow_reader_makes_the_port_wait_and_loses_nothing(loop):
    backend = TcpBackend(loop, "tcp=127.0.0.1:0")
    guest = Guest()
    backend.start(guest)
    total = 0
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(backend.address)
        run_until(loop, lambda: backend._stream is not None)
        for _ in range(200):
            total += HIGH_WATER
            if not send(backend, b"x" * HIGH_WATER):
                run_until(loop, lambda: True)
                if guest.drains == 0:
                    break
                guest.drains = 0
        else:
            pytest.fail("the port never had to wait")
        client.setblocking(False)
        received = 0

        def drain():
            nonlocal received
            while select.select([client], [], [], 0)[0]:
                received += len(client.recv(1 << 20))
            return received == total

        run_until(loop, drain)

        assert guest.drains == 1
    backend.halt()


def test_output_comes_in_few_pieces(loop):
    """The first byte at once, then what PACE_SECONDS bring."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    null = os.open(os.devnull, os.O_RDONLY)
    stream = Stream(loop, Guest(), null, theirs, unwanted)
    stream.close_input()
    pieces: list[bytes] = []
    stamps: list[float] = []

    def read():
        pieces.append(os.read(ours, 1000))
        stamps.append(time.monotonic())

    reader = loop.add_read(ours, read)
    count = 200

    def print_one():
        nonlocal count
        stream.write(0x41)
        count -= 1
        if count:
            loop.call_soon_threadsafe(print_one)

    begun = time.monotonic()
    print_one()
    run_until(loop, lambda: sum(map(len, pieces)) == 200)

    assert len(pieces) <= 2 + (stamps[-1] - begun) / PACE_SECONDS
    assert len(pieces) < 100
    loop.delete(reader)
    stream.close()
    for fd in (ours, theirs, null):
        os.close(fd)


def test_halt_waits_for_a_reader_that_reads(loop):
    backend = TcpBackend(loop, "tcp=127.0.0.1:0")
    backend.start(Guest())
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(backend.address)
        run_until(loop, lambda: backend._stream is not None)
        total = 0
        while send(backend, b"x" * 4096):
            total += 4096
            run_until(loop, lambda: True)
        total += 4096
        got = []
        reader = threading.Thread(target=lambda: got.append(read_all(client)))
        reader.start()
        backend.halt()
        reader.join()

        assert got == [total]


def read_all(client: socket.socket) -> int:
    count = 0
    while data := client.recv(1 << 16):
        count += len(data)
    return count


def test_halt_does_not_wait_for_one_that_does_not(loop):
    backend = TcpBackend(loop, "tcp=127.0.0.1:0")
    backend.start(Guest())
    with socket.create_connection(backend.address):
        run_until(loop, lambda: backend._stream is not None)
        while send(backend, b"x" * 65536):
            run_until(loop, lambda: True)
        begin = time.monotonic()
        backend.halt()

        assert time.monotonic() - begin < 3


@pytest.mark.parametrize(
    "spec", ["tcp", "tcp=", "tcp=1.2.3.4", "tcp=1.2.3.4:x", "tcp=1.2.3.4:65536"]
)
def test_bad_tcp_address(loop, spec):
    with pytest.raises(DeviceError, match="expected tcp=IP:PORT"):
        open_backend(spec, loop, unwanted)


def test_tcp_addresses():
    assert parse_address("tcp=[::1]:80") == ("::1", 80)
    assert parse_address("tcp=127.0.0.1:1234") == ("127.0.0.1", 1234)


def test_tcp_port_in_use(loop):
    first = TcpBackend(loop, "tcp=127.0.0.1:0")

    with pytest.raises(DeviceError):
        TcpBackend(loop, f"tcp=127.0.0.1:{first.address[1]}")
    first.halt()


def test_tty_is_raw_until_the_end(loop):
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    backend = open_backend(os.ttyname(slave), loop, unwanted)
    guest = Guest()
    backend.start(guest)
    os.write(master, b"\x03a\r")
    run_until(loop, lambda: guest.got == b"\x03a\r")
    send(backend, b"a\nb")
    run_until(loop, lambda: select.select([master], [], [], 0)[0])

    assert os.read(master, 100) == b"a\nb"

    backend.halt()

    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


def test_tty_that_goes_away(loop):
    master, slave = pty.openpty()
    backend = open_backend(os.ttyname(slave), loop, unwanted)
    assert isinstance(backend, TtyBackend)
    backend.start(Guest())
    os.close(slave)
    os.close(master)
    run_until(loop, lambda: backend._stream is None)

    assert send(backend, b"lost")
    backend.halt()


@pytest.mark.parametrize("spec", ["/dev/null", "/no/such", "/", "a\0b"])
def test_not_a_terminal(loop, spec):
    with pytest.raises(DeviceError, match="console"):
        open_backend(spec, loop, unwanted)


def test_pty_loses_output_until_opened_and_after_it_is_closed(loop, capsys):
    backend = open_backend("pty", loop, unwanted)
    assert isinstance(backend, PtyBackend)
    guest = Guest()
    backend.start(guest)

    assert backend.path in capsys.readouterr().err
    assert send(backend, b"x" * 2 * HIGH_WATER)

    slave = os.open(backend.path, os.O_RDWR | os.O_NOCTTY)
    run_until(loop, lambda: backend._stream is not None)
    os.write(slave, b"in")
    run_until(loop, lambda: guest.got == b"in")
    send(backend, b"out")
    run_until(loop, lambda: select.select([slave], [], [], 0)[0])

    assert os.read(slave, 100) == b"out"

    os.close(slave)
    run_until(loop, lambda: backend._stream is None)

    assert send(backend, b"x" * 2 * HIGH_WATER)
    backend.halt()


def test_escape_sequences():
    quits = []
    escape = EscapeFilter(lambda: quits.append(1))

    assert escape(b"ab\x1d") == b"ab"
    assert escape(b"\x1dc") == b"\x1dc"
    assert not quits
    assert escape(b"\x1dq") == b""
    assert quits == [1]
    assert escape(b"\x1dxq") == b"xq"


# A bhyve in miniature: an echoing port on stdio, until the escape key or "!".
PROGRAM = """
import os, signal, sys
from pybhyve.console import open_backend
from pybhyve.mevent import EventLoop

class Echo:
    def room(self): return 16
    def receive(self, data):
        for byte in data:
            if byte == ord("!"): loop.stop(0)
            if byte == ord("K"): os.kill(os.getpid(), signal.SIGKILL)
            if byte == ord("E"): raise SystemExit(5)
            backend.write(byte)
    def drained(self): pass

loop = EventLoop()
backend = open_backend("stdio", loop, lambda: loop.stop(7))
backend.start(Echo())
status = loop.run()
backend.halt()
sys.exit(status)
"""


class Terminal:
    """The program above on a pseudo terminal."""

    process: subprocess.Popen[bytes]

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env={**os.environ, "PYTHONPATH": str(SRC)},
        )
        self.expect(b"Ctrl-]]\r")
        self.wait_for(lambda: termios.tcgetattr(self.slave) != self.before)

    @staticmethod
    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def expect(self, text: bytes) -> None:
        got = b""
        while text not in got:
            assert select.select([self.master], [], [], 10)[0], got
            got += os.read(self.master, 100)

    def finish(self) -> int:
        status = self.process.wait(10)
        # Behind the death of a process comes the guard, which takes a moment.
        self.wait_for(lambda: termios.tcgetattr(self.slave) == self.before)
        os.close(self.master)
        os.close(self.slave)
        return status


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.process.kill()
    terminal.process.wait()


def test_stdio_on_a_terminal_echoes_raw_bytes_and_quits(terminal):
    os.write(terminal.master, b"\x03\x1a\x1d\x1d")
    terminal.expect(b"\x03\x1a\x1d")
    os.write(terminal.master, b"\x1dq")

    assert terminal.finish() == 7


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_terminal_is_restored_by_signals(terminal, signo):
    terminal.process.send_signal(signo)

    assert terminal.finish() == -signo


def test_terminal_is_restored_after_sigkill(terminal):
    os.write(terminal.master, b"K")

    assert terminal.finish() == -signal.SIGKILL


def test_terminal_is_restored_at_exit(terminal):
    os.write(terminal.master, b"E")

    assert terminal.finish() == 5


def test_terminal_is_raw_again_after_a_stop(terminal):
    raw = termios.tcgetattr(terminal.slave)
    terminal.process.send_signal(signal.SIGSTOP)
    termios.tcsetattr(terminal.slave, termios.TCSANOW, terminal.before)
    terminal.process.send_signal(signal.SIGCONT)
    terminal.wait_for(lambda: termios.tcgetattr(terminal.slave) == raw)
    os.write(terminal.master, b"!")

    assert terminal.finish() == 0


def run_program(**streams) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        timeout=20,
        **streams,
    )


def test_stdio_on_pipes():
    done = run_program(input=b"one\x1dqtwo!", capture_output=True)

    assert done.returncode == 0
    assert done.stdout == b"one\x1dqtwo!"
    assert done.stderr == b""


def test_end_of_input_is_not_the_end(tmp_path: Path):
    path = tmp_path / "input"
    path.write_bytes(b"text")
    with path.open("rb") as source:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONPATH": str(SRC)},
            stdin=source,
            stdout=subprocess.PIPE,
        )
    assert process.stdout is not None

    assert process.stdout.read(4) == b"text"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    process.stdout.close()
    process.wait()


def test_stdio_is_given_once(loop):
    backend = open_backend("stdio", loop, unwanted)

    with pytest.raises(DeviceError, match="another port"):
        open_backend("stdio", loop, unwanted)
    backend.halt()
