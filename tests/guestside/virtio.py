"""The driver's half of virtio: negotiation, rings, buffers (virtio 1.2, 2.7 and 3.1).

    driver = VirtioDriver(PciFunction(machine, 3), modern=True)
    driver.start(features)
    queue = driver.queue(0)
    head = queue.add([b"request"], [512])
    queue.kick()
    assert queue.wait() == {head: 512}
    assert queue.buffer(head, 0) == …

Everything lies in a real VM's memory, and registers are reached through ports and BARs.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from pybhyve.pci.pcireg import PCIY_VENDOR
from pybhyve.virtio import (
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from tests.guestside.pci import BarView, PciFunction

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 0x40
F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
COMMON, NOTIFY, ISR, DEVICE, PCI_CFG = 1, 2, 3, 4, 5
NO_VECTOR: Final = 0xFFFF
CONFIG_VECTOR: Final = 0x60
QUEUE_VECTOR: Final = 0x61  # and up
HEAP: Final = 0x100000
WAIT_SECONDS: Final = 10.0

DESC = struct.Struct("<QIHH")


@dataclass(slots=True)
class Request:
    """Where the buffers of a chain lie."""

    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)


class GuestQueue:
    """One split ring, as its driver keeps it."""

    def __init__(self, driver: VirtioDriver, index: int, size: int, base: int) -> None:
        """``base`` is where the rings lie as in the legacy layout, zeroed."""
        self.driver = driver
        self.vm = driver.vm
        self.index = index
        self.size = size
        self.desc = base
        self.avail = base + 16 * size
        self.used = (self.avail + 6 + 2 * size + 4095) & ~4095
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        self.requests: dict[int, Request] = {}
        self.avail_idx = 0
        self.kicked_idx = 0
        self.used_idx = 0

    # -- memory, as words ------------------------------------------------------------

    def get16(self, addr: int) -> int:
        """A little-endian word of guest memory."""
        return int.from_bytes(self.vm.read_mem(addr, 2), "little")

    def put16(self, addr: int, value: int) -> None:
        """A little-endian word of guest memory."""
        self.vm.write_mem(addr, (value & 0xFFFF).to_bytes(2, "little"))

    def write_desc(self, index: int, desc: tuple[int, int, int, int]) -> None:
        """Descriptor ``index``: address, length, flags, next."""
        self.vm.write_mem(self.desc + 16 * index, DESC.pack(*desc))

    # -- chains ----------------------------------------------------------------------

    def add(
        self,
        readable: Sequence[bytes],
        writable: Sequence[int] = (),
        indirect: bool = False,
    ) -> int:
        """Offer a chain (contents to read, lengths to fill); gives its head."""
        request = Request()
        for data in readable:
            addr = self.driver.alloc(len(data))
            self.vm.write_mem(addr, data)
            request.readable.append((addr, len(data)))
        for length in writable:
            request.writable.append((self.driver.alloc(length), length))
        flags = [0] * len(request.readable) + [F_WRITE] * len(request.writable)
        parts = [
            (addr, length, flag)
            for (addr, length), flag in zip(
                request.readable + request.writable, flags, strict=True
            )
        ]
        if indirect:
            table = b"".join(
                DESC.pack(
                    *part[:2], part[2] | (F_NEXT if at + 1 < len(parts) else 0), at + 1
                )
                for at, part in enumerate(parts)
            )
            at = self.driver.alloc(len(table))
            self.vm.write_mem(at, table)
            parts = [(at, len(table), F_INDIRECT)]
        slots = [self.free.pop(0) for _ in parts]
        for at, (slot, part) in enumerate(zip(slots, parts, strict=True)):
            last = at + 1 == len(parts)
            flag = part[2] | (0 if last else F_NEXT)
            self.write_desc(slot, (*part[:2], flag, 0 if last else slots[at + 1]))
        head = slots[0]
        self.chains[head] = slots
        self.requests[head] = request
        self.make_available(head)
        return head

    def make_available(self, head: int) -> None:
        """Put a head into the available ring, whatever it is."""
        self.put16(self.avail + 4 + 2 * (self.avail_idx % self.size), head)
        self.avail_idx = self.avail_idx + 1 & 0xFFFF
        self.put16(self.avail + 2, self.avail_idx)

    def wants_kick(self) -> bool:
        """Whether the device asked for a notification of what was added since."""
        old, new = self.kicked_idx, self.avail_idx
        if self.driver.features & VIRTIO_RING_F_EVENT_IDX:
            event = self.get16(self.used + 4 + 8 * self.size)
            return (new - event - 1 & 0xFFFF) < (new - old & 0xFFFF)
        return not self.get16(self.used) & 1

    def kick(self) -> bool:
        """Notify the device if it wants that; whether it did."""
        wanted = self.wants_kick()
        self.kicked_idx = self.avail_idx
        if wanted:
            self.driver.notify(self.index)
        return wanted

    def poll(self) -> dict[int, int]:
        """The chains that came back since the last time: head and bytes written."""
        done = {}
        while self.used_idx != self.get16(self.used + 2):
            at = self.used + 4 + 8 * (self.used_idx % self.size)
            head, written = struct.unpack("<II", self.vm.read_mem(at, 8))
            assert head in self.chains, f"{head} came back and was not out"
            self.free += self.chains.pop(head)
            done[head] = written
            self.used_idx = self.used_idx + 1 & 0xFFFF
        # 2.7.7.1: interrupt when the next one comes.
        self.put16(self.avail + 4 + 2 * self.size, self.used_idx)
        return done

    def wait(self, count: int = 1) -> dict[int, int]:
        """Poll until ``count`` chains have come back."""
        done: dict[int, int] = {}
        end = time.monotonic() + WAIT_SECONDS
        while len(done) < count:
            done |= self.poll()
            assert time.monotonic() < end, f"only {len(done)} of {count} came back"
        return done

    def buffer(self, head: int, index: int) -> bytes:
        """What a writable buffer of a chain has now."""
        return self.vm.read_mem(*self.requests[head].writable[index])


class VirtioDriver:
    """A driver of one function, by the modern or by the legacy registers."""

    def __init__(
        self, function: PciFunction, *, modern: bool = True, msix: bool = True
    ) -> None:
        self.function = function
        self.machine = function.machine
        self.vm = self.machine.ctx.vm
        self.modern = modern
        self.features = 0
        self.queues: dict[int, GuestQueue] = {}
        self._heap = HEAP
        function.enable()
        self.msix = msix
        if msix:
            self.vectors = function.enable_msix()
            for entry in range(self.vectors):
                function.set_msix_vector(entry, CONFIG_VECTOR + entry)
        self.legacy = function.bar(0)
        self.structures: dict[int, tuple[BarView, int, int]] = {}
        self.notify_multiplier = 0
        self._find_structures()

    def _find_structures(self) -> None:
        bars = self.function.bars()
        for cap_id, at in self.function.capabilities():
            if cap_id != PCIY_VENDOR:
                continue
            cfg_type = self.function.read(at + 3, 1)
            bar = bars[self.function.read(at + 4, 1)]
            offset = self.function.read(at + 8)
            length = self.function.read(at + 12)
            assert offset + length <= bar.size
            self.structures[cfg_type] = bar, offset, length
            if cfg_type == NOTIFY:
                self.notify_multiplier = self.function.read(at + 16)
            if cfg_type == PCI_CFG:
                self.pci_cfg = at

    def alloc(self, length: int, align: int = 16) -> int:
        """Guest memory that nobody else uses."""
        at = -(-self._heap // align) * align
        self._heap = at + length
        assert self._heap <= self.machine.ctx.lowmem_size
        return at

    # -- registers -------------------------------------------------------------------

    def get(self, structure: int, offset: int, size: int) -> int:
        """A register of a modern structure."""
        bar, base, _length = self.structures[structure]
        return bar.read(base + offset, size)

    def put(self, structure: int, offset: int, size: int, value: int) -> None:
        """A register of a modern structure."""
        bar, base, _length = self.structures[structure]
        bar.write(base + offset, size, value)

    @property
    def status(self) -> int:
        """Device status."""
        return self.get(COMMON, 20, 1) if self.modern else self.legacy.read(18, 1)

    @status.setter
    def status(self, value: int) -> None:
        if self.modern:
            self.put(COMMON, 20, 1, value)
        else:
            self.legacy.write(18, 1, value)

    def take_isr(self) -> int:
        """The ISR status, which this clears."""
        return self.get(ISR, 0, 1) if self.modern else self.legacy.read(19, 1)

    def offered(self) -> int:
        """The device's feature bits."""
        if not self.modern:
            return self.legacy.read(0, 4)
        value = 0
        for half in range(2):
            self.put(COMMON, 0, 4, half)
            value |= self.get(COMMON, 4, 4) << 32 * half
        return value

    def config(self, offset: int, size: int) -> int:
        """The device's configuration."""
        if self.modern:
            return self.get(DEVICE, offset, size)
        return self.legacy.read((24 if self.msix else 20) + offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        """The device's configuration."""
        if self.modern:
            self.put(DEVICE, offset, size, value)
        else:
            self.legacy.write((24 if self.msix else 20) + offset, size, value)

    def notify(self, index: int) -> None:
        """Tell the device about a queue."""
        if self.modern:
            self.put(COMMON, 22, 2, index)
            offset = self.get(COMMON, 30, 2) * self.notify_multiplier
            self.put(NOTIFY, offset, 2, index)
        else:
            self.legacy.write(16, 2, index)

    # -- set-up (3.1.1) --------------------------------------------------------------

    def reset(self) -> None:
        """Status 0, and wait until the device is done."""
        self.status = 0
        end = time.monotonic() + WAIT_SECONDS
        while self.status:
            assert time.monotonic() < end, "the device is not done with its reset"
        self.queues.clear()
        self.features = 0

    def start(
        self,
        features: int = VIRTIO_RING_F_EVENT_IDX | VIRTIO_RING_F_INDIRECT_DESC,
        *,
        queues: bool = True,
    ) -> int:
        """Reset, negotiate, set all queues up, go.  Gives the features in use."""
        self.reset()
        self.status = ACKNOWLEDGE
        self.status = ACKNOWLEDGE | DRIVER
        wanted = self.offered() & (features | VIRTIO_F_VERSION_1)
        self.features = wanted
        if self.modern:
            for half in range(2):
                self.put(COMMON, 8, 4, half)
                self.put(COMMON, 12, 4, wanted >> 32 * half & 0xFFFFFFFF)
            self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
            assert self.status & FEATURES_OK
        else:
            self.legacy.write(4, 4, wanted)
        if queues:
            index = 0
            while self.setup(index):
                index += 1
            self.status = self.status | DRIVER_OK
        if self.msix:
            self._set_vector(None, 0)
        return wanted

    def _set_vector(self, queue: int | None, vector: int) -> None:
        if self.modern:
            at = 16 if queue is None else 26
            self.put(COMMON, at, 2, vector)
            got = self.get(COMMON, at, 2)
        else:
            at = 20 if queue is None else 22
            self.legacy.write(at, 2, vector)
            got = self.legacy.read(at, 2)
        assert got == vector

    def setup(self, index: int) -> bool:
        """Give a queue its rings; whether there is such a queue."""
        if self.modern:
            self.put(COMMON, 22, 2, index)
            size = self.get(COMMON, 24, 2)
        else:
            self.legacy.write(14, 2, index)
            size = self.legacy.read(12, 2)
        if not size:
            return False
        length = 16 * size + 4096 + 6 + 2 * size + 4096 + 6 + 8 * size
        base = self.alloc(length, 4096)
        self.vm.write_mem(base, bytes(length))
        queue = GuestQueue(self, index, size, base)
        if self.msix:
            self._set_vector(index, index + 1)
        if self.modern:
            places = queue.desc, queue.avail, queue.used
            for at, place in zip((32, 40, 48), places, strict=True):
                self.put(COMMON, at, 4, place & 0xFFFFFFFF)
                self.put(COMMON, at + 4, 4, place >> 32)
            self.put(COMMON, 28, 2, 1)
        else:
            self.legacy.write(8, 4, base >> 12)
        self.queues[index] = queue
        return True

    def queue(self, index: int) -> GuestQueue:
        """A queue that `start` has set up."""
        return self.queues[index]
