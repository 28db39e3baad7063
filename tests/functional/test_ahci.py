"""SATA disks and CD drives with Linux's own drivers."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.console import Console
from tests.functional.machine import BOOT_TIMEOUT, Starter
from tools import fetch, guests

MIB = 1 << 20
SIZE = 64 * MIB
MODULES = ["ahci", "sd_mod", "sr_mod", "isofs", "crc32c_generic", "ext4"]

Boot = Callable[..., Console]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(8 * MIB))
    os.truncate(path, SIZE)
    return path


@pytest.fixture
def boot(start: Starter) -> Boot:
    """A Debian kernel at its prompt, with two processors and a SATA adapter."""

    def boot(name: str, *slots: str) -> Console:
        guest = guests.find("debian12-generic")
        options = [
            *guest.image(modules=MODULES).options(),
            *(word for slot in slots for word in ("-s", slot)),
            *("-o", f"cmdline={guest.cmdline} quiet"),
        ]
        console = start(name, options, guest=guest, ncpus=2).console
        console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)
        console.run("echo 1 > /proc/sys/kernel/printk")
        return console

    return boot


def read(console: Console, path: str) -> str:
    return console.run(f"cat {path}").strip()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_disk(boot: Boot, image: Path) -> None:
    console = boot("ahci", f"4,ahci-hd,{image},ser=SN0123,rev=7,model=A disk,nmrr=1")
    messages = console.run("dmesg | grep ata")
    queue = "/sys/block/sda/queue"

    assert "SATA link up 6.0 Gbps (SStatus 133 SControl 300)" in messages
    assert "ata1.00: ATA-9: A disk, 7, max UDMA/133" in messages
    assert "131072 sectors, multi 128: LBA48 NCQ (depth 32)" in messages
    assert "exception" not in messages
    assert int(read(console, "/sys/block/sda/size")) == SIZE // 512
    assert read(console, "/sys/block/sda/device/queue_depth") == "32"
    assert read(console, f"{queue}/write_cache") == "write back"
    assert read(console, f"{queue}/rotational") == "0"
    assert int(read(console, f"{queue}/discard_max_bytes")) > 0

    # What the host has written.
    shown = console.run("sha256sum /dev/sda", 120)
    assert shown.split()[0] == sha256(image.read_bytes())

    # What the guest writes, many requests at once.
    console.run("dd if=/dev/urandom of=/tmp/data bs=1M count=16")
    console.run(
        "for n in 0 1 2 3; do dd if=/tmp/data of=/dev/sda bs=64k count=64 "
        "skip=$((64 * n)) seek=$((64 * n + 256)) conv=fsync & done; wait"
    )
    shown = console.run("sha256sum /tmp/data")
    assert shown.split()[0] == sha256(image.read_bytes()[16 * MIB : 32 * MIB])

    # A file system, and trim.
    console.run("mkdir -p /disk; mke2fs -q /dev/sda")
    console.run("mount -t ext4 -o discard /dev/sda /disk && cp /tmp/data /disk/data")
    console.run("umount /disk; mount -t ext4 /dev/sda /disk")
    assert console.run("sha256sum < /disk/data").split()[0] == shown.split()[0]
    console.run("umount /disk; blkdiscard /dev/sda; sync")
    assert image.read_bytes() == bytes(SIZE)
    assert "exception" not in console.run("dmesg | grep ata")


def test_sectors_of_4096_bytes(boot: Boot, image: Path) -> None:
    console = boot("ahci-4k", f"4,ahci-hd,{image},sectorsize=4096")

    assert read(console, "/sys/block/sda/queue/logical_block_size") == "4096"
    assert int(read(console, "/sys/block/sda/size")) == SIZE // 512
    shown = console.run("dd if=/dev/sda bs=1M count=8 2>/dev/null | sha256sum", 120)
    assert shown.split()[0] == sha256(image.read_bytes()[: 8 * MIB])


def test_a_cd(boot: Boot, image: Path) -> None:
    """On one adapter with a disk; the ISO is memtest86+'s."""
    package = fetch.package("memtest86+")
    iso = package.file("usr/lib/memtest86+/memtest86+x64.iso")
    program = package.file("boot/memtest86+x64.efi")
    console = boot("ahci-cd", f"4,ahci,hd:{image},cd:{iso},ro")

    assert "ata2.00: ATAPI: BHYVE SATA DVD ROM, 001" in console.run("dmesg")
    assert read(console, "/sys/block/sr0/device/vendor") == "BHYVE"
    shown = console.run("sha256sum /dev/sr0", 120)
    assert shown.split()[0] == sha256(iso.read_bytes())
    console.run("mkdir -p /cd; mount -t iso9660 -o ro /dev/sr0 /cd")
    shown = console.run("sha256sum /cd/EFI/BOOT/bootx64.efi")
    assert shown.split()[0] == sha256(program.read_bytes())
    assert "exception" not in console.run("dmesg | grep ata")


def test_many_ports(boot: Boot, tmp_path: Path) -> None:
    """32 of them, with something at some."""
    ports = []
    for number in range(32):
        path = tmp_path / f"{number}.img"
        path.write_bytes(f"disk {number}".encode().ljust(MIB, b"\0"))
        ports.append(f"hd:{path}" if number % 10 == 1 else "hd:")
    console = boot("ahci-ports", f"4,ahci,{','.join(ports)}")

    assert "32 ports 6 Gbps 0x80200802 impl" in console.run("dmesg")
    # Probed at the same time, so letters say nothing; Linux counts ports from 1.
    disk = "/dev/$(basename /sys/bus/pci/devices/*/ata$n/host*/target*/*/block/*)"
    shown = console.run(f"for n in 2 12 22 32; do head -c 8 {disk}; echo; done")
    assert shown.replace("\0", "").split("\n")[:4] == [
        "disk 1",
        "disk 11",
        "disk 21",
        "disk 31",
    ]


def test_a_truncated_image(boot: Boot, image: Path) -> None:
    """Reads and writes behind its end fail, those before it go on."""
    console = boot("ahci-faults", f"4,ahci-hd,{image}")
    os.truncate(image, SIZE // 2)
    drop = "echo 3 > /proc/sys/vm/drop_caches"
    behind = SIZE // 2 // 4096 + 100

    shown = console.run(f"{drop}; dd if=/dev/sda bs=4k skip={behind} count=1; echo $?")
    assert "Input/output error\n1" in shown.replace("\r", "")
    shown = console.run(
        f"dd if=/dev/zero of=/dev/sda bs=4k seek={behind} count=1 conv=fsync; echo $?"
    )
    assert "Input/output error\n1" in shown.replace("\r", "")
    assert image.stat().st_size == SIZE // 2

    messages = console.run("dmesg | grep ata1")
    assert "failed command: READ FPDMA QUEUED" in messages
    assert "error: { UNC }" in messages
    assert "failed command: WRITE FPDMA QUEUED" in messages
    assert "error: { ABRT }" in messages

    shown = console.run(
        f"{drop}; dd if=/dev/sda bs=1M count=8 2>/dev/null | sha256sum", 120
    )
    assert shown.split()[0] == sha256(image.read_bytes()[: 8 * MIB])
    console.run("dd if=/dev/zero of=/dev/sda bs=4k count=1 conv=fsync")
    assert image.read_bytes()[:4096] == bytes(4096)
