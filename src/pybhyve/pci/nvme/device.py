"""The NVMe controller: options, registers, doorbells, and the life of a command.

NVM Express 1.4, chapters 3, 4 and 7.  bhyve: pci_nvme.c.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any, Final

from pybhyve.block import BlockIf, BlockOptions, SectorSize
from pybhyve.config import Node, parse_int
from pybhyve.errors import DeviceError
from pybhyve.options import integer, key, one_of, parse_legacy_config, parser
from pybhyve.pci.emul import BAR_MEM64, PciAddress, PciDevice
from pybhyve.pci.nvme.admin import Admin
from pybhyve.pci.nvme.namespace import Namespace
from pybhyve.pci.nvme.queues import Command, CompletionQueue, SubmissionQueue
from pybhyve.pci.nvme.spec import (
    AE_ERROR,
    AE_ERROR_INVALID_DOORBELL,
    AE_ERROR_INVALID_VALUE,
    AQA_ACQS_SHIFT,
    AQA_ASQS,
    CAP_CQR,
    CAP_CSS_NVM,
    CAP_TO,
    CC_AMS,
    CC_CSS,
    CC_EN,
    CC_MPS,
    CC_RESERVED,
    CC_SHN,
    CMD_FUSE,
    CMD_PSDT,
    CSTS_CFS,
    CSTS_RDY,
    CSTS_SHST,
    CSTS_SHST_COMPLETE,
    CSTS_SHST_OCCURRING,
    DOORBELL_SIZE,
    DOORBELLS,
    LOG_ERROR,
    QUEUE_MIN,
    SC_ABORT_REQUESTED,
    SC_ID_CONFLICT,
    SC_INVALID_FIELD,
    SC_SQ_DELETED,
    SC_SUCCESS,
    CommandError,
    ControllerRegs,
)
from pybhyve.pci.pcireg import (
    PCIC_STORAGE,
    PCIEM_TYPE_ENDPOINT,
    PCIP_STORAGE_NVM_NVMHCI,
    PCIS_STORAGE_NVM,
)
from pybhyve.pci.registry import pci_device
from pybhyve.vmmapi import MB, VmmError, release_iov

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.pci.bus import PciHost

log = logging.getLogger(__name__)

NVME_VENDOR: Final = 0xFB5D
NVME_DEVICE: Final = 0x0A0A
MSIX_BAR: Final = 4
BAR_SIZE_MIN: Final = 0x4000  # Windows wants no less

QUEUES_MAX: Final = 16
QENTRIES_MAX: Final = 65536
RAM_SECTOR_SIZE: Final = 4096
RAM_MAX: Final = (1 << 43) - 1  # MiB: a file's size has 63 bits
STATE_VERSION: Final = 1

# What is fetched in one go; then other threads get at the controller, the vCPU's that
# rang the doorbell goes back to its guest, and the event loop goes on.
BURST: Final = 64


@parser("512|4096|8192")
def _sector_size(text: str) -> int:
    value = parse_int(text)
    if value not in (512, 4096, 8192):
        raise ValueError("expected 512, 4096 or 8192")
    return value


@parser("integer")
def _eui64(text: str) -> int:
    value = parse_int(text)
    if not 0 <= value < 1 << 64:
        raise ValueError("expected a number of 64 bits")
    return value


class NvmeOptions(BlockOptions):
    """``pci.B.S.F.…`` of ``nvme``."""

    maxq: int = key(
        QUEUES_MAX,
        doc=f"I/O queues; {QUEUES_MAX} where it is none of 1 to {QUEUES_MAX}.",
    )
    qsz: int = key(
        2048, parse=integer(QUEUE_MIN, QENTRIES_MAX), doc="Entries of a queue, at most."
    )
    ioslots: int = key(
        8, parse=integer(1, 65536), doc="I/O commands that are worked on at a time."
    )
    sectsz: int | None = key(
        None, parse=_sector_size, doc="Bytes of a block, instead of the disk's."
    )
    ser: str | None = key(None, doc="Serial number, 20 characters.")
    eui64: int = key(
        0,
        parse=_eui64,
        doc="IEEE identifier; 0: one that is made up.",
    )
    dsm: str = key(
        "auto",
        parse=one_of("auto", "enable", "disable"),
        doc="Offer trim: where the disk has it, always, never.",
    )
    ram: int | None = key(
        None,
        parse=integer(1, RAM_MAX),
        doc="MiB of memory to have for a disk, instead of a file.",
    )

    @classmethod
    def legacy_config(cls, node: Node, text: str) -> None:
        """``PATH,…`` or ``ram=MB,…``."""
        if text.startswith("ram="):
            ram, comma, rest = text.partition(",")
            node.set("ram", ram.removeprefix("ram="))
            if comma:
                parse_legacy_config(node, rest)
        else:
            super().legacy_config(node, text)


@pci_device("nvme", options=NvmeOptions)
class PciNvme(PciDevice[NvmeOptions]):
    """One controller with one namespace.

    Registers in BAR 0, doorbells behind them, MSI-X in BAR 4, a vector for each queue.
    All state is under one lock, which no method holds while it waits.
    """

    def __init__(
        self, machine: Machine, host: PciHost, address: PciAddress, options: NvmeOptions
    ) -> None:
        super().__init__(machine, host, address, options)
        self.set_ids(
            NVME_VENDOR,
            NVME_DEVICE,
            class_=PCIC_STORAGE,
            subclass=PCIS_STORAGE_NVM,
            progif=PCIP_STORAGE_NVM_NVMHCI,
        )
        self.maxq = options.maxq if 1 <= options.maxq <= QUEUES_MAX else QUEUES_MAX
        doorbells = DOORBELL_SIZE * (self.maxq + 1)
        self.add_bar(0, BAR_MEM64, max(BAR_SIZE_MIN, DOORBELLS + doorbells))
        self.add_msix(self.maxq + 1, MSIX_BAR)
        self.add_pcie(PCIEM_TYPE_ENDPOINT)
        self.add_intx()
        self.add_boot_device(options.bootindex)

        self._vm = machine.vm
        self._lock = threading.Lock()
        self.regs = ControllerRegs(self)
        self.disk = self._open_disk(options)
        sectsz = options.sectsz or self.disk.sectsz
        trim = options.dsm == "enable" or (
            options.dsm == "auto" and self.disk.candelete
        )
        # deviation: bhyve says that it has no write cache, and so gets no flushes.
        cache = not (options.sync or options.direct or options.ram)
        self.namespace = Namespace(self, self.disk, sectsz, trim, cache)
        self.admin = Admin(self)
        self.disk.on_resize(self._resized)

        self.cqs: dict[int, CompletionQueue] = {}
        self.sqs: dict[int, SubmissionQueue] = {}
        self._commands: dict[int, Command] = {}
        self._unfetched: dict[int, SubmissionQueue] = {}  # have commands, in turns
        self._in_flight = 0
        """Commands that the disk has."""
        self._vectors: set[int] = set()  # to interrupt with
        self._level = False  # of INTx
        self._masked = 0  # INTMS
        self._fetching = False
        self._continues = False
        self._paused = False
        self._power_on()

    def _open_disk(self, options: NvmeOptions) -> BlockIf:
        ident = f"{self.NAME} {self.address}"
        mevent = self.machine.mevent
        if options.ram is None:
            return BlockIf(options, ident, mevent)
        fd = os.memfd_create(ident, os.MFD_CLOEXEC)
        try:
            os.truncate(fd, options.ram * MB)
            sectors = SectorSize(RAM_SECTOR_SIZE, RAM_SECTOR_SIZE)
            memory = BlockOptions(path=f"/proc/self/fd/{fd}", sectorsize=sectors)
            return BlockIf(memory, ident, mevent)
        except OSError as error:
            raise DeviceError(f"ram={options.ram}") from error
        finally:
            os.close(fd)

    def _power_on(self) -> None:
        self.regs.reset()
        self.regs.CAP = self.options.qsz - 1 | CAP_CQR | CAP_TO | CAP_CSS_NVM

    # -- registers -------------------------------------------------------------------

    def bar_read(self, index: int, offset: int, size: int) -> int:
        """A controller register; doorbells read 0."""
        with self._lock:
            return self.regs.read(offset, size)

    def bar_write(self, index: int, offset: int, size: int, value: int) -> None:
        """A controller register, or a doorbell, which takes dwords."""
        with self._lock:
            if offset < DOORBELLS:
                self.regs.write(offset, size, value)
            elif size == 4 and not offset & 3:
                self._doorbell(offset - DOORBELLS, value)
            elif size == 8 and not offset & 7:
                self._doorbell(offset - DOORBELLS, value & 0xFFFFFFFF)
                self._doorbell(offset - DOORBELLS + 4, value >> 32)

    @ControllerRegs.INTMS.read
    @ControllerRegs.INTMC.read
    def _mask(self) -> int:
        return self._masked

    @ControllerRegs.INTMS.write
    def _set_mask(self, value: int) -> None:
        self._masked |= value
        self._update_level()

    @ControllerRegs.INTMC.write
    def _clear_mask(self, value: int) -> None:
        self._masked &= ~value
        self._update_level()

    @ControllerRegs.CC.write
    def _configure(self, value: int) -> None:
        value &= ~CC_RESERVED
        changed = self.regs.CC ^ value
        self.regs.CC = value
        if changed & CC_EN:
            if not value & CC_EN:
                self._reset_controller()
            elif not self._in_flight:  # else _done() does it
                self._enable()
        if changed & CC_SHN and value & CC_SHN:
            self._shut_down()

    def _enable(self) -> None:
        """CC.EN was set: the admin queues begin to work (7.6.1)."""
        regs = self.regs
        submission = (regs.AQA & AQA_ASQS) + 1
        completion = (regs.AQA >> AQA_ACQS_SHIFT) + 1
        if regs.CC & (CC_CSS | CC_MPS | CC_AMS) or (
            min(submission, completion) < QUEUE_MIN
        ):
            self._fail("it is enabled with values that it does not offer")
            return
        cq = CompletionQueue(0, regs.ACQ, completion, vector=0, interrupt=True)
        self.cqs[0] = cq
        self.sqs[0] = SubmissionQueue(0, regs.ASQ, submission, cq)
        regs.CSTS = CSTS_RDY

    def _reset_controller(self) -> None:
        """CC.EN was cleared (7.3.2): forget everything but AQA, ASQ and ACQ.

        The controller is ready, as seen by the host, until the disk has let go of the
        host's memory.
        """
        for cmd in self._commands.values():
            if cmd.req is not None:
                cmd.forgotten = True
                self._cancel(cmd)
        self._commands.clear()
        self._unfetched.clear()
        self.sqs.clear()
        self.cqs.clear()
        self.admin.reset()
        self._vectors.clear()
        self._masked = 0
        self._update_level()
        self.regs.CSTS &= CSTS_RDY if self._in_flight else 0

    def _shut_down(self) -> None:
        """CC.SHN was set (7.6.2): nothing may be lost when the power goes."""
        csts = self.regs.CSTS & ~CSTS_SHST
        self.regs.CSTS = csts | CSTS_SHST_OCCURRING
        self.disk.flush(self._shut_down_done)

    def _shut_down_done(self, _error: int) -> None:
        with self._lock:
            csts = self.regs.CSTS
            if csts & CSTS_SHST == CSTS_SHST_OCCURRING:
                self.regs.CSTS = csts & ~CSTS_SHST | CSTS_SHST_COMPLETE

    def _fail(self, why: str) -> None:
        """Nothing works until the host resets the controller."""
        log.info("%s %s: %s", self.NAME, self.address, why)
        self.regs.CSTS |= CSTS_CFS
        self._unfetched.clear()

    # -- doorbells (3.1.24, 3.1.25) --------------------------------------------------

    def _doorbell(self, offset: int, value: int) -> None:
        if self.regs.CSTS & (CSTS_RDY | CSTS_CFS) != CSTS_RDY:
            return
        qid = offset // DOORBELL_SIZE
        if offset & 4:
            cq = self.cqs.get(qid)
            if cq is None:
                self._bad_doorbell(AE_ERROR_INVALID_DOORBELL)
            elif value >= cq.size or (value - cq.head) % cq.size > cq.unread():
                self._bad_doorbell(AE_ERROR_INVALID_VALUE)
            else:
                cq.head = value
                if self._level:
                    self._update_level()
        else:
            sq = self.sqs.get(qid)
            if sq is None:
                self._bad_doorbell(AE_ERROR_INVALID_DOORBELL)
            elif value >= sq.size:
                self._bad_doorbell(AE_ERROR_INVALID_VALUE)
            else:
                sq.tail = value
                if value != sq.head:
                    self._unfetched[qid] = sq
                else:
                    self._unfetched.pop(qid, None)
        self._work()

    def _bad_doorbell(self, info: int) -> None:
        self.admin.note_error(0xFFFF, 0xFFFF, 0, 0xFFFF)
        self.admin.post_event(AE_ERROR, info, LOG_ERROR)

    # -- the life of a command -------------------------------------------------------

    def _work(self) -> None:
        """Fetch what can be worked on, and interrupt for what has ended."""
        if self._fetching:
            return
        self._fetching = True
        left = BURST
        while left and self._unfetched and not self._paused:
            sq = self._next_queue()
            if sq is None:
                break
            left -= 1
            try:
                cmd = sq.fetch(self._vm)
            except VmmError:
                self._fail(f"submission queue {sq.qid} is not in memory")
                break
            if sq.head == sq.tail:
                del self._unfetched[sq.qid]
            self._execute(cmd)
        self._fetching = False
        self.admin.deliver_events()
        self._interrupt()
        if not left and self._unfetched and not self._continues:
            self._continues = True
            self.machine.mevent.call_soon_threadsafe(self._continue)

    def _continue(self) -> None:
        with self._lock:
            self._continues = False
            self._work()

    def _next_queue(self) -> SubmissionQueue | None:
        """Whose turn it is: round robin (4.13.1) over those that can go on."""
        for qid, sq in self._unfetched.items():
            if sq.cq.room() > 0 and (
                qid == 0 or self._in_flight < self.options.ioslots
            ):
                if len(self._unfetched) > 1:
                    self._unfetched[qid] = self._unfetched.pop(qid)
                return sq
        return None

    def _execute(self, cmd: Command) -> None:
        sq = cmd.sq
        sq.cq.reserved += 1
        if cmd.key in self._commands:
            self._post(cmd, SC_ID_CONFLICT, 0)
            return
        self._commands[cmd.key] = cmd
        try:
            result = self._dispatch(cmd)
        except CommandError as error:
            self.complete(cmd, error.status)
        else:
            if result is not None:
                self.complete(cmd, SC_SUCCESS, result)

    def _dispatch(self, cmd: Command) -> int | None:
        if cmd.dw0 & (CMD_FUSE | CMD_PSDT):
            raise CommandError(SC_INVALID_FIELD)  # no fused commands, PRPs only
        if cmd.sq.qid:
            return self.namespace.execute(cmd, self.admin.write_through)
        return self.admin.execute(cmd)

    def begin(self, cmd: Command) -> None:
        """Have the disk do a command's steps, the first of which is there."""
        self._in_flight += 1
        call, arguments = next(cmd.steps)
        cmd.req = call(*arguments, lambda error: self._done(cmd, error))

    def _done(self, cmd: Command, error: int) -> None:
        """The disk has done a step; a thread of its pool."""
        with self._lock:
            step = None if error or cmd.forgotten else next(cmd.steps, None)
            if step is not None:
                call, arguments = step
                cmd.req = call(*arguments, lambda error: self._done(cmd, error))
                return
            self._release(cmd)
            if not cmd.forgotten:
                status = self.namespace.status(cmd, error) if error else SC_SUCCESS
                self.complete(cmd, status)
            self._settle()
            self._work()

    def _cancel(self, cmd: Command) -> bool:
        """Take a command back from the disk, if it was not begun."""
        if cmd.req is None or not self.disk.cancel(cmd.req):
            return False
        self._release(cmd)
        return True

    def _release(self, cmd: Command) -> None:
        """The disk is done with a command."""
        release_iov(cmd.iov)
        self._in_flight -= 1
        self.namespace.released(cmd)

    def _settle(self) -> None:
        """End a reset that waited for the last command."""
        csts = self.regs.CSTS
        if not self._in_flight and csts & CSTS_RDY and 0 not in self.sqs:
            self.regs.CSTS = csts & CSTS_SHST
            if self.regs.CC & CC_EN:
                self._enable()

    def complete(self, cmd: Command, status: int, result: int = 0) -> None:
        """End a command."""
        del self._commands[cmd.key]
        self._post(cmd, status, result)
        sq = cmd.sq
        if sq.deletion is not None and not self._has_commands(sq):
            deletion, sq.deletion = sq.deletion, None
            self.complete(deletion, SC_SUCCESS)

    def _post(self, cmd: Command, status: int, result: int) -> None:
        sq = cmd.sq
        cq = sq.cq
        cq.reserved -= 1
        if status:
            self.admin.note_error(sq.qid, cmd.cid, status, cmd.nsid)
        try:
            cq.post(self._vm, result, sq, cmd.cid, status)
        except VmmError:
            self._fail(f"completion queue {cq.qid} is not in memory")
            return
        if cq.interrupt:
            self._vectors.add(cq.vector)

    def _has_commands(self, sq: SubmissionQueue) -> bool:
        return any(cmd.sq is sq for cmd in self._commands.values())

    def abort(self, key: int) -> bool:
        """Abort a command; False where it is too late, or there is none."""
        cmd = self._commands.get(key)
        if cmd is None or not (
            self.admin.forget_event_request(cmd) or self._cancel(cmd)
        ):
            return False
        self.complete(cmd, SC_ABORT_REQUESTED)
        return True

    def delete_queue(self, sq: SubmissionQueue, deletion: Command) -> bool:
        """Stop a submission queue; False: ``deletion`` ends with its last command."""
        del self.sqs[sq.qid]
        self._unfetched.pop(sq.qid, None)
        for cmd in [each for each in self._commands.values() if each.sq is sq]:
            if self._cancel(cmd):
                self.complete(cmd, SC_SQ_DELETED)
        if not self._has_commands(sq):
            return True
        sq.deletion = deletion
        return False

    # -- interrupts (7.5) ------------------------------------------------------------

    def _interrupt(self) -> None:
        if not self._vectors:
            return
        if self.msix_enabled():
            for vector in self._vectors:
                self.generate_msix(vector)
        else:
            self._update_level()
        self._vectors.clear()

    def _update_level(self) -> None:
        level = not self._masked & 1 and any(
            cq.interrupt and cq.head != cq.tail for cq in self.cqs.values()
        )
        if level != self._level:
            self._level = level
            if level:
                self.intx_assert()
            else:
                self.intx_deassert()

    # -- life ------------------------------------------------------------------------

    def _resized(self) -> None:
        """The image has another size; the event loop's thread."""
        with self._lock:
            self.namespace.resized()
            self.admin.namespace_changed()
            self._work()

    def pause(self) -> None:
        """Fetch no more commands, and finish those that were fetched."""
        with self._lock:
            self._paused = True
        self.disk.pause()

    def resume(self) -> None:
        """Go on with the commands that wait in their queues."""
        self.disk.resume()
        with self._lock:
            self._paused = False
            self._work()

    def halt(self) -> None:
        """Finish what is under way, and close the image."""
        with self._lock:
            self._paused = True
        self.disk.close()

    def reset_device(self) -> None:
        """The controller as after power-on; the disk keeps its contents."""
        with self._lock:
            self._reset_controller()
            self._power_on()
            self._level = False  # the function's own reset let go of the line

    def save_device(self) -> dict[str, Any]:
        """Registers, queues, and what the admin commands have set.

        A disk in memory is a part of it.
        """
        with self._lock:
            state = {
                "version": STATE_VERSION,
                "regs": self.regs.save(),
                "masked": self._masked,
                "level": self._level,
                "cqs": [cq.save() for cq in self.cqs.values()],
                "sqs": [sq.save() for sq in self.sqs.values()],
                "admin": self.admin.save(),
                "namespace": self.namespace.save(),
            }
            if self.options.ram is not None:
                contents = bytearray(self.disk.size)
                self.disk.read([memoryview(contents)], 0, lambda error: None)
                self.disk.drain()
                state["ram"] = bytes(contents)
            return state

    def restore_device(self, state: dict[str, Any]) -> None:
        """Take back what save_device() gave."""
        if state["version"] != STATE_VERSION:
            raise ValueError(f"{self.NAME}: unknown state version {state['version']}")
        with self._lock:
            self._reset_controller()
            self.regs.restore(state["regs"])
            self._masked = state["masked"]
            self._level = state["level"]
            self.cqs = {cq["qid"]: CompletionQueue(**cq) for cq in state["cqs"]}
            self.sqs = {}
            for saved in state["sqs"]:
                fields = {**saved, "cq": self.cqs[saved["cqid"]]}
                del fields["cqid"]
                sq = SubmissionQueue(**fields)
                self.sqs[sq.qid] = sq
                if sq.head != sq.tail:
                    self._unfetched[sq.qid] = sq
            for cmd in self.admin.restore(state["admin"], self.sqs.get(0)):
                self._commands[cmd.key] = cmd
            self.namespace.restore(state["namespace"])
            if "ram" in state:
                self.disk.write([memoryview(state["ram"])], 0, lambda error: None)
                self.disk.drain()
