"""All tables together: which there are, and where they are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pybhyve.amd64.acpi.dsdt import build_dsdt
from pybhyve.amd64.acpi.facs import build_facs
from pybhyve.amd64.acpi.fadt import build_fadt
from pybhyve.amd64.acpi.hpet import build_hpet
from pybhyve.amd64.acpi.madt import build_madt
from pybhyve.amd64.acpi.mcfg import build_mcfg
from pybhyve.amd64.acpi.rsdp import build_rsdp
from pybhyve.amd64.acpi.rsdt import build_rsdt, build_xsdt
from pybhyve.amd64.acpi.spcr import build_spcr
from pybhyve.amd64.acpi.srat import build_srat
from pybhyve.amd64.acpi.table import Table
from pybhyve.errors import BhyveError

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

ACPI_BASE: Final = 0xF2400
ACPI_LIMIT: Final = 0x100000
COM1: Final = "com1"  # the device that SPCR is about


def build_acpi(machine: Machine) -> list[Table]:
    """The tables that describe a machine, in bhyve's order."""
    tables = [
        build_fadt(),
        build_madt(machine.ncpu),
        build_hpet(machine.vm.hpet_capabilities()),
        build_mcfg(),
        build_facs(),
    ]
    if COM1 in machine.devices:
        tables.append(build_spcr())
    if machine.domains:
        tables.append(build_srat(machine.domains, machine.vm.memmap()))
    tables.append(build_dsdt(machine.devices))
    # FACS and DSDT are in the FADT instead.
    listed = [table.name for table in tables if table.name not in ("FACS", "DSDT")]
    return [build_rsdp(), build_rsdt(listed), build_xsdt(listed), *tables]


def place_acpi(tables: Sequence[Table]) -> dict[str, tuple[int, bytes]]:
    """Address and contents of each table where there is no firmware to place them.

    BhyveError: they do not fit below 1 MiB.
    """
    addresses = {}
    end = ACPI_BASE
    for table in tables:
        addresses[table.name] = -(-end // table.align) * table.align
        end = addresses[table.name] + len(table.data)
    if end > ACPI_LIMIT:
        raise BhyveError(
            f"the ACPI tables need {end - ACPI_BASE} bytes, "
            f"{ACPI_LIMIT - ACPI_BASE} are there: use fewer vCPUs or PCI devices"
        )
    return {
        table.name: (addresses[table.name], table.at(addresses)) for table in tables
    }
