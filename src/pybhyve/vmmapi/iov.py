"""Scattered guest memory as a list of buffers, for ``preadv`` and its like."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from pybhyve._vmm import Vm, VmmError
from pybhyve.vmmapi.ctx import VmCtx

Iov = list[memoryview]
"""Buffers in guest memory, in the order of the data."""


def map_iov(
    vm: Vm | VmCtx, ranges: Sequence[tuple[int, int]], writable: bool = False
) -> Iov:
    """Buffers for guest-physical ``(address, length)`` ranges; `release_iov` ends them.

    Ranges that follow each other are merged, and one may go from a mapping into the
    next, so the list can be shorter or longer than ``ranges``; the order of the bytes
    stays.  Empty ranges are left out.  Raises VmmError EFAULT where any byte is not
    memory; nothing stays mapped then.
    """
    if isinstance(vm, VmCtx):
        vm = vm.vm
    iov: Iov = []
    try:
        for gpa, length in _merged(ranges) if len(ranges) > 1 else ranges:
            if length:
                try:
                    iov.append(memoryview(vm.view(gpa, length, writable)))
                except (VmmError, OverflowError):
                    _map_across(vm, gpa, length, writable, iov)
    except BaseException:
        release_iov(iov)
        raise
    return iov


def release_iov(iov: Iov) -> None:
    """Give the buffers back: what was written into them takes effect for the guest."""
    for buffer in iov:
        buffer.release()


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    start, end = 0, 0
    for gpa, length in ranges:
        if gpa != end:
            merged.append((start, end - start))
            start = end = gpa
        end += length
    merged.append((start, end - start))
    return merged


def _map_across(vm: Vm, gpa: int, length: int, writable: bool, iov: Iov) -> None:
    """Map a range that one view does not cover, mapping by mapping."""
    for base, _segid, _offset, size, _prot in vm.memmap():
        if base <= gpa < base + size:
            part = min(length, base + size - gpa)
            iov.append(memoryview(vm.view(gpa, part, writable)))
            gpa += part
            length -= part
            if not length:
                return
    raise VmmError(errno.EFAULT, f"no memory at {gpa:#x}")
