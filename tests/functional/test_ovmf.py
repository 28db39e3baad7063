"""Debian's OVMF as it is: its shell, a kernel that it starts, tables in Linux."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.efishell import EfiShell
from tests.functional.machine import BOOT_TIMEOUT, Machine, Starter
from tools import fetch, firmware, guests

TIMEOUT = 120  # seconds to the shell, on a busy machine
UUID = "00112233-4455-6677-8899-aabbccddeeff"


def fresh_variables(directory: Path) -> Path:
    image = firmware.ovmf()
    assert image.vars is not None
    return shutil.copyfile(image.vars, directory / "VARS.fd")


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_variables(tmp_path_factory.mktemp("ovmf"))


def bootrom(variables: Path) -> list[str]:
    return ["-l", firmware.ovmf().option(variables)]


def test_shell(start: Starter, variables: Path) -> None:
    machine = start("ovmf", bootrom(variables), ncpus=2)
    shell = EfiShell(machine.console, TIMEOUT)

    assert "UEFI Interactive Shell v2.2" in shell.run("ver")
    memory = re.search(r"Total Memory: *(\d+) MB", shell.run("memmap"))
    assert memory is not None
    assert 500 <= int(memory[1]) <= 512
    functions = shell.run("pci")
    assert re.search(r"00 +00 +00 +00 ==> Bridge Device - Host/PCI bridge", functions)
    assert "Vendor 8086 Device 1237" in functions
    assert "ProductName: BHYVE" in shell.run("smbiosview -t 1")
    # What it changed in its flash is there after a reset.
    shell.run(f"setvar Kept -guid {UUID} -bs -nv =0a141e28")
    shell.type("reset")
    assert machine.console.wait(60) == 0

    machine = start("ovmf", bootrom(variables))
    shell = EfiShell(machine.console, TIMEOUT)
    assert "0A 14 1E 28" in shell.run(f"setvar Kept -guid {UUID}")
    shell.type("reset -s")
    assert machine.console.wait(60) == 1


def test_boot_order(start: Starter, variables: Path, tmp_path: Path) -> None:
    """It tries the disks that have a place in the order, and no others."""
    disks = []
    options = {
        "3,virtio-blk": "",
        "4,virtio-blk": ",bootindex=7",
        "5,ahci-hd": ",bootindex=3",
        "6,virtio-blk": ",bootindex=5",
    }
    for place, bootindex in options.items():
        path = tmp_path / f"{place[0]}.img"
        with path.open("wb") as file:
            file.truncate(1 << 20)
        disks += ["-s", f"{place},{path}{bootindex}"]
    machine = start("ovmf-order", [*bootrom(variables), *disks])
    EfiShell(machine.console, TIMEOUT)

    tried = re.findall(r"failed to load .*?Pci\(0x(\d),0x0\)", machine.console.shown)
    assert tried == ["5", "6", "4"]


def test_an_option_rom_runs(start: Starter, tmp_path: Path) -> None:
    """It finds iPXE in a network device's ROM, and that an address by DHCP."""
    # Among boot options of an earlier start, the network would be the last.
    variables = fresh_variables(tmp_path)
    rom = fetch.package("ipxe-qemu").file("usr/lib/ipxe/qemu/efi-virtio.rom")
    device = ["-s", f"3,virtio-net,slirp,open=true,rom={rom}"]
    console = start("ovmf-rom", [*bootrom(variables), *device]).console
    console.expect(r"iPXE \d", TIMEOUT)
    console.expect("virtio-net on 0000:00:03.0", TIMEOUT)
    console.expect(r"net0: 10\.0\.2\.15/255\.255\.255\.0", TIMEOUT)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for ``-f``, of more than a page."""
    path = tmp_path_factory.mktemp("items") / "text"
    path.write_bytes(b"".join(b"%d\n" % number for number in range(3000)))
    return path


@pytest.fixture(scope="module")
def linux(start_for_module: Starter, variables: Path, text: Path) -> Machine:
    """A kernel that OVMF has started, at its prompt."""
    guest = guests.find("debian12-cloud")
    image = [
        *bootrom(variables),
        *guest.image(modules=["qemu_fw_cfg"]).options(),
        *("-o", f"cmdline={guest.cmdline} quiet"),
        *("-f", "name=opt/org.example/hello,string=world"),
        *("-f", f"opt/org.example/text,file={text}"),
        *("-U", UUID),
        *("-s", "3,uart", "-s", "4,dummy", "-s", "1:2:0,dummy", "-Y"),
    ]
    machine = start_for_module("ovmf-linux", image, guest=guest, ncpus=2)
    machine.console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)
    return machine


def read_file(machine: Machine, path: str) -> bytes:
    """The contents of a file in the guest."""
    dump = machine.console.run(f'hexdump -v -e \'32/1 "%02x" "\\n"\' {path}')
    return bytes.fromhex(dump)


def test_it_is_efi(linux: Machine) -> None:
    assert linux.console.run("dmesg | grep -c 'efi: EFI v2'") == "1\n"


def test_items_are_files_in_linux(linux: Machine, text: Path) -> None:
    names = "/sys/firmware/qemu_fw_cfg/by_name"

    assert linux.console.run(f"cat {names}/opt/org.example/hello/raw") == "world\0"
    assert linux.console.run(f"cat {names}/opt/org.example/hello/size") == "6\n"
    assert read_file(linux, f"{names}/opt/bhyve/hw.ncpu/raw") == b"\2\0\0\0"
    assert read_file(linux, f"{names}/opt/org.example/text/raw") == text.read_bytes()


def test_smbios_as_linux_has_it(
    linux: Machine, tmp_path: Path, dmidecode: Callable[..., str]
) -> None:
    entry = bytearray(read_file(linux, "/sys/firmware/dmi/tables/smbios_entry_point"))
    table = read_file(linux, "/sys/firmware/dmi/tables/DMI")
    # A dump has the table at 0x20, and the entry point says so.
    old, new = entry[0x18:0x1C], (0x20).to_bytes(4, "little")
    entry[0x18:0x1C] = new
    entry[0x15] = (entry[0x15] + sum(old) - sum(new)) % 256
    (tmp_path / "dump").write_bytes(entry.ljust(0x20, b"\0") + table)
    decoded = dmidecode(tmp_path, "--from-dump", "dump")

    assert f"UUID: {UUID}" in decoded
    assert "Size: 512 MB" in decoded
    assert decoded.count("Core Count: 1") == 2
    assert linux.console.run("cat /sys/class/dmi/id/sys_vendor") == "FreeBSD\n"


def test_acpi_as_linux_has_it(
    linux: Machine, tmp_path: Path, iasl: Callable[..., str]
) -> None:
    names = linux.console.run(
        "cd /sys/firmware/acpi/tables; ls -d [A-Z]*; cd /"
    ).split()

    assert {*names} >= {"APIC", "DSDT", "FACP", "FACS", "HPET", "MCFG", "SPCR"}
    for name in names:
        data = read_file(linux, f"/sys/firmware/acpi/tables/{name}")
        (tmp_path / f"{name}.dat").write_bytes(data)
        iasl(tmp_path, "-d", f"{name}.dat")
        decoded = (tmp_path / f"{name}.dsl").read_text()
        assert "Incorrect checksum" not in decoded
        if name == "DSDT":
            assert "QEMU0002" in decoded
    assert "ACPI Error" not in linux.console.run("dmesg")


def test_bars_are_where_firmware_put_them(linux: Machine) -> None:
    log = linux.console.run("dmesg | grep -i pci")

    assert not re.search(
        "no compatible bridge|can't claim|failed to assign|conflict|not ECAM", log
    )
    # OVMF's places on bus 0: I/O from 0xC000, memory from 2 GiB.  Others it leaves.
    port, *memory = bars(linux, "0000:00:04.0")
    assert 0xC000 <= port < 0x10000
    assert all(0x80000000 <= start < 0x80100000 for start in memory)
    port, *memory = bars(linux, "0000:01:02.0")
    assert 0x2000 <= port < 0x3000
    assert all(0xC0000000 <= start < 0xC0400000 for start in memory)


def bars(machine: Machine, place: str) -> list[int]:
    """The addresses of the first three BARs."""
    lines = machine.console.run(f"cat /sys/bus/pci/devices/{place}/resource")
    return [int(line.split()[0], 16) for line in lines.splitlines()[:3]]


def test_power_off(linux: Machine) -> None:
    linux.console.send("poweroff -f\n")

    assert linux.console.wait(60) == 1
