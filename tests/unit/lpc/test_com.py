"""COM ports and pc-testdev at their ISA addresses."""

from __future__ import annotations

import socket

import pytest

from pybhyve.errors import DeviceError


@pytest.mark.parametrize(
    ("base", "irq"), [(0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3)]
)
def test_port_and_interrupt(build, base, irq):
    machine = build("31,lpc")
    machine.vm.take()
    machine.inout.write(base + 1, 1, 0x02)
    machine.inout.read(base + 2, 1)

    assert machine.vm.take() == [
        ("isa_assert_irq", irq, irq),
        ("isa_deassert_irq", irq, irq),
    ]


def test_without_lpc_there_is_no_port(build):
    assert build().inout.owner(0x3F8) is None


def test_backend_moves_bytes(build):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    machine = build("31,lpc", lpc__com2__path=f"tcp=127.0.0.1:{port}")
    loop = machine.mevent
    machine.devices["com2"].start()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"ab")

        def look():
            if machine.inout.read(0x2FD, 1) & 1:
                loop.stop()

        timer = loop.add_timer(0.002, look, periodic=True)
        loop.run()
        loop.delete(timer)

        assert machine.inout.read(0x2F8, 1) == ord("a")

        machine.inout.write(0x2F8, 1, ord("z"))
        loop.add_timer(0.02, loop.stop)
        loop.run()

        assert client.recv(10) == b"z"


def test_a_backend_that_cannot_be_opened(build):
    with pytest.raises(DeviceError) as raised:
        build("31,lpc", lpc__com1__path="/no/such")

    assert "console /no/such cannot be opened" in str(raised.value.__cause__)


def test_pc_testdev_exit_status(build):
    machine = build("31,lpc", **{"lpc__pc-testdev": "true"})
    machine.inout.write(0xF4, 1, 0x10)

    assert machine.mevent.run() == 33
    assert machine.inout.read(0xF4, 1) == 0


def test_pc_testdev_scratch_and_memory(build):
    machine = build("31,lpc", **{"lpc__pc-testdev": "true"})
    machine.inout.write(0xE0, 4, 0x11223344)
    machine.mem.write(0, 0xFF000100, 4, 0xCAFEF00D)

    assert machine.inout.read(0xE1, 1) == 0x33
    assert machine.inout.read(0xE2, 4) == 0x1122
    assert machine.mem.read(0, 0xFF000102, 2) == 0xCAFE


def test_pc_testdev_lines(build):
    machine = build("31,lpc", **{"lpc__pc-testdev": "true"})
    machine.vm.take()
    for value in (1, 1, 0, 0):
        machine.inout.write(0x2005, 1, value)
        machine.inout.write(0x2014, 1, value)

    assert machine.vm.take() == [
        ("isa_assert_irq", 5, 5),
        ("ioapic_assert_irq", 20),
        ("isa_deassert_irq", 5, 5),
        ("ioapic_deassert_irq", 20),
    ]


def test_a_paused_port_lets_the_line_wait(build):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    machine = build("31,lpc", lpc__com1__path=f"tcp=127.0.0.1:{port}")
    loop, com = machine.mevent, machine.devices["com1"]
    com.start()
    com.pause()
    before = com.save()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"a")
        loop.add_timer(0.05, loop.stop)
        loop.run()

        assert com.save() == before

        com.resume()
        loop.add_timer(0.05, loop.stop)
        loop.run()

        assert machine.inout.read(0x3F8, 1) == ord("a")


def test_what_came_during_a_pause_goes_with_the_state(build):
    first, second = (build("31,lpc").devices["com1"] for _ in range(2))
    first.pause()
    first._port.receive(b"a")  # a read of the line that was under way

    state = first.save()
    second.pause()
    second.restore(state)
    second.resume()

    assert second._port.read(0, 1) == ord("a")


def test_a_state_of_another_version_is_refused(build):
    com = build("31,lpc").devices["com1"]

    with pytest.raises(ValueError, match="unknown version 9"):
        com.restore(com.save() | {"version": 9})
