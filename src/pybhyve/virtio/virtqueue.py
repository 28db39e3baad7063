"""Split virtqueues, the device's side (virtio 1.2, 2.7).  bhyve: virtio.c.

    while (chain := vq.getchain()) is not None:
        data = vq.read(chain.readable, 16)
        ...
        vq.relchain(chain, vq.write(chain.writable, answer))
    vq.endchains(used_all_avail=True)

The guest's processors run on other threads of the host while the rings are read: each
word of a ring is read once, in one piece, and an index before what it makes valid.  The
host has x86's order of memory accesses, and a write to guest memory ends with a fence.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from pybhyve.vmmapi import HIGHMEM_BASE, VmmError

if TYPE_CHECKING:
    from pybhyve.vmmapi import VmCtx

log = logging.getLogger(__name__)

VRING_DESC_F_NEXT: Final = 1
VRING_DESC_F_WRITE: Final = 2
VRING_DESC_F_INDIRECT: Final = 4
VRING_AVAIL_F_NO_INTERRUPT: Final = 1
VRING_USED_F_NO_NOTIFY: Final = 1

VIRTIO_F_NOTIFY_ON_EMPTY: Final = 1 << 24
VIRTIO_F_ANY_LAYOUT: Final = 1 << 27
VIRTIO_RING_F_INDIRECT_DESC: Final = 1 << 28
VIRTIO_RING_F_EVENT_IDX: Final = 1 << 29
VIRTIO_F_VERSION_1: Final = 1 << 32

VIRTIO_MSI_NO_VECTOR: Final = 0xFFFF

QUEUE_MAX: Final = 32768  # 2.7: a power of two
VQ_MAX_DESCRIPTORS: Final = 512  # of an indirect table, which could be 256 Mi long
LEGACY_ALIGN: Final = 4096  # 2.7.2: of the used ring behind the available ring

_DESC: Final = struct.Struct("<QIHH")  # address, length, flags, next
_DESC_SIZE: Final = 16
_USED: Final = struct.Struct("<II")  # head, bytes written
_ADDRESS_ALIGN: Final = (16, 2, 4)  # 2.7: of descriptors, available and used ring

Segments = list[tuple[int, int]]
"""Guest-physical address and length, all of it RAM and no length zero."""


class Chain:
    """What the driver made available in one piece: buffers to read, buffers to fill."""

    __slots__ = ("head", "readable", "ring", "writable")

    def __init__(
        self, head: int, readable: Segments, writable: Segments, ring: Ring
    ) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.ring = ring

    def __repr__(self) -> str:
        """The segments."""
        return f"<chain {self.head} {self.readable} -> {self.writable}>"


class DriverError(Exception):
    """The driver's rings make no sense.  Never leaves this module."""


