"""The control socket: a real machine's event loop, real sockets, rude clients."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.bhyverun.machine import Machine
from pybhyve.config import Config
from pybhyve.control import server
from pybhyve.control.client import ControlClient
from pybhyve.control.operations import Operations
from pybhyve.control.protocol import LINE_MAX, ControlError, connect, encode
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import MB, REGISTERS, SuspendHow, Vm, VmCtx

NAME = "v" * 229  # the longest: its socket's path does not fit a socket address


class Running:
    """A machine without devices, whose event loop runs on a thread."""

    def __init__(self) -> None:
        ctx = VmCtx.create(NAME)
        ctx.setup_memory(4 * MB)
        self.machine = Machine(ctx, Config(), GlobalOptions.parse(None), 1)
        server.start(self.machine)
        self._loop = threading.Thread(target=self.machine.mevent.run)
        self._loop.start()

    def end(self) -> None:
        if self._loop.is_alive():
            self.machine.mevent.stop()
            self._loop.join()
            self.machine.halt()


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    rundir = tmp_path / "run"
    rundir.mkdir(mode=0o700)
    monkeypatch.setenv("PYBHYVE_RUNDIR", str(rundir))
    running = Running()
    yield running
    running.end()
    running.machine.ctx.destroy()


@pytest.fixture
def machine(running: Running) -> Machine:
    return running.machine


@pytest.fixture
def client(machine: Machine) -> Iterator[ControlClient]:
    with ControlClient(machine.ctx.directory.control_path) as client:
        yield client


@pytest.fixture
def raw(machine: Machine) -> Iterator[socket.socket]:
    """A connection to say anything on."""
    with connect(machine.ctx.directory.control_path) as sock:
        sock.settimeout(10)
        yield sock


def reply(sock: socket.socket) -> Any:
    line = b""
    while not line.endswith(b"\n"):
        data = sock.recv(1)
        assert data, "the server hung up"
        line += data
    return json.loads(line)


def test_only_its_owner_can_use_the_socket(machine: Machine) -> None:
    mode = machine.ctx.directory.control_path.stat().st_mode

    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_registers(client: ControlClient, machine: Machine) -> None:
    client.call("set_register", vcpu=0, register="rax", value=0xFFFFFFFFFFFFFFFF)
    client.call("set_desc", vcpu=0, register="ds", base=1, limit=2, access=0x93)

    assert client.call("get_register", vcpu=0, register="rax") == (1 << 64) - 1
    assert client.call("get_desc", vcpu=0, register="ds") == [1, 2, 0x93]
    assert machine.vm.vcpu(0).get_desc(REGISTERS["ds"]) == (1, 2, 0x93)


def test_what_a_vm_has(client: ControlClient) -> None:
    assert client.call("get_memsegs") == [[0, "", 4 * MB]]
    assert client.call("get_memmap") == [[0, 0, 0, 4 * MB, 7]]
    assert client.call("get_topology") == [1, 1, 1, 1]
    assert client.call("get_cpus") == {"active": [], "suspended": [], "debug": []}
    assert client.call("get_stats", vcpu=0)["total number of vm exits"] == 0
    assert client.call("get_intinfo", vcpu=0) == [0, 0]


def test_clock_and_capabilities(client: ControlClient) -> None:
    client.call("rtc_settime", secs=1_000_000_000)
    client.call("rtc_write", offset=0x70, value=0x5A)
    client.call("set_capability", vcpu=0, name="hlt_exit", value=1)

    assert 0 <= client.call("rtc_gettime") - 1_000_000_000 < 60
    assert client.call("rtc_read", offset=0x70) == 0x5A
    assert client.call("get_capability", vcpu=0, name="hlt_exit") == 1


def test_suspend_happens_once(client: ControlClient) -> None:
    client.call("suspend", how=int(SuspendHow.POWEROFF))

    with pytest.raises(ControlError) as refused:
        client.call("suspend", how=int(SuspendHow.RESET))
    assert refused.value.errno == errno.EALREADY


@pytest.mark.parametrize(
    ("op", "args", "number"),
    [
        ("nonsense", {}, errno.EOPNOTSUPP),
        ("call", {}, errno.EOPNOTSUPP),
        ("__init__", {}, errno.EOPNOTSUPP),
        ("get_register", {}, errno.EINVAL),
        ("get_register", {"vcpu": 0, "register": "rax", "more": 1}, errno.EINVAL),
        ("get_register", {"vcpu": 1, "register": "rax"}, errno.EINVAL),
        ("get_register", {"vcpu": -1, "register": "rax"}, errno.ERANGE),
        ("get_register", {"vcpu": 1 << 64, "register": "rax"}, errno.ERANGE),
        ("get_register", {"vcpu": True, "register": "rax"}, errno.EINVAL),
        ("get_register", {"vcpu": 0.0, "register": "rax"}, errno.EINVAL),
        ("get_register", {"vcpu": 0, "register": "\udc80"}, errno.EINVAL),
        ("get_register", {"vcpu": 0, "register": None}, errno.EINVAL),
        ("get_desc", {"vcpu": 0, "register": "rax"}, errno.EINVAL),
        ("get_capability", {"vcpu": 0, "name": "wings"}, errno.ENOENT),
        ("lapic_local_irq", {"vcpu": 0, "lvt": 7}, errno.EINVAL),
        ("rtc_read", {"offset": 128}, errno.EINVAL),
        ("rtc_settime", {"secs": (1 << 64) - 1}, errno.EINVAL),
        ("suspend", {"how": int(SuspendHow.TRIPLEFAULT)}, errno.EINVAL),
    ],
)
def test_what_is_wrong_is_refused(
    client: ControlClient, op: str, args: dict[str, object], number: int
) -> None:
    with pytest.raises(ControlError) as refused:
        client.call(op, **args)
    assert refused.value.errno == number
    assert str(refused.value)


@pytest.mark.parametrize(
    ("line", "number"),
    [
        (b"", errno.EBADMSG),
        (b"{", errno.EBADMSG),
        (b"\xff\xfe", errno.EBADMSG),
        (b"[" * 60000, errno.EBADMSG),
        (b"[]", errno.EBADMSG),
        (b"{}", errno.EPROTONOSUPPORT),
        (b'{"version": 2, "op": "get_topology", "args": {}}', errno.EPROTONOSUPPORT),
        (b'{"version": 1}', errno.EOPNOTSUPP),
        (b'{"version": 1, "op": [], "args": {}}', errno.EOPNOTSUPP),
        (b'{"version": 1, "op": "get_topology"}', errno.EINVAL),
        (b'{"version": 1, "op": "get_topology", "args": [1]}', errno.EINVAL),
        (b"1" * 5000, errno.EBADMSG),  # more digits than Python converts
    ],
)
def test_a_line_that_is_no_request_has_a_reply(
    raw: socket.socket, line: bytes, number: int
) -> None:
    raw.sendall(line + b"\n" + encode({"op": "get_topology", "args": {}}))

    refusal = reply(raw)
    assert (refusal["ok"], refusal["errno"]) == (False, number)
    assert reply(raw) == {"version": 1, "ok": True, "result": [1, 1, 1, 1]}


def test_a_line_too_long_ends_the_connection(raw: socket.socket) -> None:
    with contextlib.suppress(OSError):
        raw.sendall(b"x" * (4 * LINE_MAX))

    # What was left unread may turn the end of the connection into a reset.
    with contextlib.suppress(ConnectionResetError):
        assert reply(raw)["errno"] == errno.EMSGSIZE
        assert raw.recv(1) == b""


def test_a_client_that_never_reads_is_not_listened_to(
    raw: socket.socket, client: ControlClient
) -> None:
    """Its replies fill the socket, then it is on hold; others are served."""
    request = encode({"op": "get_stats", "args": {"vcpu": 0}})
    raw.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(100_000):
            raw.send(request * 100)
        pytest.fail("the server takes whatever it is sent")

    assert client.call("get_topology") == [1, 1, 1, 1]

    # And when it reads after all, each whole request has its reply, in order.
    raw.settimeout(10)
    for _ in range(5):
        assert reply(raw)["ok"] is True


def test_half_a_line_waits_for_the_other_half(raw: socket.socket) -> None:
    request = encode({"op": "get_topology", "args": {}})
    raw.sendall(request[:10])
    raw.sendall(request[10:])

    assert reply(raw)["result"] == [1, 1, 1, 1]


def test_many_clients_come_and_go(machine: Machine) -> None:
    path = machine.ctx.directory.control_path
    crowd = [connect(path) for _ in range(40)]
    for sock in crowd:
        sock.close()

    with ControlClient(path) as client:
        assert client.call("get_topology") == [1, 1, 1, 1]


def test_a_client_in_the_backlog_has_its_turn(machine: Machine) -> None:
    path = machine.ctx.directory.control_path
    crowd = [ControlClient(path) for _ in range(server.CLIENTS_MAX)]
    for each in crowd:
        each.call("get_topology")
    late = ControlClient(path)
    crowd[0].close()

    assert late.call("get_topology") == [1, 1, 1, 1]
    for each in (*crowd[1:], late):
        each.close()


def test_the_socket_goes_with_the_machine(running: Running) -> None:
    path = running.machine.ctx.directory.control_path
    client = ControlClient(path)
    client.call("get_topology")
    running.end()

    assert not os.path.lexists(path)
    with pytest.raises(ControlError) as gone:
        client.call("get_topology")
    assert gone.value.errno == errno.ECONNRESET
    client.close()


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.binary(max_size=200)
        | st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ).map(lambda value: json.dumps(value).encode()),
        max_size=5,
    )
)
def test_any_lines_leave_the_server_alive(machine: Machine, lines: list[bytes]) -> None:
    path = machine.ctx.directory.control_path
    with connect(path) as sock:
        sock.settimeout(10)
        for line in lines:
            sock.sendall(line.replace(b"\n", b" ") + b"\n")
            assert reply(sock)["ok"] is False
    with ControlClient(path) as client:
        assert client.call("get_topology") == [1, 1, 1, 1]


@given(
    st.sampled_from(["set_register", "set_desc", "get_stats", "suspend", "rtc_write"]),
    st.dictionaries(
        st.sampled_from(
            ["vcpu", "register", "value", "base", "limit", "access", "how", "offset"]
        ),
        st.integers() | st.sampled_from(["rax", "cs", "gdtr", ""]) | st.none(),
    ),
)
def test_any_arguments_are_done_or_refused(op: str, args: dict[str, object]) -> None:
    with contextlib.suppress(ControlError):
        Operations(Vm(1)).call(op, args)
