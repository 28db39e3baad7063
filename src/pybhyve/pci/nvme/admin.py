"""The admin command set: identify, features, log pages, events, queues.

NVM Express 1.4, chapter 5.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from pybhyve.pci.nvme.namespace import MAX_TRANSFER, MDTS
from pybhyve.pci.nvme.prp import prp_ranges
from pybhyve.pci.nvme.queues import Command, CompletionQueue, SubmissionQueue
from pybhyve.pci.nvme.spec import (
    ADMIN_ABORT,
    ADMIN_ASYNC_EVENT,
    ADMIN_CREATE_CQ,
    ADMIN_CREATE_SQ,
    ADMIN_DELETE_CQ,
    ADMIN_DELETE_SQ,
    ADMIN_FORMAT,
    ADMIN_GET_FEATURES,
    ADMIN_GET_LOG_PAGE,
    ADMIN_IDENTIFY,
    ADMIN_SET_FEATURES,
    AE_ERROR,
    AE_NOTICE,
    AE_NOTICE_NAMESPACE,
    AE_SMART,
    AE_SMART_TEMPERATURE,
    ASYNC_DEFAULT,
    ASYNC_NAMESPACE,
    ASYNC_TEMPERATURE,
    CC_IOCQES_SHIFT,
    CC_IOSQES_SHIFT,
    CQE_SIZE,
    CQES,
    ERROR_ENTRY,
    FEAT_ARBITRATION,
    FEAT_ASYNC_EVENT,
    FEAT_ATOMICITY,
    FEAT_COALESCING,
    FEAT_ERROR_RECOVERY,
    FEAT_POWER,
    FEAT_QUEUES,
    FEAT_SAVE,
    FEAT_TEMPERATURE,
    FEAT_VECTOR,
    FEAT_WRITE_CACHE,
    LOG_CHANGED_NAMESPACES,
    LOG_ERROR,
    LOG_FIRMWARE,
    LOG_RAE,
    LOG_SMART,
    NSID,
    NSID_ALL,
    PAGE,
    QUEUE_MIN,
    SC_ASYNC_LIMIT,
    SC_CQ_INVALID,
    SC_DATA_TRANSFER_ERROR,
    SC_INTERRUPT_VECTOR,
    SC_INVALID_FIELD,
    SC_INVALID_FORMAT,
    SC_INVALID_NAMESPACE,
    SC_INVALID_OPCODE,
    SC_LOG_PAGE,
    SC_NOT_NAMESPACE_SPECIFIC,
    SC_NOT_SAVEABLE,
    SC_PRP_OFFSET,
    SC_QUEUE_DELETION,
    SC_QUEUE_IDENTIFIER,
    SC_QUEUE_SIZE,
    SC_SEQUENCE_ERROR,
    SC_SUCCESS,
    SQE_SIZE,
    SQES,
    CommandError,
)
from pybhyve.pci.pcireg import PCIR_VENDOR
from pybhyve.vmmapi import VmmError

if TYPE_CHECKING:
    from pybhyve.pci.nvme.device import PciNvme

MODEL: Final = "bhyve-NVMe"
FIRMWARE: Final = "1.0"
IEEE: Final = 0x589CFC  # FreeBSD's
OUI_FREEBSD_NVME_LOW: Final = 0x589CFC200000
ACL: Final = 2  # 0 is one
AERL: Final = 4
OACS_FORMAT: Final = 1 << 1
OAES_NAMESPACE: Final = 1 << 8
LPA_EXTENDED: Final = 1 << 2  # log pages by offset
FRMW_ONE_READ_ONLY: Final = 1 << 1 | 1 << 0
FNA_FORMAT_ALL: Final = 1 << 0
ONCS_DSM: Final = 1 << 2
ONCS_WRITE_ZEROES: Final = 1 << 3
VWC_PRESENT: Final = 1 << 0
VWC_FLUSH_ALL: Final = 3 << 1  # a flush of NSID_ALL is taken
SANICAP_NODMMAS: Final = 1 << 30
CNTRLTYPE_IO: Final = 1
NSFEAT_OPTPERF: Final = 1 << 4
NSATTR_WRITE_PROTECTED: Final = 1 << 0
NIDT_EUI64: Final = 1

TEMPERATURE: Final = 296  # kelvins
TEMPERATURE_LIMIT: Final = 0x157
WARNING_TEMPERATURE: Final = 1 << 1
SPARE: Final = 100  # per cent
SPARE_THRESHOLD: Final = 10

CNS_NAMESPACE: Final = 0x00
CNS_CONTROLLER: Final = 0x01
CNS_ACTIVE_NAMESPACES: Final = 0x02
CNS_DESCRIPTORS: Final = 0x03
CNS_CONTROLLERS: Final = 0x13

_RESET_FEATURES: Final = {
    FEAT_ARBITRATION: 0,
    FEAT_POWER: 0,
    FEAT_ERROR_RECOVERY: 0,
    FEAT_WRITE_CACHE: 1,
    FEAT_COALESCING: 0,
    FEAT_ATOMICITY: 0,
    FEAT_ASYNC_EVENT: ASYNC_DEFAULT,
}
# 5.21.1: which may name a namespace.
_OF_NAMESPACE: Final = (FEAT_ERROR_RECOVERY,)
_EVENT_OF_LOG: Final = {
    LOG_ERROR: AE_ERROR,
    LOG_SMART: AE_SMART,
    LOG_CHANGED_NAMESPACES: AE_NOTICE,
}


def crc16(data: bytes) -> int:
    """CRC-16 (polynomial 0x8005, reflected, from 0) of what an EUI-64 is made of."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc


