"""A SATA CD drive with a disc in it: the PACKET command and MMC commands on an image.

ATA8-ACS, 7.18 (PACKET); MMC-5 (T10/1675-D), chapter 6; SPC-3, chapter 6.
bhyve: the ATAPI half of pci_ahci.c.
"""

from __future__ import annotations

import logging
from typing import Any, Final, NamedTuple

from pybhyve.block import BlockIf
from pybhyve.pci.ahci.ahcireg import SPD_MASK, SPD_SHIFT
from pybhyve.pci.ahci.command import Command
from pybhyve.pci.ahci.device import (
    DIAGNOSTIC_PASSED,
    ERR_ABRT,
    EXECUTE_DEVICE_DIAGNOSTIC,
    SataDevice,
)
from pybhyve.pci.ahci.identify import (
    IDENTIFY_SIZE,
    MODE_DEFAULT,
    Names,
    identify,
    transfer_modes,
    valid_transfer_mode,
)

log = logging.getLogger(__name__)

SECTOR: Final = 2048
PACKET_LENGTH: Final = 12

# ATA commands.
DEVICE_RESET: Final = 0x08
READ_SECTORS: Final = 0x20
PACKET: Final = 0xA0
IDENTIFY_PACKET_DEVICE: Final = 0xA1
STANDBY_IMMEDIATE: Final = 0xE0
IDLE_IMMEDIATE: Final = 0xE1
CHECK_POWER_MODE: Final = 0xE5
SLEEP: Final = 0xE6
FLUSH_CACHE: Final = 0xE7
IDENTIFY_DEVICE: Final = 0xEC
SET_FEATURES: Final = 0xEF
SF_TRANSFER_MODE: Final = 0x03
POWER_ACTIVE: Final = 0xFF

REASON_STATUS: Final = 0x03  # interrupt reason: to the host, no data

# MMC and SPC commands.
TEST_UNIT_READY: Final = 0x00
REQUEST_SENSE: Final = 0x03
INQUIRY: Final = 0x12
START_STOP_UNIT: Final = 0x1B
PREVENT_ALLOW_MEDIUM_REMOVAL: Final = 0x1E
READ_CAPACITY: Final = 0x25
READ_10: Final = 0x28
SEEK_10: Final = 0x2B
READ_TOC: Final = 0x43
GET_CONFIGURATION: Final = 0x46
GET_EVENT_STATUS_NOTIFICATION: Final = 0x4A
READ_DISC_INFORMATION: Final = 0x51
MODE_SENSE_10: Final = 0x5A
REPORT_LUNS: Final = 0xA0
READ_12: Final = 0xA8
SET_CD_SPEED: Final = 0xBB


class Sense(NamedTuple):
    """Why a command failed: sense key, additional code and its qualifier."""

    key: int
    asc: int
    ascq: int = 0


NO_SENSE: Final = Sense(0, 0)
MEDIUM_ERROR: Final = Sense(0x3, 0x11)  # unrecovered read error
INVALID_OPCODE: Final = Sense(0x5, 0x20)
OUT_OF_RANGE: Final = Sense(0x5, 0x21)
INVALID_FIELD: Final = Sense(0x5, 0x24)
NO_SAVED_VALUES: Final = Sense(0x5, 0x39)
CANNOT_EJECT: Final = Sense(0x5, 0x53)
MEDIUM_CHANGED: Final = Sense(0x6, 0x28)
ABORTED: Final = Sense(0xB, 0x00)

# 6.4: commands that a changed medium does not keep from being done.
DESPITE_ATTENTION: Final = frozenset(
    {
        REQUEST_SENSE,
        INQUIRY,
        GET_CONFIGURATION,
        GET_EVENT_STATUS_NOTIFICATION,
        REPORT_LUNS,
    }
)

LEAD_OUT: Final = 0xAA
DATA_TRACK: Final = 0x14  # ADR 1, data track that may be copied
MSF_OFFSET: Final = 150  # frames before logical block 0
FRAMES: Final = 75  # a second

