"""virtio devices under Linux's drivers, by the modern and by the legacy registers."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest

from tests.functional.console import Console
from tests.functional.machine import BOOT_TIMEOUT, Starter
from tools import guests

MIB = 1 << 20
SIZE = 24 * MIB
MODULES = ("virtio_pci", "virtio_blk", "virtio_rng")
LEGACY = (
    "rmmod virtio_blk virtio_rng virtio_pci && "
    "insmod /lib/modules/virtio_pci.ko force_legacy=1 && "
    "insmod /lib/modules/virtio_blk.ko && insmod /lib/modules/virtio-rng.ko"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def check_disk(console: Console, image: Path) -> None:
    """Checksums both ways, a flush, a trim, a disk that grows."""
    content = image.read_bytes()
    size = len(content)
    assert int(console.run("cat /sys/block/vda/size")) == size // 512
    assert console.run("md5sum < /dev/vda", 240).split()[0] == md5(content)

    # What the guest writes, the file has, and what is beside it stays.
    copy = "dd if=/dev/vda of=/dev/vda bs=1M skip=2 seek=10 count=5 conv=fsync,notrunc"
    console.run(f"{copy} && sync")
    content = content[: 10 * MIB] + content[2 * MIB : 7 * MIB] + content[15 * MIB :]
    assert md5(image.read_bytes()) == md5(content)

    console.run(f"blkdiscard -o {MIB} -l {6 * MIB} /dev/vda")
    content = content[:MIB] + bytes(6 * MIB) + content[7 * MIB :]
    assert md5(image.read_bytes()) == md5(content)
    assert image.stat().st_blocks * 512 <= size - 6 * MIB

    os.truncate(image, size + MIB)
    sectors = (size + MIB) // 512
    until = f"while [ $(cat /sys/block/vda/size) != {sectors} ]; do sleep 0.2; done"
    console.run(until, 60)
    console.run("echo 3 > /proc/sys/vm/drop_caches")
    assert console.run("md5sum < /dev/vda", 240).split()[0] == md5(content + bytes(MIB))


def check_randomness(console: Console) -> None:
    command = "dd if=/dev/hwrng bs=64 count=4 2> /dev/null | md5sum"
    assert console.run("cat /sys/class/misc/hw_random/rng_current").startswith("virtio")
    assert console.run(command) != console.run(command)


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_disk_and_randomness(start: Starter, image: Path, interrupts: str) -> None:
    guest = guests.find("debian12-cloud")
    slots = ["-s", f"4,virtio-blk,{image},ser=SERIAL-4", "-s", "5,virtio-rnd"]
    if interrupts == "intx":
        slots.append("-W")
    options = [*guest.image(modules=MODULES).options(), *slots]
    console = start(f"virtio-{interrupts}", options, guest=guest).console
    console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)
    console.run("echo 1 > /proc/sys/kernel/printk")

    lines = console.run("grep virtio /proc/interrupts")
    assert ("PCI-MSI" in lines) == (interrupts == "msix")
    assert console.run("cat /sys/block/vda/serial").strip() == "SERIAL-4"
    features = console.run("cat /sys/bus/virtio/devices/virtio0/features").strip()
    assert features[32] == "1"  # VERSION_1
    check_disk(console, image)
    check_randomness(console)

    console.run(LEGACY)
    features = console.run("cat /sys/bus/virtio/devices/virtio?/features").split()[0]
    assert features[32] == "0"
    check_disk(console, image)
    check_randomness(console)

    console.send("poweroff\n")

    assert console.wait(60) == 1
