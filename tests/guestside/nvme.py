"""The driver's half of NVMe: registers, queues, PRP lists (NVM Express 1.4).

    driver = NvmeDriver(PciFunction(machine, 3))
    driver.enable()
    queue = driver.create_queues(1)
    done = queue.do(READ, nsid=1, prp1=buffer, cdw12=7)
    assert done.status == 0

Everything lies in a real VM's memory, and registers are reached through the BAR.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.guestside.pci import PciFunction

# Registers.
CAP, VS, INTMS, INTMC, CC, CSTS = 0x00, 0x08, 0x0C, 0x10, 0x14, 0x1C
AQA, ASQ, ACQ = 0x24, 0x28, 0x30
DOORBELLS: Final = 0x1000
CC_EN: Final = 1
CC_SHN_NORMAL: Final = 1 << 14
CC_SIZES: Final = 6 << 16 | 4 << 20  # of entries
RDY, CFS, SHST_COMPLETE = 1, 2, 2 << 2

# Admin commands.
DELETE_SQ, CREATE_SQ, GET_LOG, DELETE_CQ, CREATE_CQ = 0, 1, 2, 4, 5
IDENTIFY, ABORT, SET_FEATURES, GET_FEATURES, ASYNC, FORMAT = 6, 8, 9, 10, 12, 0x80
# Commands of the namespace.
FLUSH, WRITE, READ, WRITE_ZEROES, DSM = 0, 1, 2, 8, 9

PAGE: Final = 4096
HEAP: Final = 0x100000
VECTOR: Final = 0x50  # and up
WAIT_SECONDS: Final = 20.0

_SQE = struct.Struct("<BBHI8xQQQ6I")
_CQE = struct.Struct("<IIHHHH")


class Completion(NamedTuple):
    """A completion entry, its status without the phase."""

    result: int
    sqhd: int
    sqid: int
    cid: int
    status: int


@dataclass(slots=True)
class Queue:
    """A submission queue with a completion queue of its own."""

    driver: NvmeDriver
    qid: int
    sq: int
    cq: int
    size: int
    cq_size: int
    tail: int = 0
    head: int = 0
    phase: int = 1
    cid: int = 0

    def put(
        self,
        opcode: int,
        *,
        nsid: int = 0,
        prp1: int = 0,
        prp2: int = 0,
        cid: int | None = None,
        flags: int = 0,
        **cdws: int,
    ) -> int:
        """Place a command in the queue, without a word to the controller."""
        if cid is None:
            cid = self.cid
            self.cid = self.cid + 1 & 0xFFFF
        words = [cdws.get(f"cdw{number}", 0) for number in range(10, 16)]
        entry = _SQE.pack(opcode, flags, cid, nsid, 0, prp1, prp2, *words)
        self.driver.vm.write_mem(self.sq + 64 * self.tail, entry)
        self.tail = (self.tail + 1) % self.size
        return cid

    def ring(self) -> None:
        """Tell the controller where the queue ends."""
        self.driver.write(DOORBELLS + 8 * self.qid, 4, self.tail)

    def submit(self, opcode: int, **fields: int) -> int:
        """Place a command, and tell."""
        cid = self.put(opcode, **fields)
        self.ring()
        return cid

    def poll(self) -> Completion | None:
        """The next completion, if it is there; it is read then."""
        entry = self.driver.vm.read_mem(self.cq + 16 * self.head, 16)
        result, _, sqhd, sqid, cid, status = _CQE.unpack(entry)
        if status & 1 != self.phase:
            return None
        self.head += 1
        if self.head == self.cq_size:
            self.head, self.phase = 0, self.phase ^ 1
        self.driver.write(DOORBELLS + 8 * self.qid + 4, 4, self.head)
        return Completion(result, sqhd, sqid, cid, status >> 1)

    def wait(self) -> Completion:
        """The next completion, which comes."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (done := self.poll()) is None:
            assert time.monotonic() < deadline, "no completion"
            time.sleep(0.0005)
        return done

    def do(self, opcode: int, **fields: int) -> Completion:
        """Submit a command and wait for it, with nothing else under way."""
        cid = self.submit(opcode, **fields)
        done = self.wait()
        assert (done.cid, done.sqid) == (cid, self.qid)
        return done


