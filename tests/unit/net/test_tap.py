"""Taps of the kernel that the tests run on, each test in its own namespace."""

from __future__ import annotations

import random
import socket
import struct
import subprocess
import threading
import time

import pytest

from pybhyve.errors import BhyveError, DeviceError, NotAvailableError, one_line
from pybhyve.mevent import EventLoop
from pybhyve.net import FRAME_MAX, HEADER_MRG, NetOptions, open_backend
from pybhyve.net.tap import TapBackend
from tests.guestside import frames
from tests.unit.net.namespace import in_namespace

MAC = bytes.fromhex("020000000001")


def ip(*args: str) -> str:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, check=True)
    return done.stdout


class Station:
    """Takes what a tap receives, and sends, on an event loop of its own."""

    def __init__(self, tap: TapBackend, loop: EventLoop) -> None:
        self.tap = tap
        self.loop = loop
        self.got: list[bytes] = []
        self.calls = 0
        self.links: list[bool] = []
        self.buffer = memoryview(bytearray(FRAME_MAX))
        tap.start(self.receive, lambda: self.links.append(tap.link_up))
        self.thread = threading.Thread(target=loop.run)
        self.thread.start()

    def receive(self) -> None:
        self.calls += 1
        length = self.tap.receive(self.buffer)
        if length:
            self.got.append(bytes(self.buffer[:length]))

    def wait(self, condition) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def close(self) -> None:
        self.loop.stop()
        self.thread.join()
        self.tap.close()
        self.loop.close()


def station(name: str = "tap0") -> Station:
    loop = EventLoop()
    return Station(TapBackend(loop, name), loop)


def arps(got: list[bytes], header: int) -> list[bytes]:
    return [frame for frame in got if frame[header + 12 : header + 14] == b"\x08\x06"]


@in_namespace
def test_a_tap_is_created_used_and_removed():
    guest = station()
    ip("addr", "add", "192.168.9.1/24", "dev", "tap0")
    guest.tap.enable_receive()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("192.168.9.1", 7))
        host.sendto(b"ping", ("192.168.9.2", 7))  # asks who has that address
        guest.wait(lambda: arps(guest.got, 10))
        question = arps(guest.got, 10)[0][10:]
        host_mac = question[6:12]
        answer = frames.arp(2, MAC, "192.168.9.2", host_mac, "192.168.9.1")
        frame = frames.ether(host_mac, MAC, frames.ETHERTYPE_ARP, answer)
        guest.loop.call_soon_threadsafe(lambda: guest.tap.send([bytes(10), frame]))
        guest.wait(lambda: any(b"ping" in frame for frame in guest.got))
        packet = frames.udp("192.168.9.2", 7, "192.168.9.1", 7, b"pong")
        frame = frames.ether(host_mac, MAC, frames.ETHERTYPE_IPV4, packet)
        guest.loop.call_soon_threadsafe(
            lambda: guest.tap.send([bytes(10), frame[:20], frame[20:]])
        )
        host.settimeout(5)

        assert host.recvfrom(100) == (b"pong", ("192.168.9.2", 7))

    guest.close()

    assert "tap0" not in ip("link")


