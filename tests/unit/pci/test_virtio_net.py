"""virtio-net over both kinds of registers, with the cable in the test's hands."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.errors import ConfigError
from pybhyve.net import FRAME_MAX
from pybhyve.pci import virtio_net
from pybhyve.virtio import VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC
from tests.guestside.pci import PciFunction
from tests.guestside.virtio import NEEDS_RESET, VirtioDriver
from tests.guestside.wire import Wire, running

RXQ, TXQ, CTLQ = 0, 1, 2
CSUM, GUEST_CSUM, OFFLOADS, F_MTU, F_MAC = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5
GUEST_TSO4, GUEST_ECN, HOST_TSO4, MRG_RXBUF = 1 << 7, 1 << 9, 1 << 11, 1 << 15
STATUS, CTRL_VQ, CTRL_RX, CTRL_MAC = 1 << 16, 1 << 17, 1 << 18, 1 << 23
RING = VIRTIO_RING_F_EVENT_IDX | VIRTIO_RING_F_INDIRECT_DESC
ALL = 0xFFFFFF | RING
MAC = bytes.fromhex("00a098010203")
VARIABLES = {"pci__0__2__0__mac": "00:a0:98:01:02:03", "pci__0__2__0__backend": "tap0"}


class Nic:
    def __init__(self, machine, wire, *, modern=True, msix=True, features=ALL) -> None:
        self.machine = machine
        self.wire = wire
        self.device = machine.devices["pci.0.2.0"]
        self.driver = VirtioDriver(PciFunction(machine, 2), modern=modern, msix=msix)
        self.features = self.driver.start(features)
        wire.settle()

    @property
    def header(self) -> int:
        return 12 if self.driver.modern or self.features & MRG_RXBUF else 10

    def send(self, *parts: bytes, header: bytes | None = None, **how) -> int:
        queue = self.driver.queue(TXQ)
        front = bytes(self.header) if header is None else header
        head = queue.add([front, *parts] if front else parts, **how)
        queue.kick()
        assert queue.wait() == {head: 0}
        return head

    def post(self, *sizes: int) -> list[int]:
        """Make a buffer of each size available."""
        queue = self.driver.queue(RXQ)
        heads = [queue.add([], [size]) for size in sizes]
        queue.kick()
        return heads

    def control(self, command: bytes) -> int:
        queue = self.driver.queue(CTLQ)
        head = queue.add([command[:2], command[2:]] if command[2:] else [command], [1])
        queue.kick()
        assert queue.poll() == {head: 1}
        self.wire.settle()
        return queue.buffer(head, 0)[0]


@pytest.fixture
def nic(build, monkeypatch) -> Iterator[Callable[..., Nic]]:
    with ExitStack() as stack:

        def make(variables=VARIABLES, **options) -> Nic:
            wires = []

            def open_wire(_options, loop, _clock, _mtu) -> Wire:
                wires.append(Wire(loop))
                return wires[0]

            monkeypatch.setattr(virtio_net, "open_backend", open_wire)
            machine = build("2,virtio-net", **variables)
            stack.enter_context(running(machine, "pci.0.2.0"))
            return Nic(machine, wires[0], **options)

        yield make


@pytest.fixture(params=["legacy", "modern"])
def modern(request) -> bool:
    return request.param == "modern"


def test_identity_and_configuration(nic, modern):
    card = nic(modern=modern)
    function = card.driver.function

    assert function.read(0) == 0x10001AF4
    assert function.read(0x2C) == 0x00011AF4
    assert function.read(8) >> 16 == 0x0200
    config = bytes(card.driver.config(at, 1) for at in range(12))
    assert config == MAC + struct.pack("<HHH", 1, 1, 1500)
    assert card.features & (F_MAC | STATUS | MRG_RXBUF) == F_MAC | STATUS | MRG_RXBUF
    assert not card.driver.offered() & F_MTU


def test_mtu(nic):
    card = nic(VARIABLES | {"pci__0__2__0__mtu": "9000"})

    assert card.features & F_MTU
    assert card.driver.config(10, 2) == 9000


@pytest.mark.parametrize("mtu", ["45", "65536", "x", "-1"])
def test_mtu_that_is_none(build, mtu):
    with pytest.raises(ConfigError, match=r"pci\.0\.2\.0\.mtu"):
        build("2,virtio-net", pci__0__2__0__mtu=mtu)


@pytest.mark.parametrize("features", [ALL, 0, RING, MRG_RXBUF])
def test_frames_go_out_as_they_are(nic, modern, features):
    card = nic(modern=modern, features=features)
    indirect = bool(card.features & VIRTIO_RING_F_INDIRECT_DESC)
    header = bytes(range(card.header))
    card.send(b"one", b"", b"frame" * 10, header=header, indirect=indirect)
    card.send(bytes(60), header=b"", indirect=False)

    assert card.wire.wait_sent(2) == [header + b"one" + b"frame" * 10, bytes(60)]
    assert card.wire.header == card.header


def test_many_frames_at_once(nic, modern):
    card = nic(modern=modern)
    queue = card.driver.queue(TXQ)
    frames = [bytes(12) + struct.pack("<Q", number) for number in range(300)]
    for frame in frames:
        queue.add([frame])
    queue.kick()

    assert len(queue.wait(300)) == 300
    assert card.wire.wait_sent(300) == frames


def test_a_frame_that_is_too_long_is_lost(nic):
    card = nic()
    card.send(bytes(FRAME_MAX))
    card.send(b"next")

    assert [len(frame) for frame in card.wire.wait_sent()] == [16]


def test_a_frame_arrives_in_one_buffer(nic, modern):
    card = nic(modern=modern)
    (head,) = card.post(2000)
    card.wire.put(b"frame" * 100)
    queue = card.driver.queue(RXQ)

    assert queue.wait() == {head: 512}
    assert queue.buffer(head, 0)[:512] == bytes(10) + b"\1\0" + b"frame" * 100


def test_a_frame_arrives_in_several_buffers(nic):
    card = nic()
    heads = card.post(100, 200, 300, 400)
    card.wire.put(b"a" * 500, b"b" * 10)
    queue = card.driver.queue(RXQ)
    done = queue.wait(4)

    assert done == dict(zip(heads, (100, 200, 212, 22), strict=True))
    whole = b"".join(queue.buffer(head, 0)[: done[head]] for head in heads[:3])
    assert whole == bytes(10) + b"\3\0" + b"a" * 500
    assert queue.buffer(heads[3], 0)[:22] == bytes(10) + b"\1\0" + b"b" * 10


def test_without_merging_a_frame_needs_one_buffer(nic, modern):
    card = nic(modern=modern, features=GUEST_CSUM)
    heads = card.post(100, 100)
    card.wire.put(b"a" * 100, b"b" * 50, b"c" * 50)
    queue = card.driver.queue(RXQ)
    size = 50 + card.header

    assert queue.wait(2) == dict.fromkeys(heads, size)
    number = b"\1\0" if modern else b""
    assert queue.buffer(heads[0], 0)[10:size] == number + b"b" * 50


def test_a_frame_waits_for_buffers(nic, modern):
    card = nic(modern=modern)
    (first,) = card.post(100)
    queue = card.driver.queue(RXQ)
    card.wire.put(b"a" * 120)
    card.wire.settle()

    assert not card.wire.enabled
    assert queue.poll() == {}

    rest = [queue.add([], [100]) for _ in range(2)]

    assert queue.kick(), "it has to know of new buffers"
    assert queue.wait(2) == {first: 100, rest[0]: 32}
    assert card.wire.enabled

    card.wire.put(b"b" * 10)

    assert queue.wait() == {rest[1]: 22}


def test_frames_before_there_is_a_driver_wait(nic):
    card = nic()
    card.driver.reset()
    card.wire.put(b"early")
    card.wire.settle()
    card.driver.start(ALL)
    (head,) = card.post(100)

    assert card.driver.queue(RXQ).wait() == {head: 17}


def test_offloads_follow_the_features(nic):
    assert nic(features=ALL).wire.offloads == 0b1111


@pytest.mark.parametrize(
    ("features", "offloads"),
    [
        (0, 0),
        (GUEST_CSUM, 1),
        (GUEST_CSUM | GUEST_TSO4, 3),
        (GUEST_TSO4, 0),
        (GUEST_CSUM | GUEST_ECN, 1),
    ],
)
def test_offloads_that_depend_on_others(nic, features, offloads):
    assert nic(features=features).wire.offloads == offloads


def test_offloads_are_switched_by_command(nic):
    card = nic()

    assert card.control(b"\5\0" + struct.pack("<Q", GUEST_CSUM | GUEST_TSO4)) == 0
    assert card.wire.offloads == 3
    assert card.control(b"\5\0" + bytes(8)) == 0
    assert card.wire.offloads == 0
    assert card.control(b"\5\0" + b"\xff" * 8) == 0
    assert card.wire.offloads == 15
    assert card.control(b"\5\0" + bytes(7)) == 1


def test_the_address_is_set_by_command(nic):
    card = nic()
    card.wire.settle()

    assert card.control(b"\1\1" + b"\2\0\0\0\0\1") == 0
    assert card.driver.config(0, 4) == 2
    assert card.driver.config(4, 2) == 0x100
    card.driver.set_config(0, 4, 0)  # read-only for a modern driver
    assert card.driver.config(0, 4) == 2

    card.driver.reset()

    assert card.driver.config(0, 4) == int.from_bytes(MAC[:4], "little")


def test_a_legacy_driver_writes_its_address(nic):
    card = nic(modern=False)
    for at, byte in enumerate(b"\2\0\0\0\0\1\0\0"):  # two bytes too many
        card.driver.set_config(at, 1, byte)

    assert bytes(card.driver.config(at, 1) for at in range(8)) == (b"\2\0\0\0\0\1\1\0")


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (b"\0\0\1", 0),
        (b"\0\1\1", 0),
        (b"\0\7\1", 1),
        (b"\1\0" + bytes(8), 0),
        (b"\1\1" + bytes(5), 1),
        (b"\4\0\1\0", 1),
        (b"\xff\xff", 1),
        (b"\0", 1),
    ],
)
def test_other_commands(nic, command, answer):
    assert nic().control(command) == answer


def test_the_cable(nic, modern):
    card = nic(modern=modern)
    wires = card.machine.vm
    wires.take()

    card.wire.plug(up=False)
    card.wire.settle()

    assert card.driver.config(6, 2) == 0
    assert [wire[0] for wire in wires.take()] == ["lapic_msi"]

    card.wire.plug(up=True)
    card.wire.settle()

    assert card.driver.config(6, 2) == 1
    assert [wire[0] for wire in wires.take()] == ["lapic_msi"]


def test_the_cable_by_intx(nic, modern):
    card = nic(modern=modern, msix=False)
    card.wire.plug(up=False)
    card.wire.settle()

    assert card.driver.take_isr() == 2


def test_nothing_moves_while_it_is_paused(nic):
    card = nic()
    card.post(100)
    queue = card.driver.queue(TXQ)
    card.wire.settle()
    card.device.pause()
    card.wire.put(b"in")
    queue.add([bytes(12), b"out"])
    queue.kick()
    card.wire.settle()

    assert not card.wire.sent
    assert card.driver.queue(RXQ).poll() == {}

    card.device.resume()

    assert card.wire.wait_sent() == [bytes(12) + b"out"]
    assert len(card.driver.queue(RXQ).wait()) == 1


def test_state_comes_back(nic):
    card = nic()
    card.post(100, 200)
    card.control(b"\1\1" + b"\2\0\0\0\0\1")
    card.control(b"\5\0" + struct.pack("<Q", GUEST_CSUM))
    card.device.pause()
    state = card.device.save()
    card.device.reset()
    card.device.restore(state)
    card.device.resume()

    assert card.wire.offloads == 1
    assert card.driver.config(0, 4) == 2

    card.wire.put(b"a" * 150)

    assert list(card.driver.queue(RXQ).wait(2).values()) == [100, 62]


def test_empty_buffers_are_passed_over(nic):
    card = nic()
    queue = card.driver.queue(RXQ)
    empty = queue.add([], [0])
    (head,) = card.post(100)
    card.wire.put(b"a" * 10)

    assert queue.wait(2) == {empty: 0, head: 22}


def test_a_driver_that_breaks_the_rules(nic):
    card = nic()
    queue = card.driver.queue(TXQ)
    queue.write_desc(0, (0, 100, 1, 0))  # a loop
    queue.make_available(0)
    queue.kick()
    card.wire.wait(lambda: card.driver.status & NEEDS_RESET)
    card.driver.start(ALL)
    card.send(b"alive")

    assert card.wire.wait_sent() == [bytes(12) + b"alive"]


ANYWHERE = st.one_of(
    st.integers(0, 1 << 25), st.integers(0, (1 << 64) - 1), st.just(0x100000)
)
DESCRIPTORS = st.lists(
    st.tuples(
        ANYWHERE,
        st.one_of(st.integers(0, 70000), st.integers(0, 0xFFFFFFFF)),
        st.integers(0, 7),
        st.integers(0, 1100),
    ),
    min_size=1,
    max_size=12,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    queue=st.sampled_from((RXQ, TXQ, CTLQ)),
    descriptors=DESCRIPTORS,
    heads=st.lists(st.integers(0, 15), min_size=1, max_size=20),
    features=st.sampled_from((ALL, 0, RING, MRG_RXBUF | CTRL_VQ)),
)
def test_any_rings(hypothesis_nic, queue, descriptors, heads, features):
    card = hypothesis_nic
    card.driver._heap = 0x400000
    card.driver.start(features)
    ring = card.driver.queues.get(queue)
    assert ring is not None
    for index, desc in enumerate(descriptors):
        ring.write_desc(index, desc)
    for head in heads:
        ring.make_available(head)
    card.wire.put(bytes(1500), b"", bytes(9000))
    card.driver.notify(queue)
    card.wire.settle()
    card.wire.waiting.clear()
    card.driver._heap = 0x400000
    card.driver.start(ALL)
    card.wire.settle()
    card.wire.sent.clear()
    card.send(b"alive")

    assert card.wire.wait_sent() == [bytes(12) + b"alive"]


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_frames_in_any_buffers(hypothesis_nic, data):
    card = hypothesis_nic
    card.driver._heap = 0x100000
    card.wire.waiting.clear()
    card.driver.start(ALL)
    card.wire.settle()
    lengths = data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=20))
    sizes = data.draw(st.lists(st.integers(12, 2000), min_size=1, max_size=60))
    frames = [bytes([at + 1]) * length for at, length in enumerate(lengths)]
    heads = card.post(*sizes)
    card.wire.put(*frames)
    card.wire.settle()
    queue = card.driver.queue(RXQ)
    done = queue.poll()
    used = heads[: len(done)]
    got = []
    while used:
        count = struct.unpack_from("<10xH", queue.buffer(used[0], 0))[0]
        parts, used = used[:count], used[count:]
        got.append(b"".join(queue.buffer(h, 0)[: done[h]] for h in parts)[12:])

    assert got == frames[: len(got)]
    if len(got) < len(frames):
        assert sum(sizes[len(done) :]) < 12 + lengths[len(got)]


@pytest.fixture
def hypothesis_nic(nic) -> Nic:
    return nic()
