"""What is below 1 MiB at power-on: the tables for the guest, or the end of a BIOS.

A PC shows the end of its ROM there, until the BIOS has made RAM of it.  There is only
RAM here, with the same contents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from pybhyve.device import Device

if TYPE_CHECKING:
    from pybhyve.vmmapi import VmCtx

LOWMEM_END: Final = 0x100000
BIOS_MAX: Final = 0x20000
"""Bytes of a ROM that are there at most: those of segments E000 and F000."""

FAR_JUMP: Final = 0xEA
RESET_VECTOR: Final = -16
BIOS_SEGMENT: Final = b"\x00\xf0"


def bios_end(rom: bytes) -> bytes | None:
    """The part of a boot ROM that has to be below 1 MiB; None for other firmware.

    The first instruction of a BIOS jumps there: far, into segment F000.
    """
    vector = rom[RESET_VECTOR:]
    if vector[0] != FAR_JUMP or vector[3:5] != BIOS_SEGMENT:
        return None
    return rom[-BIOS_MAX:]


class LowMemory(Device):
    """Puts contents, by their addresses, into RAM at power-on and at a reset.

    VmmError: there is no RAM.
    """

    def __init__(self, ctx: VmCtx, contents: Mapping[int, bytes]) -> None:
        self._ctx = ctx
        self._contents = contents
        self.reset()

    def reset(self) -> None:
        """Put them there."""
        for address, data in self._contents.items():
            self._ctx.write(address, data)
