"""POST codes: firmware writes its progress to a port where a card may show it.

bhyve: post.c, which has port 0x84 for reading only.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from pybhyve.amd64.acpi.resources import io
from pybhyve.device import Device

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

log = logging.getLogger(__name__)

# deviation: writes are taken, and 0x80 as well, where PCs have it (and which Linux
# writes to for a delay).
POST_PORTS: Final = (0x80, 0x84)


class Post(Device):
    """Reads are all ones, writes are logged."""

    acpi_resources = tuple(io(port, 1) for port in POST_PORTS)

    def __init__(self, machine: Machine) -> None:
        for port in POST_PORTS:
            machine.inout.register("post", port, 1, self._read, self._write)

    @staticmethod
    def _read(_port: int, size: int) -> int:
        return (1 << 8 * size) - 1

    @staticmethod
    def _write(port: int, _size: int, value: int) -> None:
        log.debug("post port=%#x code=%#04x", port, value)
