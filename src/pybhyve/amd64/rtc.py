"""The real time clock's start values: the time, and the memory sizes in CMOS.

The clock itself is vmm's, ports 0x70 and 0x71.  bhyve: rtc.c.
"""

from __future__ import annotations

import calendar
import time
from typing import TYPE_CHECKING, Final

from pybhyve.amd64.acpi import Aml
from pybhyve.amd64.acpi.aml import eisaid
from pybhyve.amd64.acpi.resources import io, irq, template
from pybhyve.device import Device

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

RTC_PORT: Final = 0x70
RTC_IRQ: Final = 8
RTC_CENTURY: Final = 0x32

# Where PC firmware leaves the memory sizes, in units of 64 KiB.
LMEM_LSB: Final = 0x34  # above 16 MiB, below 4 GiB: 2 bytes
LMEM_MSB: Final = 0x35
HMEM_LSB: Final = 0x5B  # above 4 GiB: 3 bytes
HMEM_SB: Final = 0x5C
HMEM_MSB: Final = 0x5D
SIXTEEN_MIB: Final = 16 << 20
UNIT: Final = 64 << 10


class Rtc(Device):
    """Sets the clock, and describes it to the guest."""

    acpi_scope = "ISA"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._init_nvram()
        self._set_time()

    def _init_nvram(self) -> None:
        vm, ctx = self._machine.vm, self._machine.ctx
        low = max(ctx.lowmem_size - SIXTEEN_MIB, 0) // UNIT
        high = ctx.highmem_size // UNIT
        vm.rtc_write(LMEM_LSB, low & 0xFF)
        vm.rtc_write(LMEM_MSB, low >> 8 & 0xFF)
        vm.rtc_write(HMEM_LSB, high & 0xFF)
        vm.rtc_write(HMEM_SB, high >> 8 & 0xFF)
        vm.rtc_write(HMEM_MSB, high >> 16 & 0xFF)

    def _set_time(self) -> None:
        """The host's time, as local time or UTC, in seconds of a clock without zone."""
        now = time.time()
        local = self._machine.options.rtc_use_localtime
        fields = time.localtime(now) if local else time.gmtime(now)
        self._machine.vm.rtc_settime(calendar.timegm(fields))

    def reset(self) -> None:
        """The memory sizes, and the host's time, again."""
        self._init_nvram()
        self._set_time()

    def dsdt(self, aml: Aml) -> None:
        """``RTC``."""
        with aml.device("RTC"):
            aml.name("_HID", eisaid("PNP0B00"))
            aml.name("_CRS", template(io(RTC_PORT, 2), irq(RTC_IRQ)))
