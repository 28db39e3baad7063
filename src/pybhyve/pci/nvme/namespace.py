"""The namespace: the NVM command set on a disk image (NVM Express 1.4, chapter 6)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from pybhyve.pci.nvme.prp import map_prps, prp_ranges
from pybhyve.pci.nvme.queues import Command, Step
from pybhyve.pci.nvme.spec import (
    DSM_AD,
    DSM_RANGE,
    NSID,
    NSID_ALL,
    NVM_DSM,
    NVM_FLUSH,
    NVM_READ,
    NVM_WRITE,
    NVM_WRITE_ZEROES,
    PAGE,
    RW_FUA,
    SC_CAPACITY_EXCEEDED,
    SC_DATA_TRANSFER_ERROR,
    SC_FORMAT_IN_PROGRESS,
    SC_INVALID_FIELD,
    SC_INVALID_NAMESPACE,
    SC_INVALID_OPCODE,
    SC_LBA_RANGE,
    SC_READ_ERROR,
    SC_WRITE_FAULT,
    SC_WRITE_PROTECTED,
    CommandError,
)
from pybhyve.vmmapi import VmmError, release_iov

if TYPE_CHECKING:
    from pybhyve.block import BlockIf
    from pybhyve.pci.nvme.device import PciNvme

MDTS: Final = 9
MAX_TRANSFER: Final = PAGE << MDTS
UNIT: Final = 512  # what the health log counts thousands of


class Namespace:
    """Namespace 1.  The controller's lock is held in every method."""

    def __init__(
        self, ctl: PciNvme, disk: BlockIf, sectsz: int, dsm: bool, cache: bool
    ) -> None:
        self._ctl = ctl
        self._vm = ctl.machine.vm
        self._disk = disk
        self.shift = sectsz.bit_length() - 1
        """log2 of the size of a block."""
        self.dsm = dsm
        self.cache = cache
        """Whether writes that are done may still wait for a flush."""
        self.blocks = disk.size >> self.shift
        self._formatting: Command | None = None
        self.counters = {
            "read_units": 0,
            "write_units": 0,
            "read_commands": 0,
            "write_commands": 0,
            "media_errors": 0,
        }

    @property
    def ro(self) -> bool:
        """Whether it is write protected."""
        return self._disk.ro

    @property
    def physical_blocks(self) -> int:
        """How many blocks the host writes at a time."""
        return max(1, self._disk.psectsz >> self.shift)

    def resized(self) -> None:
        """The image has another size."""
        self.blocks = self._disk.size >> self.shift

    def execute(self, cmd: Command, write_through: bool) -> int | None:
        """Do a command; its result, or None where it ends later.

        ``write_through``: no write may wait for a flush.  Raises CommandError.
        """
        opcode = cmd.dw0 & 0xFF
        if cmd.nsid != NSID and not (cmd.nsid == NSID_ALL and opcode == NVM_FLUSH):
            raise CommandError(SC_INVALID_NAMESPACE)
        if self._formatting is not None:
            raise CommandError(SC_FORMAT_IN_PROGRESS)
        if opcode == NVM_READ:
            return self._read(cmd)
        if opcode == NVM_WRITE:
            return self._write(cmd, write_through)
        if opcode == NVM_FLUSH:
            return self._begin(cmd, SC_WRITE_FAULT, (self._disk.flush, ()))
        if opcode == NVM_WRITE_ZEROES:
            return self._write_zeroes(cmd, write_through)
        if opcode == NVM_DSM and self.dsm:
            return self._dataset_management(cmd)
        raise CommandError(SC_INVALID_OPCODE)

    def format(self, cmd: Command) -> None:
        """Erase everything; the command ends later."""
        if self.ro:
            raise CommandError(SC_WRITE_PROTECTED)
        if self._formatting is not None:
            raise CommandError(SC_FORMAT_IN_PROGRESS)
        erase = self._disk.delete if self._disk.candelete else self._disk.write_zeroes
        self._formatting = cmd
        self._begin(cmd, SC_WRITE_FAULT, (erase, (0, self.blocks << self.shift)))

    def released(self, cmd: Command) -> None:
        """The disk is done with a command, one way or the other."""
        if cmd is self._formatting:
            self._formatting = None

    def status(self, cmd: Command, error: int) -> int:
        """What a command ends with after the host's errno."""
        if error == errno.ENOSPC:
            return SC_CAPACITY_EXCEEDED
        self.counters["media_errors"] += 1
        return cmd.failed

    # -- commands --------------------------------------------------------------------

    def _read(self, cmd: Command) -> int | None:
        offset, length = self._extent(cmd)
        if length > MAX_TRANSFER:
            raise CommandError(SC_INVALID_FIELD)
        self.counters["read_commands"] += 1
        self.counters["read_units"] += length // UNIT
        cmd.iov = map_prps(self._vm, cmd.prp1, cmd.prp2, length, writable=True)
        if self._disk.read_now(cmd.iov, offset):
            release_iov(cmd.iov)
            return 0
        return self._begin(cmd, SC_READ_ERROR, (self._disk.read, (cmd.iov, offset)))

    def _write(self, cmd: Command, write_through: bool) -> int | None:
        offset, length = self._extent(cmd)
        if length > MAX_TRANSFER:
            raise CommandError(SC_INVALID_FIELD)
        if self.ro:
            raise CommandError(SC_WRITE_PROTECTED)
        self.counters["write_commands"] += 1
        self.counters["write_units"] += length // UNIT
        cmd.iov = map_prps(self._vm, cmd.prp1, cmd.prp2, length, writable=False)
        return self._modify(cmd, (self._disk.write, (cmd.iov, offset)), write_through)

    def _write_zeroes(self, cmd: Command, write_through: bool) -> int | None:
        # deviation: bhyve says that it is done, and does nothing.
        offset, length = self._extent(cmd)
        if self.ro:
            raise CommandError(SC_WRITE_PROTECTED)
        self.counters["write_commands"] += 1
        return self._modify(
            cmd, (self._disk.write_zeroes, (offset, length)), write_through
        )

    def _modify(self, cmd: Command, step: Step, write_through: bool) -> int | None:
        if self.cache and (write_through or cmd.cdws[2] & RW_FUA):
            return self._begin(cmd, SC_WRITE_FAULT, step, (self._disk.flush, ()))
        return self._begin(cmd, SC_WRITE_FAULT, step)

    def _dataset_management(self, cmd: Command) -> int | None:
        ranges = (cmd.cdws[0] & 0xFF) + 1
        data = b""
        try:
            for gpa, length in prp_ranges(
                self._vm, cmd.prp1, cmd.prp2, ranges * DSM_RANGE.size
            ):
                data += self._vm.read_mem(gpa, length)
        except VmmError:
            raise CommandError(SC_DATA_TRANSFER_ERROR) from None
        wanted = list(DSM_RANGE.iter_unpack(data))
        if any(first + blocks > self.blocks for _, blocks, first in wanted):
            raise CommandError(SC_LBA_RANGE)
        # The other attributes are advice that a disk image has no use for.
        if not cmd.cdws[1] & DSM_AD or not self._disk.candelete:
            return 0
        steps = [
            (self._disk.delete, (first << self.shift, blocks << self.shift))
            for _, blocks, first in wanted
            if blocks
        ]
        return self._begin(cmd, SC_WRITE_FAULT, *steps) if steps else 0

    def _extent(self, cmd: Command) -> tuple[int, int]:
        """Offset and length, in bytes, of what dwords 10 to 12 say in blocks."""
        low, high, control, *_ = cmd.cdws
        first = high << 32 | low
        blocks = (control & 0xFFFF) + 1
        if first + blocks > self.blocks:
            raise CommandError(SC_LBA_RANGE)
        return first << self.shift, blocks << self.shift

    def _begin(self, cmd: Command, failed: int, *steps: Step) -> int | None:
        cmd.failed = failed
        cmd.steps = iter(steps)
        self._ctl.begin(cmd)
        return None

    # -- state -----------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """The counters; the contents are the image's."""
        return {"counters": dict(self.counters)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        self.counters.update(state["counters"])
