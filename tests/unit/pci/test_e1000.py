"""e1000, driven by its registers, with the cable in the test's hands."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from pybhyve.net import VnetHeader
from pybhyve.pci import e1000
from tests.guestside import e1000 as chip
from tests.guestside import frames
from tests.guestside.e1000 import (
    DATA,
    EOP,
    IC,
    IFCS,
    RS,
    TSE,
    VLE,
    E1000Driver,
)
from tests.guestside.pci import PciFunction
from tests.guestside.wire import Wire, running

MAC = bytes.fromhex("00a098010203")
OTHER = bytes.fromhex("00a098040506")
LAST = EOP | IFCS | RS
NO_HEADER = bytes(10)


class Nic(E1000Driver):
    def __init__(self, machine, wire, size) -> None:
        super().__init__(PciFunction(machine, 2), size)
        self.machine, self.wire = machine, wire
        self.device = machine.devices["pci.0.2.0"]
        self.take_wires = machine.vm.take

    def receive(self, frame: bytes) -> tuple[bytes, int, int] | None:
        self.wire.put(frame)
        self.wire.settle()
        return self.take()

    def lines(self) -> list[str]:
        """What the interrupt line did."""
        return [
            name.split("_")[1]
            for name, *_ in self.take_wires()
            if name.startswith("ioapic")
        ]


@pytest.fixture
def nic(build, monkeypatch) -> Iterator[Callable[..., Nic]]:
    with ExitStack() as stack:

        def make(size=16) -> Nic:
            wires = []

            def open_wire(_options, loop, _clock, _mtu) -> Wire:
                wires.append(Wire(loop))
                return wires[0]

            monkeypatch.setattr(e1000, "open_backend", open_wire)
            machine = build("2,e1000", pci__0__2__0__mac="00:a0:98:01:02:03")
            stack.enter_context(running(machine, "pci.0.2.0"))
            card = Nic(machine, wires[0], size)
            card.take_wires()
            return card

        yield make


def frame_to(destination: bytes, length: int = 100, seed: int = 1) -> bytes:
    body = random.Random(seed).randbytes(length - 14)
    return destination + OTHER + b"\x08\x00" + body


# -- the chip ------------------------------------------------------------------------


def test_identity(nic):
    card = nic()

    assert card.function.read(0) == 0x100F8086
    assert card.function.read(0x2C) == 0x10088086
    assert card.function.read(8) >> 16 == 0x0200
    assert card.function.read(0x3D, 1) == 1
    assert [card.function.bar(index).size for index in range(3)] == [
        128 << 10,
        64 << 10,
        8,
    ]


def test_the_eeprom_bit_by_bit_and_by_eerd(nic):
    card = nic()
    words = [card.eeprom(word) for word in range(64)]

    assert struct.pack("<HHH", *words[:3]) == MAC
    assert words[0x0B:0x0F] == [0x1008, 0x8086, 0x100F, 0x8086]
    assert sum(words) & 0xFFFF == 0xBABA
    for word in (0, 1, 63, 64):
        card.set(chip.EERD, word << 8 | 1)
        got = card.get(chip.EERD)
        assert got & 0x10
        assert got >> 16 == (words[word] if word < 64 else 0)

    card.microwire(0b101, 5, 0x1234)

    assert card.eeprom(5) == 0x1234
    assert card.microwire(0b111, 5) == 0, "an opcode that gives no data"
    assert card.eeprom(4) == 0


def test_the_phy(nic):
    card = nic()

    assert card.phy(2) & 0xFFFF == 0x0141
    assert card.phy(3) & 0xFFF0 == 0x0C20
    assert card.phy(1) & 0x24 == 0x24
    assert card.phy(2, phy=2) & 1 << 30, "nobody is there"
    card.phy(4, 0x0123)
    assert card.phy(4) & 0xFFFF == 0x0123
    card.phy(0, 0x9340)
    assert card.phy(0) & 0x8200 == 0, "reset and restart are done"
    card.phy(2, 0xFFFF)
    assert card.phy(2) & 0xFFFF == 0x0141
    card.set(chip.CTRL, card.get(chip.CTRL) | 1 << 31)
    assert card.phy(4) & 0xFFFF == 0x0DE1


def test_a_cable_is_pulled_and_put_back(nic):
    card = nic()
    card.start()
    card.lines()

    assert card.get(chip.STATUS) & 3 == 3

    card.wire.plug(up=False)
    card.wire.settle()

    assert card.lines() == ["assert"]
    assert card.get(chip.ICR) == chip.LSC
    assert card.lines() == ["deassert"]
    assert card.get(chip.STATUS) & 3 == 1
    assert card.phy(1) & 0x24 == 0
    assert card.phy(10) & 0xFFFF == 0

    card.wire.plug(up=True)
    card.wire.settle()

    assert card.get(chip.STATUS) & 3 == 3


def test_masks_and_causes(nic):
    card = nic()
    card.start()
    card.lines()
    card.set(chip.IMC, 0xFFFFFFFF)
    card.set(chip.ICS, chip.LSC | chip.RXT0)

    assert card.lines() == []

    card.set(chip.IMS, chip.RXT0)

    assert card.lines() == ["assert"]

    card.set(chip.ICR, chip.RXT0)

    assert card.lines() == ["deassert"]
    assert card.get(chip.ICR) == chip.LSC
    assert card.get(chip.ICR) == 0
    assert card.get(chip.IMS) == chip.RXT0

    card.set(chip.ICS, chip.RXT0)
    card.set(chip.IMC, chip.RXT0)

    assert card.lines() == ["assert", "deassert"]


def test_interrupts_are_throttled(nic):
    card = nic()
    card.start(itr=0xFFFF)  # 16.8 ms
    card.lines()
    for _ in range(3):
        card.set(chip.ICS, chip.RXT0)
        card.get(chip.ICR)

    assert card.lines() == ["assert", "deassert"]

    card.set(chip.ICS, chip.RXT0)
    card.wire.wait(lambda: card.device._asserted)

    assert card.lines() == ["assert"]


def test_registers_by_ports(nic):
    card = nic()
    card.ports.write(0, 4, chip.VET)
    card.ports.write(4, 4, 0x8100)

    assert card.ports.read(0, 4) == chip.VET
    assert card.get(chip.VET) == 0x8100
    assert card.ports.read(4, 2) == 0x8100


def test_a_reset_keeps_the_tables(nic):
    card = nic()
    card.set(chip.MTA + 8, 0x12345678)
    card.set(chip.RDLEN, 0x100)
    card.set(chip.CTRL, 1 << 26)

    assert card.get(chip.MTA + 8) == 0x12345678
    assert card.get(chip.RDLEN) == 0
    assert card.get(chip.CTRL) & 1 << 26 == 0
    assert card.get(chip.RA).to_bytes(4, "little") == MAC[:4]
    assert card.get(chip.RA + 4) == 0x80000302


# -- transmission --------------------------------------------------------------------


def test_legacy_descriptors(nic):
    card = nic()
    card.start()
    first = card.data(b"a" * 30, IFCS)
    second = card.data(b"b" * 40, LAST)
    third = card.data(b"c" * 60, EOP | IFCS)
    card.kick()
    sent = card.wire.wait_sent(2)
    card.wire.settle()

    assert sent == [NO_HEADER + b"a" * 30 + b"b" * 40, NO_HEADER + b"c" * 60]
    assert [card.status(at) for at in (first, second, third)] == [0, 1, 0]
    assert card.get(chip.TDH) == 3
    assert card.get(chip.ICR) == chip.TXDW | chip.TXQE


def test_many_frames_around_the_ring(nic):
    card = nic(64)
    card.start()
    count = 0
    for turn in range(20):
        number = 1 + turn * 3 % 50
        for _ in range(number):
            card.data(struct.pack("<I", count) * 16, LAST)
            count += 1
        card.kick()
        sent = card.wire.wait_sent(number)
        card.wire.settle()
        expected = range(count - number, count)
        assert sent == [NO_HEADER + struct.pack("<I", n) * 16 for n in expected]
        card.heap = 0x800000


def test_padding_and_the_senders_own_fcs(nic):
    card = nic()
    card.start(tctl=1 << 3)
    card.data(b"x" * 20, LAST)
    card.data(b"y" * 60 + b"fcs!", EOP | RS)
    card.kick()

    assert card.wire.wait_sent(2) == [
        NO_HEADER + b"x" * 20 + bytes(40),
        NO_HEADER + b"y" * 60,
    ]


def test_a_legacy_checksum(nic):
    card = nic()
    card.start()
    data = bytearray(frame_to(OTHER, 81))
    data[50:52] = b"\0\0"
    card.data(bytes(data), LAST | IC | 50 << 16, 34 << 8)
    card.kick()
    (sent,) = card.wire.wait_sent()

    assert frames.checksum(sent[10 + 34 :]) == 0


def ip_frame(payload: bytes, *, ipv6: bool = False) -> bytes:
    """TCP as a driver leaves it to the chip: sums of pseudo headers, no lengths."""
    segment = frames.tcp_segment(1, 2, 3, 4, frames.ACK, payload)
    header: bytearray
    if ipv6:
        header = bytearray(struct.pack(">IHBB", 6 << 28, 0, frames.TCP, 64))
        header += bytes(range(32))
        pseudo = bytes(header[8:]) + struct.pack(">II", 0, frames.TCP)
        ethertype = b"\x86\xdd"
    else:
        header = bytearray(frames.ipv4("10.0.0.1", "10.0.0.2", frames.TCP, b""))
        header[2:4] = header[10:12] = b"\0\0"
        pseudo = frames.pseudo("10.0.0.1", "10.0.0.2", frames.TCP, 0)
        ethertype = b"\x08\x00"
    partial = frames.checksum(pseudo) ^ 0xFFFF
    segment = segment[:16] + partial.to_bytes(2, "big") + segment[18:]
    return OTHER + MAC + ethertype + header + segment


def test_checksums_of_a_data_descriptor(nic):
    card = nic()
    card.start()
    frame = bytearray(ip_frame(b"payload"))
    frame[16:18] = (len(frame) - 14).to_bytes(2, "big")
    card.context()
    card.data(bytes(frame), DATA | LAST, 3 << 8)
    card.kick()
    (sent,) = card.wire.wait_sent()

    assert VnetHeader.unpack(sent) == VnetHeader(1, csum_start=34, csum_offset=16)
    assert frames.checksum(sent[10 + 14 : 10 + 34]) == 0
    assert sent[10 + 34 :] == frame[34:]


@pytest.mark.parametrize("ipv6", [False, True])
def test_segmentation_is_left_to_the_backend(nic, ipv6):
    card = nic()
    card.start()
    payload = random.Random(3).randbytes(5000)
    frame = ip_frame(payload, ipv6=ipv6)
    tcp = 54 if ipv6 else 34
    card.context(
        tu=(tcp, tcp + 16, 0),
        command=(1 if ipv6 else 3) << 24 | 1 << 26,
        hdr=tcp + 20,
        mss=1400,
    )
    card.data(frame[: tcp + 20], DATA | TSE, 3 << 8)
    card.data(frame[tcp + 20 : 3000], DATA | TSE)
    card.data(frame[3000:], DATA | TSE | LAST)
    card.kick()
    (sent,) = card.wire.wait_sent()
    header, got = VnetHeader.unpack(sent), sent[10:]

    assert header == VnetHeader(1, 4 if ipv6 else 1, tcp + 20, 1400, tcp, 16)
    if ipv6:
        assert int.from_bytes(got[18:20], "big") == len(frame) - 54
    else:
        assert int.from_bytes(got[16:18], "big") == len(frame) - 14
        assert frames.checksum(got[14:34]) == 0
    finished = header.finish(got)
    assert finished is not None
    length = len(frame) - tcp
    if ipv6:
        pseudo = got[22:54] + struct.pack(">II", length, frames.TCP)
    else:
        pseudo = frames.pseudo("10.0.0.1", "10.0.0.2", frames.TCP, length)
    assert frames.checksum(pseudo + finished[tcp:]) == 0
    assert finished.endswith(payload)
    assert card.get(chip.STATS + 0xF8) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"mss": 0},
        {"hdr": 0},
        {"hdr": 255},
        {"tu": (34, 90, 0)},
        {"tu": (10, 26, 0)},
        {"ip": (250, 24, 33)},
        {"command": 2 << 24},
    ],
)
def test_segmentation_that_makes_no_sense(nic, change):
    card = nic()
    card.start()
    options = {"command": 3 << 24, "hdr": 54, "mss": 1400} | change
    card.context(**options)
    card.data(ip_frame(b"x" * 100), DATA | TSE | LAST)
    card.data(b"next" * 20, LAST)
    card.kick()

    assert card.wire.wait_sent() == [NO_HEADER + b"next" * 20]


def test_vlan_tags_are_inserted(nic):
    card = nic()
    card.start()
    card.set(chip.VET, 0x8100)
    card.set(chip.CTRL, 1 << 30)
    frame = frame_to(OTHER)
    card.data(frame, LAST | VLE, 0x2345 << 16)
    card.kick()

    assert card.wire.wait_sent() == [
        NO_HEADER + frame[:12] + b"\x81\x00\x23\x45" + frame[12:]
    ]


def test_an_unfinished_frame_waits(nic):
    card = nic()
    card.start()
    card.data(b"a" * 40, IFCS)
    card.kick()
    card.wire.settle()

    assert not card.wire.sent
    assert card.get(chip.TDH) == 0

    card.data(b"b" * 40, LAST)
    card.kick()

    assert card.wire.wait_sent() == [NO_HEADER + b"a" * 40 + b"b" * 40]


def test_hostile_transmission(nic):
    card = nic(512)
    card.start()
    for _ in range(300):
        card.put(0, 100)  # no end
    card.put(1 << 60, LAST | 100)  # no memory
    card.put(0xFFFFFFFFFFFFFFFF, LAST | 100)
    card.put(0, DATA | LAST | 0xFFFFF)  # too long
    card.put(0, LAST | 3)  # too short
    card.put(0, LAST)  # empty
    card.put(0, DATA | LAST | 2, 3 << 8)
    card.data(b"alive" * 20, LAST)
    card.kick()

    assert card.wire.wait_sent() == [NO_HEADER + b"alive" * 20]


@pytest.mark.parametrize(
    "registers",
    [
        {chip.TDBAL: 0xFFFFFFF0, chip.TDBAH: 0xFFFFFFFF},
        {chip.TDBAL: 0xE0000000},
        {chip.TDLEN: 0},
        {chip.TDT: 0xFFFF},
        {chip.TDH: 0xFFFF},
        {chip.RDBAL: 0xFFFFFFF0, chip.RDBAH: 0xFFFFFFFF},
        {chip.RDLEN: 0},
        {chip.RDT: 0xFFFF},
        {chip.RDH: 0xFFFF},
    ],
)
def test_rings_that_make_no_sense(nic, registers):
    card = nic()
    card.start()
    card.data(b"lost" * 20, LAST)
    for register, value in registers.items():
        card.set(register, value)
    if chip.TDT not in registers:
        card.kick()
    card.wire.put(frame_to(MAC), frame_to(MAC))
    card.wire.settle()
    card.wire.waiting.clear()
    card.start()
    card.wire.sent.clear()
    card.data(b"alive" * 20, LAST)
    card.kick()

    assert card.wire.wait_sent() == [NO_HEADER + b"alive" * 20]
    while (got := card.receive(frame_to(MAC, seed=9))) is None:
        pass
    assert got[0] == frame_to(MAC, seed=9)


def test_any_descriptors(nic):
    card = nic(64)
    randomly = random.Random(17)
    for _ in range(150):
        card.start(rctl=randomly.getrandbits(27) & ~(3 << 6), tctl=1 << 3)
        card.set(chip.CTRL, randomly.choice((0, 1 << 30)))
        for at in range(64):
            address = randomly.choice((0x800000, 0x1FFFFF0, 1 << 60, 0xE0000000))
            card.vm.write_mem(chip.RX_RING + 16 * at, struct.pack("<QQ", address, 0))
            lower = randomly.choice((60, 1514, 9000, 0xFFFFF, 0, 3))
            lower |= randomly.getrandbits(8) << 24 | randomly.getrandbits(1) << 20
            upper = randomly.getrandbits(32)
            desc = struct.pack("<QII", address, lower, upper)
            card.vm.write_mem(chip.TX_RING + 16 * at, desc)
        card.wire.put(frame_to(MAC), frame_to(frames.BROADCAST, 1518), b"")
        card.set(chip.TDT, randomly.randrange(64))
        card.wire.settle()
        card.wire.waiting.clear()
    card.start()
    card.wire.sent.clear()
    card.data(b"alive" * 20, LAST)
    card.kick()

    assert card.wire.wait_sent() == [NO_HEADER + b"alive" * 20]


# -- reception -----------------------------------------------------------------------


def test_a_frame_is_received(nic):
    card = nic()
    card.start()
    frame = frame_to(MAC)

    assert card.receive(frame) == (frame, 0b111, 0)
    assert card.get(chip.ICR) == chip.RXT0
    assert card.get(chip.RDH) == 1
    assert card.receive(MAC + OTHER + b"\x08\x00short")[0] == (
        MAC + OTHER + b"\x08\x00short" + bytes(41)
    )


def test_the_fcs_is_there_unless_stripped(nic):
    card = nic()
    card.start(rctl=0)
    frame = frame_to(MAC)
    got = card.receive(frame)

    assert got is not None
    assert got[0] == frame + zlib.crc32(frame).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("bits", "size"),
    [(0, 2048), (2 << 16, 512), (3 << 16, 256), (1 << 25 | 3 << 16, 4096)],
)
def test_long_frames_take_several_buffers(nic, bits, size):
    card = nic(64)
    card.start(rctl=chip.SECRC | chip.LPE | bits)
    frame = frame_to(MAC, 9000)
    got = card.receive(frame)

    assert got is not None
    assert got[0] == frame
    assert card.get(chip.RDH) == -(-9000 // size)


def test_frames_wait_for_descriptors(nic):
    card = nic(8)
    card.start()
    sent = [frame_to(MAC, seed=seed) for seed in range(10)]
    card.wire.put(*sent)
    card.wire.settle()
    got = [card.take() for _ in range(7)]

    assert [one[0] for one in got if one] == sent[:7]
    assert card.take() is None
    assert card.get(chip.ICR) & chip.RXDMT0
    assert not card.wire.enabled

    card.give_back()
    card.wire.settle()
    card.wire.settle()

    assert [one[0] for one in (card.take(), card.take(), card.take()) if one] == sent[
        7:
    ]
    assert card.wire.enabled


def test_a_frame_that_never_fits_is_lost(nic):
    card = nic(8)
    card.start(rctl=chip.SECRC | chip.LPE | 3 << 16)

    assert card.receive(frame_to(MAC, 2000)) is None
    assert card.receive(frame_to(MAC, 1500)) is not None
    assert card.get(chip.STATS + 0x10) == 1


def multicast_hash(card, mac: bytes) -> None:
    index = (mac[4] | mac[5] << 8) >> 4 & 0xFFF
    at = chip.MTA + 4 * (index >> 5)
    card.set(at, card.get(at) | 1 << (index & 31))


GROUP = bytes.fromhex("01005e010203")


@pytest.mark.parametrize(
    ("destination", "rctl", "accepted"),
    [
        (MAC, 0, True),
        (OTHER, 0, False),
        (OTHER, chip.UPE, True),
        (frames.BROADCAST, 0, False),
        (frames.BROADCAST, chip.BAM, True),
        (GROUP, 0, False),
        (GROUP, chip.MPE, True),
        (GROUP, 1 << 6, False),
        (MAC, 1 << 6, False),  # loopback: the cable is off
    ],
)
def test_which_frames_are_for_us(nic, destination, rctl, accepted):
    card = nic()
    card.start(rctl=rctl)

    assert (card.receive(frame_to(destination)) is not None) == accepted


def test_more_addresses_and_groups(nic):
    card = nic()
    card.start()
    card.set(chip.RA + 8 * 15, int.from_bytes(OTHER[:4], "little"))
    card.set(chip.RA + 8 * 15 + 4, int.from_bytes(OTHER[4:], "little"))

    assert card.receive(frame_to(OTHER)) is None, "not valid"

    card.set(chip.RA + 8 * 15 + 4, int.from_bytes(OTHER[4:], "little") | 1 << 31)

    assert card.receive(frame_to(OTHER)) is not None

    multicast_hash(card, GROUP)
    got = card.receive(frame_to(GROUP))

    assert got is not None
    assert got[1] & 0x80, "by hash only"
    assert card.receive(frame_to(bytes.fromhex("01005e040506"))) is None


def tagged(tag: int) -> bytes:
    frame = frame_to(MAC)
    return frame[:12] + b"\x81\x00" + tag.to_bytes(2, "big") + frame[12:]


def test_vlans_are_filtered_and_stripped(nic):
    card = nic()
    card.start(rctl=chip.SECRC | chip.VFE)
    card.set(chip.VET, 0x8100)
    card.set(chip.VFTA + 4 * 3, 1 << 5)  # 101

    assert card.receive(tagged(100)) is None
    assert card.receive(tagged(0x2000 | 101)) == (tagged(0x2000 | 101), 0b111, 0)

    card.set(chip.CTRL, 1 << 30)

    assert card.receive(tagged(0x2000 | 101)) == (frame_to(MAC), 0b1111, 0x2000 | 101)


def test_too_long_and_too_short_frames(nic):
    card = nic()
    card.start()

    assert card.receive(frame_to(MAC, 1519)) is None
    assert card.receive(MAC) is None
    assert card.receive(frame_to(MAC, 1518)) is not None
    assert card.get(chip.STATS + 0xAC) == 1


def test_statistics_begin_anew_when_read(nic):
    card = nic()
    card.start()
    card.receive(frame_to(MAC, 100))
    card.receive(frame_to(frames.BROADCAST, 1000))
    card.data(b"x" * 60, LAST)
    card.kick()
    card.wire.wait_sent()
    card.wire.settle()

    assert card.get(chip.STATS + 0x74) == 2  # good packets received
    assert card.get(chip.STATS + 0x74) == 0
    assert card.get(chip.STATS + 0x78) == 1  # broadcasts
    assert card.get(chip.STATS + 0x60) == 1  # 65 to 127 bytes
    assert card.get(chip.STATS + 0x6C) == 1  # 512 to 1023 bytes
    assert card.get(chip.STATS + 0xD8) == 1  # 64 bytes sent
    assert card.get(chip.STATS + 0x88) == 1100
    assert card.get(chip.STATS + 0x8C) == 0
    assert card.get(chip.STATS + 0x88) == 0


# -- life ----------------------------------------------------------------------------


def test_nothing_moves_while_it_is_paused(nic):
    card = nic()
    card.start()
    card.wire.settle()
    card.device.pause()
    card.wire.put(frame_to(MAC))
    card.data(b"out" * 20, LAST)
    card.kick()
    card.wire.settle()

    assert not card.wire.sent
    assert card.take() is None

    card.device.resume()

    assert card.wire.wait_sent() == [NO_HEADER + b"out" * 20]
    card.wire.settle()
    assert card.take() is not None


def test_state_comes_back(nic):
    card = nic()
    card.start(itr=100)
    multicast_hash(card, GROUP)
    card.microwire(0b101, 5, 0x1234)
    card.phy(4, 0x0123)
    card.context(command=3 << 24, hdr=54, mss=1400)
    card.receive(frame_to(MAC))
    card.kick()
    card.wire.settle()
    card.device.pause()
    state = card.device.save()
    card.device.reset()

    assert card.get(chip.RDLEN) == 0

    card.device.restore(state)
    card.device.resume()

    assert card.device.save() == state
    assert card.eeprom(5) == 0x1234
    assert card.phy(4) & 0xFFFF == 0x0123
    assert card.receive(frame_to(GROUP)) is not None
    card.data(ip_frame(b"x" * 3000), DATA | TSE | LAST)
    card.kick()
    (sent,) = card.wire.wait_sent()
    assert VnetHeader.unpack(sent).gso_size == 1400


def test_any_register_takes_anything(nic):
    card = nic()
    randomly = random.Random(5)
    for _ in range(3000):
        offset = randomly.choice(
            (randomly.randrange(0x6000), randomly.randrange(0x20000))
        )
        size = randomly.choice((1, 2, 4))
        card.regs.read(offset, size)
        card.regs.write(offset, size, randomly.getrandbits(8 * size))
    card.ports.write(0, 4, 0xFFFFFFFF)
    for offset in range(8):
        for size in (1, 2, 4):
            card.ports.read(offset, size)
            card.ports.write(offset, size, 0)
    card.wire.settle()
    card.device.reset()
    card.start()

    assert card.receive(frame_to(MAC)) is not None
