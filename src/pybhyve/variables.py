"""The configuration variables that are about the machine as a whole.

bhyve_config(5).  The variables of a device are declared with the device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from uuid import UUID

from pybhyve.options import Options, integer, key, numbered, one_of, parser


@parser("uuid")
def _uuid(text: str) -> UUID:
    if re.fullmatch("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text):
        return UUID(text)
    raise ValueError("expected a UUID like 01234567-89ab-cdef-0123-456789abcdef")


class VcpuOptions(Options):
    """``vcpu.N.…``."""

    cpuset: str | None = key(None, doc="Host CPUs to run on: numbers, ranges, commas.")


class DomainOptions(Options):
    """``domains.N.…``: one NUMA domain."""

    size: str | None = key(None, doc="Memory of the domain.")
    cpus: str | None = key(None, doc="vCPUs of the domain: numbers, ranges, commas.")
    domain_policy: str | None = key(
        None,
        doc="Where the domain's memory comes from on the host, as cpuset(1) has it.",
    )


class FwcfgOptions(Options):
    """``fwcfg.N.…``: one item of ``-f``."""

    name: str = key(doc="Name of the item.")
    string: str | None = key(None, doc="Its data, with a NUL behind.")
    file: str | None = key(None, doc="File with its data.")


class GlobalOptions(Options):
    """Every variable outside ``pci``, typed; an instance is one machine's settings."""

    name: str | None = key(None, doc="Name of the VM.")
    acpi_tables: bool = key(True, preset=True, doc="Give the guest ACPI tables.")
    acpi_tables_in_memory: bool = key(
        True, preset=True, doc="Put the ACPI tables at 0xF2400 too."
    )
    memory_size: str = key(
        "256M",
        name="memory.size",
        preset=True,
        doc="Guest memory; a bare number below 1048576 is in MiB, else suffix K M G T.",
    )
    memory_wired: bool = key(
        False, name="memory.wired", doc="Lock guest memory in host memory."
    )
    memory_guest_in_core: bool = key(
        False, name="memory.guest_in_core", doc="Have guest memory in core files."
    )
    cpus: str | None = key(None, doc="Number of vCPUs.")
    sockets: str | None = key(None, doc="Packages; as many as vCPUs if not given.")
    cores: str | None = key(None, doc="Cores in a package, 1 if not given.")
    threads: str | None = key(None, doc="Threads of a core, 1 if not given.")
    destroy_on_poweroff: bool = key(False, doc="Destroy the VM when it powers off.")
    engine: str = key(
        "auto",
        parse=one_of("auto", "kvm", "soft"),
        doc="What runs the guest: the host's processor or one in software.",
    )
    soft_translate: bool = key(
        True,
        name="soft.translate",
        doc="The processor in software translates what runs often.",
    )
    kernel: str | None = key(
        None, doc="Linux, PVH or multiboot kernel to load before the start."
    )
    initrd: str | None = key(None, doc="Initial RAM disk for kernel.")
    cmdline: str | None = key(
        None, doc="Command line for kernel; Linux talks on com1 if not given."
    )
    bootrom: str | None = key(
        None, doc="Firmware image; it starts kernel, if lpc.fwcfg is qemu."
    )
    bootvars: str | None = key(None, doc="Its variable store, which it changes.")
    restore: str | None = key(None, doc="Checkpoint to go on from.")
    gdb_address: str = key(
        "localhost", name="gdb.address", doc="Where the debug server listens."
    )
    gdb_port: int = key(
        0,
        parse=integer(0, 65535),
        name="gdb.port",
        doc="Port of the debug server; 0: none.",
    )
    gdb_wait: bool = key(
        False, name="gdb.wait", doc="Do not start before a debugger has connected."
    )
    keyboard_layout: str | None = key(
        None, name="keyboard.layout", doc="Key map of the graphics console."
    )
    rtc_use_localtime: bool = key(
        True, name="rtc.use_localtime", doc="The real time clock has local time."
    )
    uuid: UUID | None = key(
        None, parse=_uuid, doc="SMBIOS UUID; made from the name if not given."
    )
    virtio_msix: bool = key(True, doc="virtio devices have MSI-X.")
    config_dump: bool = key(
        False, name="config.dump", doc="Print all variables and exit."
    )
    config_check: bool = key(
        False, name="config.check", doc="Report variables that nothing knows."
    )
    log_level: str = key(
        "warning",
        parse=one_of("debug", "info", "warning", "error"),
        name="log.level",
        doc="The least that is said on standard error.",
    )
    bios_vendor: str = key("BHYVE", name="bios.vendor", doc="SMBIOS type 0.")
    bios_version: str = key("14.0", name="bios.version", doc="SMBIOS type 0.")
    bios_release_date: str = key(
        "10/17/2021", name="bios.release_date", doc="SMBIOS type 0."
    )
    system_manufacturer: str = key(
        "FreeBSD", name="system.manufacturer", doc="SMBIOS type 1."
    )
    system_product_name: str = key(
        "BHYVE", name="system.product_name", doc="SMBIOS type 1."
    )
    system_version: str = key("1.0", name="system.version", doc="SMBIOS type 1.")
    system_serial_number: str = key(
        "None", name="system.serial_number", doc="SMBIOS type 1."
    )
    system_sku: str = key("None", name="system.sku", doc="SMBIOS type 1.")
    system_family_name: str = key(
        "Virtual Machine", name="system.family_name", doc="SMBIOS type 1."
    )
    board_manufacturer: str = key(
        "FreeBSD", name="board.manufacturer", doc="SMBIOS type 2."
    )
    board_product_name: str = key(
        "BHYVE", name="board.product_name", doc="SMBIOS type 2."
    )
    board_version: str = key("1.0", name="board.version", doc="SMBIOS type 2.")
    board_serial_number: str = key(
        "None", name="board.serial_number", doc="SMBIOS type 2."
    )
    board_asset_tag: str = key("None", name="board.asset_tag", doc="SMBIOS type 2.")
    board_location: str = key("None", name="board.location", doc="SMBIOS type 2.")
    chassis_manufacturer: str = key(
        "FreeBSD", name="chassis.manufacturer", doc="SMBIOS type 3."
    )
    chassis_version: str = key("1.0", name="chassis.version", doc="SMBIOS type 3.")
    chassis_serial_number: str = key(
        "None", name="chassis.serial_number", doc="SMBIOS type 3."
    )
    chassis_asset_tag: str = key("None", name="chassis.asset_tag", doc="SMBIOS type 3.")
    chassis_sku: str = key("None", name="chassis.sku", doc="SMBIOS type 3.")
    x86_strictmsr: bool = key(
        True, name="x86.strictmsr", preset=True, doc="An unknown MSR raises #GP."
    )
    x86_verbosemsr: bool = key(
        False, name="x86.verbosemsr", preset=True, doc="Report each unknown MSR."
    )
    x86_mptable: bool = key(True, name="x86.mptable", doc="Give the guest an MP table.")
    x86_x2apic: bool = key(False, name="x86.x2apic", doc="The local APIC is an x2APIC.")
    x86_strictio: bool = key(
        False, name="x86.strictio", doc="End the VM at a port that no device has."
    )
    x86_vmexit_on_hlt: bool = key(
        False, name="x86.vmexit_on_hlt", doc="HLT ends the run of a vCPU."
    )
    x86_vmexit_on_pause: bool = key(
        False, name="x86.vmexit_on_pause", doc="PAUSE ends the run of a vCPU."
    )
    tpm_type: str | None = key(None, name="tpm.type", doc="passthru or swtpm.")
    tpm_path: str | None = key(None, name="tpm.path", doc="TPM device or socket.")
    tpm_version: str = key("2.0", name="tpm.version", doc="TPM version.")
    tpm_intf: str = key("crb", name="tpm.intf", doc="TPM interface.")
    lpc_fwcfg: str = key(
        "bhyve",
        parse=one_of("bhyve", "qemu"),
        name="lpc.fwcfg",
        preset=True,
        doc="Firmware configuration interface; OVMF needs qemu.",
    )
    lpc_bootrom: str | None = key(
        None, name="lpc.bootrom", doc="Old name of bootrom.", deprecated="bootrom"
    )
    lpc_bootvars: str | None = key(
        None, name="lpc.bootvars", doc="Old name of bootvars.", deprecated="bootvars"
    )
    lpc_com1_path: str | None = key(None, name="lpc.com1.path", doc="Backend of COM1.")
    lpc_com2_path: str | None = key(None, name="lpc.com2.path", doc="Backend of COM2.")
    lpc_com3_path: str | None = key(None, name="lpc.com3.path", doc="Backend of COM3.")
    lpc_com4_path: str | None = key(None, name="lpc.com4.path", doc="Backend of COM4.")
    lpc_pc_testdev: bool = key(
        False, name="lpc.pc-testdev", doc="kvm-unit-tests' device."
    )
    lpc_pvpanic: bool = key(
        False, name="lpc.pvpanic", doc="A guest whose kernel crashes ends, status 2."
    )
    lpc_pcireg_vendor: str = key("0x8086", name="lpc.pcireg.vendor", doc="PCI id.")
    lpc_pcireg_device: str = key("0x7000", name="lpc.pcireg.device", doc="PCI id.")
    lpc_pcireg_revid: str = key("0", name="lpc.pcireg.revid", doc="PCI id.")
    lpc_pcireg_subvendor: str = key("0", name="lpc.pcireg.subvendor", doc="PCI id.")
    lpc_pcireg_subdevice: str = key("0", name="lpc.pcireg.subdevice", doc="PCI id.")
    vcpu: Mapping[int, VcpuOptions] = numbered(VcpuOptions, doc="One vCPU.")
    domains: Mapping[int, DomainOptions] = numbered(DomainOptions, doc="NUMA domains.")
    fwcfg: Mapping[int, FwcfgOptions] = numbered(FwcfgOptions, doc="Firmware items.")
