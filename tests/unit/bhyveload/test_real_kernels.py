"""Kernels of Debian's packages, and what a compiler makes: planned, not run."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pybhyve.bhyveload.formats import make_plan
from pybhyve.errors import ImageError
from tests.unit.bhyveload.kernel_images import vmlinux
from tools import fetch, guests

MIB = 1 << 20


def kernel_of(name: str) -> Path:
    guest = guests.find(name)
    return fetch.package(guest.package, guest.sha256).file(guest.kernel)


@pytest.mark.parametrize("name", list(guests.load()))
def test_every_guest_is_placed_where_its_header_says(name: str) -> None:
    kernel = kernel_of(name)
    image = kernel.read_bytes()

    plan, state = make_plan(kernel, None, "console=ttyS0", [], 512 * MIB, 0)

    (placed,) = [piece for piece in plan.pieces if piece.name == "the kernel"]
    setup_size = (image[0x1F1] + 1) * 512
    assert placed.gpa == struct.unpack_from("<Q", image, 0x258)[0]
    assert placed.data == image[setup_size:][: len(placed.data)]
    assert placed.size == struct.unpack_from("<I", image, 0x260)[0]
    is_64bit = image[0x236] & 1
    assert state.registers["rip"] == placed.gpa + (0x200 if is_64bit else 0)
    assert state.registers["cr0"] >> 31 == is_64bit


def test_debians_vmlinux_has_a_pvh_entry(tmp_path: Path) -> None:
    """The ELF file inside the compressed kernel, entered without its decompressor."""
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(vmlinux(kernel_of("debian12-generic").read_bytes()))

    plan, state = make_plan(kernel, None, None, [], 512 * MIB, 0)

    assert state.registers["cr0"] >> 31 == 0
    assert 16 * MIB <= state.registers["rip"] < 64 * MIB
    info = state.registers["rbx"]
    (start_info,) = [piece.data for piece in plan.pieces if piece.gpa == info]
    assert bytes(start_info[:4]) == bytes.fromhex("78c56e33")


def test_a_program_is_not_a_kernel() -> None:
    with pytest.raises(ImageError):
        make_plan(Path("/bin/true"), None, None, [], 512 * MIB, 0)
