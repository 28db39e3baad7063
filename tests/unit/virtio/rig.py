"""A queue of eight with its rings in a real VM's memory, and nothing in them."""

from __future__ import annotations

from pybhyve.virtio import VIRTIO_RING_F_INDIRECT_DESC, VirtQueue
from pybhyve.vmmapi import VmCtx
from tests.guestside.virtio import DESC

SIZE = 8
BASE = 0x10000
AVAIL = BASE + 16 * SIZE
USED = BASE + 4096
DATA = 0x40000
TABLE = 0x80000


class Rig:
    """What a driver does to the rings, and what the queue says."""

    def __init__(self, ctx: VmCtx) -> None:
        self.ctx = ctx
        self.interrupts = 0
        self.broken: list[str] = []
        self.vq = VirtQueue(ctx, 0, SIZE, self._interrupt, self._broken)
        self.avail_idx = 0
        self.start(VIRTIO_RING_F_INDIRECT_DESC)

    def _interrupt(self, _vq) -> None:
        self.interrupts += 1

    def _broken(self, _vq, why) -> None:
        self.broken.append(why)

    def start(self, features: int) -> None:
        self.ctx.write(BASE, bytes(2 * 4096))
        self.avail_idx = 0
        self.broken.clear()
        self.vq.reset()
        self.vq.features = features
        self.vq.enable_legacy(BASE)

    def desc(self, index, addr, length, flags=0, following=0) -> None:
        self.ctx.write(BASE + 16 * index, DESC.pack(addr, length, flags, following))

    def offer(self, *heads) -> None:
        for head in heads:
            at = AVAIL + 4 + 2 * (self.avail_idx % SIZE)
            self.ctx.write(at, head.to_bytes(2, "little"))
            self.avail_idx = self.avail_idx + 1 & 0xFFFF
        self.ctx.write(AVAIL + 2, self.avail_idx.to_bytes(2, "little"))

    def used(self) -> tuple[int, list[tuple[int, int]]]:
        data = self.ctx.read(USED, 4 + 8 * SIZE)
        words = [
            int.from_bytes(data[at : at + 4], "little") for at in range(4, len(data), 4)
        ]
        pairs = list(zip(words[::2], words[1::2], strict=True))
        return int.from_bytes(data[2:4], "little"), pairs
