"""libslirp itself, and a guest made of frames."""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pybhyve.errors import DeviceError
from pybhyve.mevent import EventLoop
from pybhyve.net import FRAME_MAX, slirp
from pybhyve.net.slirp import SlirpBackend
from tests.guestside import frames
from tests.guestside.frames import ACK, FIN, PSH, RST, SYN

MAC = bytes.fromhex("00a098010203")
GUEST, HOST = "10.0.2.15", "10.0.2.2"
HEADER = 10


class Guest:
    """A station on slirp's network."""

    def __init__(self, **options) -> None:
        self.loop = EventLoop()
        self.net = SlirpBackend(self.loop, time.monotonic_ns, 1500, **options)
        self.got: list[bytes] = []
        self.lock = threading.Condition()
        self.buffer = memoryview(bytearray(FRAME_MAX))
        self.net.start(self._receive, lambda: None)
        self.net.enable_receive()
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()
        self.host_mac = b""

    def _receive(self) -> None:
        length = self.net.receive(self.buffer)
        if length:
            with self.lock:
                self.got.append(bytes(self.buffer[HEADER:length]))
                self.lock.notify()

    def send(self, frame: bytes, header: bytes = bytes(HEADER)) -> None:
        self.loop.call_soon_threadsafe(lambda: self.net.send([header, frame]))

    def send_ip(self, packet: bytes, header: bytes = bytes(HEADER)) -> None:
        frame = frames.ether(self.host_mac, MAC, frames.ETHERTYPE_IPV4, packet)
        self.send(frame, header)

    def take(self, match: Callable[[bytes], object], seconds: float = 5) -> bytes:
        """The next frame of that kind; others are dropped."""
        with self.lock:
            deadline = time.monotonic() + seconds
            while True:
                while self.got:
                    frame = self.got.pop(0)
                    if match(frame):
                        return frame
                left = deadline - time.monotonic()
                assert left > 0, "no such frame"
                self.lock.wait(left)

    def join_network(self) -> None:
        """ARP, as any station before it talks."""
        question = frames.arp(1, MAC, GUEST, bytes(6), HOST)
        self.send(frames.ether(frames.BROADCAST, MAC, frames.ETHERTYPE_ARP, question))
        answer = self.take(lambda frame: frame[12:14] == b"\x08\x06")
        self.host_mac = answer[6:12]

    def answer_arp(self, frame: bytes) -> None:
        asker, their_ip = frame[22:28], ".".join(map(str, frame[28:32]))
        reply = frames.arp(2, MAC, GUEST, asker, their_ip)
        self.send(frames.ether(asker, MAC, frames.ETHERTYPE_ARP, reply))

    def take_tcp(self) -> frames.Tcp:
        parsed: list[frames.Tcp] = []

        def is_tcp(frame: bytes) -> bool:
            if frame[12:14] == b"\x08\x06":
                self.answer_arp(frame)
                return False
            found = frames.parse_tcp(frame)
            if found is not None:
                parsed.append(found)
            return found is not None

        self.take(is_tcp)
        return parsed[0]

    def close(self) -> None:
        self.loop.stop()
        self.thread.join()
        self.net.close()
        self.loop.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest(is_open=True)
    guest.join_network()
    yield guest
    guest.close()


def dhcp_discover() -> bytes:
    message = struct.pack(">BBBBIHH", 1, 1, 6, 0, 0x12345678, 0, 0)
    message += bytes(16) + MAC + bytes(10 + 64 + 128)
    message += b"\x63\x82\x53\x63" + b"\x35\x01\x01" + b"\xff" + bytes(60)
    return frames.udp(slirp.ANY, 68, "255.255.255.255", 67, message)


def test_dhcp_offers_the_documented_addresses():
    guest = Guest(is_open=True)
    guest.host_mac = frames.BROADCAST
    guest.send_ip(dhcp_discover())
    offer = guest.take(lambda frame: frame[34:38] == b"\x00\x43\x00\x44")
    guest.close()
    options = offer[14 + 20 + 8 + 240 :]

    assert offer[14 + 20 + 8 + 16 :][:4] == frames.address(GUEST)
    assert b"\x01\x04" + frames.address("255.255.255.0") in options
    assert b"\x03\x04" + frames.address(HOST) in options
    assert b"\x06\x04" + frames.address("10.0.2.3") in options


def test_udp_to_the_host_and_back(guest):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("127.0.0.1", 0))
        host.settimeout(5)
        port = host.getsockname()[1]
        guest.send_ip(frames.udp(GUEST, 5000, HOST, port, b"question"))
        data, sender = host.recvfrom(100)

        assert data == b"question"

        host.sendto(b"answer", sender)
        guest.take(lambda frame: frame.endswith(b"answer"))


