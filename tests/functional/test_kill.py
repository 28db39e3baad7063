"""kill -9 while a guest writes: what it saw flushed is on the disk."""

from __future__ import annotations

import re
import signal
import struct
import zlib
from pathlib import Path

import pytest

from tests.functional.machine import BOOT_TIMEOUT, Starter
from tools import guests

BLOCK = 16384  # as in tests/guests/src/flushed.c
HEADER = struct.Struct("<8sIII")
WRITERS = 4
PROMISES = 150  # lines to see before the end comes
SIZE = 512 << 20


@pytest.mark.parametrize(
    ("device", "name", "guest", "modules"),
    [
        ("ahci-hd", "sda", "debian12-generic", ["ahci", "sd_mod"]),
        ("virtio-blk", "vda", "debian12-cloud", ["virtio_pci", "virtio_blk"]),
        ("nvme", "nvme0n1", "debian12-cloud", ["nvme"]),
    ],
    ids=["ahci-hd", "virtio-blk", "nvme"],
)
def test_flushed_blocks_are_there(
    start: Starter,
    tmp_path: Path,
    device: str,
    name: str,
    guest: str,
    modules: list[str],
) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    program = guests.compile_program("flushed")
    found = guests.find(guest)
    options = found.image([program], modules).options()
    machine = start(
        f"kill-{device}", [*options, "-s", f"4,{device},{image}"], guest=found, ncpus=2
    )
    console = machine.console
    console.expect(re.escape(found.prompt), BOOT_TIMEOUT)
    console.send(f"flushed /dev/{name} {WRITERS}\n")
    part_blocks = int(console.expect(r"parts of (\d+) blocks", 60)[1])
    for _ in range(PROMISES):
        console.expect(r"flushed \d+ \d+\r", 60)
    console.process.kill()

    assert console.wait(30) == -signal.SIGKILL

    promised = dict.fromkeys(range(WRITERS), -1)
    lines = re.findall(r"flushed (\d+) (\d+)\r", console.shown)
    for writer, number in lines:
        promised[int(writer)] = int(number)

    assert sum(promised.values()) > PROMISES
    with image.open("rb") as file:
        for writer, last in promised.items():
            file.seek(writer * part_blocks * BLOCK)
            for number in range(last + 1):
                block = file.read(BLOCK)
                magic, *identity, crc = HEADER.unpack_from(block)

                assert magic == b"flushed\0"
                assert identity == [writer, number]
                assert crc == zlib.crc32(block[HEADER.size :])