@in_namespace
def test_nothing_is_read_while_reception_is_disabled():
    guest = station()
    ip("addr", "add", "192.168.9.1/24", "dev", "tap0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.sendto(b"ping", ("192.168.9.2", 7))
    time.sleep(0.2)

    assert guest.calls == 0

    guest.tap.enable_receive()
    guest.wait(lambda: arps(guest.got, 10))
    guest.tap.disable_receive()
    time.sleep(0.05)
    calls = guest.calls
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.sendto(b"ping", ("192.168.9.3", 7))
    time.sleep(0.2)

    assert guest.calls == calls

    guest.close()


@in_namespace
def test_the_long_header():
    guest = station()
    guest.tap.set_header(HEADER_MRG)
    ip("addr", "add", "192.168.9.1/24", "dev", "tap0")
    guest.tap.enable_receive()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.sendto(b"ping", ("192.168.9.2", 7))
    guest.wait(lambda: arps(guest.got, 12))
    guest.close()


@in_namespace
def test_a_cable_is_pulled_and_put_back():
    guest = station()

    assert guest.tap.link_up

    ip("link", "set", "tap0", "down")
    guest.wait(lambda: guest.links == [False])
    guest.tap.send([bytes(10), bytes(60)])  # lost
    ip("link", "set", "tap0", "up")
    guest.wait(lambda: guest.links == [False, True])
    ip("link", "set", "tap0", "name", "other0")
    ip("link", "set", "other0", "carrier", "off")
    guest.wait(lambda: guest.links == [False, True, False])
    guest.close()


@in_namespace
def test_an_interface_that_is_removed_is_a_pulled_cable_and_no_busy_loop():
    guest = station()
    guest.tap.enable_receive()
    ip("link", "delete", "tap0")
    guest.wait(lambda: guest.links == [False])
    time.sleep(0.1)
    calls = guest.calls
    guest.tap.enable_receive()
    guest.tap.send([bytes(10), bytes(60)])
    time.sleep(0.2)

    assert guest.calls == calls

    guest.close()


@in_namespace
def test_malformed_frames_are_lost():
    guest = station()
    tap = guest.tap
    for iov in ([b""], [bytes(9)], [bytes(10)], [bytes(10), bytes(13)], [b"\xff" * 70]):
        tap.send(iov)
    tap.send([bytes(10), bytes(70000)])
    guest.close()


@in_namespace
def test_any_header_in_front_of_anything():
    guest = station()
    randomly = random.Random(11)
    for _ in range(3000):
        header = bytes(randomly.choice((0, 1, 4, 0xFF)) for _ in range(2))
        header += struct.pack("<4H", *(randomly.randrange(100) for _ in range(4)))
        frame = frames.tcp_segment(1, 2, 3, 4, 5, randomly.randbytes(3000))
        packet = frames.ipv4("192.168.9.2", "192.168.9.1", frames.TCP, frame)
        whole = frames.ether(b"\xff" * 6, MAC, frames.ETHERTYPE_IPV4, packet)
        guest.tap.send([header, whole[: randomly.choice((0, 20, 60, 4000))]])
    guest.close()


@in_namespace
def test_a_bridge():
    ip("link", "add", "br0", "type", "bridge")
    loop = EventLoop()
    tap = TapBackend(loop, "tap0", "br0")

    assert "master br0" in ip("link", "show", "tap0")

    tap.close()
    with pytest.raises(DeviceError, match="there is no bridge br1"):
        TapBackend(loop, "tap0", "br1")
    with pytest.raises(DeviceError, match="lo is not a bridge"):
        TapBackend(loop, "tap0", "lo")
    loop.close()


@in_namespace
def test_names_that_are_taken():
    loop = EventLoop()
    first = TapBackend(loop, "tap0")
    with pytest.raises(DeviceError) as caught:
        TapBackend(loop, "tap0")

    assert one_line(caught.value) == (
        "tap0: another program has it: Device or resource busy"
    )

    first.close()
    ip("link", "add", "tapx", "type", "bridge")
    with pytest.raises(DeviceError, match="not a tap of one queue"):
        TapBackend(loop, "tapx")
    loop.close()


@in_namespace
def test_a_tap_made_by_root_is_used_and_stays():
    ip("tuntap", "add", "tap7", "mode", "tap")
    guest = station("tap7")

    assert guest.tap.link_up

    guest.close()

    assert "tap7" in ip("link")


def test_without_privilege():
    loop = EventLoop()

    def child() -> None:
        # A user namespace of its own has no say over this network.
        with pytest.raises(DeviceError) as caught:
            TapBackend(loop, "tapnobody")
        text = one_line(caught.value)

        assert "ip tuntap add tapnobody mode tap user" in text or (
            "/dev/net/tun may not be opened" in text
        )

    in_namespace(child, network=False)()
    loop.close()


def test_without_the_kernels_module(monkeypatch, tmp_path):
    monkeypatch.setattr("pybhyve.net.tap.TUN_DEVICE", str(tmp_path / "tun"))
    loop = EventLoop()
    with pytest.raises(DeviceError, match="load its module: modprobe tun"):
        TapBackend(loop, "tap0")
    loop.close()


@pytest.mark.parametrize("name", ["tap0123456789abcdef", "tap 0", "tap/0", "tap%d"])
def test_names_that_no_interface_has(name):
    loop = EventLoop()
    with pytest.raises(DeviceError, match="cannot be the name of an interface"):
        TapBackend(loop, name)
    loop.close()


@pytest.mark.parametrize(
    ("variables", "error", "message"),
    [
        ({"backend": "netgraph"}, NotAvailableError, "netgraph is not available"),
        ({"backend": "netmap:em0"}, NotAvailableError, "netmap is not available"),
        ({"backend": "vale0:1"}, NotAvailableError, "vale is not available"),
        ({"backend": "em0"}, DeviceError, 'backend "em0": expected tapN, vmnetN or'),
        ({"backend": "em0", "type": "x"}, DeviceError, "backend type=x: expected"),
    ],
)
def test_other_backends_are_refused(variables, error, message):
    loop = EventLoop()
    with pytest.raises(error, match=message) as caught:
        open_backend(NetOptions(**variables), loop, lambda: 0, 1500)

    assert isinstance(caught.value, BhyveError)

    loop.close()


def test_no_backend_is_no_cable():
    loop = EventLoop()
    backend = open_backend(NetOptions(), loop, lambda: 0, 1500)
    backend.start(lambda: None, lambda: None)
    backend.send([bytes(72)])

    assert not backend.link_up
    assert backend.receive(memoryview(bytearray(FRAME_MAX))) == 0

    backend.close()
    loop.close()
