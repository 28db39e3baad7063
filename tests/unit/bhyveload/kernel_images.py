"""Kernel images made by hand, one builder for each format that bhyveload takes."""

from __future__ import annotations

import lzma
import struct

MIB = 1 << 20


def bzimage(
    *,
    version: int = 0x020F,
    xloadflags: int = 0b11,
    payload: bytes = b"\x90" * 4096,
    setup_sects: int = 3,
    loadflags: int = 1,
    relocatable: int = 1,
    alignment: int = 0x200000,
    pref_address: int = 16 * MIB,
    init_size: int = 32 * MIB,
    cmdline_size: int = 2047,
    initrd_addr_max: int = 0x7FFFFFFF,
    syssize: int | None = None,
    magic: bytes = b"HdrS",
) -> bytes:
    """A Linux kernel: header as in boot.rst, ``payload`` as protected-mode code."""
    setup = bytearray(((setup_sects or 4) + 1) * 512)
    if syssize is None:
        syssize = -(-len(payload) // 16)
    for offset, format, value in (
        (0x1F1, "<B", setup_sects),
        (0x1F4, "<I", syssize),
        (0x1FE, "<H", 0xAA55),
        (0x200, "<H", 0x6AEB),  # a jump to 0x26c
        (0x206, "<H", version),
        (0x210, "<B", 0),
        (0x211, "<B", loadflags),
        (0x214, "<I", 0x100000),
        (0x22C, "<I", initrd_addr_max),
        (0x230, "<I", alignment),
        (0x234, "<B", relocatable),
        (0x236, "<H", xloadflags),
        (0x238, "<I", cmdline_size),
        (0x258, "<Q", pref_address),
        (0x260, "<I", init_size),
    ):
        struct.pack_into(format, setup, offset, value)
    setup[0x202:0x206] = magic
    return bytes(setup) + payload


Segment = tuple[int, int, bytes, int]  # vaddr, paddr, contents, memsz


def elf(
    segments: list[Segment],
    *,
    bits: int = 64,
    entry: int = 0x100000,
    notes: bytes = b"",
    type: int = 2,
    machine: int | None = None,
) -> bytes:
    """An ELF executable with these PT_LOAD segments, and one of notes if there are."""
    ehsize, phentsize = (64, 56) if bits == 64 else (52, 32)
    programs = [(1, *segment) for segment in segments]
    if notes:
        programs.append((4, 0, 0, notes, len(notes)))
    offset = -(-(ehsize + phentsize * len(programs)) // 16) * 16
    headers, body = b"", b""
    for kind, vaddr, paddr, contents, memsz in programs:
        at = offset + len(body)
        if bits == 64:
            headers += struct.pack(
                "<2I6Q", kind, 7, at, vaddr, paddr, len(contents), memsz, 4
            )
        else:
            headers += struct.pack(
                "<8I", kind, at, vaddr, paddr, len(contents), memsz, 7, 4
            )
        body += contents + bytes(-len(contents) % 16)
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    if machine is None:
        machine = 62 if bits == 64 else 3
    ehdr = struct.pack(
        "<16sHHIQQQIHHHHHH" if bits == 64 else "<16sHHIIIIIHHHHHH",
        *(ident, type, machine, 1, entry, ehsize, 0, 0),
        *(ehsize, phentsize, len(programs), 0, 0, 0),
    )
    return (ehdr + headers).ljust(offset, b"\0") + body


def note(name: bytes, type: int, contents: bytes) -> bytes:
    """An ELF note."""
    return (
        struct.pack("<3I", len(name), len(contents), type)
        + name
        + bytes(-len(name) % 4)
        + contents
        + bytes(-len(contents) % 4)
    )


def pvh_note(entry: int, size: int = 4) -> bytes:
    """Another note, then XEN_ELFNOTE_PHYS32_ENTRY."""
    return note(b"GNU\0", 3, b"build") + note(
        b"Xen\0", 18, entry.to_bytes(size, "little")
    )


def multiboot_header(flags: int, *addresses: int) -> bytes:
    """A multiboot 1 header; ``addresses`` only with bit 16 of flags."""
    magic = 0x1BADB002
    return struct.pack(
        f"<{3 + len(addresses)}I",
        magic,
        flags,
        -(magic + flags) & 0xFFFFFFFF,
        *addresses,
    )


def multiboot2_header(*tags: tuple[int, int, bytes], architecture: int = 0) -> bytes:
    """A multiboot 2 header with tags (type, flags, contents) and an end tag."""
    body = b""
    for type, flags, contents in (*tags, (0, 0, b"")):
        tag = struct.pack("<2HI", type, flags, 8 + len(contents)) + contents
        body += tag + bytes(-len(tag) % 8)
    magic, length = 0xE85250D6, 16 + len(body)
    checksum = -(magic + architecture + length) & 0xFFFFFFFF
    return struct.pack("<4I", magic, architecture, length, checksum) + body


def vmlinux(bzimage: bytes) -> bytes:
    """The ELF file inside a Linux kernel that is compressed with xz."""
    offset, length = struct.unpack_from("<2I", bzimage, 0x248)
    start = (bzimage[0x1F1] + 1) * 512 + offset
    # The last four bytes are the size of what comes out.
    return lzma.decompress(bzimage[start : start + length - 4])
