"""Kernels of every format: what becomes of good ones, what is said of bad ones."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.bhyveload.formats import make_plan
from pybhyve.bhyveload.plan import CpuState, LoadPlan
from pybhyve.errors import ImageError, one_line
from tests.unit.bhyveload.kernel_images import (
    MIB,
    bzimage,
    elf,
    multiboot2_header,
    multiboot_header,
    note,
    pvh_note,
)

GIB = 1 << 30
CODE = b"\xf4" * 64


class Loaded:
    """What a kernel became: memory to look into, and the state of vCPU 0."""

    def __init__(self, plan: LoadPlan, state: CpuState) -> None:
        self.plan = plan
        self.state = state
        self.regs = state.registers

    def read(self, gpa: int, length: int) -> bytes:
        for piece in self.plan.pieces:
            if piece.gpa <= gpa and gpa + length <= piece.gpa + piece.size:
                data = bytes(piece.data).ljust(piece.size, b"\0")
                return data[gpa - piece.gpa :][:length]
        raise AssertionError(f"nothing is loaded at {gpa:#x}")

    def u32(self, gpa: int) -> int:
        return int.from_bytes(self.read(gpa, 4), "little")

    def string(self, gpa: int) -> bytes:
        (data,) = [p.data for p in self.plan.pieces if p.gpa <= gpa < p.gpa + p.size]
        start = gpa - max(p.gpa for p in self.plan.pieces if p.gpa <= gpa)
        return bytes(data)[start:].split(b"\0")[0]


@pytest.fixture
def boot(tmp_path: Path):
    def load(
        kernel: bytes,
        initrd: bytes | None = None,
        cmdline: str | None = None,
        env: list[str] | None = None,
        lowmem: int = 256 * MIB,
        highmem: int = 0,
    ) -> Loaded:
        path = tmp_path / "kernel"
        path.write_bytes(kernel)
        initrd_path = None
        if initrd is not None:
            initrd_path = tmp_path / "initrd"
            initrd_path.write_bytes(initrd)
        return Loaded(
            *make_plan(path, initrd_path, cmdline, env or [], lowmem, highmem)
        )

    return load


class TestLinux:
    """Documentation/arch/x86/boot.rst, from the kernel's side."""

    def test_a_64_bit_kernel_runs_at_its_preferred_address(self, boot) -> None:
        got = boot(bzimage(payload=b"K" * 4096))

        assert got.regs["rip"] == 16 * MIB + 0x200
        assert got.read(16 * MIB, 4096) == b"K" * 4096
        assert got.regs["cr0"] >> 31 == 1

    def test_the_zero_page(self, boot) -> None:
        got = boot(bzimage(), initrd=b"I" * 5000, cmdline="quiet", env=["a=b"])

        zero = got.regs["rsi"]
        page = got.read(zero, 4096)
        assert page[0x1F1:0x202] != bytes(0x11), "the header is copied"
        assert page[0x202:0x206] == b"HdrS"
        assert page[0x210] == 0xFF, "an unknown loader"
        assert page[0x26C:0x2D0] == bytes(0x64), "nothing from behind the header"
        assert page[:0xC0] == bytes(0xC0), "neither screen nor ACPI"
        assert got.string(got.u32(zero + 0x228)) == b"quiet a=b"
        initrd, size = struct.unpack_from("<2I", page, 0x218)
        assert (size, got.read(initrd, size)) == (5000, b"I" * 5000)
        assert initrd % 4096 == 0
        assert page[0x1E8] == 4
        assert [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(4)] == [
            (0, 0xA0000, 1),
            (0xA0000, 0x20000, 2),
            (0xC0000, 0x40000, 2),
            (0x100000, 255 * MIB, 1),
        ]

    def test_without_a_command_line_it_talks_on_com1(self, boot) -> None:
        got = boot(bzimage())

        assert got.string(got.u32(got.regs["rsi"] + 0x228)) == b"console=ttyS0"

    def test_an_empty_command_line_stays_empty(self, boot) -> None:
        got = boot(bzimage(), cmdline="")

        assert got.string(got.u32(got.regs["rsi"] + 0x228)) == b""

    def test_a_32_bit_kernel_is_entered_flat(self, boot) -> None:
        got = boot(bzimage(xloadflags=0))

        assert got.regs["rip"] == 16 * MIB
        assert got.regs["cr0"] >> 31 == 0
        assert got.state.descriptors["cs"][2] == 0xC09B
        assert got.read(got.regs["rsi"] + 0x202, 4) == b"HdrS"

    def test_a_kernel_that_cannot_relocate_goes_to_1_mib(self, boot) -> None:
        got = boot(bzimage(relocatable=0, payload=b"K" * 4096), initrd=bytes(4096))

        assert got.regs["rip"] == MIB + 0x200
        assert got.read(MIB, 4096) == b"K" * 4096
        assert any(p.gpa == 16 * MIB and p.size == 32 * MIB for p in got.plan.pieces)

    def test_the_initrd_ends_below_the_kernels_limit(self, boot) -> None:
        limit = 100 * MIB - 1
        got = boot(bzimage(initrd_addr_max=limit, xloadflags=0), initrd=bytes(MIB))

        assert got.u32(got.regs["rsi"] + 0x218) == 99 * MIB

    def test_an_initrd_too_big_for_low_memory_goes_above_4_gib(self, boot) -> None:
        got = boot(bzimage(), initrd=bytes(80 * MIB), lowmem=64 * MIB, highmem=GIB)

        page = got.read(got.regs["rsi"], 4096)
        low, high = struct.unpack_from("<I", page, 0x218), page[0xC0:0xC4]
        address = low[0] | int.from_bytes(high, "little") << 32
        assert address == 5 * GIB - 80 * MIB

    def test_old_protocols_have_shorter_command_lines(self, boot) -> None:
        old = bzimage(version=0x0205, relocatable=0)
        boot(old, cmdline="x" * 255)

        with pytest.raises(ImageError) as error:
            boot(old, cmdline="x" * 256)
        assert "has 256 bytes, and this kernel takes at most 255" in one_line(
            error.value
        )

    @pytest.mark.parametrize(
        ("image", "complaint"),
        [
            (
                bzimage(version=0x0201),
                "boot protocol 2.01, and the oldest known is 2.02",
            ),
            (bzimage(loadflags=0), "is a zImage"),
            (bzimage(alignment=3), "kernel_alignment 0x3 is not a power of two"),
            (bzimage(alignment=0), "kernel_alignment 0x0 is not a power of two"),
            (bzimage(init_size=300 * MIB), "the kernel needs 316 MiB of memory"),
            (bzimage(pref_address=1 << 63), "where the VM has no memory"),
            (bzimage(pref_address=0x8000, alignment=1), "the kernel"),
            (bzimage(syssize=1 << 20), "truncated: the header announces 16777216"),
            (bzimage(syssize=0), "no kernel behind it"),
            (bzimage(payload=b""), "truncated: the protected-mode kernel"),
            (bzimage()[:0x20A], "truncated: the kernel header"),
            (bzimage()[:0x300], "truncated: the protected-mode kernel"),
            (bzimage()[:-17], "truncated: the header announces 4096 bytes"),
            (b"\0\0".join([bzimage()[:0x1FE], bzimage()[0x200:]]), "0xaa55"),
        ],
    )
    def test_what_is_wrong_is_said(self, boot, image: bytes, complaint: str) -> None:
        with pytest.raises(ImageError) as error:
            boot(image)
        assert complaint in one_line(error.value)

    def test_a_last_paragraph_may_be_incomplete(self, boot) -> None:
        got = boot(bzimage(payload=b"K" * 4090))

        assert got.read(16 * MIB, 4096) == b"K" * 4090 + bytes(6)


