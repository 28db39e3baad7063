"""pvpanic: a guest says that its kernel has crashed.

QEMU docs/specs/pvpanic: port 0x505, one byte.  Reads say which events we know of,
writes report one.  bhyve has none.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from pybhyve.amd64.acpi import Aml
from pybhyve.amd64.acpi.aml import string
from pybhyve.amd64.acpi.resources import io, template
from pybhyve.device import Device
from pybhyve.vmmapi import SuspendHow

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

log = logging.getLogger(__name__)

PORT: Final = 0x505
PANICKED: Final = 1 << 0  # it has crashed, and stays down
CRASHLOADED: Final = 1 << 1  # it has crashed, and starts a crash kernel


class Pvpanic(Device):
    """Only with ``lpc.pvpanic``: a guest that has crashed ends, as one that halts."""

    acpi_scope = "ISA"

    def __init__(self, machine: Machine) -> None:
        self._ctx = machine.ctx
        machine.inout.register("pvpanic", PORT, 1, self._known, self._report)

    def _known(self, _port: int, _size: int) -> int:
        return PANICKED | CRASHLOADED

    def _report(self, _port: int, _size: int, value: int) -> None:
        if value & PANICKED:
            log.error("the guest's kernel has crashed")
            self._ctx.suspend(SuspendHow.HALT)
        elif value & CRASHLOADED:
            log.warning("the guest's kernel has crashed, a crash kernel starts")

    def dsdt(self, aml: Aml) -> None:
        """``PEVT``."""
        with aml.device("PEVT"):
            aml.name("_HID", string("QEMU0001"))
            aml.name("_STA", 0x0B)
            aml.name("_CRS", template(io(PORT, 1)))