# 6.22.3 mode pages
PAGE_ERROR_RECOVERY: Final = 0x01
PAGE_CAPABILITIES: Final = 0x2A
PAGE_ALL: Final = 0x3F
MODE_PAGES: Final = {
    PAGE_ERROR_RECOVERY: bytes((PAGE_ERROR_RECOVERY, 6, 0, 5, 0, 0, 0, 0)),
    PAGE_CAPABILITIES: bytes((PAGE_CAPABILITIES, 20, 0x08, 0, 0x71, 0, 0, 0, 0, 0))
    + (2).to_bytes(2, "big")  # volume levels
    + (512).to_bytes(2, "big")  # KiB of buffer
    + bytes(8),
}
MODE_CURRENT: Final = 0
MODE_SAVED: Final = 3
MEDIUM_CD: Final = 0x70  # door closed, no disc: what bhyve says

# 6.6.2 events
EVENT_MEDIA: Final = 4
EVENT_NONE: Final = 0x80
NEW_MEDIA: Final = 2
MEDIA_PRESENT: Final = 2

# 5.3 features
PROFILE_CD_ROM: Final = 0x0008
PROFILE_DVD_ROM: Final = 0x0010
CD_SECTORS: Final = 80 * 60 * FRAMES  # a larger image must be a DVD
FEATURE_PROFILES: Final = 0x0000
FEATURE_CORE: Final = 0x0001
FEATURE_REMOVABLE: Final = 0x0003
FEATURE_RANDOM_READABLE: Final = 0x0010
FEATURE_CD_READ: Final = 0x001E
FEATURE_DVD_READ: Final = 0x001F
PERSISTENT: Final = 0x02
CURRENT: Final = 0x01


