"""A busy queue is looked at by a thread, a quiet one runs by notifications."""

from __future__ import annotations

import time

import pytest

from pybhyve.virtio import VIRTIO_RING_F_EVENT_IDX, Poller, poller
from pybhyve.virtio.poller import BUSY, PROBE
from tests.guestside.virtio import F_WRITE
from tests.unit.virtio.rig import DATA, SIZE, USED, Rig

EVENT = USED + 4 + 8 * SIZE


class Device:
    """Finishes each chain at once, on whatever thread."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.hold = False
        self.held = []
        self.fail = False
        for index in range(SIZE):
            rig.desc(index, DATA, 4, F_WRITE)
        self.looks = 0  # how often the thread began to look
        self._kick_disable = rig.vq.kick_disable
        rig.vq.kick_disable = self.kick_disable  # type: ignore[method-assign]  # counts
        self.poller = Poller(rig.ctx.vm, rig.vq, self.run, "test")

    def kick_disable(self) -> None:
        self._kick_disable()
        self.looks += 1

    def run(self, vq) -> None:
        if self.fail:
            self.fail = False
            raise RuntimeError("on purpose")
        with vq.run_lock:
            while (chain := vq.getchain()) is not None:
                if self.hold:
                    self.held.append(chain)
                else:
                    vq.relchain(chain, 4)
            vq.endchains()

    def probe(self) -> None:
        """As many notifications as it takes to have the thread look."""
        for _ in range(PROBE):
            self.rig.offer(0)
            self.poller.notified()
        self.wait(lambda: self.looks)

    def wait(self, condition) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.001)


@pytest.fixture(params=[0, VIRTIO_RING_F_EVENT_IDX], ids=["flag", "event"])
def device(rig, request):
    rig.start(request.param)
    device = Device(rig)
    yield device
    device.poller.close()


def wants_notification(rig) -> bool:
    if rig.vq.features & VIRTIO_RING_F_EVENT_IDX:
        return int.from_bytes(rig.ctx.read(EVENT, 2), "little") == rig.avail_idx
    return rig.ctx.read(USED, 2) == b"\0\0"


def test_notifications_do_where_requests_are_few(device, rig):
    for count in range(1, PROBE):
        rig.offer(0)
        device.poller.notified()

        assert rig.used()[0] == count
        assert rig.vq.kicks
        assert wants_notification(rig)


def test_a_busy_queue_is_looked_at_without_notifications(device, rig, monkeypatch):
    monkeypatch.setattr(poller, "LOOKS", 1 << 30)
    device.probe()
    done = PROBE
    for _ in range(50):
        rig.offer(*range(BUSY))
        done += BUSY
        device.wait(lambda: rig.used()[0] == done)  # noqa: B023  # called at once

    assert device.looks == 1


def test_a_queue_that_is_quiet_again_has_notifications(device, rig):
    device.probe()

    device.wait(lambda: rig.vq.kicks)
    assert wants_notification(rig)
    rig.offer(3)
    device.poller.notified()
    assert rig.used()[0] == PROBE + 1


def test_requests_under_way_begin_it(device, rig):
    device.hold = True
    rig.offer(0)
    device.poller.notified()
    assert rig.vq.outstanding() == 1
    assert not device.looks
    rig.offer(1)
    device.poller.notified()

    device.wait(lambda: device.looks)


def test_nothing_is_forgotten_between_the_two(device, rig):
    """Chains come at every moment, and notifications only when they are asked for."""
    total = 3000
    for count in range(1, total + 1):
        rig.offer(count % SIZE)
        if wants_before(rig):
            device.poller.notified()
        device.wait(lambda: rig.used()[0] == count)  # noqa: B023  # called at once


def wants_before(rig) -> bool:
    """Whether the driver, which has just added one chain, has to notify."""
    if rig.vq.features & VIRTIO_RING_F_EVENT_IDX:
        event = int.from_bytes(rig.ctx.read(EVENT, 2), "little")
        return event == rig.avail_idx - 1 & 0xFFFF
    return rig.ctx.read(USED, 2) == b"\0\0"


def test_after_stop_notifications_do(device, rig, monkeypatch):
    monkeypatch.setattr(poller, "LOOKS", 1 << 30)
    device.probe()
    device.poller.stop()

    assert rig.vq.kicks
    assert wants_notification(rig)
    done = rig.used()[0]
    rig.offer(0)
    device.poller.notified()
    assert rig.used()[0] == done + 1


def test_a_device_that_fails_gets_its_notifications_back(device, rig, caplog):
    for _ in range(PROBE - 1):
        rig.offer(0)
        device.poller.notified()
    run = device.poller._run

    def once(vq) -> None:
        run(vq)
        device.fail = True

    device.poller._run = once
    rig.offer(0)
    device.poller.notified()
    device.poller._run = run
    device.wait(lambda: "failed" in caplog.text)
    device.poller.stop()

    assert rig.vq.kicks
    rig.offer(1)
    device.poller.notified()
    assert rig.used()[0] == PROBE + 1


def test_close_twice(device):
    device.probe()
    device.poller.close()
    device.poller.close()
