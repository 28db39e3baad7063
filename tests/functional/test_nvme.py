"""NVMe disks with Linux's own driver: contents, trim, growth, a host that fails."""

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
from tools import guests

MIB = 1 << 20
SIZE = 64 * MIB
DISK = "/dev/nvme0n1"

Boot = Callable[..., Console]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(8 * MIB))
    os.truncate(path, SIZE)
    return path


@pytest.fixture
def boot(start: Starter) -> Boot:
    """A Debian kernel at its prompt, with two processors and an nvme disk."""

    def boot(name: str, disk: str) -> Console:
        guest = guests.find("debian12-cloud")
        options = [
            *guest.image(modules=["nvme"]).options(),
            *("-s", f"4,nvme,{disk}"),
            *("-o", f"cmdline={guest.cmdline} quiet"),
        ]
        console = start(name, options, guest=guest, ncpus=2).console
        console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)
        console.run("echo 1 > /proc/sys/kernel/printk")
        return console

    return boot


def read(console: Console, path: str) -> str:
    return console.run(f"cat {path}").strip()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_a_disk(boot: Boot, image: Path) -> None:
    console = boot("nvme", f"{image},ser=ABC123,eui64=0x0102030405060708")
    controller, disk = "/sys/class/nvme/nvme0", "/sys/block/nvme0n1"

    assert read(console, f"{controller}/model") == "bhyve-NVMe"
    assert read(console, f"{controller}/serial") == "ABC123"
    assert read(console, f"{disk}/eui") == "01 02 03 04 05 06 07 08"
    assert read(console, f"{disk}/queue/write_cache") == "write back"
    assert int(read(console, f"{disk}/size")) == SIZE // 512

    # What the host has written, through both sizes of PRP and from both processors.
    whole = md5(image.read_bytes())
    for cpu, size in ((0, "1M"), (1, "4k")):
        command = f"taskset -c {cpu} dd if={DISK} bs={size} iflag=direct 2>/dev/null"
        assert console.run(f"{command} | md5sum", 240).split()[0] == whole
    interrupts = console.run("grep nvme0q /proc/interrupts")
    assert len(interrupts.splitlines()) == 3
    console.run(
        f"dd if=/dev/urandom of=/tmp/data bs=1M count=5 && sync && "
        f"dd if=/tmp/data of={DISK} bs=64k seek=100 conv=fsync",
        120,
    )
    expected = console.run("md5sum < /tmp/data").split()[0]
    assert md5(image.read_bytes()[6400 << 10 :][: 5 * MIB]) == expected

    # Trim.
    before = image.stat().st_blocks
    console.run(f"blkdiscard -o 0 -l {2 * MIB} {DISK}")
    assert image.stat().st_blocks <= before - 2 * MIB // 512
    assert image.read_bytes()[: 2 * MIB] == bytes(2 * MIB)

    # The disk grows, and is cut off, under the guest.
    os.truncate(image, 2 * SIZE)
    console.run(
        f"while [ $(cat {disk}/size) != {2 * SIZE // 512} ]; do sleep 0.2; done"
    )
    console.run(f"dd if=/tmp/data of={DISK} bs=1M seek=100 conv=fsync", 120)
    assert md5(image.read_bytes()[100 * MIB :][: 5 * MIB]) == expected
    os.truncate(image, MIB)
    # An error, or nothing once the guest knows of the disk's new end.
    beyond = f"dd if={DISK} bs=4k count=1 skip=10000 iflag=direct 2>/dev/null"
    assert console.run(f"{beyond} | wc -c") == "0\n"
    assert console.run(
        f"dd if={DISK} bs=4k count=1 iflag=direct 2>/dev/null | md5sum"
    ).split()[0] == md5(bytes(4096))

    console.send("reboot -f\n")

    assert console.wait(60) == 0


def test_what_was_flushed_survives_a_kill(boot: Boot, image: Path) -> None:
    console = boot("nvmekill", str(image))
    console.send(
        "i=0; while true; do yes $i | head -c 4096 > /tmp/b; "
        f"dd if=/tmp/b of={DISK} bs=4k seek=$i conv=fsync,notrunc 2>/dev/null && "
        "echo flushed $i.; i=$((i+1)); done\n"
    )
    last = 0
    while last < 25:
        last = int(console.expect(r"flushed (\d+)\.", 120)[1])
    console.process.kill()
    console.wait(30)

    data = image.read_bytes()
    for number in range(last + 1):
        line = f"{number}\n".encode()
        assert data[4096 * number :].startswith(line * (4096 // len(line)))


def test_a_disk_in_memory(boot: Boot) -> None:
    console = boot("nvmeram", "ram=32")

    assert read(console, "/sys/block/nvme0n1/size") == str(32 * MIB // 512)
    assert read(console, "/sys/block/nvme0n1/queue/logical_block_size") == "4096"
    console.run("dd if=/dev/urandom of=/tmp/data bs=1M count=3")
    console.run(f"dd if=/tmp/data of={DISK} bs=1M seek=29 oflag=direct")
    back = f"dd if={DISK} bs=1M skip=29 iflag=direct 2>/dev/null | md5sum"
    assert console.run(back) == console.run("md5sum < /tmp/data")
    console.send("poweroff -f\n")

    assert console.wait(60) == 1
