"""Below 1 MiB at power-on: tables, or the end of a BIOS."""

from __future__ import annotations

import pytest

from pybhyve.amd64 import platform
from pybhyve.amd64.lowmem import bios_end

JUMP = bytes.fromhex("ea 5be0 00f0")  # ljmp $0xf000, $0xe05b


def rom(vector: bytes, size: int) -> bytes:
    return (bytes(range(256)) * (size // 256))[:-16] + vector.ljust(16, b"\x90")


@pytest.mark.parametrize("size", [4096, 0x20000, 0x40000])
def test_a_bios_is_shown_below_1_mib(build, tmp_path, size):
    image = rom(JUMP, size)
    (tmp_path / "bios").write_bytes(image)
    machine = build("31,lpc", bootrom=str(tmp_path / "bios"), lpc__fwcfg="qemu")
    platform.late_init(machine)

    shown = min(size, 0x20000)
    assert machine.ctx.read(0x100000 - shown, shown) == image[-shown:]


@pytest.mark.parametrize(
    "vector",
    [
        b"\x90\x90\xe9\xa0\x0f",  # edk2: a near jump
        bytes.fromhex("ea 5be0 00e0"),
        bytes(5),
    ],
)
def test_other_firmware_finds_tables(build, tmp_path, vector):
    (tmp_path / "rom").write_bytes(rom(vector, 4096))
    machine = build("31,lpc", bootrom=str(tmp_path / "rom"))
    platform.late_init(machine)

    assert bios_end(machine.firmware.rom) is None
    assert machine.ctx.read(0xF0000, 4) == b"_MP_"
    assert machine.ctx.read(0xF2400, 8) == b"RSD PTR "


def test_a_reset_brings_the_contents_back(build):
    machine = build("31,lpc")
    platform.late_init(machine)
    before = machine.ctx.read(0xF0000, 0x10000)
    machine.ctx.write(0xF0000, bytes(0x10000))

    machine.devices["lowmem"].reset()

    assert machine.ctx.read(0xF0000, 0x10000) == before