class NvmeDriver:
    """A driver of one controller; ``admin`` is its admin queue."""

    admin: Queue

    def __init__(self, function: PciFunction) -> None:
        function.enable()
        self.function = function
        self.machine = function.machine
        self.vm = function.machine.vm
        self.bar = function.bar(0)
        self._heap = HEAP

    # -- memory and registers --------------------------------------------------------

    def read(self, offset: int, size: int = 4) -> int:
        """A register."""
        return self.bar.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """A register or a doorbell."""
        self.bar.write(offset, size, value)

    def alloc(self, length: int) -> int:
        """Pages of zeroes."""
        at = self._heap
        self._heap += -(-length // PAGE) * PAGE
        self.vm.write_mem(at, bytes(self._heap - at))
        return at

    def prps(self, address: int, length: int) -> tuple[int, int]:
        """PRP 1 and PRP 2 for a buffer, and the list that they may need."""
        first = PAGE - address % PAGE
        pages = list(range(address + first, address + length, PAGE))
        if len(pages) < 2:
            return address, pages[0] if pages else 0
        room = PAGE // 8
        at = prp2 = self.alloc(PAGE)
        while len(pages) > room:
            following = self.alloc(PAGE)
            entries, pages = [*pages[: room - 1], following], pages[room - 1 :]
            self.vm.write_mem(at, struct.pack(f"<{room}Q", *entries))
            at = following
        self.vm.write_mem(at, struct.pack(f"<{len(pages)}Q", *pages))
        return address, prp2

    # -- the controller --------------------------------------------------------------

    def wait_status(self, mask: int, value: int) -> None:
        """Wait until CSTS has a value under a mask."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self.read(CSTS) & mask != value:
            assert time.monotonic() < deadline, f"CSTS is {self.read(CSTS):#x}"
            time.sleep(0.0005)

    def enable(self, size: int = 32, cq_size: int = 0) -> None:
        """Reset the controller, and switch it on with an admin queue."""
        cq_size = cq_size or size
        self.disable()
        sq, cq = self.alloc(64 * size), self.alloc(16 * cq_size)
        self.write(AQA, 4, cq_size - 1 << 16 | size - 1)
        self.write(ASQ, 8, sq)
        self.write(ACQ, 8, cq)
        self.write(CC, 4, CC_SIZES | CC_EN)
        self.wait_status(RDY | CFS, RDY)
        self.admin = Queue(self, 0, sq, cq, size, cq_size)

    def disable(self) -> None:
        """Reset the controller."""
        self.write(CC, 4, 0)
        self.wait_status(RDY, 0)

    def create_queues(
        self, qid: int, size: int = 32, *, vector: int | None = None, cq_size: int = 0
    ) -> Queue:
        """A pair of queues; with ``vector``, interrupts."""
        cq_size = cq_size or size
        sq, cq = self.alloc(64 * size), self.alloc(16 * cq_size)
        flags = 1 if vector is None else vector << 16 | 3
        cdw10 = cq_size - 1 << 16 | qid
        done = self.admin.do(CREATE_CQ, prp1=cq, cdw10=cdw10, cdw11=flags)
        assert done.status == 0, hex(done.status)
        cdw10 = size - 1 << 16 | qid
        done = self.admin.do(CREATE_SQ, prp1=sq, cdw10=cdw10, cdw11=qid << 16 | 1)
        assert done.status == 0, hex(done.status)
        return Queue(self, qid, sq, cq, size, cq_size)

    def identify(self, cns: int, nsid: int = 0) -> bytes:
        """A page of identification."""
        page = self.alloc(PAGE)
        done = self.admin.do(IDENTIFY, nsid=nsid, prp1=page, cdw10=cns)
        assert done.status == 0, hex(done.status)
        return self.vm.read_mem(page, PAGE)

    def log(self, page: int, length: int, offset: int = 0, rae: int = 0) -> bytes:
        """A log page, or a part of it."""
        buffer = self.alloc(length)
        prp1, prp2 = self.prps(buffer, length)
        cdw10 = (length // 4 - 1) << 16 | rae << 15 | page
        done = self.admin.do(
            GET_LOG, prp1=prp1, prp2=prp2, cdw10=cdw10, cdw12=offset, nsid=0xFFFFFFFF
        )
        assert done.status == 0, hex(done.status)
        return self.vm.read_mem(buffer, length)
