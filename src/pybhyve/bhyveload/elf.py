"""ELF executables as kernels: what to load where, the entry, the notes.

System V gABI, chapters 4 and 5; ELF32 for i386, ELF64 for x86-64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from pybhyve.bhyveload.image import Image
from pybhyve.bhyveload.plan import LoadPlan
from pybhyve.errors import ImageError
from pybhyve.layout import Layout

MAGIC: Final = b"\x7fELF"
EI_CLASS: Final = 4
EI_DATA: Final = 5
ELFCLASS32: Final = 1
ELFCLASS64: Final = 2
ELFDATA2LSB: Final = 1
ET_EXEC: Final = 2
ET_DYN: Final = 3
EM_386: Final = 3
EM_X86_64: Final = 62
PT_LOAD: Final = 1
PT_NOTE: Final = 4

# Kernels have a dozen headers and some hundred bytes of notes.  Without limits a small
# file could name the same megabytes of notes sixty thousand times.
MAX_PHDRS: Final = 128
MAX_NOTES_SIZE: Final = 1 << 16

_EHDR = (
    "ident type machine version entry phoff shoff flags ehsize"
    " phentsize phnum shentsize shnum shstrndx"
)
EHDR32: Final = Layout("<16sHHIIIIIHHHHHH", _EHDR)
EHDR64: Final = Layout("<16sHHIQQQIHHHHHH", _EHDR)
PHDR32: Final = Layout("<8I", "type offset vaddr paddr filesz memsz flags align")
PHDR64: Final = Layout("<2I6Q", "type flags offset vaddr paddr filesz memsz align")
NHDR: Final = Layout("<3I", "namesz descsz type")


class Segment(NamedTuple):
    """A program header of type PT_LOAD or PT_NOTE."""

    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


class Elf(NamedTuple):
    """A checked file header and program headers."""

    is_64bit: bool
    entry: int  # e_entry: a virtual address
    loads: list[Segment]
    notes: list[Segment]


def recognise(image: Image) -> bool:
    """Whether this is ELF, well-formed or not."""
    return image.data.startswith(MAGIC)


def parse(image: Image) -> Elf:
    """Check the headers and read them.  Raises ImageError."""
    ident = image.bytes(0, 16, "the ELF header")
    is_64bit = ident[EI_CLASS] == ELFCLASS64
    if not is_64bit and ident[EI_CLASS] != ELFCLASS32:
        raise ImageError(f"ELF class {ident[EI_CLASS]} is neither 32-bit nor 64-bit")
    ehdr_layout, phdr_layout = (EHDR64, PHDR64) if is_64bit else (EHDR32, PHDR32)
    ehdr = ehdr_layout.unpack(image.bytes(0, ehdr_layout.size, "the ELF header"))
    machine = EM_X86_64 if is_64bit else EM_386
    if ident[EI_DATA] != ELFDATA2LSB or ehdr.machine != machine:
        raise ImageError(f"is ELF for another processor (machine {ehdr.machine})")
    if ehdr.type not in (ET_EXEC, ET_DYN):
        raise ImageError(f"is not an ELF executable (type {ehdr.type})")
    if ehdr.phnum > MAX_PHDRS or ehdr.phentsize < phdr_layout.size:
        raise ImageError(
            f"{ehdr.phnum} program headers of {ehdr.phentsize} bytes: at most"
            f" {MAX_PHDRS} of at least {phdr_layout.size} can be read"
        )
    loads, notes = [], []
    table = image.bytes(ehdr.phoff, ehdr.phnum * ehdr.phentsize, "the program headers")
    for n in range(ehdr.phnum):
        phdr = phdr_layout.unpack(table, n * ehdr.phentsize)
        if phdr.type not in (PT_LOAD, PT_NOTE):
            continue
        segment = Segment(
            phdr.offset, phdr.vaddr, phdr.paddr, phdr.filesz, phdr.memsz, phdr.align
        )
        image.bytes(segment.offset, segment.filesz, f"ELF segment {n}")
        if phdr.type == PT_NOTE:
            if segment.filesz > MAX_NOTES_SIZE:
                raise ImageError(f"ELF segment {n} has {segment.filesz} bytes of notes")
            notes.append(segment)
            continue
        if segment.filesz > segment.memsz:
            raise ImageError(f"ELF segment {n} is larger in the file than in memory")
        if segment.memsz:
            loads.append(segment)
    if not loads:
        raise ImageError("is ELF, but has nothing to load")
    return Elf(is_64bit, ehdr.entry, loads, notes)


def place(plan: LoadPlan, image: Image, elf: Elf) -> None:
    """Place all segments at their physical addresses.  Raises ImageError."""
    for segment in elf.loads:
        data = image.bytes(segment.offset, segment.filesz, "an ELF segment")
        plan.place("an ELF segment", segment.paddr, data, segment.memsz)


def physical_entry(elf: Elf) -> int:
    """Where the entry point lies in physical memory.  Raises ImageError."""
    for segment in elf.loads:
        if segment.vaddr <= elf.entry < segment.vaddr + segment.memsz:
            return elf.entry - segment.vaddr + segment.paddr
    return check_entry(elf, elf.entry)


def check_entry(elf: Elf, address: int) -> int:
    """``address``, which must be a physical one in a segment; else ImageError."""
    if not any(s.paddr <= address < s.paddr + s.memsz for s in elf.loads):
        raise ImageError(f"the entry point {address:#x} is in none of the ELF segments")
    return address


def notes(image: Image, elf: Elf) -> Iterator[tuple[bytes, int, memoryview]]:
    """Name (without its NUL), type and contents of all notes.  Raises ImageError."""
    for segment in elf.notes:
        align = 8 if segment.align == 8 else 4
        position, end = segment.offset, segment.offset + segment.filesz
        while position + NHDR.size <= end:
            nhdr = NHDR.unpack(image.bytes(position, NHDR.size, "an ELF note"))
            position += NHDR.size
            name = image.bytes(position, nhdr.namesz, "an ELF note's name")
            position += -(-nhdr.namesz // align) * align
            contents = image.bytes(position, nhdr.descsz, "an ELF note")
            position += -(-nhdr.descsz // align) * align
            yield bytes(name).rstrip(b"\0"), nhdr.type, contents