class TestPvh:
    """Xen's start_info.h, from the kernel's side."""

    KERNEL = elf(
        [(0xFFFFFFFF81000000, 16 * MIB, CODE, 2 * MIB)],
        entry=0xFFFFFFFF81000000,
        notes=pvh_note(16 * MIB + 8),
    )

    def test_entry_state(self, boot) -> None:
        got = boot(self.KERNEL)

        assert got.regs["rip"] == 16 * MIB + 8
        assert got.regs["cr0"] & 0x80000001 == 1
        assert got.read(16 * MIB, 65) == CODE + b"\0"

    def test_start_info(self, boot) -> None:
        got = boot(self.KERNEL, initrd=b"initrd", cmdline="root=/dev/vda")

        info = struct.unpack("<4I4Q2I", got.read(got.regs["rbx"], 56))
        magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, _ = (
            info
        )
        assert (magic, version, flags, modules, rsdp) == (0x336EC578, 1, 0, 1, 0)
        assert got.string(cmdline) == b"root=/dev/vda"
        module, size, _, _ = struct.unpack("<4Q", got.read(modlist, 32))
        assert got.read(module, size) == b"initrd"
        assert entries == 4
        assert struct.unpack("<2Q2I", got.read(memmap + 72, 24)) == (
            *(MIB, 255 * MIB),
            *(1, 0),
        )

    def test_an_8_byte_note(self, boot) -> None:
        image = elf([(0, MIB, CODE, 64)], notes=pvh_note(MIB, 8), entry=0)

        assert boot(image).regs["rip"] == MIB

    @pytest.mark.parametrize(
        ("image", "complaint"),
        [
            (
                elf([(0, MIB, CODE, 64)], notes=pvh_note(2 * MIB)),
                "entry point 0x200000 is in none",
            ),
            (
                elf([(0, MIB, CODE, 64)], notes=pvh_note(MIB, 3)),
                "PVH note has 3 bytes, not 4 or 8",
            ),
            (
                elf([(0, MIB, CODE, 64), (0, MIB + 63, CODE, 64)], notes=pvh_note(MIB)),
                "an ELF segment at 0x10003f to 0x10007f overlaps an ELF segment",
            ),
            (
                elf([(0, 0xB8000, CODE, 64)], notes=pvh_note(0xB8000)),
                "an ELF segment belongs at 0xb8000 to 0xb8040, where the VM has no",
            ),
            (
                elf([(0, MIB, CODE, 63)], notes=pvh_note(MIB)),
                "ELF segment 0 is larger in the file than in memory",
            ),
            (elf([], notes=pvh_note(MIB)), "has nothing to load"),
            (elf([(0, MIB, CODE, 64)], type=1), "not an ELF executable (type 1)"),
            (
                elf([(0, MIB, CODE, 64)], machine=183),
                "ELF for another processor (machine 183)",
            ),
            (
                elf([(0, MIB, CODE, 64)], notes=pvh_note(MIB))[:-40],
                "truncated: ELF seg",
            ),
            (elf([(0, MIB, CODE, 64)])[:70], "truncated: the program headers"),
            (elf([(0, MIB, CODE, 64)])[:20], "truncated: the ELF header"),
            (
                elf([(0, MIB, CODE, 64)], notes=bytes(1 << 17)),
                "ELF segment 1 has 131072 bytes of notes",
            ),
            (elf([(0, MIB, CODE, 64)] * 200), "200 program headers of 56 bytes"),
            (elf([(0, MIB, CODE, 64)], notes=note(b"Xen\0", 17, b"x")), "not a kernel"),
        ],
    )
    def test_what_is_wrong_is_said(self, boot, image: bytes, complaint: str) -> None:
        with pytest.raises(ImageError) as error:
            boot(image)
        assert complaint in one_line(error.value)


