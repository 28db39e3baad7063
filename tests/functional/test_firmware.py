"""Firmware from the reset vector: edk2's shell, its variables, files of wrong sizes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.functional.efishell import EfiShell
from tests.functional.machine import Programs, Starter
from tools import firmware, guests

TIMEOUT = 120  # seconds to the shell, on a busy machine

GUID = "01234567-89ab-cdef-0123-456789abcdef"
SET = f"setvar Kept -guid {GUID} -bs -nv =0a141e28"
SHOW = f"setvar Kept -guid {GUID}"


@pytest.fixture(scope="module")
def image() -> firmware.Image:
    return firmware.bhyve()


@pytest.fixture
def variables(image: firmware.Image, tmp_path: Path) -> Path:
    assert image.vars is not None
    return shutil.copyfile(image.vars, tmp_path / "VARS.fd")


def bootrom(image: firmware.Image, variables: Path | None = None) -> list[str]:
    return ["-l", image.option(variables)]


@pytest.fixture(scope="module", params=[1, 2], ids=["1cpu", "2cpu"])
def shell(request: pytest.FixtureRequest, start_for_module: Starter) -> EfiShell:
    """A shell of firmware in one file, without variables that are kept."""
    rom = bootrom(firmware.bhyve_without_variables())
    machine = start_for_module(f"efi-{request.param}", rom, ncpus=request.param)
    return EfiShell(machine.console, TIMEOUT)


def test_version(shell: EfiShell) -> None:
    version = shell.run("ver")

    assert "UEFI Interactive Shell v2.2" in version
    assert re.search(r"UEFI v2\.\d+ \(BHYVE, 0x00010000\)", version)


def test_memory_map(shell: EfiShell) -> None:
    memory = shell.run("memmap")

    total = re.search(r"Total Memory: *(\d+) MB", memory)
    assert total is not None, memory
    assert 500 <= int(total[1]) <= 512


def test_pci(shell: EfiShell) -> None:
    functions = shell.run("pci")

    assert re.search(r"00 +00 +00 +00 ==> Bridge Device - Host/PCI bridge", functions)
    assert re.search(r"00 +00 +1F +00 ==> Bridge Device - PCI/ISA bridge", functions)
    assert "Vendor 8086 Device 7000" in functions


def test_drivers(shell: EfiShell) -> None:
    drivers = shell.run("drivers")

    for name in ("PCI Bus Driver", "AtaAtapiPassThru", "Virtio Block Driver"):
        assert name in drivers


@pytest.mark.parametrize(("command", "status"), [("reset", 0), ("reset -s", 1)])
def test_end(
    start: Starter, image: firmware.Image, variables: Path, command: str, status: int
) -> None:
    machine = start("efi-end", bootrom(image, variables))
    EfiShell(machine.console, TIMEOUT).type(command)

    assert machine.console.wait(60) == status


@pytest.mark.parametrize("end", ["reset", "kill"])
def test_variables_are_kept(
    start: Starter, image: firmware.Image, variables: Path, end: str
) -> None:
    rom = bootrom(image, variables)
    machine = start("efi-vars", rom)
    shell = EfiShell(machine.console, TIMEOUT)
    assert "0A 14 1E 28" not in shell.run(SHOW)
    shell.run(SET)
    assert "0A 14 1E 28" in shell.run(SHOW)
    if end == "reset":
        shell.type("reset")
        assert machine.console.wait(60) == 0
    else:
        machine.console.process.kill()
        machine.console.process.wait()

    machine = start("efi-vars", rom)
    shell = EfiShell(machine.console, TIMEOUT)

    assert "0A 14 1E 28" in shell.run(SHOW)


def test_a_killed_write_leaves_a_whole_store(
    start: Starter, image: firmware.Image, variables: Path
) -> None:
    """Killed while the firmware makes its variables, again and again: it starts."""
    rom = bootrom(image, variables)
    whole = variables.stat().st_size
    for delay in (0.1, 0.2, 0.4):
        machine = start("efi-kill", rom)
        machine.console.expect("BdsDxe", TIMEOUT)
        machine.console.ended_within(delay)
        machine.console.process.kill()
        machine.console.process.wait()
        assert variables.stat().st_size == whole

    machine = start("efi-kill", rom)
    EfiShell(machine.console, TIMEOUT)


def test_one_store_is_of_one_machine(
    start: Starter, programs: Programs, image: firmware.Image, variables: Path
) -> None:
    machine = start("efi-one", bootrom(image, variables))
    machine.console.expect("BdsDxe", TIMEOUT)

    other = programs.run("bhyve", *bootrom(image, variables), "efi-other")

    assert other.returncode == 4
    assert other.stderr == (
        f'bhyve: Error opening bootrom variable file "{variables}": '
        "it is in use, each VM needs a copy of its own\n"
    )


@pytest.mark.parametrize(
    ("rom_size", "vars_size", "message"),
    [
        (0, None, 'Invalid bootrom size 0 of "{rom}": '),
        (4000, None, 'Invalid bootrom size 4000 of "{rom}": '),
        ((16 << 20) + 4096, None, 'Invalid bootrom size 16781312 of "{rom}": '),
        (4096, 100, 'Invalid bootrom variable size 100 of "{vars}": '),
        (4096, 16 << 20, "Invalid bootrom and variable aggregate size 16781312: "),
    ],
)
def test_wrong_sizes(
    programs: Programs,
    tmp_path: Path,
    rom_size: int,
    vars_size: int | None,
    message: str,
) -> None:
    rom, variables = tmp_path / "ROM.fd", tmp_path / "VARS.fd"
    option = f"bootrom,{rom}"
    for path, size in ((rom, rom_size), (variables, vars_size)):
        if size is not None:
            with path.open("wb") as file:
                file.truncate(size)
    if vars_size is not None:
        option += f",{variables}"

    refused = programs.run("bhyve", "-l", option, "efi-size")

    assert refused.returncode == 4
    (line,) = refused.stderr.splitlines()
    assert line.startswith("bhyve: " + message.format(rom=rom, vars=variables))
    assert programs.run("bhyvectl", "--vm=efi-size", "--destroy").returncode != 0


@pytest.mark.parametrize("bus", ["virtio-blk", "ahci-hd"])
def test_a_bios_boots_a_disk(start: Starter, tmp_path: Path, bus: str) -> None:
    disk = shutil.copyfile(guests.compile_boot_disk("bootsector"), tmp_path / "disk")
    with disk.open("r+b") as file:
        file.truncate(8 << 20)  # less has no cylinder
    image = [*bootrom(firmware.seabios()), "-s", f"3,{bus},{disk}"]
    console = start("bios", image).console
    console.expect("SeaBIOS", TIMEOUT)
    console.expect("Booting from Hard Disk", 60)
    console.expect("first sector", 30)
    # SeaBIOS's serial screen is behind what is on it.
    console.expect("second", 30)

    assert console.wait(30) == 1


def test_a_bios_without_fw_cfg_is_told(start: Starter) -> None:
    rom = firmware.seabios().rom
    console = start("bios-alone", ["-l", f"bootrom,{rom}"]).console

    console.expect("a BIOS needs fw_cfg: add fwcfg=qemu to -l bootrom,FILE", 30)