class Admin:
    """What the admin queue's commands do, and what they set.

    The controller's lock is held in every method.
    """

    def __init__(self, ctl: PciNvme) -> None:
        self._ctl = ctl
        self._vm = ctl.machine.vm
        bus, slot, func = ctl.address
        name = ctl.machine.ctx.name
        self.serial = ctl.options.ser or f"NVME-{slot}-{func}"
        made_up = OUI_FREEBSD_NVME_LOW | crc16(f"{name}{bus}{slot}{func}".encode())
        self.eui64 = ctl.options.eui64 or made_up << 16 | NSID
        subsystem = uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {ctl.address}")
        self.subnqn = f"nqn.2014-08.org.nvmexpress:uuid:{subsystem}"
        self._commands: dict[int, Callable[[Command], int | None]] = {
            ADMIN_DELETE_SQ: self._delete_sq,
            ADMIN_CREATE_SQ: self._create_sq,
            ADMIN_GET_LOG_PAGE: self._get_log_page,
            ADMIN_DELETE_CQ: self._delete_cq,
            ADMIN_CREATE_CQ: self._create_cq,
            ADMIN_IDENTIFY: self._identify,
            ADMIN_ABORT: self._abort,
            ADMIN_SET_FEATURES: self._set_features,
            ADMIN_GET_FEATURES: self._get_features,
            ADMIN_ASYNC_EVENT: self._async_event,
            ADMIN_FORMAT: self._format,
        }
        self._errors = 0
        self._last_error = bytes(ERROR_ENTRY.size)
        self.reset()

    def reset(self) -> None:
        """What a reset of the controller leaves: the counters."""
        self._features = dict(_RESET_FEATURES)
        self._over = TEMPERATURE_LIMIT
        self._under = 0
        self._uncoalesced: set[int] = set()  # vectors
        self._queues = (self._ctl.maxq, self._ctl.maxq)  # submission, completion
        self._requests: list[Command] = []  # for events
        self._events: dict[int, int] = {}  # by type, result of the request's completion
        self._masked: set[int] = set()  # types whose log page is yet to be read
        self._changed: list[int] = []  # namespaces

    @property
    def write_through(self) -> bool:
        """Whether the host has switched the write cache off."""
        return not self._features[FEAT_WRITE_CACHE] & 1

    def execute(self, cmd: Command) -> int | None:
        """Do a command; its result, or None where it ends later.

        Raises CommandError.
        """
        handler = self._commands.get(cmd.dw0 & 0xFF)
        if handler is None:
            raise CommandError(SC_INVALID_OPCODE)
        return handler(cmd)

    def _send(self, cmd: Command, data: bytes, length: int) -> None:
        """Put data, padded with zeroes, into a command's buffer of ``length`` bytes."""
        try:
            for gpa, size in prp_ranges(self._vm, cmd.prp1, cmd.prp2, length):
                self._vm.write_mem(gpa, data[:size].ljust(size, b"\0"))
                data = data[size:]
        except VmmError:
            raise CommandError(SC_DATA_TRANSFER_ERROR) from None

    # -- queues (5.3 to 5.6) ---------------------------------------------------------

    def _new_queue(self, cmd: Command, entry_size: int, shift: int, log2: int) -> int:
        """How many entries a queue is to have, after the checks that all need."""
        regs = self._ctl.regs
        size = (cmd.cdws[0] >> 16) + 1
        if not cmd.cdws[1] & 1 or regs.CC >> shift & 15 != log2:
            raise CommandError(SC_INVALID_FIELD)
        if not QUEUE_MIN <= size <= self._ctl.options.qsz:
            raise CommandError(SC_QUEUE_SIZE)
        if cmd.prp1 & PAGE - 1:
            raise CommandError(SC_PRP_OFFSET)
        try:
            self._vm.view(cmd.prp1, size * entry_size)
        except VmmError:
            raise CommandError(SC_INVALID_FIELD) from None
        return size

    def _create_cq(self, cmd: Command) -> int:
        qid = cmd.cdws[0] & 0xFFFF
        if not 1 <= qid <= self._queues[1] or qid in self._ctl.cqs:
            raise CommandError(SC_QUEUE_IDENTIFIER)
        size = self._new_queue(cmd, CQE_SIZE, CC_IOCQES_SHIFT, CQES)
        vector = cmd.cdws[1] >> 16
        if vector > self._ctl.maxq:
            raise CommandError(SC_INTERRUPT_VECTOR)
        interrupt = bool(cmd.cdws[1] & 2)
        self._ctl.cqs[qid] = CompletionQueue(qid, cmd.prp1, size, vector, interrupt)
        return 0

    def _create_sq(self, cmd: Command) -> int:
        qid = cmd.cdws[0] & 0xFFFF
        cqid = cmd.cdws[1] >> 16
        if not 1 <= qid <= self._queues[0] or qid in self._ctl.sqs:
            raise CommandError(SC_QUEUE_IDENTIFIER)
        if not 1 <= cqid <= self._queues[1]:
            raise CommandError(SC_QUEUE_IDENTIFIER)
        if cqid not in self._ctl.cqs:
            raise CommandError(SC_CQ_INVALID)
        size = self._new_queue(cmd, SQE_SIZE, CC_IOSQES_SHIFT, SQES)
        cq = self._ctl.cqs[cqid]
        self._ctl.sqs[qid] = SubmissionQueue(qid, cmd.prp1, size, cq)
        return 0

    def _delete_sq(self, cmd: Command) -> int | None:
        sq = self._ctl.sqs.get(cmd.cdws[0] & 0xFFFF)
        if sq is None or not sq.qid:
            raise CommandError(SC_QUEUE_IDENTIFIER)
        return 0 if self._ctl.delete_queue(sq, cmd) else None

    def _delete_cq(self, cmd: Command) -> int:
        cq = self._ctl.cqs.get(cmd.cdws[0] & 0xFFFF)
        if cq is None or not cq.qid:
            raise CommandError(SC_QUEUE_IDENTIFIER)
        if cq.reserved or any(sq.cq is cq for sq in self._ctl.sqs.values()):
            raise CommandError(SC_QUEUE_DELETION)
        del self._ctl.cqs[cq.qid]
        return 0

    def _abort(self, cmd: Command) -> int:
        sqid, cid = cmd.cdws[0] & 0xFFFF, cmd.cdws[0] >> 16
        return 0 if self._ctl.abort(sqid << 16 | cid) else 1

    # -- identify (5.15) -------------------------------------------------------------

    def _identify(self, cmd: Command) -> int:
        cns = cmd.cdws[0] & 0xFF
        if cns == CNS_NAMESPACE:
            data = self._namespace(cmd.nsid)
        elif cns == CNS_CONTROLLER:
            data = self._controller()
        elif cns == CNS_ACTIVE_NAMESPACES:
            if cmd.nsid >= NSID_ALL - 1:
                raise CommandError(SC_INVALID_NAMESPACE)
            data = struct.pack("<I", NSID) if cmd.nsid < NSID else b""
        elif cns == CNS_DESCRIPTORS:
            if cmd.nsid != NSID:
                raise CommandError(SC_INVALID_NAMESPACE)
            data = struct.pack(">BBxxQ", NIDT_EUI64, 8, self.eui64)
        elif cns == CNS_CONTROLLERS:
            # One, with identifier 0.
            data = b"" if cmd.cdws[0] >> 16 else struct.pack("<HH", 1, 0)
        else:
            raise CommandError(SC_INVALID_FIELD)
        self._send(cmd, data, PAGE)
        return 0

    def _namespace(self, nsid: int) -> bytes:
        if nsid != NSID:
            raise CommandError(SC_INVALID_NAMESPACE)
        ns = self._ctl.namespace
        data = bytearray(PAGE)
        struct.pack_into("<3Q", data, 0, ns.blocks, ns.blocks, ns.blocks)
        if ns.physical_blocks > 1:
            data[24] = NSFEAT_OPTPERF
            grain = ns.physical_blocks - 1
            struct.pack_into("<4H", data, 64, grain, grain, grain, grain)
        data[99] = NSATTR_WRITE_PROTECTED if ns.ro else 0
        struct.pack_into(">Q", data, 120, self.eui64)
        data[128 + 2] = ns.shift
        return bytes(data)

    def _controller(self) -> bytes:
        ns = self._ctl.namespace
        oncs = ONCS_WRITE_ZEROES | (ONCS_DSM if ns.dsm else 0)
        data = bytearray(PAGE)

        def text(offset: int, size: int, value: str) -> None:
            encoded = value.encode("ascii", "replace")[:size]
            data[offset : offset + size] = encoded.ljust(size)

        def put(form: str, offset: int, value: int) -> None:
            struct.pack_into(form, data, offset, value)

        put("<H", 0, self._ctl.config_read(PCIR_VENDOR, 2))
        text(4, 20, self.serial)
        text(24, 40, MODEL)
        text(64, 8, FIRMWARE)
        data[72] = 4  # RAB: commands in a burst, a power of two
        data[73:76] = IEEE.to_bytes(3, "little")
        data[77] = MDTS
        put("<I", 80, self._ctl.regs.VS)
        put("<I", 92, OAES_NAMESPACE)
        data[111] = CNTRLTYPE_IO
        put("<H", 256, OACS_FORMAT)
        data[258] = ACL
        data[259] = AERL
        data[260] = FRMW_ONE_READ_ONLY
        data[261] = LPA_EXTENDED
        put("<H", 266, TEMPERATURE_LIMIT)
        put("<H", 268, TEMPERATURE_LIMIT)
        put("<I", 328, SANICAP_NODMMAS)
        data[512] = SQES << 4 | SQES
        data[513] = CQES << 4 | CQES
        put("<I", 516, 1)  # NN: namespaces
        put("<H", 520, oncs)
        data[524] = FNA_FORMAT_ALL
        data[525] = VWC_PRESENT | VWC_FLUSH_ALL if ns.cache else 0
        nqn = self.subnqn.encode()
        data[768 : 768 + len(nqn)] = nqn
        return bytes(data)

    # -- log pages (5.14) ------------------------------------------------------------

    def note_error(self, sqid: int, cid: int, status: int, nsid: int) -> None:
        """Remember a command that failed; the log has one entry."""
        self._errors += 1
        location = 0xFFFF  # no field of the command is told
        self._last_error = ERROR_ENTRY.pack(
            self._errors, sqid, cid, status << 1, location, 0, nsid, 0, 0, 0
        )

    def _get_log_page(self, cmd: Command) -> int:
        dw10, dw11, low, high, *_ = cmd.cdws
        page = dw10 & 0xFF
        length = 4 * (((dw11 & 0xFFFF) << 16 | dw10 >> 16) + 1)
        offset = high << 32 | low
        if page == LOG_ERROR:
            data = self._last_error
        elif page == LOG_SMART:
            data = self._health()
        elif page == LOG_FIRMWARE:
            data = struct.pack("<B7x8s496x", 1, FIRMWARE.ljust(8).encode())
        elif page == LOG_CHANGED_NAMESPACES:
            data = struct.pack("<I", self._changed[0]) if self._changed else b""
            data = data.ljust(PAGE, b"\0")
        else:
            raise CommandError(SC_LOG_PAGE)
        if length > MAX_TRANSFER or offset & 3 or offset > len(data):
            raise CommandError(SC_INVALID_FIELD)
        self._send(cmd, data[offset:], length)
        if page == LOG_CHANGED_NAMESPACES:
            self._changed.clear()
        if page in _EVENT_OF_LOG and not dw10 & LOG_RAE:
            self._masked.discard(_EVENT_OF_LOG[page])
        return 0

    def _warning(self) -> int:
        """The critical warning of the health log: too hot or too cold, as set."""
        ordinary = self._under <= TEMPERATURE < self._over
        return 0 if ordinary else WARNING_TEMPERATURE

    def _health(self) -> bytes:
        counters = self._ctl.namespace.counters
        data = bytearray(512)
        struct.pack_into(
            "<BHBB", data, 0, self._warning(), TEMPERATURE, SPARE, SPARE_THRESHOLD
        )
        for offset, value in (
            # Thousands of 512 bytes, rounded up.
            (32, -(-counters["read_units"] // 1000)),
            (48, -(-counters["write_units"] // 1000)),
            (64, counters["read_commands"]),
            (80, counters["write_commands"]),
            (112, 1),  # power cycles
            (160, counters["media_errors"]),
            (176, self._errors),
        ):
            data[offset : offset + 16] = value.to_bytes(16, "little")
        return bytes(data)

    # -- features (5.13, 5.21) -------------------------------------------------------

    def _get_features(self, cmd: Command) -> int:
        feature = cmd.cdws[0] & 0xFF
        if cmd.cdws[0] >> 8 & 7:
            raise CommandError(SC_INVALID_FIELD)  # only what is current, no defaults
        value = cmd.cdws[1]
        if feature == FEAT_QUEUES:
            return self._queues[1] - 1 << 16 | self._queues[0] - 1
        if feature == FEAT_TEMPERATURE:
            if value >> 16 & 15:
                raise CommandError(SC_INVALID_FIELD)  # there is one sensor
            return self._under if value >> 20 & 3 == 1 else self._over
        if feature == FEAT_VECTOR:
            vector = value & 0xFFFF
            if vector > self._ctl.maxq:
                raise CommandError(SC_INVALID_FIELD)
            return vector | (vector in self._uncoalesced) << 16
        self._check_feature(feature)
        return self._features[feature]

    def _set_features(self, cmd: Command) -> int:
        feature = cmd.cdws[0] & 0xFF
        value = cmd.cdws[1]
        if cmd.cdws[0] & FEAT_SAVE:
            raise CommandError(SC_NOT_SAVEABLE)
        if cmd.nsid not in (0, NSID_ALL) and feature not in _OF_NAMESPACE:
            raise CommandError(SC_NOT_NAMESPACE_SPECIFIC)
        if feature == FEAT_QUEUES:
            return self._set_queues(value)
        if feature == FEAT_TEMPERATURE:
            self._set_temperature(value)
        elif feature == FEAT_VECTOR:
            vector = value & 0xFFFF
            if vector > self._ctl.maxq:
                raise CommandError(SC_INVALID_FIELD)
            if value >> 16 & 1:
                self._uncoalesced.add(vector)
            else:
                self._uncoalesced.discard(vector)
        else:
            self._check_feature(feature)
            if (feature == FEAT_POWER and value & 0x1F) or (
                feature == FEAT_ERROR_RECOVERY and value >> 16 & 1
            ):
                raise CommandError(SC_INVALID_FIELD)  # neither is offered
            self._features[feature] = value
        return 0

    def _check_feature(self, feature: int) -> None:
        if feature not in self._features or (
            feature == FEAT_WRITE_CACHE and not self._ctl.namespace.cache
        ):
            raise CommandError(SC_INVALID_FIELD)

    def _set_queues(self, value: int) -> int:
        submission, completion = value & 0xFFFF, value >> 16
        if 0xFFFF in (submission, completion):
            raise CommandError(SC_INVALID_FIELD)
        if len(self._ctl.sqs) > 1 or len(self._ctl.cqs) > 1:
            raise CommandError(SC_SEQUENCE_ERROR)
        most = self._ctl.maxq
        self._queues = (min(submission + 1, most), min(completion + 1, most))
        return self._queues[1] - 1 << 16 | self._queues[0] - 1

    def _set_temperature(self, value: int) -> None:
        threshold, sensor, which = value & 0xFFFF, value >> 16 & 15, value >> 20 & 3
        if sensor not in (0, 15) or which > 1:
            raise CommandError(SC_INVALID_FIELD)
        if which:
            self._under = threshold
        else:
            self._over = threshold
        if self._warning() and self._features[FEAT_ASYNC_EVENT] & ASYNC_TEMPERATURE:
            self.post_event(AE_SMART, AE_SMART_TEMPERATURE, LOG_SMART)

    # -- asynchronous events (5.2) ---------------------------------------------------

    def _async_event(self, cmd: Command) -> None:
        if len(self._requests) > AERL:
            raise CommandError(SC_ASYNC_LIMIT)
        self._requests.append(cmd)
        # It may wait for ever, and must not keep others from their entries.
        cmd.sq.cq.reserved -= 1

    def forget_event_request(self, cmd: Command) -> bool:
        """Take back a request for events; False where the command is none."""
        if cmd not in self._requests:
            return False
        self._requests.remove(cmd)
        cmd.sq.cq.reserved += 1
        return True

    def post_event(self, kind: int, info: int, page: int) -> None:
        """Have the host told of an event; one of each kind waits at a time."""
        if kind not in self._masked:
            self._events.setdefault(kind, page << 16 | info << 8 | kind)

    def deliver_events(self) -> None:
        """Complete requests for the events that there are."""
        while self._events and self._requests and self._requests[0].sq.cq.room() > 0:
            kind = next(iter(self._events))
            result = self._events.pop(kind)
            self._masked.add(kind)
            cmd = self._requests[0]
            self.forget_event_request(cmd)
            self._ctl.complete(cmd, SC_SUCCESS, result)

    def namespace_changed(self) -> None:
        """The namespace has another size."""
        self._changed = [NSID]
        if self._features[FEAT_ASYNC_EVENT] & ASYNC_NAMESPACE:
            self.post_event(AE_NOTICE, AE_NOTICE_NAMESPACE, LOG_CHANGED_NAMESPACES)

    # -- format (5.23) ---------------------------------------------------------------

    def _format(self, cmd: Command) -> None:
        if cmd.nsid not in (NSID, NSID_ALL):
            raise CommandError(SC_INVALID_NAMESPACE)
        wanted = cmd.cdws[0]
        if wanted & 0xFF or wanted >> 8 & 1:
            raise CommandError(SC_INVALID_FORMAT)  # one format, without metadata
        if wanted >> 9 & 7 > 1:
            raise CommandError(SC_INVALID_FIELD)  # no cryptographic erase
        self._ctl.namespace.format(cmd)

    # -- state -----------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """What commands have set, and the requests and events that wait."""
        return {
            "features": [list(item) for item in self._features.items()],
            "over": self._over,
            "under": self._under,
            "uncoalesced": sorted(self._uncoalesced),
            "queues": list(self._queues),
            "requests": [cmd.dw0 for cmd in self._requests],
            "events": [list(item) for item in self._events.items()],
            "masked": sorted(self._masked),
            "changed": list(self._changed),
            "errors": self._errors,
            "last_error": self._last_error,
        }

    def restore(
        self, state: dict[str, Any], sq: SubmissionQueue | None
    ) -> list[Command]:
        """Take back what save() gave; the commands that wait for events."""
        self._features = dict(state["features"])
        self._over = state["over"]
        self._under = state["under"]
        self._uncoalesced = set(state["uncoalesced"])
        submission, completion = state["queues"]
        self._queues = (submission, completion)
        self._events = dict(state["events"])
        self._masked = set(state["masked"])
        self._changed = list(state["changed"])
        self._errors = state["errors"]
        self._last_error = state["last_error"]
        if sq is not None:
            self._requests = [
                Command(sq, dw0, 0, 0, 0, [0] * 6) for dw0 in state["requests"]
            ]
        return self._requests
