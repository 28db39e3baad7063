"""Submission and completion queues, and the commands between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pybhyve.pci.nvme.spec import CQE, CQE_SIZE, SQE, SQE_SIZE

if TYPE_CHECKING:
    from pybhyve.block import BlockReq
    from pybhyve.vmmapi import Iov, Vm

Step = tuple[Callable[..., Any], tuple[Any, ...]]
"""A request to the disk: a method of `BlockIf` and its arguments but ``done``."""

_NO_STEPS: Final[Iterator[Step]] = iter(())


@dataclass(slots=True, eq=False)
class CompletionQueue:
    """A completion queue; ``size`` is its number of entries."""

    qid: int
    base: int
    size: int
    vector: int
    interrupt: bool
    head: int = 0
    tail: int = 0
    phase: int = 1
    reserved: int = 0
    """Entries that commands under way will need."""

    def unread(self) -> int:
        """How many entries the host has not consumed."""
        return (self.tail - self.head) % self.size

    def room(self) -> int:
        """For how many more commands there is place."""
        return self.size - 1 - self.unread() - self.reserved

    def post(
        self, vm: Vm, result: int, sq: SubmissionQueue, cid: int, status: int
    ) -> None:
        """Write an entry.  VmmError where the queue is not in memory."""
        status = status << 1 | self.phase
        entry = CQE.pack(result, 0, sq.head, sq.qid, cid, status)
        vm.write_mem(self.base + CQE_SIZE * self.tail, entry)
        self.tail += 1
        if self.tail == self.size:
            self.tail = 0
            self.phase ^= 1

    def save(self) -> dict[str, Any]:
        """All of it; nothing is under way."""
        return {
            "qid": self.qid,
            "base": self.base,
            "size": self.size,
            "vector": self.vector,
            "interrupt": self.interrupt,
            "head": self.head,
            "tail": self.tail,
            "phase": self.phase,
        }


@dataclass(slots=True, eq=False)
class SubmissionQueue:
    """A submission queue; ``size`` is its number of entries."""

    qid: int
    base: int
    size: int
    cq: CompletionQueue
    head: int = 0
    tail: int = 0
    deletion: Command | None = None
    """The command that deletes it, and ends when all of its own have ended."""

    def fetch(self, vm: Vm) -> Command:
        """The next command.  VmmError where the queue is not in memory."""
        entry = vm.read_mem(self.base + SQE_SIZE * self.head, SQE_SIZE)
        self.head += 1
        if self.head == self.size:
            self.head = 0
        dw0, nsid, _, _, prp1, prp2, *cdws = SQE.unpack(entry)
        return Command(self, dw0, nsid, prp1, prp2, cdws)

    def save(self) -> dict[str, Any]:
        """All of it; nothing is under way."""
        return {
            "qid": self.qid,
            "base": self.base,
            "size": self.size,
            "cqid": self.cq.qid,
            "head": self.head,
            "tail": self.tail,
        }


@dataclass(slots=True, eq=False)
class Command:
    """A command that was fetched and has not ended; ``cdws`` are dwords 10 to 15."""

    sq: SubmissionQueue
    dw0: int
    nsid: int
    prp1: int
    prp2: int
    cdws: list[int]
    steps: Iterator[Step] = _NO_STEPS
    """What it asks of the disk, one after the other."""
    failed: int = 0
    """The status it ends with if the host's disk does not do it."""
    iov: Iov = field(default_factory=list)
    req: BlockReq | None = None
    """What the disk works on."""
    forgotten: bool = False
    """The controller was reset: it ends without a word."""

    @property
    def cid(self) -> int:
        """Its identifier."""
        return self.dw0 >> 16

    @property
    def key(self) -> int:
        """What tells it from all others that are under way."""
        return self.sq.qid << 16 | self.dw0 >> 16
