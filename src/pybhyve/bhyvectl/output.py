"""What bhyvectl prints, to the byte: scripts read it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pybhyve.vmmapi import Exit

PROT_LETTERS: Final = ((1, "R"), (2, "W"), (4, "X"))

INTINFO_VALID: Final = 1 << 31
INTINFO_ERROR_CODE: Final = 1 << 11
INTINFO_TYPES: Final = {0: "extint", 2: "nmi", 4: "swint"}  # all others: exception

EXIT_NAMES: Final = {
    number: name for name, number in vars(Exit).items() if isinstance(number, int)
}
HUMAN_UNITS: Final = "KMGTPE"
HUMAN_LIMIT: Final = 100_000  # five digits, unit and B fill humanize_number()'s buffer


def hexadecimal(value: int) -> str:
    """C's ``%#lx``: zero has no prefix."""
    return f"{value:#x}" if value else "0"


def register(name: str, vcpu: int, value: int) -> str:
    """A general or control register."""
    gap = "\t" if name == "rflags" else "\t\t"
    return f"{name}[{vcpu}]{gap}0x{value:016x}"


def selector(name: str, vcpu: int, value: int) -> str:
    """The visible part of a segment register."""
    return f"{name}[{vcpu}]\t\t0x{value:04x}"


def descriptor(name: str, vcpu: int, base: int, limit: int, access: int) -> str:
    """The hidden part of a segment register."""
    return f"{name} desc[{vcpu}]\t0x{base:016x}/0x{limit:08x}/0x{access:08x}"


def table(name: str, vcpu: int, base: int, limit: int) -> str:
    """GDTR or IDTR."""
    return f"{name}[{vcpu}]\t\t0x{base:016x}/0x{limit:08x}"


def human_size(size: int) -> str:
    """humanize_number(3) as bhyvectl calls it: ``256MB``, ``16384KB``."""
    unit, rest = "", 0
    for letter in HUMAN_UNITS:
        if size + (rest >= 512) < HUMAN_LIMIT:
            break
        size, rest, unit = size // 1024, size % 1024, letter
    return f"{size + (rest >= 512)}{unit}B"


def memory_segments(segments: Sequence[tuple[int, str, int]]) -> list[str]:
    """``--get-memseg``: id, name and length of each."""
    return [
        "ID  Length      Name",
        *(
            f"{segid:<4d}{human_size(length):<12s}{name or 'sysmem'}"
            for segid, name, length in segments
        ),
    ]


def memory_map(
    mappings: Sequence[tuple[int, int, int, int, int]], names: Mapping[int, str]
) -> list[str]:
    """``--get-memmap``: gpa, segment id, offset, length and protection of each."""
    lines = ["Address     Length      Segment     Offset      Prot  Flags"]
    for gpa, segid, offset, length, prot in mappings:
        letters = "".join(c if prot & bit else "-" for bit, c in PROT_LETTERS)
        name = names.get(segid) or "sysmem"
        size = human_size(length)
        lines.append(f"{gpa:<12X}{size:<12s}{name:<12s}{offset:<12X}{letters}   ")
    return lines


def cpus(banner: str, indexes: Sequence[int]) -> str:
    """A set of vCPUs."""
    return f"{banner}:\t {', '.join(map(str, indexes)) or '(none)'}"


def intinfo(banner: str, info: int) -> str:
    """A VM_INTINFO word."""
    if not info & INTINFO_VALID:
        return f"{banner}:\tn/a"
    kind = INTINFO_TYPES.get(info >> 8 & 7, "exception")
    text = f"{banner}:\t{kind} vector {info & 0xFF}"
    if info & INTINFO_ERROR_CODE:
        text += f" errcode {hexadecimal(info >> 32)}"
    return text


def capability(name: str, vcpu: int, value: int) -> str:
    """A capability that there is."""
    return f'Capability "{name}" is {"set" if value else "not set"} on vcpu {vcpu}'


def no_capability(name: str) -> str:
    """A capability that there is not."""
    return f'Capability "{name}" is not available'


def rtc_time(secs: int) -> str:
    """The time of day in the guest's clock."""
    when = time.strftime("%a %b %d %H:%M:%S", time.gmtime(secs))
    return f"rtc time {hexadecimal(secs)}: {when} {time.gmtime(secs).tm_year}"


def topology(sockets: int, cores: int, threads: int, maxcpus: int) -> str:
    """``--get-cpu-topology``."""
    return (
        f"cpu_topology:\tsockets={sockets}, cores={cores}, threads={threads}, "
        f"maxcpus={maxcpus}"
    )


def statistics(vcpu: int, counters: Mapping[str, int]) -> list[str]:
    """``--get-stats``."""
    return [
        f"vcpu{vcpu} stats:",
        *(f"{name:<40s}\t{value}" for name, value in counters.items()),
    ]


def vm_exit(vcpu: int, rip: int, exit: tuple[Any, ...]) -> list[str]:
    """What ``--run`` came back with: an exit tuple."""
    lines = [f"vm exit[{vcpu}]", f"\trip\t\t0x{rip:016x}"]
    code, *payload = exit
    if code == Exit.INOUT:
        port, size, value = payload
        lines += [
            "\treason\t\tINOUT",
            f"\tdirection\t{'IN' if value is None else 'OUT'}",
            f"\tbytes\t\t{size}",
            "\tflags\t\t",
            f"\tport\t\t0x{port:04x}",
            f"\teax\t\t0x{value or 0:08x}",
        ]
    else:
        # deviation: bhyve's names four, and says that it does not know the rest.
        lines.append(f"\treason\t\t{EXIT_NAMES.get(code, code)}")
    return lines
