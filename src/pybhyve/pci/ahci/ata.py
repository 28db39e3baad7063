"""A SATA disk: ATA8-ACS commands on an image.

ATA8-ACS (T13/1699-D), chapter 7; native command queuing: Serial ATA 3.1, 13.6.
bhyve: the ATA half of pci_ahci.c.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Final, NamedTuple

from pybhyve.block import BlockIf
from pybhyve.pci.ahci.ahcireg import (
    SPD_MASK,
    SPD_SHIFT,
    STS_DRDY,
    STS_DSC,
    STS_ERR,
)
from pybhyve.pci.ahci.command import Command
from pybhyve.pci.ahci.device import (
    DIAGNOSTIC_PASSED,
    ERR_ABRT,
    ERR_IDNF,
    EXECUTE_DEVICE_DIAGNOSTIC,
    SataDevice,
    ata_error,
)
from pybhyve.pci.ahci.identify import (
    MODE_DEFAULT,
    Names,
    checksum,
    chs,
    identify,
    transfer_modes,
    valid_transfer_mode,
)

log = logging.getLogger(__name__)

# Commands.
READ_VERIFY_SECTORS: Final = 0x40
READ_VERIFY_SECTORS_EXT: Final = 0x42
DATA_SET_MANAGEMENT: Final = 0x06
READ_LOG_EXT: Final = 0x2F
READ_LOG_DMA_EXT: Final = 0x47
READ_FPDMA_QUEUED: Final = 0x60
WRITE_FPDMA_QUEUED: Final = 0x61
NCQ_QUEUE_MANAGEMENT: Final = 0x63
SEND_FPDMA_QUEUED: Final = 0x64
RECEIVE_FPDMA_QUEUED: Final = 0x65
SET_MULTIPLE_MODE: Final = 0xC6
STANDBY_IMMEDIATE: Final = 0xE0
IDLE_IMMEDIATE: Final = 0xE1
STANDBY: Final = 0xE2
IDLE: Final = 0xE3
CHECK_POWER_MODE: Final = 0xE5
SLEEP: Final = 0xE6
FLUSH_CACHE: Final = 0xE7
FLUSH_CACHE_EXT: Final = 0xEA
IDENTIFY_DEVICE: Final = 0xEC
SET_FEATURES: Final = 0xEF

QUEUED: Final = frozenset(
    {
        READ_FPDMA_QUEUED,
        WRITE_FPDMA_QUEUED,
        NCQ_QUEUE_MANAGEMENT,
        SEND_FPDMA_QUEUED,
        RECEIVE_FPDMA_QUEUED,
    }
)


class Transfer(NamedTuple):
    """How a read or write command moves its data."""

    write: bool
    ext: bool  # 48-bit addresses
    pio: bool = False
    multiple: bool = False  # PIO in blocks of SET MULTIPLE MODE
    fua: bool = False  # on the medium before the command ends


TRANSFERS: Final = {
    0x20: Transfer(write=False, ext=False, pio=True),  # READ SECTOR(S)
    0x24: Transfer(write=False, ext=True, pio=True),
    0x25: Transfer(write=False, ext=True),  # READ DMA EXT
    0x29: Transfer(write=False, ext=True, pio=True, multiple=True),
    0x30: Transfer(write=True, ext=False, pio=True),  # WRITE SECTOR(S)
    0x34: Transfer(write=True, ext=True, pio=True),
    0x35: Transfer(write=True, ext=True),  # WRITE DMA EXT
    0x39: Transfer(write=True, ext=True, pio=True, multiple=True),
    0x3D: Transfer(write=True, ext=True, fua=True),
    READ_FPDMA_QUEUED: Transfer(write=False, ext=True),
    WRITE_FPDMA_QUEUED: Transfer(write=True, ext=True),
    0xC4: Transfer(write=False, ext=False, pio=True, multiple=True),  # READ MULTIPLE
    0xC5: Transfer(write=True, ext=False, pio=True, multiple=True),
    0xC8: Transfer(write=False, ext=False),  # READ DMA
    0xCA: Transfer(write=True, ext=False),  # WRITE DMA
    0xCE: Transfer(write=True, ext=True, pio=True, multiple=True, fua=True),
}

LBA28_SECTORS: Final = 0x0FFFFFFF
MULTIPLE_MAX: Final = 128
DEVICE_FUA: Final = 0x80  # of WRITE FPDMA QUEUED's device register
POWER_ACTIVE: Final = 0xFF  # active or idle

# SET FEATURES, 7.45.
SF_WRITE_CACHE: Final = 0x02
SF_TRANSFER_MODE: Final = 0x03
SF_NO_LOOK_AHEAD: Final = 0x55
SF_NO_WRITE_CACHE: Final = 0x82
SF_LOOK_AHEAD: Final = 0xAA

# Logs, A.1.
LOG_SIZE: Final = 512
LOG_DIRECTORY: Final = 0x00
LOG_NCQ_ERROR: Final = 0x10
LOG_NCQ_SEND_RECEIVE: Final = 0x13
NOT_QUEUED: Final = 0x80  # byte 0 of the NCQ error log

# DATA SET MANAGEMENT, 7.8, and its queued form.
DSM_TRIM: Final = 1
SEND_DSM: Final = 0  # subcommand of SEND FPDMA QUEUED
DSM_BLOCK: Final = 512

# IDENTIFY DEVICE, bits of words.
ID_SUPPORTED_82: Final = 0x4068  # NOP, look-ahead, write cache, power management
ID_LOOK_AHEAD: Final = 0x40
ID_WRITE_CACHE: Final = 0x20
ID_SUPPORTED_83: Final = 0x7400  # flush, flush ext, 48 bits
ID_SUPPORTED_84: Final = 0x4060  # FUA, general purpose logging
ID_WORDS_119_VALID: Final = 0x8000
ID_SUPPORTED_119: Final = 0x4008  # read log DMA
ID_DRAT_RZAT: Final = 0x4020  # what was trimmed reads as zeroes
ID_SPEEDS_NCQ: Final = 0x010E  # 1.5, 3 and 6 Gbit/s, queuing
ID_SEND_RECEIVE: Final = 0x0040


class AtaDisk(SataDevice):
    """The disk."""

    SIGNATURE = 0x00000101
    STATUS_AT_RESET = STS_DRDY | STS_DSC

    def __init__(self, blk: BlockIf, names: Names, rotation_rate: int) -> None:
        super().__init__(blk)
        self._names = names
        self._rotation_rate = rotation_rate
        self.power_on()
        self.reset()
        self._handlers = {
            DATA_SET_MANAGEMENT: self._data_set_management,
            READ_LOG_EXT: self._read_log,
            READ_LOG_DMA_EXT: self._read_log,
            READ_VERIFY_SECTORS: self._verify,
            READ_VERIFY_SECTORS_EXT: self._verify,
            SEND_FPDMA_QUEUED: self._send_queued,
            EXECUTE_DEVICE_DIAGNOSTIC: self._diagnostic,
            SET_MULTIPLE_MODE: self._set_multiple,
            # What spins a disk down has written its cache before.
            STANDBY_IMMEDIATE: self._flush,
            STANDBY: self._flush,
            SLEEP: self._flush,
            FLUSH_CACHE: self._flush,
            FLUSH_CACHE_EXT: self._flush,
            IDLE_IMMEDIATE: self._nothing,
            IDLE: self._nothing,
            CHECK_POWER_MODE: self._check_power,
            IDENTIFY_DEVICE: self._identify,
            SET_FEATURES: self._set_features,
        }

    # -- life ------------------------------------------------------------------------

    def power_on(self) -> None:
        """The disk is as large as its image is now.

        It stays so: to a running driver, a disk of another size is another disk.
        """
        self.sectors = self.blk.size // self.blk.sectsz

    def reset(self) -> None:
        """Settings as after power-on."""
        self._mode = MODE_DEFAULT
        self._multiple = MULTIPLE_MAX
        self._write_cache = True
        self._look_ahead = True
        self._error_log = bytes(14)
        self.soft_reset()

    def soft_reset(self) -> None:
        """The queue goes on after an error."""
        self._halted = False  # by an error in the queue, until it was read out

    def save(self) -> dict[str, Any]:
        """Settings, and the error that has not been read out."""
        return {
            "sectors": self.sectors,
            "mode": self._mode,
            "multiple": self._multiple,
            "write_cache": self._write_cache,
            "look_ahead": self._look_ahead,
            "halted": self._halted,
            "error_log": self._error_log,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        self.sectors = state["sectors"]
        self._mode = state["mode"]
        self._multiple = state["multiple"]
        self._write_cache = state["write_cache"]
        self._look_ahead = state["look_ahead"]
        self._halted = state["halted"]
        self._error_log = state["error_log"]

    # -- commands --------------------------------------------------------------------

    def execute(self, command: Command) -> None:
        """Do a command, or begin it."""
        opcode = command.opcode
        queued = opcode in QUEUED
        if self._halted and not self._reads_error(command):
            self.abort(command)
        elif queued and command.fis[12] >> 3 != command.slot:
            # AHCI 5.6.1.1: the tag is the slot.
            self.abort(command)
        elif not queued and self.port.outstanding:
            # SATA 13.6.3.2: the two kinds exclude each other.
            self._halted = True
            self.abort(command)
        else:
            if queued:
                self.port.accept(command)
            if opcode in TRANSFERS:
                self._transfer(command)
            else:
                self._handlers.get(opcode, self._unknown)(command)

    def _unknown(self, command: Command) -> None:
        log.debug("unknown command disk=%s %#x", self.blk.ident, command.opcode)
        self.abort(command)

    def _nothing(self, command: Command) -> None:
        self.port.complete(command)

    def abort(self, command: Command) -> None:
        """End a command that cannot be done."""
        self._fail(command, ERR_ABRT)

    def _fail(self, command: Command, error: int) -> None:
        fis = command.fis
        first = command.slot if command.queued else NOT_QUEUED
        status = STS_DRDY | STS_ERR
        # The FIS's registers have their places in the log too (A.14).
        self._error_log = (
            bytes((first, 0, status, error)) + fis[4:11] + b"\0" + fis[12:14]
        )
        if command.queued:
            self._halted = True
        self.port.fail(command, error)

    # -- reading and writing ---------------------------------------------------------

    def _transfer(self, command: Command) -> None:
        way = TRANSFERS[command.opcode]
        if command.queued:
            lba, count = command.lba48, command.features or 0x10000
        elif way.ext:
            lba, count = command.lba48, command.count or 0x10000
        else:
            lba, count = command.lba28, command.fis[12] or 0x100
        if way.multiple and not self._multiple:
            self.abort(command)
            return
        if lba + count > self.sectors:
            self._fail(command, ERR_IDNF)
            return
        offset, length = lba * self.blk.sectsz, count * self.blk.sectsz
        if not way.write:
            self.read_blocks(command, offset, length)
            return
        iov = command.map(length, False)
        if way.pio:
            self.port.begin_pio_out(command, self._block_length(way))
        self.port.block_io(command, self.blk.write, iov, offset, then=self.transferred)

    def transferred(self, command: Command, error: int) -> None:
        """A read or a write has ended, with an errno."""
        way = TRANSFERS[command.opcode]
        if error:
            self._fail(command, ata_error(error, way.write))
        elif way.write and (
            not self._write_cache
            or way.fua
            or (command.queued and command.device & DEVICE_FUA)
        ):
            self.port.block_io(command, self.blk.flush, then=self._written)
        else:
            self._written(command, 0)

    def _written(self, command: Command, error: int) -> None:
        """All of a transfer is done."""
        way = TRANSFERS[command.opcode]
        if error:
            self._fail(command, ata_error(error, way.write))
        elif command.queued:
            # AHCI 5.4.1: nobody counts the bytes of a queued command.
            self.port.complete_queued(command)
        else:
            count = command.count if way.ext else command.fis[12]
            count = count or (0x10000 if way.ext else 0x100)
            command.moved(count * self.blk.sectsz)
            if way.pio and not way.write:
                self.port.complete_pio_in(command, self._block_length(way))
            else:
                self.port.complete(command)

    def _block_length(self, way: Transfer) -> int:
        """Bytes of a DRQ block."""
        return self.blk.sectsz * (self._multiple if way.multiple else 1)

    def _verify(self, command: Command) -> None:
        if command.opcode == READ_VERIFY_SECTORS_EXT:
            end = command.lba48 + (command.count or 0x10000)
        else:
            end = command.lba28 + (command.fis[12] or 0x100)
        if end > self.sectors:
            self._fail(command, ERR_IDNF)
        else:
            self.port.complete(command)

    def _flush(self, command: Command) -> None:
        self.port.block_io(command, self.blk.flush, then=self._done)

    def _done(self, command: Command, error: int) -> None:
        """The end of a command without data, or with data that came first."""
        if error:
            self._fail(command, ERR_ABRT)
        elif command.queued:
            self.port.complete_queued(command)
        else:
            self.port.complete(command)

    # -- trim ------------------------------------------------------------------------

    @property
    def _can_trim(self) -> bool:
        return self.blk.candelete and not self.blk.ro

    def _data_set_management(self, command: Command) -> None:
        if self._can_trim and command.features == DSM_TRIM and command.count == 1:
            self._trim(command)
        else:
            self.abort(command)

    def _send_queued(self, command: Command) -> None:
        if (
            self._can_trim
            and command.fis[13] & 0x1F == SEND_DSM
            and command.fis[16:18] == bytes((DSM_TRIM, 0))
            and command.features == 1
        ):
            self._trim(command)
        else:
            self.abort(command)

    def _trim(self, command: Command) -> None:
        data = command.load(DSM_BLOCK)
        ranges: list[tuple[int, int]] = []
        sectors, size = self.sectors, self.blk.sectsz
        for at in range(0, DSM_BLOCK, 8):
            lba = int.from_bytes(data[at : at + 6], "little")
            count = int.from_bytes(data[at + 6 : at + 8], "little")
            if lba + count > sectors:
                self._fail(command, ERR_IDNF)
                return
            # A driver cuts long ranges into what an entry can say.
            if ranges and ranges[-1][0] + ranges[-1][1] == lba * size:
                ranges[-1] = ranges[-1][0], ranges[-1][1] + count * size
            elif count:
                ranges.append((lba * size, count * size))
        self._trim_next(ranges[::-1], command, 0)

    def _trim_next(
        self, ranges: list[tuple[int, int]], command: Command, error: int
    ) -> None:
        if error or not ranges:
            self._done(command, error)
            return
        offset, length = ranges.pop()
        then = partial(self._trim_next, ranges)
        self.port.block_io(command, self.blk.delete, offset, length, then=then)

    # -- logs ------------------------------------------------------------------------

    @staticmethod
    def _reads_error(command: Command) -> bool:
        return (
            command.opcode in (READ_LOG_EXT, READ_LOG_DMA_EXT)
            and command.fis[4] == LOG_NCQ_ERROR
        )

    def _read_log(self, command: Command) -> None:
        fis = command.fis
        data = self._log(fis[4])
        if data is None or fis[5] or fis[9] or command.count != 1:
            self.abort(command)
            return
        command.store(data)
        if self._reads_error(command):
            self._halted = False
        if command.opcode == READ_LOG_EXT:
            self.port.complete_pio_in(command, LOG_SIZE)
        else:
            self.port.complete(command)

    def _log(self, address: int) -> bytes | None:
        """A log's only page."""
        data = bytearray(LOG_SIZE)
        if address == LOG_DIRECTORY:
            data[0] = 1  # version
            data[2 * LOG_NCQ_ERROR] = 1  # pages
            data[2 * LOG_NCQ_SEND_RECEIVE] = 1
        elif address == LOG_NCQ_ERROR:
            data[: len(self._error_log)] = self._error_log
            data[-1] = checksum(data)
        elif address == LOG_NCQ_SEND_RECEIVE:
            if self._can_trim:
                data[0] = 1  # data set management
                data[4] = 1  # trim
        else:
            return None
        return bytes(data)

    # -- settings --------------------------------------------------------------------

    def _diagnostic(self, command: Command) -> None:
        self.set_signature(command)
        self.port.complete(command, DIAGNOSTIC_PASSED)

    def _check_power(self, command: Command) -> None:
        command.fis[12] = POWER_ACTIVE
        self.port.complete(command)

    def _set_multiple(self, command: Command) -> None:
        count = command.fis[12]
        if count > MULTIPLE_MAX or count & count - 1:
            self.abort(command)
        else:
            self._multiple = count
            self.port.complete(command)

    def _set_features(self, command: Command) -> None:
        match command.fis[3]:
            case x if x in (SF_WRITE_CACHE, SF_NO_WRITE_CACHE):
                self._write_cache = x == SF_WRITE_CACHE
                if not self._write_cache:
                    self._flush(command)
                    return
            case x if x in (SF_LOOK_AHEAD, SF_NO_LOOK_AHEAD):
                self._look_ahead = x == SF_LOOK_AHEAD
            case x if x == SF_TRANSFER_MODE and valid_transfer_mode(command.fis[12]):
                self._mode = command.fis[12]
            case _:
                self.abort(command)
                return
        self.port.complete(command)

    def _identify(self, command: Command) -> None:
        command.store(self.identify())
        self.port.complete_pio_in(command, LOG_SIZE)

    def identify(self) -> bytes:
        """What IDENTIFY DEVICE says."""
        blk, sectors = self.blk, self.sectors
        cylinders, heads, track = chs(sectors * blk.sectsz)
        enabled = ID_SUPPORTED_82
        if not self._write_cache:
            enabled &= ~ID_WRITE_CACHE
        if not self._look_ahead:
            enabled &= ~ID_LOOK_AHEAD
        small = min(sectors, LBA28_SECTORS)
        speed = (self.port.regs.SSTS & SPD_MASK) >> SPD_SHIFT
        words = {
            0: 0x0040,  # not removable
            1: cylinders,
            3: heads,
            6: track,
            47: 0x8000 | MULTIPLE_MAX,
            48: 0x4000,
            49: 0x0B00,  # IORDY, LBA, DMA
            50: 0x4000,
            59: 0x0100 | self._multiple if self._multiple else 0,
            60: small & 0xFFFF,
            61: small >> 16,
            75: 31,  # the depth of the queue - 1
            76: ID_SPEEDS_NCQ,
            77: speed << 1,
            81: 0x0028,  # ATA8-ACS version 6
            82: ID_SUPPORTED_82,
            83: ID_SUPPORTED_83,
            84: ID_SUPPORTED_84,
            85: enabled,
            86: ID_SUPPORTED_83 & 0x3FFF | ID_WORDS_119_VALID,
            87: ID_SUPPORTED_84,
            106: 0x4000,
            119: ID_SUPPORTED_119,
            120: ID_SUPPORTED_119,
            209: 0x4000,
            217: self._rotation_rate,
        } | transfer_modes(self._mode)
        for index in range(4):
            words[100 + index] = sectors >> 16 * index & 0xFFFF
        if self._can_trim:
            words[69] = ID_DRAT_RZAT
            words[77] |= ID_SEND_RECEIVE
            words[105] = 1  # blocks of ranges
            words[169] = DSM_TRIM
        if blk.psectsz > blk.sectsz:
            ratio = blk.psectsz // blk.sectsz
            words[106] |= 0x2000 | min(ratio.bit_length() - 1, 15)
            words[209] |= blk.psectoff // blk.sectsz & 0x3FFF
        if blk.sectsz > 512:
            words[106] |= 0x1000
            words[117] = blk.sectsz // 2 & 0xFFFF
            words[118] = blk.sectsz // 2 >> 16
        return identify(self._names, words)