class Ring:
    """The rings of a queue that is enabled, at addresses that do not change.

    A queue that is reset and enabled again has a new one: chains of the old one are
    known by it, and come to nothing.
    """

    __slots__ = (
        "avail",
        "avail_event",
        "avail_idx",
        "done",
        "high_end",
        "last_avail",
        "low_end",
        "mask",
        "returned",
        "signalled",
        "size",
        "table",
        "taken",
        "used",
        "used_idx",
        "vm",
    )

    def __init__(
        self, ctx: VmCtx, size: int, places: tuple[int, int, int], last_avail: int
    ) -> None:
        """DriverError for ``places`` without alignment or where there is no RAM.

        They are of the descriptors, the available ring and the used ring.
        """
        self.vm = ctx.vm
        self.low_end = ctx.lowmem_size
        self.high_end = HIGHMEM_BASE + ctx.highmem_size
        lengths = (_DESC_SIZE * size, 6 + 2 * size, 6 + 8 * size)
        for addr, length, align in zip(places, lengths, _ADDRESS_ALIGN, strict=True):
            if addr % align:
                raise DriverError(f"a ring at {addr:#x} is not aligned to {align}")
            if not self.is_ram(addr, length):
                raise DriverError(f"a ring at {addr:#x}+{length:#x} is not in RAM")
        desc, avail, used = places
        for addr, length in ((desc, lengths[0]), (avail, lengths[1])):
            # What is released must not become available again by itself, for ever.
            if addr < used + lengths[2] and used < addr + length:
                raise DriverError(f"rings overlap at {used:#x}")
        try:
            # Read-only windows, so they may stay: nothing has to be told of writes.
            self.table = memoryview(ctx.map_gpa(desc, lengths[0]))
            self.avail = memoryview(ctx.map_gpa(avail, lengths[1])).cast("H")
        except VmmError as error:
            raise DriverError(f"a ring goes across NUMA domains: {error}") from error
        self.size = size
        self.mask = size - 1
        self.used = used
        self.last_avail = last_avail
        self.avail_idx = last_avail  # entries below it are known to be there
        self.avail_event: int | None = None  # what the driver was told
        self.used_idx = 0
        self.signalled = 0  # used_idx when the need of an interrupt was last decided
        self.done: list[bytes] = []  # used entries that are not in the ring yet
        self.taken = 0
        self.returned = 0

    def is_ram(self, addr: int, length: int) -> bool:
        """Whether a range lies in guest RAM."""
        end = addr + length
        return end <= self.low_end or (addr >= HIGHMEM_BASE and end <= self.high_end)

    def chain(self, index: int, features: int) -> Chain:
        """The chain that begins with descriptor ``index``.  Raises DriverError."""
        unpack = _DESC.unpack_from
        low_end = self.low_end
        head = index
        table: memoryview | bytes = self.table
        entries = self.size
        if index < entries:
            addr, length, flags, _ = unpack(table, index * _DESC_SIZE)
            if flags == VRING_DESC_F_WRITE and length and addr + length <= low_end:
                # What most drivers receive into, often many for one frame.
                return Chain(head, [], [(addr, length)], self)
        readable: Segments = []
        writable: Segments = []
        # A chain may loop: there are no more steps than descriptors.
        left = entries
        indirect = features & VIRTIO_RING_F_INDIRECT_DESC
        while left:
            left -= 1
            if index >= entries:
                raise DriverError(f"descriptor index {index} of {entries}")
            addr, length, flags, index = unpack(table, index * _DESC_SIZE)
            if addr + length > low_end and not self.is_ram(addr, length):
                raise DriverError(f"a buffer at {addr:#x}+{length:#x} is not in RAM")
            if flags & VRING_DESC_F_INDIRECT:
                # 2.7.5.3.1: only at the end of a chain, and not in such a table.
                if not indirect or flags & VRING_DESC_F_NEXT:
                    raise DriverError("an indirect table where there must be none")
                indirect = index = 0
                entries = left = length // _DESC_SIZE
                if length % _DESC_SIZE or not 0 < entries <= VQ_MAX_DESCRIPTORS:
                    raise DriverError(f"an indirect table of {length} bytes")
                table = self.vm.read_mem(addr, length)
                continue
            if flags & VRING_DESC_F_WRITE:
                if length:
                    writable.append((addr, length))
            elif writable:
                raise DriverError("a buffer to read behind one to write")
            elif length:
                readable.append((addr, length))
            if not flags & VRING_DESC_F_NEXT:
                return Chain(head, readable, writable, self)
        raise DriverError(f"a chain of more than {entries} descriptors")


