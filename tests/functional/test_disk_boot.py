"""An installed Debian: firmware, GRUB, login, work, reboot, power-off, clean disks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional import debian
from tests.functional.console import Console
from tests.functional.machine import PROGRAM_DIR, Programs
from tools import disk, firmware

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="session")
def installed() -> Path:
    """The disk that every machine has a copy of."""
    return disk.debian()


@pytest.fixture
def image(installed: Path, tmp_path: Path) -> Iterator[Path]:
    """A disk of the test's own."""
    path = tmp_path / "disk.img"
    disk.copy(installed, path)
    yield path
    path.unlink()


@pytest.fixture
def cargo(tmp_path: Path) -> Path:
    """A disk without partitions, a FAT file system with a package on it."""
    tree = tmp_path / "greeting"
    program = tree / "usr/bin/greeting"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\ncat /var/lib/greeting\n")
    program.chmod(0o755)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: greeting\nVersion: 1.0\nArchitecture: all\nDepends: coreutils\n"
        "Maintainer: Nobody <nobody@localhost>\nDescription: a greeting\n"
    )
    script = tree / "DEBIAN/postinst"
    script.write_text(
        "#!/bin/sh\necho configured for $(uname -n) > /var/lib/greeting\n"
    )
    script.chmod(0o755)
    package = tmp_path / "greeting.deb"
    path = tmp_path / "cargo.img"
    commands: list[list[str | Path]] = [
        ["dpkg-deb", "--build", "--root-owner-group", tree, package],
        ["/usr/sbin/mkfs.vfat", "-C", "-n", "CARGO", path, "8192"],
        ["mcopy", "-i", path, package, "::"],
    ]
    for command in commands:
        subprocess.run(command, check=True, capture_output=True)
    return path


class Starter:
    """Starts bhyve with exactly these arguments, as often as asked."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._started: list[Console] = []

    def __call__(self, *args: str) -> Console:
        """Start it in a network of its own, where it may make its tap."""
        log = self._programs.logs / f"debian.{len(self._started)}.log"
        command = ["unshare", "--map-root-user", "--net", str(PROGRAM_DIR / "bhyve")]
        console = Console([*command, *args], log, self._programs.env)
        self._started.append(console)
        return console

    def close(self) -> None:
        """End everything."""
        for console in self._started:
            console.close()


@pytest.fixture
def bhyve(programs: Programs) -> Iterator[Starter]:
    starter = Starter(programs)
    yield starter
    starter.close()
    programs.run("bhyvectl", "--vm=vm0", "--destroy")


def test_documented_command(bhyve: Starter, image: Path) -> None:
    rom = firmware.bhyve_without_variables().rom
    # As bhyve's documentation has it.
    command = [
        *("-c", "2", "-m", "2G", "-AHP"),
        *("-s", "0:0,hostbridge", "-s", "31,lpc"),
        *("-s", f"3:0,ahci-hd,{image}"),
        *("-l", "com1,stdio"),
        *("-l", f"bootrom,{rom}"),
        *("-s", "2,virtio-net,tap0"),
        "vm0",
    ]
    console = bhyve(*command)
    console.expect("GNU GRUB", 120)
    debian.log_in(console)

    assert console.run("systemctl is-system-running --wait", 200) == "running\n"
    assert console.run("nproc") == "2\n"
    assert console.run("findmnt -no SOURCE,FSTYPE /") == "/dev/sda2 ext4\n"
    assert console.run("cat /sys/block/sda/device/model") == "BHYVE SATA DISK \n"
    assert console.run("dmidecode -s system-product-name") == "BHYVE\n"
    tables = console.run("acpidump -s")
    for name in ("DSDT", "FACP", "APIC", "HPET", "MCFG"):
        assert re.search(rf"^ACPI: {name} ", tables, re.MULTILINE), tables
    # Nobody gives addresses here; these two have made their own.
    assert "1 received" in console.run("ping -c 1 -w 20 ff02::1%enp0s2")

    console.run("mkdir -p /srv/kept && date > /srv/kept/date")
    console.send("reboot\n")

    assert console.wait(180) == 0
    debian.check_file_systems(image)

    again = bhyve(*command)
    debian.log_in(again)

    assert again.run("ls /srv/kept") == "date\n"

    os.kill(again.process.pid, signal.SIGTERM)  # the power button

    assert again.wait(180) == 1
    debian.check_file_systems(image)


def test_ovmf_network_and_package(
    bhyve: Starter, image: Path, cargo: Path, tmp_path: Path
) -> None:
    console = bhyve(
        *("-c", "2", "-m", "2G", "-AHP"),
        *("-s", "0:0,hostbridge", "-s", "31,lpc"),
        *("-s", f"3:0,virtio-blk,{image}", "-s", f"4,nvme,{cargo},ro"),
        *("-l", "com1,stdio"),
        *("-l", firmware.ovmf().option(tmp_path / "vars.fd")),
        *("-s", "2,virtio-net,slirp,open=true"),
        "vm0",
    )
    console.expect("GNU GRUB", 120)
    debian.log_in(console)

    assert console.run("systemctl is-system-running --wait", 200) == "running\n"
    assert "inet 10.0.2.15/24" in console.run("ip address show dev enp0s2")
    assert "3 received" in console.run("ping -c 3 -w 30 10.0.2.2")

    console.run("mount -o ro LABEL=CARGO /mnt && dpkg --install /mnt/greeting.deb", 120)

    assert console.run("greeting") == "configured for debian\n"
    assert console.run("umount /mnt; dpkg --audit; dpkg --verify greeting") == ""

    console.send("poweroff\n")

    assert console.wait(180) == 1
    debian.check_file_systems(image)
