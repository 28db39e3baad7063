"""A firmware's half of fw_cfg: ports, DMA, and the directory (QEMU specs/fw_cfg)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from pybhyve.amd64.inout import InoutTable
from pybhyve.vmmapi import VmCtx

SELECTOR: Final = 0x510
DATA: Final = 0x511
DMA: Final = 0x514
DIRECTORY: Final = 0x19

ERROR: Final = 1
READ: Final = 2
SKIP: Final = 4
SELECT: Final = 8
WRITE: Final = 16

ACCESS: Final = 0x1000  # where the driver has its request
BUFFER: Final = 0x2000


@dataclass(frozen=True, slots=True)
class File:
    size: int
    selector: int


class FwCfgDriver:
    """Reads items as a firmware does, below 1 MiB of guest memory."""

    def __init__(self, inout: InoutTable, ctx: VmCtx) -> None:
        self.inout = inout
        self.ctx = ctx

    def select(self, selector: int) -> None:
        self.inout.write(SELECTOR, 2, selector)

    def read(self, length: int) -> bytes:
        return bytes(self.inout.read(DATA, 1) for _ in range(length))

    def item(self, selector: int, length: int) -> bytes:
        self.select(selector)
        return self.read(length)

    def directory(self) -> dict[str, File]:
        (count,) = struct.unpack(">I", self.item(DIRECTORY, 4))
        files = {}
        for _ in range(count):
            size, selector, name = struct.unpack(">IHxx56s", self.read(64))
            files[name.rstrip(b"\0").decode()] = File(size, selector)
        return files

    def file(self, name: str) -> bytes:
        """A file's contents, by DMA."""
        file = self.directory()[name]
        assert self.dma(SELECT | READ, file.size, selector=file.selector) == 0
        return self.ctx.read(BUFFER, file.size)

    def dma(
        self,
        command: int,
        length: int,
        *,
        address: int = BUFFER,
        selector: int = 0,
        access: int = ACCESS,
    ) -> int:
        """Do a transfer; the control word afterwards."""
        request = struct.pack(">IIQ", selector << 16 | command, length, address)
        self.ctx.write(access, request)
        high, low = struct.pack(">Q", access)[:4], struct.pack(">Q", access)[4:]
        if access >> 32:
            self.inout.write(DMA, 4, int.from_bytes(high, "little"))
        self.inout.write(DMA + 4, 4, int.from_bytes(low, "little"))
        return int.from_bytes(self.ctx.read(access, 4), "big")