def kludge(flags: int = 1 << 16, *addresses: int, contents: bytes = CODE) -> bytes:
    """A multiboot image without ELF: 16 bytes of something, header, contents."""
    start = MIB + 16
    addresses = addresses or (start, MIB, 0, 0, start + 32)
    return bytes(16) + multiboot_header(flags, *addresses) + contents


class TestMultiboot:
    """The Multiboot Specification, from the kernel's side."""

    @pytest.mark.parametrize("bits", [32, 64])
    def test_elf(self, boot, bits: int) -> None:
        code = multiboot_header(3) + CODE
        image = elf([(0xC0100000, MIB, code, 8192)], bits=bits, entry=0xC010000C)

        got = boot(image)

        assert got.regs["rip"] == MIB + 12, "the entry is given as a virtual address"
        assert got.regs["rax"] == 0x2BADB002
        assert got.read(MIB, len(code)) == code

    def test_addresses_instead_of_elf(self, boot) -> None:
        image = kludge(1 << 16, MIB + 16, MIB, 0, MIB + 8192, MIB + 48)

        got = boot(image)

        assert got.read(MIB, 8192) == image.ljust(8192, b"\0")
        assert got.regs["rip"] == MIB + 48

    def test_information(self, boot) -> None:
        got = boot(kludge(), initrd=b"module", cmdline="one two", env=["a=b"])

        info = got.regs["rbx"]
        flags, lower, upper, _, cmdline, count, mods = struct.unpack(
            "<7I", got.read(info, 28)
        )
        mmap_length, mmap = struct.unpack("<2I", got.read(info + 44, 8))
        assert flags == 0b1001001101
        assert (lower, upper) == (640, 255 * 1024)
        assert got.string(cmdline) == b"kernel one two a=b"
        assert count == 1
        start, end, string, _ = struct.unpack("<4I", got.read(mods, 16))
        assert got.read(start, end - start) == b"module"
        assert start % 4096 == 0
        assert got.string(string) == b""
        assert mmap_length == 4 * 24
        assert struct.unpack("<I2QI", got.read(mmap, 24)) == (20, 0, 0xA0000, 1)
        assert got.string(got.u32(info + 64)) == b"bhyveload"

    @pytest.mark.parametrize(
        ("image", "complaint"),
        [
            (kludge(1 << 16 | 1 << 5), "demands unknown features (0x20)"),
            (kludge(0), "has no addresses, and the file is not ELF"),
            (kludge(1 << 16, MIB, MIB + 4, 0, 0, MIB), "outside what it says to load"),
            (kludge(1 << 16, MIB + 16, MIB, MIB - 1, 0, MIB), "load from 0x100000 to"),
            (kludge(1 << 16, MIB + 16, MIB, 2 * MIB, 0, MIB), "truncated: the kernel"),
            (kludge(1 << 16, MIB + 17, MIB, 0, 0, MIB), "truncated: the kernel that"),
            (kludge(1 << 16, MIB + 16, MIB, 0, 0, 5), "entry point 0x5 is not in the"),
            (kludge(1 << 16, MIB + 16, MIB, 0, GIB, MIB), "the kernel needs 1024 MiB"),
        ],
    )
    def test_what_is_wrong_is_said(self, boot, image: bytes, complaint: str) -> None:
        with pytest.raises(ImageError) as error:
            boot(image)
        assert complaint in one_line(error.value)

    def test_a_header_behind_8_kib_is_none(self, boot) -> None:
        with pytest.raises(ImageError) as error:
            boot(bytes(8192) + kludge())
        assert "is not a kernel" in one_line(error.value)


