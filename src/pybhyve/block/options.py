"""The variables that every device with a disk has."""

from __future__ import annotations

from typing import Final, NamedTuple

from pybhyve.config import parse_int
from pybhyve.options import POSITIONAL, Options, key, parser

SECTOR_MIN: Final = 512


class SectorSize(NamedTuple):
    """Bytes of a logical and of a physical sector: powers of two."""

    logical: int
    physical: int


@parser("L[/P]")
def _sector_size(text: str) -> SectorSize:
    """Parse ``L[/P]``; P is L where it is not given."""
    first, slash, second = text.partition("/")
    try:
        logical = parse_int(first)
        physical = parse_int(second) if slash else logical
    except ValueError:
        logical = physical = 0
    if (
        not SECTOR_MIN <= logical <= physical
        or logical & logical - 1
        or (physical & physical - 1)
    ):
        raise ValueError(f"expected L or L/P, powers of two, {SECTOR_MIN} <= L <= P")
    return SectorSize(logical, physical)


class BlockOptions(Options):
    """What a device's disk is, and how the host treats it."""

    path: str | None = key(
        None, doc="File or block device with the contents.", legacy=POSITIONAL
    )
    nocache: bool = key(False, doc="Open it with O_DIRECT.")
    nodelete: bool = key(False, doc="Offer no trim to the guest.")
    sync: bool = key(False, doc="Open it with O_SYNC.")
    direct: bool = key(False, doc="The same as sync.")
    ro: bool = key(False, doc="Open it for reading only.")
    sectorsize: SectorSize | None = key(
        None, parse=_sector_size, doc="Bytes of a logical and a physical sector."
    )
    bootindex: int | None = key(
        None, parse=parse_int, doc="Place in the firmware's boot order."
    )
