"""A disk of the host's that fails under a running guest, and then works again."""

from __future__ import annotations

import errno
import random
import re
from pathlib import Path

import pytest

from tests.functional.machine import BOOT_TIMEOUT, Starter
from tools import guests

MIB = 1 << 20
SIZE = 16 * MIB

DEVICES = {
    "virtio-blk": ("debian12-cloud", ["virtio_pci", "virtio_blk"], "/dev/vda"),
    "nvme": ("debian12-cloud", ["nvme"], "/dev/nvme0n1"),
    "ahci-hd": ("debian12-generic", ["ahci", "sd_mod"], "/dev/sda"),
}


@pytest.mark.parametrize("device", DEVICES)
def test_errors_reach_the_guest(device: str, start: Starter, tmp_path: Path) -> None:
    """Reads, writes and flushes fail with an error, and the VM goes on."""
    name, modules, disk = DEVICES[device]
    image, switch = tmp_path / "disk.img", tmp_path / "errno"
    image.write_bytes(random.Random(1).randbytes(SIZE))
    guest = guests.find(name)
    enter = [
        "env",
        f"LD_PRELOAD={guests.compile_library('diskfault')}",
        f"DISKFAULT_SWITCH={switch}",
        f"DISKFAULT_IMAGE={image}",
    ]
    options = [*guest.image(modules=modules).options(), "-s", f"4,{device},{image}"]
    console = start(f"error-{device}", options, guest=guest, enter=enter).console
    console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)
    console.run("echo 1 > /proc/sys/kernel/printk")
    console.run("yes written | head -c 65536 > /tmp/data")
    write = f"dd if=/tmp/data of={disk} bs=64k seek={{}} conv=fsync,notrunc; echo $?"
    read = f"dd if={disk} of=/tmp/back bs=64k skip={{}} count=1; echo $?"

    def status(command: str) -> str:
        return console.run(command, 120).split()[-1]

    assert status(write.format(1)) == "0"
    for number in (errno.EIO, errno.ENOSPC):
        switch.write_text(str(number))
        assert status(write.format(2)) == "1"
        assert status(read.format(100)) == "1"
        switch.unlink()

        assert status(write.format(2)) == "0"
        assert status(read.format(100)) == "0"
    assert status("cmp /tmp/back /tmp/data; echo $?") == "1"
    assert status(read.format(1)) == "0"
    assert status("cmp /tmp/back /tmp/data; echo $?") == "0"
    assert image.stat().st_size == SIZE