def kludge2(*tags: tuple[int, int, bytes], load: int = MIB, entry: int = MIB) -> bytes:
    addresses = struct.pack("<4I", MIB, load, 0, 0)
    return (
        multiboot2_header((2, 0, addresses), (3, 0, entry.to_bytes(4, "little")), *tags)
        + CODE
    )


class TestMultiboot2:
    """The Multiboot2 Specification, from the kernel's side."""

    def test_elf(self, boot) -> None:
        code = multiboot2_header() + CODE
        got = boot(elf([(MIB, MIB, code, 4096)], bits=32, entry=MIB + 24))

        assert got.regs["rip"] == MIB + 24
        assert got.regs["rax"] == 0x36D76289

    def test_information(self, boot) -> None:
        got = boot(kludge2(), initrd=b"module", cmdline="one")

        info = got.regs["rbx"]
        total = got.u32(info)
        tags, position = {}, 8
        while position < total:
            type, size = struct.unpack("<2I", got.read(info + position, 8))
            tags[type] = got.read(info + position + 8, size - 8)
            position += -(-size // 8) * 8
        assert position == total
        assert list(tags)[-1] == 0
        assert tags[1] == b"kernel one\0"
        start, end = struct.unpack("<2I", tags[3][:8])
        assert got.read(start, end - start) == b"module"
        assert struct.unpack("<2I", tags[4]) == (640, 255 * 1024)
        assert struct.unpack("<2I", tags[6][:8]) == (24, 0)
        assert len(tags[6]) == 8 + 4 * 24

    def test_loading_from_the_start_of_the_file(self, boot) -> None:
        image = kludge2(load=0xFFFFFFFF)

        assert boot(image).read(MIB, len(image)) == image

    def test_wishes_are_ignored(self, boot) -> None:
        boot(
            kludge2(
                (5, 0, bytes(12)), (99, 1, b"optional"), (1, 1, bytes([9, 0, 0, 0]))
            )
        )

    @pytest.mark.parametrize(
        ("image", "complaint"),
        [
            (kludge2((99, 0, b"")), "demands an unknown feature (tag 99)"),
            (
                kludge2((1, 0, bytes([9, 0, 0, 0]))),
                "information that is not there: [9]",
            ),
            (kludge2(entry=7), "the entry point 0x7 is not in the kernel"),
            (multiboot2_header((2, 0, bytes(16))) + CODE, "but not where to start"),
            (multiboot2_header(architecture=4) + CODE, "for another processor"),
            (multiboot2_header() + CODE, "has no addresses, and the file is not ELF"),
        ],
    )
    def test_what_is_wrong_is_said(self, boot, image: bytes, complaint: str) -> None:
        with pytest.raises(ImageError) as error:
            boot(image)
        assert complaint in one_line(error.value)


class TestFiles:
    """What a path may be, before its contents matter."""

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError) as error:
            make_plan(tmp_path / "no", None, None, [], 64 * MIB, 0)
        assert one_line(error.value) == (
            f"kernel {tmp_path / 'no'}: cannot be opened: No such file or directory"
        )

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError) as error:
            make_plan(tmp_path, None, None, [], 64 * MIB, 0)
        assert one_line(error.value) == f"kernel {tmp_path}: is a directory, not a file"

    def test_fifo(self, tmp_path: Path) -> None:
        """Opening a FIFO without a writer would wait for ever."""
        os.mkfifo(tmp_path / "fifo")

        with pytest.raises(ImageError) as error:
            make_plan(tmp_path / "fifo", None, None, [], 64 * MIB, 0)
        assert "is not a regular file" in one_line(error.value)

    def test_empty_and_huge(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        with pytest.raises(ImageError) as error:
            make_plan(file, None, None, [], 64 * MIB, 0)
        assert "is empty" in one_line(error.value)

        os.truncate(file, 1 << 40)
        with pytest.raises(ImageError) as error:
            make_plan(file, None, None, [], 64 * MIB, 0)
        assert "there is room for 1073741824" in one_line(error.value)

    def test_initrd(self, tmp_path: Path, boot) -> None:
        (tmp_path / "kernel").write_bytes(bzimage())
        initrd = tmp_path / "initrd"
        initrd.touch()
        with pytest.raises(ImageError) as error:
            make_plan(tmp_path / "kernel", initrd, None, [], 64 * MIB, 0)
        assert one_line(error.value) == f"initrd {initrd}: is empty"

        with pytest.raises(ImageError) as error:
            boot(bzimage(xloadflags=1), initrd=bytes(60 * MIB), lowmem=64 * MIB)
        assert "no room for the initrd of 62914560 bytes" in one_line(error.value)

    def test_nul_in_the_command_line(self, boot) -> None:
        with pytest.raises(ImageError) as error:
            boot(bzimage(), cmdline="a\0b")
        assert "NUL" in one_line(error.value)


VICTIMS = {
    "linux": bzimage(payload=b"\x90" * 512, setup_sects=1),
    "pvh": TestPvh.KERNEL,
    "multiboot": kludge(),
    "multiboot elf": elf(
        [(MIB, MIB, multiboot_header(3) + CODE, 4096)], bits=32, entry=MIB + 12
    ),
    "multiboot2": kludge2((1, 0, bytes([1, 0, 0, 0, 6, 0, 0, 0]))),
}


@pytest.mark.parametrize("format", VICTIMS)
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_damaged_header_is_an_image_error_or_loads(
    boot, format: str, data: st.DataObject
) -> None:
    """Numbers changed to edge values, and the end cut off: no other exception."""
    image = bytearray(VICTIMS[format])
    # Offsets where the format keeps numbers; the Linux header lies in one place.
    first = 0x1F0 if format == "linux" else 0
    for _ in range(data.draw(st.integers(1, 4))):
        offset = data.draw(st.integers(first, min(len(image) - 8, first + 0x98)))
        size = data.draw(st.sampled_from([1, 2, 4, 8]))
        edge = st.sampled_from(
            [0, 1, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 64) - 1]
        )
        value = data.draw(edge | st.integers(0, (1 << 64) - 1))
        image[offset : offset + size] = (value & ((1 << 8 * size) - 1)).to_bytes(
            size, "little"
        )
    end = data.draw(st.integers(0, len(image)) | st.just(len(image)))
    with contextlib.suppress(ImageError):
        boot(bytes(image[:end]) or b"\0", initrd=b"initrd")
