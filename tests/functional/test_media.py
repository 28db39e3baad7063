"""Other people's programs, started by firmware from a disk or a CD on AHCI."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.console import Console
from tests.functional.efishell import CONTROL_SEQUENCE, EfiShell
from tests.functional.machine import Programs, Starter
from tools import fetch, firmware, media

TIMEOUT = 120  # seconds to what firmware starts, on a busy machine

INSTALLER = (
    "usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64/{name}"
)
TEXT_SCREEN = 0xB8000  # of a PC: 25 lines of 80 characters with an attribute each

Boot = Callable[..., Console]


@pytest.fixture
def boot(start: Starter, tmp_path: Path) -> Boot:
    """A machine with firmware and PCI devices."""

    def boot(
        name: str, *slots: str, image: firmware.Image, memory: str = "512M"
    ) -> Console:
        options = ["-l", image.option(tmp_path / "VARS.fd")]
        options += (word for slot in slots for word in ("-s", slot))
        console: Console = start(name, options, memory=memory).console
        return console

    return boot


def uefi() -> firmware.Image:
    return firmware.bhyve_without_variables()


class GrubShell:
    """GRUB's own shell on the console that firmware gives it."""

    PROMPT = "grub> "

    def __init__(self, console: Console) -> None:
        console.expect(self.PROMPT, TIMEOUT)
        self.console = console

    def run(self, command: str, timeout: float = 60) -> str:
        """Type a command and return what it shows."""
        self.type(command)
        shown = self.console.expect(rf"(.*){self.PROMPT}", timeout)[1]
        return CONTROL_SEQUENCE.sub("", shown).replace("\r", "")

    def type(self, command: str) -> None:
        """Type a command that will not come back."""
        for key in command:
            self.console.send(key)
            # Between control sequences, which have letters of their own.
            self.console.expect(rf"(?<![\x1b\[0-9;]){re.escape(key)}", 30)
        self.console.send("\r")


def test_efi_shell_and_a_program_from_a_disk(boot: Boot, tmp_path: Path) -> None:
    disk = media.fat(
        tmp_path / "esp.img",
        {
            "EFI/tools/ipxe.efi": fetch.package("ipxe").file("boot/ipxe.efi"),
            "words.txt": b"from a disk\n",
        },
    )
    shell = EfiShell(boot("efi-hd", f"3:0,ahci-hd,{disk}", image=uefi()), TIMEOUT)

    assert re.search(
        r"FS0: Alias\(s\):.*PciRoot\(0x0\)/Pci\(0x3,0x0\)/Sata\(0x0,0xFFFF,0x0\)",
        shell.run("map -r"),
        re.DOTALL,
    )
    assert "ipxe.efi" in shell.run(r"ls fs0:\EFI\tools")
    assert "from a disk" in shell.run(r"type fs0:\words.txt")
    assert "to a disk" in shell.run(
        r"echo to a disk >a fs0:\new.txt" "\r" r"type fs0:\new.txt"
    )
    shell.type(r"fs0:\EFI\tools\ipxe.efi")
    shell.console.expect("Open Source Network Boot Firmware", TIMEOUT)
    shell.console.expect("Press Ctrl-B", TIMEOUT)
    shell.console.send("\x02")
    shell.console.expect("iPXE> ", 30)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("bhyve", "ahci-cd"),
        ("ovmf", "ahci-cd"),
        ("seabios", "ahci-cd"),
        ("seabios", "ahci-hd"),
    ],
)
def test_ipxe_iso(boot: Boot, name: str, device: str) -> None:
    """UEFI starts its El Torito image, a BIOS starts ISOLINUX, which loads it.

    The ISO is a disk too, for a BIOS.
    """
    image = uefi() if name == "bhyve" else firmware.FIRMWARE[name]()
    iso = fetch.package("ipxe").file("usr/lib/ipxe/ipxe.iso")
    console = boot(f"ipxe-{name}", f"3:0,{device},{iso},ro", image=image)
    console.expect("Open Source Network Boot Firmware", TIMEOUT)
    console.expect("Press Ctrl-B", TIMEOUT)
    console.send("\x02")
    console.expect("iPXE> ", 30)