class Connection:
    """A TCP connection of a guest that loses nothing."""

    def __init__(self, guest: Guest, sport: int, dport: int, peer: str = HOST) -> None:
        self.guest, self.sport, self.dport, self.peer = guest, sport, dport, peer
        self.seq, self.ack = 1000, 0

    def send(self, flags: int, payload: bytes = b"", header: bytes = b"") -> None:
        segment = frames.tcp_segment(
            self.sport, self.dport, self.seq, self.ack, flags, payload
        )
        pseudo = frames.pseudo(GUEST, self.peer, frames.TCP, len(segment))
        total = frames.checksum(pseudo + (b"" if header else segment))
        if header:  # the sum of the pseudo header is there for whoever finishes it
            total ^= 0xFFFF
        segment = segment[:16] + total.to_bytes(2, "big") + segment[18:]
        packet = frames.ipv4(GUEST, self.peer, frames.TCP, segment)
        self.guest.send_ip(packet, header or bytes(HEADER))
        self.seq += len(payload) + bool(flags & (SYN | FIN))

    def take(self) -> frames.Tcp:
        got = self.guest.take_tcp()
        self.ack = got.seq + len(got.payload) + bool(got.flags & (SYN | FIN))
        return got

    def open(self) -> None:
        self.send(SYN)
        got = self.take()

        assert got.flags == SYN | ACK

        self.send(ACK)


def test_tcp_to_the_host_with_large_segments_that_nobody_has_finished(guest):
    with socket.create_server(("127.0.0.1", 0)) as server:
        tcp = Connection(guest, 4000, server.getsockname()[1])
        tcp.open()
        server.settimeout(5)
        host, _ = server.accept()
        host.settimeout(5)
        data = random.Random(1).randbytes(60000)
        # virtio_net_hdr: NEEDS_CSUM, GSO_TCPV4, header 54, 1460 a segment, 34 + 16.
        header = struct.pack("<BBHHHH", 1, 1, 54, 1460, 34, 16)
        tcp.send(ACK | PSH, data, header)
        with host:
            got = b""
            while len(got) < len(data):
                got += host.recv(65536)

            assert got == data

            host.sendall(b"thanks")
            while not (reply := tcp.take()).payload:
                pass

            assert reply.payload == b"thanks"


def test_a_port_of_the_host_leads_to_the_guest():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    guest = Guest(hostfwd=f"tcp:127.0.0.1:{port}-:22;udp:127.0.0.1:{port}-:53")
    guest.join_network()
    with socket.socket() as client:
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", port))
        tcp = Connection(guest, 22, 0)
        syn = tcp.take()

        assert (syn.flags, syn.dport) == (SYN, 22)

        tcp.dport = syn.sport
        tcp.send(SYN | ACK)
        tcp.take()
        tcp.send(ACK | PSH, b"SSH-2.0-test")

        assert select.select([client], [], [], 5)[0] == [client]
        assert client.recv(100) == b"SSH-2.0-test"
    guest.close()


def test_a_closed_port_is_refused(guest):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    tcp = Connection(guest, 4001, port)
    tcp.send(SYN)

    assert tcp.take().flags & RST


def test_a_guest_that_is_not_open_cannot_connect():
    guest = Guest()
    guest.join_network()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        Connection(guest, 4002, server.getsockname()[1]).send(SYN)
        with pytest.raises(TimeoutError):
            server.accept()
    guest.close()


def test_a_guest_that_does_not_take_frames_loses_them_in_the_end(guest):
    guest.net.disable_receive()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("127.0.0.1", 0))
        host.settimeout(5)
        port = host.getsockname()[1]
        guest.send_ip(frames.udp(GUEST, 5001, HOST, port, b"hello"))
        _, sender = host.recvfrom(100)
        for _ in range(slirp.QUEUE_MAX // 1024 * 2):
            host.sendto(bytes(1400), sender)
            time.sleep(0.0005)
        time.sleep(0.2)

        assert guest.net._queued <= slirp.QUEUE_MAX
        assert len(guest.net._frames) > 100

        guest.net.enable_receive()
        guest.take(lambda frame: len(frame) == 1442)


def test_random_frames_do_no_harm(guest):
    randomly = random.Random(7)
    for _ in range(2000):
        frame = randomly.randbytes(randomly.choice((0, 1, 13, 14, 34, 60, 1514)))
        if randomly.random() < 0.7:
            frame = guest.host_mac + MAC + b"\x08\x00\x45" + frame
        guest.send(frame, randomly.randbytes(HEADER))
    guest.join_network()


def test_a_port_that_is_taken():
    loop = EventLoop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(DeviceError, match=f"TCP port {port} of 127.0.0.1 cannot"):
            SlirpBackend(
                loop, time.monotonic_ns, 1500, hostfwd=f"tcp:127.0.0.1:{port}-:1"
            )
    loop.close()


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(slirp, "LIBRARY", "libslirp.so.none")
    loop = EventLoop()
    with pytest.raises(DeviceError, match="apt-get install libslirp0"):
        SlirpBackend(loop, time.monotonic_ns, 1500)
    loop.close()
