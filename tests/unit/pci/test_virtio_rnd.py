"""virtio-rnd, driven over both kinds of registers."""

from __future__ import annotations

import pytest

from pybhyve.virtio import VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC
from tests.guestside.pci import PciFunction
from tests.guestside.virtio import VirtioDriver


@pytest.fixture(params=["legacy", "modern"])
def modern(request) -> bool:
    return request.param == "modern"


def test_fills_buffers_with_what_the_source_gives(build, modern):
    machine = build("3,virtio-rnd")
    machine.random_bytes = lambda count: bytes(range(256))[:count]
    driver = VirtioDriver(PciFunction(machine, 3), modern=modern)
    driver.start()
    queue = driver.queue(0)

    head = queue.add([], [3, 5])
    queue.kick()

    assert queue.poll() == {head: 8}
    assert queue.buffer(head, 0) == bytes(range(3))
    assert queue.buffer(head, 1) == bytes(range(3, 8))


@pytest.mark.parametrize(
    "features", [0, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC]
)
def test_many_chains_around_the_ring(build, modern, features):
    machine = build("3,virtio-rnd")
    driver = VirtioDriver(PciFunction(machine, 3), modern=modern)
    driver.start(features)
    queue = driver.queue(0)

    for turn in range(50):
        heads = [
            queue.add([], [8], indirect=bool(driver.features & 1 << 28))
            for _ in range(turn % 20 + 1)
        ]
        assert queue.kick()
        assert queue.poll() == dict.fromkeys(heads, 8)


def test_a_chain_gets_no_more_than_a_page(build):
    machine = build("3,virtio-rnd")
    driver = VirtioDriver(PciFunction(machine, 3))
    driver.start()
    queue = driver.queue(0)

    head = queue.add([], [1 << 20])
    queue.kick()

    assert queue.poll() == {head: 4096}


def test_identity(build):
    function = PciFunction(build("3,virtio-rnd"), 3)

    assert function.read(0x00) == 0x1005_1AF4
    assert function.read(0x08) == 0x10000000
    assert function.read(0x2C) == 0x0004_1AF4
