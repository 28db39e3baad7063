"""The board around the processor: what every machine has before its PCI devices.

bhyve: bhyve_init_platform() and bhyve_init_platform_late() of bhyverun_machdep.c.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pybhyve.amd64.acpi.build import build_acpi, place_acpi
from pybhyve.amd64.acpi.loader import add_acpi
from pybhyve.amd64.atkbdc import Atkbdc
from pybhyve.amd64.bootrom import init_bootrom
from pybhyve.amd64.kernemu_dev import KernelDevices
from pybhyve.amd64.lowmem import LOWMEM_END, LowMemory, bios_end
from pybhyve.amd64.mptable import MPTABLE_BASE, build_mptable
from pybhyve.amd64.pci_irq import PirqRouter
from pybhyve.amd64.pm import PowerManagement
from pybhyve.amd64.post import Post
from pybhyve.amd64.qemu_fwcfg import init_fwcfg
from pybhyve.amd64.rtc import Rtc
from pybhyve.amd64.smbios import SMBIOS_BASE, init_smbios
from pybhyve.amd64.vmgenc import Vmgenc
from pybhyve.pci.bus import PciHost, pci_host

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

log = logging.getLogger(__name__)


def init_platform(machine: Machine) -> None:
    """Add the board's devices, in bhyve's order; PCI functions come afterwards."""
    machine.add_device("kernemu", KernelDevices(machine))
    machine.add_device("post", Post(machine))
    router = PirqRouter(machine)
    machine.add_device("atkbdc", Atkbdc(machine, router))
    machine.add_device("pirq", router)
    machine.add_device("rtc", Rtc(machine))
    pm = PowerManagement(machine)
    pm.attach()
    machine.add_device("pm", pm)
    init_bootrom(machine, machine.firmware)
    if machine.options.acpi_tables:
        machine.add_device("vmgenc", Vmgenc(machine))
    host = PciHost(machine, router)
    host.attach()
    machine.add_device("pci", host)
    init_fwcfg(machine)


def late_init(machine: Machine) -> None:
    """Put the tables that describe the finished machine into memory and fw_cfg.

    With a BIOS they are in fw_cfg only: it has its place where theirs is in memory.

    BhyveError: a table cannot describe it, or does not fit.
    """
    tables: dict[int, bytes] = {}
    machine.fwcfg.add_file("etc/e820", machine.e820.to_bytes())
    if boot_order := pci_host(machine).boot_order():
        machine.fwcfg.add_file("bootorder", boot_order)
    if machine.options.x86_mptable:
        tables[MPTABLE_BASE] = build_mptable(machine.ncpu, pci_host(machine))
    tables[SMBIOS_BASE] = init_smbios(machine)
    if machine.options.acpi_tables:
        acpi = build_acpi(machine)
        add_acpi(machine.fwcfg, acpi)
        if machine.options.acpi_tables_in_memory:
            tables.update(place_acpi(acpi).values())
    if machine.firmware is not None and (bios := bios_end(machine.firmware.rom)):
        tables = {LOWMEM_END - len(bios): bios}
        if machine.options.lpc_fwcfg != "qemu":
            log.warning("a BIOS needs fw_cfg: add fwcfg=qemu to -l bootrom,FILE")
    machine.add_device("lowmem", LowMemory(machine.ctx, tables))