def text_screen(programs: Programs, name: str) -> str:
    """What a program has drawn where PCs have their text screen: in RAM, here."""
    memory = Path(programs.env["XDG_RUNTIME_DIR"]) / "pybhyve" / name / "memory/sysmem"
    with memory.open("rb") as ram:
        ram.seek(TEXT_SCREEN)
        return ram.read(4000)[::2].decode("cp437")


def test_memtest_iso(boot: Boot, programs: Programs) -> None:
    iso = fetch.package("memtest86+").file("usr/lib/memtest86+/memtest86+x64.iso")
    console = boot("memtest-iso", f"3:0,ahci-cd,{iso}", image=firmware.seabios())
    console.expect("Booting from DVD/CD", TIMEOUT)
    for _ in range(TIMEOUT):
        screen = text_screen(programs, "memtest-iso")
        if re.search("Status: Testing", screen) and re.search("Test #[1-9]", screen):
            break
        assert not console.ended_within(1)
    else:
        pytest.fail(f"no test is under way:\n{screen}")

    assert "Memtest86+ v6.10" in screen
    assert re.search(r"Errors: +0", screen)


def test_memtest_efi_program_wants_a_screen(boot: Boot) -> None:
    """It is read from the CD and started; without a display it goes no further."""
    iso = fetch.package("memtest86+").file("usr/lib/memtest86+/memtest86+x64.iso")
    console = boot("memtest-efi", f"3:0,ahci-cd,{iso}", image=uefi())
    console.expect('starting Boot.* "UEFI BHYVE SATA DVD ROM', TIMEOUT)
    console.expect(r"set_screen_info\(\) failed", 30)


def test_grub_shell(boot: Boot, tmp_path: Path) -> None:
    disk = media.grub(tmp_path / "grub.img", {"words.txt": b"from a disk\n"})
    # Not one that starts: firmware would take a CD first.
    disc = media.fat(tmp_path / "disc.img", {"more/words.txt": b"from a disc\n"})
    slots = f"3:0,ahci-hd,{disk}", f"4:0,ahci-cd,{disc}"
    shell = GrubShell(boot("grub", *slots, image=uefi()))

    devices = shell.run("ls")
    assert "(hd0)" in devices
    assert "(cd0)" in devices
    assert "words.txt" in shell.run("ls (hd0)/")
    assert "from a disk" in shell.run("cat (hd0)/words.txt")
    assert "from a disc" in shell.run("cat (cd0)/more/words.txt")
    functions = shell.run("lspci")
    for place, ids in (("00:00.0", "1275:1275"), ("00:03.0", "8086:2821")):
        assert re.search(rf"{place} {ids}", functions), functions
    shell.type("halt")

    assert shell.console.wait(60) == 1


@pytest.mark.parametrize("first", ["hd", "cd"])
def test_boot_order(boot: Boot, tmp_path: Path, first: str) -> None:
    disk = media.grub(tmp_path / "grub.img", {})
    iso = fetch.package("ipxe").file("usr/lib/ipxe/ipxe.iso")
    hd, cd = (0, 1) if first == "hd" else (1, 0)
    slots = f"3:0,ahci-hd,{disk},bootindex={hd}", f"4:0,ahci-cd,{iso},bootindex={cd}"
    console = boot(f"order-{first}", *slots, image=firmware.ovmf())

    console.expect("grub> " if first == "hd" else "Press Ctrl-B", TIMEOUT)


def test_debian_installer_to_its_first_dialog(boot: Boot, tmp_path: Path) -> None:
    package = fetch.package("debian-installer-12-netboot-amd64")
    config = (
        "linux /linux console=ttyS0,115200n8\n"
        "echo the initial RAM disk follows\n"
        "initrd /initrd.gz\n"
        "boot\n"
    )
    disk = media.grub(
        tmp_path / "installer.img",
        {
            name: package.file(INSTALLER.format(name=name))
            for name in ("linux", "initrd.gz")
        },
        config,
    )
    console = boot("installer", f"3:0,ahci-hd,{disk}", image=uefi(), memory="1G")
    console.expect("the initial RAM disk follows", TIMEOUT)
    console.expect("Linux version 6", TIMEOUT)
    console.expect("Select a language", 2 * TIMEOUT)
    console.expect("English", 30)
