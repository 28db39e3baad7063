r"""DSDT: the devices, as their own ``dsdt`` methods describe them (ACPI 6.5, 5.2.11.1).

A device says with ``acpi_scope`` below what its part belongs.  A part that no place was
found for is an error, because the guest would not know of the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pybhyve.amd64.acpi.aml import Aml, arg, eisaid, package
from pybhyve.amd64.acpi.resources import template
from pybhyve.amd64.acpi.table import Table, build_table
from pybhyve.device import Device

SLP_TYP_S5: Final = 5


class Dsdt(Aml):
    """A DSDT being written; :meth:`place` is where devices' parts come in."""

    def __init__(self, devices: Mapping[str, Device]) -> None:
        super().__init__()
        self.system_resources = [
            resource
            for device in devices.values()
            for resource in device.acpi_resources
        ]
        self._waiting = {
            name: device
            for name, device in devices.items()
            if type(device).dsdt is not Device.dsdt
        }

    def place(self, scope: str) -> None:
        """Write here what belongs into ``scope`` and has not been placed before."""
        here = [
            (name, device)
            for name, device in self._waiting.items()
            if device.acpi_scope == scope
        ]
        for name, _device in here:
            del self._waiting[name]
        for _name, device in here:
            device.dsdt(self)

    def finish(self) -> Table:
        """The table; ValueError where a device's part has no place."""
        if self._waiting:
            lost = ", ".join(self._waiting)
            raise ValueError(f"the DSDT has no place for {lost}")
        return build_table("DSDT", 2, self.to_bytes())


def build_dsdt(devices: Mapping[str, Device]) -> Table:
    r"""The table for these devices.

    ISA devices that no bridge has placed are in ``\_SB``.
    """
    dsdt = Dsdt(devices)
    dsdt.name(r"\_S5", package([SLP_TYP_S5, 0, 0, 0]))
    # The interrupt model: 0 PIC, 1 APIC (5.8.1).
    dsdt.name("PICM", 0)
    with dsdt.method("_PIC", 1):
        dsdt.store(arg(0), "PICM")
    with dsdt.scope(r"\_SB"):
        dsdt.place("_SB")
        dsdt.place("ISA")
        # What no other device claims.
        with dsdt.device("SIO"):
            dsdt.name("_HID", eisaid("PNP0C02"))
            dsdt.name("_CRS", template(*dsdt.system_resources))
    return dsdt.finish()
