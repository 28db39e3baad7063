"""The data of IDENTIFY DEVICE and IDENTIFY PACKET DEVICE.

ATA8-ACS, 7.16 and 7.17; words are numbered as there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

IDENTIFY_SIZE: Final = 512

SERIAL_LENGTH: Final = 20
FIRMWARE_LENGTH: Final = 8
MODEL_LENGTH: Final = 40

# Words that disks and CD drives have in common.
_COMMON: Final = {
    53: 0x0006,  # words 64-70 and 88 are valid
    64: 0x0003,  # PIO modes 3 and 4
    65: 120,  # nanoseconds a transfer, for multiword DMA and PIO
    66: 120,
    67: 120,
    68: 120,
    80: 0x03F0,  # ATA/ATAPI-4 to ATA8-ACS and its successor
    222: 0x1020,  # serial transport, SATA 2.6
}

SIGNATURE_WORD: Final = 255
SIGNATURE: Final = 0xA5


@dataclass(slots=True, frozen=True)
class Names:
    """What a drive is called."""

    serial: str
    firmware: str
    model: str


def default_serial(path: str) -> str:
    """A serial number that is always the same for an image of that path."""
    digest = hashlib.md5(path.encode(errors="surrogateescape"), usedforsecurity=False)
    octets = digest.hexdigest().upper()
    return f"BHYVE-{octets[0:4]}-{octets[4:8]}-{octets[8:12]}"


def identify(names: Names, words: Mapping[int, int]) -> bytes:
    """The 512 bytes: names, what all drives have, ``words``, and the checksum."""
    data = bytearray(IDENTIFY_SIZE)
    _put_string(data, 10, names.serial, SERIAL_LENGTH)
    _put_string(data, 23, names.firmware, FIRMWARE_LENGTH)
    _put_string(data, 27, names.model, MODEL_LENGTH)
    for word, value in (*_COMMON.items(), *words.items()):
        data[2 * word : 2 * word + 2] = value.to_bytes(2, "little")
    data[2 * SIGNATURE_WORD] = SIGNATURE
    data[-1] = checksum(data)
    return bytes(data)


def checksum(data: bytes | bytearray) -> int:
    """What the last byte must be for the sum of all to be 0."""
    return -sum(data[:-1]) & 0xFF


def transfer_modes(mode: int) -> dict[int, int]:
    """Words 63 and 88: which DMA modes there are, and the one that was set."""
    multiword, ultra = 0x0007, 0x007F
    if mode & 0xF8 == MODE_MULTIWORD:
        multiword |= 0x100 << (mode & 7)
    elif mode & 0xF8 == MODE_ULTRA:
        ultra |= 0x100 << (mode & 7)
    return {63: multiword, 88: ultra}


# SET FEATURES, 7.45.3: transfer modes.
MODE_MULTIWORD: Final = 0x20
MODE_ULTRA: Final = 0x40
MODE_DEFAULT: Final = MODE_ULTRA | 6


def valid_transfer_mode(mode: int) -> bool:
    """Whether a SET FEATURES may choose it."""
    kind, number = mode & 0xF8, mode & 7
    limits = {0x00: 1, 0x08: 4, MODE_MULTIWORD: 2, MODE_ULTRA: 6}
    return number <= limits.get(kind, -1)


def chs(size: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors a track for a disk of ``size`` bytes.

    The algorithm of the VHD specification, its appendix.
    """
    sectors = min(size // 512, 65535 * 16 * 255)
    if sectors >= 65536 * 16 * 63:
        return sectors // 255 // 16, 16, 255
    track = 17
    cylinders_heads = sectors // track
    heads = max((cylinders_heads + 1023) // 1024, 4)
    if cylinders_heads >= heads * 1024 or heads > 16:
        track, heads = 31, 16
        cylinders_heads = sectors // track
    if cylinders_heads >= heads * 1024:
        track = 63
        cylinders_heads = sectors // track
    return cylinders_heads // heads, heads, track


def _put_string(data: bytearray, word: int, text: str, length: int) -> None:
    """An ATA string: ASCII, filled up with blanks, the bytes of a word swapped."""
    raw = text.encode("ascii", "replace")[:length].ljust(length)
    data[2 * word : 2 * word + length : 2] = raw[1::2]
    data[2 * word + 1 : 2 * word + length : 2] = raw[::2]
