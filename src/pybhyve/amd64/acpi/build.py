"""All tables together: what each is called, where it goes, who points to whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
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
from pybhyve.errors import BhyveError

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

ACPI_BASE: Final = 0xF2400
ACPI_LIMIT: Final = 0x100000
ALIGN: Final = 16
FACS_ALIGN: Final = 64
COM1: Final = "com1"  # the device that SPCR is about

Addresses = defaultdict[str, int]


def build_acpi(machine: Machine, base: int = ACPI_BASE) -> dict[str, tuple[int, bytes]]:
    """Address and contents of each table, by signature, in the order of placement.

    BhyveError: they do not fit below 1 MiB.
    """
    dsdt = build_dsdt(machine.devices)
    listed = ["FACP", "APIC", "HPET", "MCFG"]
    if COM1 in machine.devices:
        listed.append("SPCR")
    if machine.domains:
        listed.append("SRAT")
    builders: dict[str, Callable[[Addresses], bytes]] = {
        "RSDP": lambda at: build_rsdp(at["RSDT"], at["XSDT"]),
        "RSDT": lambda at: build_rsdt([at[name] for name in listed]),
        "XSDT": lambda at: build_xsdt([at[name] for name in listed]),
        "FACP": lambda at: build_fadt(at["FACS"], at["DSDT"]),
        "APIC": lambda _at: build_madt(machine.ncpu),
        "HPET": lambda _at: build_hpet(machine.vm.hpet_capabilities()),
        "MCFG": lambda _at: build_mcfg(),
        "FACS": lambda _at: build_facs(),
        "SPCR": lambda _at: build_spcr(),
        "SRAT": lambda _at: build_srat(machine.domains, machine.vm.memmap()),
        "DSDT": lambda _at: dsdt,
    }
    for optional in {"SPCR", "SRAT"} - {*listed}:
        del builders[optional]
    # No table's size depends on an address, so a first pass finds the addresses.
    addresses: Addresses = defaultdict(int)
    end = base
    for name, build in builders.items():
        align = FACS_ALIGN if name == "FACS" else ALIGN
        addresses[name] = -(-end // align) * align
        end = addresses[name] + len(build(Addresses(int)))
    if end > ACPI_LIMIT:
        raise BhyveError(
            f"the ACPI tables need {end - base} bytes, {ACPI_LIMIT - base} are there: "
            "use fewer vCPUs or PCI devices"
        )
    return {
        name: (addresses[name], build(addresses)) for name, build in builders.items()
    }
