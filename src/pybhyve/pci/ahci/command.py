"""A command of the list: what its driver has put into memory for it.

Serial ATA AHCI 1.3.1, 4.2.2 (command list) and 4.2.3 (command table).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pybhyve.pci.ahci.ahcireg import (
    CFIS_AREA,
    FIS_C,
    FIS_H2D,
    FIS_H2D_SIZE,
    HEADER,
    HEADER_CFL,
    HEADER_SIZE,
    IS_DPS,
    PRD,
    PRD_DBC,
    PRD_I,
    PRDBC,
    TABLE_ACMD,
    TABLE_PRDT,
)
from pybhyve.vmmapi import Iov, Vm, map_iov, release_iov

if TYPE_CHECKING:
    from pybhyve.block import BlockReq

_U32: Final = struct.Struct("<I")
ACMD_SIZE: Final = 16
ADDRESS_MASK: Final = (1 << 64) - 1


class BadFisError(Exception):
    """What is in the command table is no FIS that a device takes."""


class PrdtOverflowError(Exception):
    """The PRDs have less room than the transfer is long (6.1.5)."""


class Command:
    """A command under way.

    Every method that touches memory raises VmmError where an address of the driver's is
    no memory.
    """

    __slots__ = (
        "_header",
        "_prdt",
        "_vm",
        "acmd",
        "alive",
        "control",
        "descriptor",
        "fis",
        "iov",
        "queued",
        "request",
        "slot",
    )

    def __init__(self, vm: Vm, command_list: int, slot: int) -> None:
        """Fetch slot 0 to 31 of the list; BadFisError or VmmError."""
        self._vm = vm
        self._header = command_list + HEADER_SIZE * slot & ADDRESS_MASK
        flags, prdtl, _, base = HEADER.unpack(vm.read_mem(self._header, HEADER.size))
        table = vm.read_mem(base & ~0x7F, TABLE_PRDT + PRD.size * prdtl)
        length = 4 * (flags & HEADER_CFL)
        if table[0] != FIS_H2D or not FIS_H2D_SIZE <= length <= CFIS_AREA:
            raise BadFisError
        self.slot = slot
        self.fis = bytearray(table[:FIS_H2D_SIZE])
        """The command; its device puts results where the command has them."""
        self.acmd = table[TABLE_ACMD : TABLE_ACMD + ACMD_SIZE]
        self.control = not table[1] & FIS_C
        """Not a command: an update of the device control register."""
        self.queued = False
        """Accepted as a queued command."""
        self.alive = True
        """Its result matters; False: it was aborted while block I/O was under way."""
        self.descriptor = 0
        """IS_DPS where a PRD that asks for an interrupt was used."""
        self.iov: Iov | None = None
        self.request: BlockReq | None = None
        self._prdt = memoryview(table)[TABLE_PRDT:]

    # -- fields of the FIS -----------------------------------------------------------

    @property
    def opcode(self) -> int:
        """The command register."""
        return self.fis[2]

    @property
    def features(self) -> int:
        """The features register, 16 bits."""
        return self.fis[3] | self.fis[11] << 8

    @property
    def count(self) -> int:
        """The count register, 16 bits."""
        return self.fis[12] | self.fis[13] << 8

    @property
    def device(self) -> int:
        """The device register."""
        return self.fis[7]

    @property
    def lba28(self) -> int:
        """The address of a 28-bit command."""
        return int.from_bytes(self.fis[4:8], "little") & 0xFFFFFFF

    @property
    def lba48(self) -> int:
        """The address of a 48-bit command."""
        low = int.from_bytes(self.fis[4:8], "little") & 0xFFFFFF
        return low | (int.from_bytes(self.fis[8:12], "little") & 0xFFFFFF) << 24

    # -- data ------------------------------------------------------------------------

    def ranges(self, length: int) -> list[tuple[int, int]]:
        """Where in memory ``length`` bytes of data are; PrdtOverflowError."""
        found: list[tuple[int, int]] = []
        if not length:
            return found
        for address, _, count in PRD.iter_unpack(self._prdt):
            # 4.2.3.3: both are even, whatever their lowest bits say.
            size = (count & PRD_DBC | 1) + 1
            if count & PRD_I:
                self.descriptor = IS_DPS
            found.append((address & ~1, min(size, length)))
            length -= size
            if length <= 0:
                return found
        raise PrdtOverflowError

    def map(self, length: int, writable: bool) -> Iov:
        """Buffers for ``length`` bytes, `unmap` ends them; PrdtOverflowError."""
        self.iov = iov = map_iov(self._vm, self.ranges(length), writable)
        return iov

    def unmap(self) -> None:
        """Give the buffers back, if there are any."""
        if self.iov is not None:
            release_iov(self.iov)
            self.iov = None

    def store(self, data: bytes) -> None:
        """Put ``data`` where the driver wants it; PrdtOverflowError."""
        iov = self.map(len(data), True)
        at = 0
        for buffer in iov:
            buffer[:] = data[at : at + len(buffer)]
            at += len(buffer)
        self.unmap()
        self.moved(len(data))

    def load(self, length: int) -> bytes:
        """``length`` bytes of the driver's; PrdtOverflowError."""
        data = b"".join(self.map(length, False))
        self.unmap()
        self.moved(length)
        return data

    def moved(self, length: int) -> None:
        """Tell the driver how many bytes were transferred (PRDBC)."""
        self._vm.write_mem(self._header + PRDBC, _U32.pack(length & 0xFFFFFFFF))