class AtapiCd(SataDevice):
    """The drive."""

    SIGNATURE = 0xEB140101
    STATUS_AT_RESET = 0

    def __init__(self, blk: BlockIf, names: Names) -> None:
        super().__init__(blk)
        self._names = names
        self._attention = False  # the disc has changed, and nobody was told
        self._new_media = False  # the same, for those who ask for events
        self.reset()
        self._handlers = {
            DEVICE_RESET: self._device_reset,
            EXECUTE_DEVICE_DIAGNOSTIC: self._diagnostic,
            PACKET: self._packet,
            IDENTIFY_PACKET_DEVICE: self._identify,
            # 7.16.5: this is how a driver finds out that it is no disk.
            IDENTIFY_DEVICE: self._not_a_disk,
            READ_SECTORS: self._not_a_disk,
            STANDBY_IMMEDIATE: self._nothing,
            IDLE_IMMEDIATE: self._nothing,
            SLEEP: self._nothing,
            FLUSH_CACHE: self._nothing,
            CHECK_POWER_MODE: self._check_power,
            SET_FEATURES: self._set_features,
        }
        self._packets = {
            TEST_UNIT_READY: self._good,
            REQUEST_SENSE: self._request_sense,
            INQUIRY: self._inquiry,
            START_STOP_UNIT: self._start_stop,
            # Nothing can be taken out in any case.
            PREVENT_ALLOW_MEDIUM_REMOVAL: self._good,
            READ_CAPACITY: self._read_capacity,
            READ_10: self._read,
            READ_12: self._read,
            SEEK_10: self._seek,
            READ_TOC: self._read_toc,
            GET_CONFIGURATION: self._get_configuration,
            GET_EVENT_STATUS_NOTIFICATION: self._get_event,
            READ_DISC_INFORMATION: self._disc_information,
            MODE_SENSE_10: self._mode_sense,
            REPORT_LUNS: self._report_luns,
            SET_CD_SPEED: self._good,
        }

    @property
    def sectors(self) -> int:
        """Blocks of 2048 bytes there are now."""
        return self.blk.size // SECTOR

    def medium_changed(self) -> None:
        """The image has another size now: to the guest, another disc."""
        with self.port.lock:
            self._attention = self._new_media = True

    # -- life ------------------------------------------------------------------------

    def power_on(self) -> None:
        """Nothing: how large a disc is, is seen whenever it is asked for."""

    def reset(self) -> None:
        """Settings as after power-on."""
        self._mode = MODE_DEFAULT
        self.soft_reset()

    def soft_reset(self) -> None:
        """Sense data are gone."""
        self._sense = NO_SENSE

    def save(self) -> dict[str, Any]:
        """Settings, sense data and events that nobody has asked for yet."""
        return {
            "mode": self._mode,
            "sense": list(self._sense),
            "attention": self._attention,
            "new_media": self._new_media,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        self._mode = state["mode"]
        self._sense = Sense(*state["sense"])
        self._attention = state["attention"]
        self._new_media = state["new_media"]

    # -- ATA commands ----------------------------------------------------------------

    def execute(self, command: Command) -> None:
        """Do a command, or begin it."""
        self._handlers.get(command.opcode, self._unknown)(command)

    def abort(self, command: Command) -> None:
        """End a command that cannot be done."""
        if command.opcode == PACKET:
            self._check(command, ABORTED)
        else:
            self.port.fail(command, ERR_ABRT)

    def _unknown(self, command: Command) -> None:
        log.debug("unknown command cd=%s %#x", self.blk.ident, command.opcode)
        self.port.fail(command, ERR_ABRT)

    def _nothing(self, command: Command) -> None:
        self.port.complete(command)

    def _not_a_disk(self, command: Command) -> None:
        self.set_signature(command)
        self.port.fail(command, ERR_ABRT)

    def _device_reset(self, command: Command) -> None:
        self.soft_reset()
        self._diagnostic(command)

    def _diagnostic(self, command: Command) -> None:
        self.set_signature(command)
        self.port.complete(command, DIAGNOSTIC_PASSED)

    def _check_power(self, command: Command) -> None:
        command.fis[12] = POWER_ACTIVE
        self.port.complete(command)

    def _set_features(self, command: Command) -> None:
        mode = command.fis[12]
        if command.fis[3] == SF_TRANSFER_MODE and valid_transfer_mode(mode):
            self._mode = mode
            self.port.complete(command)
        else:
            self.port.fail(command, ERR_ABRT)

    def _identify(self, command: Command) -> None:
        command.store(self.identify())
        self.port.complete_pio_in(command, IDENTIFY_SIZE)

    def identify(self) -> bytes:
        """What IDENTIFY PACKET DEVICE says."""
        supported = 0x4218  # NOP, DEVICE RESET, PACKET, power management
        speed = (self.port.regs.SSTS & SPD_MASK) >> SPD_SHIFT
        words = {
            0: 0x85C0,  # a CD drive, removable, packets of 12 bytes
            49: 0x0300,  # LBA, DMA
            50: 0x4000,
            76: 0x000E,  # 1.5, 3 and 6 Gbit/s
            77: speed << 1,
            82: supported,
            83: 0x4000,
            84: 0x4000,
            85: supported,
            87: 0x4000,
        }
        return identify(self._names, words | transfer_modes(self._mode))

    # -- packets ---------------------------------------------------------------------

    def _packet(self, command: Command) -> None:
        self.port.begin_pio_out(command, PACKET_LENGTH)
        opcode = command.acmd[0]
        if self._attention and opcode not in DESPITE_ATTENTION:
            self._attention = False
            self._check(command, MEDIUM_CHANGED)
            return
        if opcode != REQUEST_SENSE:
            self._sense = NO_SENSE
        handler = self._packets.get(opcode)
        if handler is None:
            log.debug("unknown packet cd=%s %#x", self.blk.ident, opcode)
            self._check(command, INVALID_OPCODE)
        else:
            handler(command)

    def _good(self, command: Command) -> None:
        command.fis[12] = REASON_STATUS
        self.port.complete(command)

    def _check(self, command: Command, sense: Sense) -> None:
        """End in CHECK CONDITION."""
        self._sense = sense
        command.fis[12] = REASON_STATUS
        self.port.fail(command, sense.key << 4)

    def _answer(self, command: Command, data: bytes, allocated: int) -> None:
        """Give the driver what it has room for."""
        command.store(data[:allocated])
        self._good(command)

    def _request_sense(self, command: Command) -> None:
        data = bytearray(18)
        data[0] = 0xF0  # current, with information
        data[2] = self._sense.key
        data[7] = 10
        data[12:14] = self._sense.asc, self._sense.ascq
        self._answer(command, bytes(data), command.acmd[4])
        self._sense = NO_SENSE

    def _inquiry(self, command: Command) -> None:
        acmd = command.acmd
        allocated = int.from_bytes(acmd[3:5], "big")
        if not acmd[1] & 1:
            data = bytes((0x05, 0x80, 0x00, 0x21, 31, 0, 0, 0))
            data += b"BHYVE   " + b"BHYVE DVD-ROM   " + b"001 "
            self._answer(command, data, allocated)
        elif acmd[2] == 0:  # vital product data: which pages there are
            self._answer(command, bytes((0x05, 0, 0, 1, 0)), allocated)
        else:
            self._check(command, INVALID_FIELD)

    def _start_stop(self, command: Command) -> None:
        eject = command.acmd[4] & 3 == 2
        if eject:
            self._check(command, CANNOT_EJECT)
        else:
            self._good(command)

    def _read_capacity(self, command: Command) -> None:
        last = max(self.sectors - 1, 0)
        data = min(last, 0xFFFFFFFF).to_bytes(4, "big") + SECTOR.to_bytes(4, "big")
        self._answer(command, data, len(data))

    def _read(self, command: Command) -> None:
        acmd = command.acmd
        lba = int.from_bytes(acmd[2:6], "big")
        where = slice(7, 9) if acmd[0] == READ_10 else slice(6, 10)
        count = int.from_bytes(acmd[where], "big")
        if lba + count > self.sectors:
            self._check(command, OUT_OF_RANGE)
        elif not count:
            self._good(command)
        else:
            self.read_blocks(command, lba * SECTOR, count * SECTOR)

    def transferred(self, command: Command, error: int) -> None:
        """A read has ended, with an errno."""
        if error:
            # An image that has shrunk ends before what was its end.
            self._check(command, MEDIUM_ERROR)
            return
        acmd = command.acmd
        where = slice(7, 9) if acmd[0] == READ_10 else slice(6, 10)
        command.moved(int.from_bytes(acmd[where], "big") * SECTOR)
        self._good(command)

    def _seek(self, command: Command) -> None:
        if int.from_bytes(command.acmd[2:6], "big") >= self.sectors:
            self._check(command, OUT_OF_RANGE)
        else:
            self._good(command)

    def _read_toc(self, command: Command) -> None:
        acmd = command.acmd
        msf = bool(acmd[1] & 2)
        # SFF-8020i had the format elsewhere.
        kind = acmd[2] & 0xF or acmd[9] >> 6
        first = acmd[6]
        if kind > 2 or (kind == 0 and first > 1 and first != LEAD_OUT):
            self._check(command, INVALID_FIELD)
            return
        begin, end = _address(0, msf), _address(self.sectors, msf)
        if kind == 0:
            data = bytes((1, 1))  # first and last track
            if first <= 1:
                data += bytes((0, DATA_TRACK, 1, 0)) + begin
            data += bytes((0, DATA_TRACK, LEAD_OUT, 0)) + end
        elif kind == 1:
            data = bytes((1, 1, 0, DATA_TRACK, 1, 0)) + begin
        else:
            point = bytes((1, DATA_TRACK, 0))
            data = bytes((1, 1))
            data += point + bytes((0xA0, 0, 0, 0, 0, 1, 0, 0))
            data += point + bytes((0xA1, 0, 0, 0, 0, 1, 0, 0))
            data += point + bytes((0xA2, 0, 0, 0)) + end
            data += point + bytes((1, 0, 0, 0)) + begin
        allocated = int.from_bytes(acmd[7:9], "big")
        self._answer(command, len(data).to_bytes(2, "big") + data, allocated)

    def _get_configuration(self, command: Command) -> None:
        acmd = command.acmd
        kind, first = acmd[1] & 3, int.from_bytes(acmd[2:4], "big")
        if kind == 3:
            self._check(command, INVALID_FIELD)
            return
        dvd = self.sectors > CD_SECTORS
        profile = PROFILE_DVD_ROM if dvd else PROFILE_CD_ROM
        profiles = b"".join(
            each.to_bytes(2, "big") + bytes((each == profile, 0))
            for each in (PROFILE_DVD_ROM, PROFILE_CD_ROM)
        )
        features = (
            (FEATURE_PROFILES, PERSISTENT | CURRENT, profiles),
            (
                FEATURE_CORE,
                0x08 | PERSISTENT | CURRENT,
                bytes((0, 0, 0, 7, 1, 0, 0, 0)),
            ),
            (FEATURE_REMOVABLE, PERSISTENT | CURRENT, bytes((0x20, 0, 0, 0))),
            (
                FEATURE_RANDOM_READABLE,
                CURRENT,
                SECTOR.to_bytes(4, "big") + bytes((0, 1, 0, 0)),
            ),
            (FEATURE_CD_READ, 0x08 | CURRENT * (not dvd), bytes(4)),
            (FEATURE_DVD_READ, CURRENT * dvd, b""),
        )
        data = bytes(2) + profile.to_bytes(2, "big")
        for code, flags, body in features:
            if kind == 2:  # this one
                wanted = code == first
            else:  # these, or those of them that are current
                wanted = code >= first and (kind == 0 or bool(flags & CURRENT))
            if wanted:
                data += code.to_bytes(2, "big") + bytes((flags, len(body))) + body
        allocated = int.from_bytes(acmd[7:9], "big")
        self._answer(command, len(data).to_bytes(4, "big") + data, allocated)

    def _get_event(self, command: Command) -> None:
        acmd = command.acmd
        allocated = int.from_bytes(acmd[7:9], "big")
        if not acmd[1] & 1:
            # To be told later, by itself, is not to be had.
            self._check(command, INVALID_FIELD)
        elif not acmd[4] & 1 << EVENT_MEDIA:
            data = bytes((0, 2, EVENT_NONE, 1 << EVENT_MEDIA))
            self._answer(command, data, allocated)
        else:
            event = NEW_MEDIA if self._new_media else 0
            data = bytes((0, 6, EVENT_MEDIA, 1 << EVENT_MEDIA))
            data += bytes((event, MEDIA_PRESENT, 0, 0))
            self._answer(command, data, allocated)
            if allocated > 4:
                self._new_media = False

    def _disc_information(self, command: Command) -> None:
        acmd = command.acmd
        if acmd[1] & 7:
            self._check(command, INVALID_FIELD)
            return
        data = bytearray(34)
        data[1] = len(data) - 2
        data[2] = 0x0E  # a finished disc, its last session complete
        data[3] = data[4] = data[5] = data[6] = 1  # first track, sessions, tracks
        data[7] = 0x20  # unrestricted use
        data[16:24] = b"\xff" * 8  # no further session can begin
        self._answer(command, bytes(data), int.from_bytes(acmd[7:9], "big"))

    def _mode_sense(self, command: Command) -> None:
        acmd = command.acmd
        control, page = acmd[2] >> 6, acmd[2] & 0x3F
        if control == MODE_SAVED:
            self._check(command, NO_SAVED_VALUES)
        elif control != MODE_CURRENT or page not in (*MODE_PAGES, PAGE_ALL):
            self._check(command, INVALID_FIELD)
        else:
            pages = [MODE_PAGES[page]] if page in MODE_PAGES else MODE_PAGES.values()
            data = bytes((MEDIUM_CD, 0, 0, 0, 0, 0)) + b"".join(pages)
            allocated = int.from_bytes(acmd[7:9], "big")
            self._answer(command, len(data).to_bytes(2, "big") + data, allocated)

    def _report_luns(self, command: Command) -> None:
        data = bytes((0, 0, 0, 8)) + bytes(12)
        self._answer(command, data, int.from_bytes(command.acmd[6:10], "big"))


def _address(lba: int, msf: bool) -> bytes:
    """A logical block, or minutes, seconds and frames, in four bytes."""
    if not msf:
        return min(lba, 0xFFFFFFFF).to_bytes(4, "big")
    seconds, frames = divmod(lba + MSF_OFFSET, FRAMES)
    minutes, seconds = divmod(seconds, 60)
    return bytes((0, min(minutes, 255), seconds, frames))
