"""Disks behind devices (bhyve: block_if.c).

    blk = BlockIf(options, "nvme 0:4:0", machine.mevent)
    blk.read(iov, offset, done)

What a device may count on is in `BlockIf`.
"""

from __future__ import annotations

from pybhyve.block.blockif import BlockIf
from pybhyve.block.options import BlockOptions, SectorSize
from pybhyve.block.pool import BlockReq, Done

__all__ = ["BlockIf", "BlockOptions", "BlockReq", "Done", "SectorSize"]