class VirtQueue:
    """One queue of a device.

    One thread at a time takes chains (`getchain`, `retchains`, `kick_disable`,
    `kick_enable`); any number of threads give them back (`relchain`, `endchains`).  A
    driver that breaks the rules stops the queue until it is reset.
    """

    def __init__(
        self,
        ctx: VmCtx,
        index: int,
        max_size: int,
        interrupt: Callable[[VirtQueue], None],
        broken: Callable[[VirtQueue, str], None],
    ) -> None:
        """``interrupt(vq)`` tells the driver of used buffers, on any thread.

        ``broken(vq, why)`` is told once when the queue stops, on the thread that takes
        chains.
        """
        if max_size & max_size - 1 or not 0 < max_size <= QUEUE_MAX:
            raise ValueError(f"a queue of {max_size}")
        self.index = index
        self.max_size = max_size
        self.run_lock = threading.Lock()
        """Held by the thread that takes chains after a notification."""
        self.kicked = False
        """A notification has come that nobody has looked at."""
        self.features = 0
        """Negotiated feature bits."""
        self._vm = ctx.vm
        self._ctx = ctx
        self._interrupt = interrupt
        self._broken = broken
        self._used_lock = threading.Lock()
        self.ring: Ring | None = None
        self.size = max_size
        self.vector = VIRTIO_MSI_NO_VECTOR
        self.desc = self.avail = self.used = 0  # of the rings, while set up
        self.enabled = False
        self.kicks = True
        self.stopped = False

    # -- set-up: the transport's side ------------------------------------------------

    def reset(self) -> Ring | None:
        """As after power-on.  Gives the ring that was, if chains of it are still out.

        Until `Ring.returned` is `Ring.taken`, somebody may write to its buffers.
        """
        ring = self.disable()
        self.size = self.max_size
        self.vector = VIRTIO_MSI_NO_VECTOR
        self.desc = self.avail = self.used = 0
        self.kicks = True
        return ring

    def enable(self) -> None:
        """Begin to use the rings at ``desc``, ``avail`` and ``used``."""
        self.enabled = True
        self._map(0, 0)

    def enable_legacy(self, addr: int) -> None:
        """Begin to use rings that lie at ``addr`` as in virtio 1.2, 2.7.2."""
        self.desc = addr
        self.avail = addr + _DESC_SIZE * self.size
        end = self.avail + 6 + 2 * self.size
        self.used = -(-end // LEGACY_ALIGN) * LEGACY_ALIGN
        self.enable()

    def disable(self) -> Ring | None:
        """Leave the rings alone; gives what `reset` gives."""
        ring, self.ring = self.ring, None
        self.enabled = False
        self.stopped = False
        return ring if ring is not None and ring.taken != ring.returned else None

    def _map(self, last_avail: int, used_idx: int) -> None:
        try:
            ring = Ring(
                self._ctx,
                _checked_size(self.size, self.max_size),
                (self.desc, self.avail, self.used),
                last_avail,
            )
        except DriverError as error:
            self._stop(error)
            return
        ring.used_idx = ring.signalled = used_idx
        self.ring = ring

    def _stop(self, error: DriverError) -> None:
        self.stopped = True
        self._broken(self, str(error))

    # -- taking chains ---------------------------------------------------------------

    def has_descs(self) -> bool:
        """Whether the driver has made chains available that nobody took."""
        ring = self.ring
        if ring is None or self.stopped:
            return False
        return ring.avail[1] != ring.last_avail

    def taken(self) -> int:
        """How many chains were taken since the queue was enabled."""
        ring = self.ring
        return ring.taken if ring is not None else 0

    def outstanding(self) -> int:
        """How many chains were taken and not given back."""
        ring = self.ring
        return ring.taken - ring.returned if ring is not None else 0

    def getchain(self) -> Chain | None:
        """Take the next chain; None: there is none now, a notification will come."""
        ring = self.ring
        if ring is None or self.stopped:
            return None
        try:
            last = ring.last_avail
            if last == ring.avail_idx and not self._look(ring):
                return None
            chain = ring.chain(ring.avail[2 + (last & ring.mask)], self.features)
        except DriverError as error:
            self._stop(error)
            return None
        ring.last_avail = last + 1 & 0xFFFF
        ring.taken += 1
        return chain

    def getchains(self, room: int) -> list[Chain]:
        """Take chains until their writable segments have ``room`` bytes together.

        An empty list: there are not so many now, and none was taken; a notification
        will come.
        """
        chains: list[Chain] = []
        ring = self.ring
        if ring is None or self.stopped:
            return chains
        try:
            last = ring.last_avail
            while room > 0:
                if last == ring.avail_idx and not self._look(ring):
                    return []
                chain = ring.chain(ring.avail[2 + (last & ring.mask)], self.features)
                last = last + 1 & 0xFFFF
                chains.append(chain)
                for _, length in chain.writable:
                    room -= length
        except DriverError as error:
            self._stop(error)
            return []
        ring.last_avail = last
        ring.taken += len(chains)
        return chains

    def _look(self, ring: Ring) -> bool:
        """Look for new chains; where there are none, ask for a notification."""
        known = ring.avail_idx
        index = ring.avail[1]
        if index == known:
            if not self.kicks or not self._ask(ring):
                return False
            index = ring.avail[1]
        # Chains that are out have their descriptors: there is an end to them.
        free = ring.size - (ring.taken - ring.returned)
        if (index - ring.last_avail & 0xFFFF) > free:
            raise DriverError(
                f"the available ring goes from {ring.last_avail} to {index}"
            )
        ring.avail_idx = index
        return index != known

    def _ask(self, ring: Ring) -> bool:
        """Have the driver notify of the next chain; whether the ring needs a look.

        A chain may have come before the driver saw that a notification is wanted.
        """
        if (
            not self.features & VIRTIO_RING_F_EVENT_IDX
            or ring.avail_event == ring.avail_idx
        ):
            return False
        ring.avail_event = ring.avail_idx
        self._store(ring.used + 4 + 8 * ring.size, ring.avail_idx)
        return True

    def retchains(self, count: int) -> None:
        """Give the last ``count`` chains taken back: `getchain` will give them again.

        None of them may have been released.
        """
        ring = self.ring
        if ring is not None:
            ring.last_avail = ring.last_avail - count & 0xFFFF
            ring.taken -= count

    def reject(self, chain: Chain, why: str) -> None:
        """Stop the queue: the driver should know better than to make such a chain.

        On the thread that took it.
        """
        with self._used_lock:
            chain.ring.returned += 1
        self._stop(DriverError(why))

    def kick_disable(self) -> None:
        """No notifications are needed: the caller looks at the queue by itself."""
        self.kicks = False
        ring = self.ring
        # With event indexes it is enough not to ask.
        if ring is not None and not self.features & VIRTIO_RING_F_EVENT_IDX:
            self._store(ring.used, VRING_USED_F_NO_NOTIFY)

    def kick_enable(self) -> None:
        """Have notifications again; the caller then looks once more at the queue."""
        self.kicks = True
        ring = self.ring
        if ring is None:
            return
        if self.features & VIRTIO_RING_F_EVENT_IDX:
            self._ask(ring)
        else:
            self._store(ring.used, 0)

    # -- giving chains back ----------------------------------------------------------

    def relchain(self, chain: Chain, written: int) -> None:
        """A chain is done, ``written`` bytes of its writable segments are filled.

        The driver sees it with the next `endchains`.
        """
        with self._used_lock:
            ring = chain.ring
            ring.returned += 1
            if ring is self.ring:
                ring.done.append(_USED.pack(chain.head, written))

    def relchains(self, chains: Iterable[tuple[Chain, int]]) -> None:
        """`relchain` for several chains, each with the number of bytes written."""
        with self._used_lock:
            for chain, written in chains:
                ring = chain.ring
                ring.returned += 1
                if ring is self.ring:
                    ring.done.append(_USED.pack(chain.head, written))

    def endchains(self, used_all_avail: bool = False) -> None:
        """Show the driver what was released, and interrupt it where it wants that.

        ``used_all_avail``: the caller found the queue empty.
        """
        with self._used_lock:
            ring = self.ring
            if ring is None:
                return
            if ring.done:
                self._publish(ring)
            old, new = ring.signalled, ring.used_idx
            ring.signalled = new
            features = self.features
            if used_all_avail and features & VIRTIO_F_NOTIFY_ON_EMPTY:
                wanted = ring.avail[1] == ring.last_avail
            elif old == new:
                wanted = False
            elif features & VIRTIO_RING_F_EVENT_IDX:
                event = ring.avail[2 + ring.size]
                wanted = (new - event - 1 & 0xFFFF) < (new - old & 0xFFFF)
            else:
                wanted = not ring.avail[0] & VRING_AVAIL_F_NO_INTERRUPT
        if wanted:
            self._interrupt(self)

    def _publish(self, ring: Ring) -> None:
        """Write used entries, then the index that makes them valid."""
        start = ring.used_idx & ring.mask
        room = _USED.size * (ring.size - start)
        data = b"".join(ring.done)
        self._vm.write_mem(ring.used + 4 + _USED.size * start, data[:room])
        if len(data) > room:
            self._vm.write_mem(ring.used + 4, data[room:])
        ring.used_idx = ring.used_idx + len(ring.done) & 0xFFFF
        ring.done = []
        self._store(ring.used + 2, ring.used_idx)

    def _store(self, addr: int, value: int) -> None:
        self._vm.write_mem(addr, value.to_bytes(2, "little"))

    # -- small payloads --------------------------------------------------------------

    def read(self, segments: Sequence[tuple[int, int]], limit: int) -> bytes:
        """A copy of the first ``limit`` bytes, or of all where there are fewer."""
        parts = []
        for addr, length in segments:
            if limit <= 0:
                break
            part = self._vm.read_mem(addr, min(length, limit))
            limit -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, segments: Sequence[tuple[int, int]], data: bytes) -> int:
        """Fill segments from their beginning; gives how many bytes there was room for.

        That is what `relchain` wants to know.
        """
        done = 0
        for addr, length in segments:
            part = data[done : done + length]
            if not part:
                break
            self._vm.write_mem(addr, part)
            done += len(part)
        return done

    # -- state -----------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Set-up and positions; no chain is out."""
        ring = self.ring
        return {
            "size": self.size,
            "vector": self.vector,
            "rings": [self.desc, self.avail, self.used],
            "enabled": self.enabled,
            "kicks": self.kicks,
            "stopped": self.stopped,
            "last_avail": ring.last_avail if ring is not None else 0,
            "used_idx": ring.used_idx if ring is not None else 0,
            "signalled": ring.signalled if ring is not None else 0,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave; memory is there already or comes later."""
        self.reset()
        self.size = state["size"]
        self.vector = state["vector"]
        self.desc, self.avail, self.used = state["rings"]
        self.enabled = state["enabled"]
        self.kicks = state["kicks"]
        self.stopped = state["stopped"]
        if self.enabled and not self.stopped:
            self._map(state["last_avail"], state["used_idx"])
            if self.ring is None:
                raise ValueError("a queue that cannot have been in use")
            self.ring.signalled = state["signalled"]


def _checked_size(size: int, max_size: int) -> int:
    if size & size - 1 or not 0 < size <= max_size:
        raise DriverError(f"a queue of {size}")
    return size


def split(segments: Segments, length: int) -> tuple[Segments, Segments]:
    """The first ``length`` bytes of segments, and what is behind them.

    A driver may lay its structures out over segments as it likes (2.7.4).
    """
    head: Segments = []
    for at, (addr, size) in enumerate(segments):
        if length < size:
            if length:
                head.append((addr, length))
            return head, [(addr + length, size - length), *segments[at + 1 :]]
        head.append((addr, size))
        length -= size
    return head, []


def total(segments: Segments) -> int:
    """The number of bytes in segments."""
    return sum([length for _, length in segments])
