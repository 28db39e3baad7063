"""Physical region pages: where a command's data are (NVM Express 1.4, 4.3)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from pybhyve.pci.nvme.spec import (
    PAGE,
    SC_DATA_TRANSFER_ERROR,
    SC_PRP_OFFSET,
    CommandError,
)
from pybhyve.vmmapi import Iov, VmmError, map_iov

if TYPE_CHECKING:
    from pybhyve.vmmapi import Vm


def prp_ranges(vm: Vm, prp1: int, prp2: int, length: int) -> list[tuple[int, int]]:
    """Guest-physical address and length of each piece of ``length`` bytes, above 0.

    Raises CommandError: an entry is not aligned as it must be, or a list is not in
    memory.  Of lists no more is read than ``length`` needs, so a circle ends.
    """
    if prp1 & 3:
        raise CommandError(SC_PRP_OFFSET)
    first = PAGE - (prp1 & PAGE - 1)
    if length <= first:
        return [(prp1, length)]
    left = length - first
    if left <= PAGE:
        if prp2 & PAGE - 1:
            raise CommandError(SC_PRP_OFFSET)
        return [(prp1, first), (prp2, left)]
    ranges = [(prp1, first)]
    at, align = prp2, 7  # the first list may begin inside of a page, others not
    while left:
        if at & align:
            raise CommandError(SC_PRP_OFFSET)
        room = (PAGE - (at & PAGE - 1)) // 8
        needed = -(-left // PAGE)
        count = min(room, needed)
        try:
            entries = struct.unpack(f"<{count}Q", vm.read_mem(at, 8 * count))
        except VmmError:
            raise CommandError(SC_DATA_TRANSFER_ERROR) from None
        if needed > room:
            # The last entry of a page that is not enough is the next list's address.
            at, align = entries[-1], PAGE - 1
            entries = entries[:-1]
        for entry in entries:
            if entry & PAGE - 1:
                raise CommandError(SC_PRP_OFFSET)
            ranges.append((entry, min(left, PAGE)))
            left -= min(left, PAGE)
    return ranges


def map_prps(vm: Vm, prp1: int, prp2: int, length: int, writable: bool) -> Iov:
    """Buffers for a command's data; CommandError where they are not in memory."""
    try:
        return map_iov(vm, prp_ranges(vm, prp1, prp2, length), writable)
    except VmmError:
        raise CommandError(SC_DATA_TRANSFER_ERROR) from None
