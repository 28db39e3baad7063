"""The texts that scripts read, to the byte."""

from __future__ import annotations

import pytest

from pybhyve.bhyvectl import output
from pybhyve.vmmapi import Exit


def test_registers() -> None:
    assert output.register("rax", 1, 0xFFFF) == "rax[1]\t\t0x000000000000ffff"
    assert output.register("rflags", 0, 2) == "rflags[0]\t0x0000000000000002"
    assert output.selector("cs", 0, 0x10) == "cs[0]\t\t0x0010"
    assert output.descriptor("cs", 0, 0, 0xFFFFFFFF, 0xA09B) == (
        "cs desc[0]\t0x0000000000000000/0xffffffff/0x0000a09b"
    )
    assert output.table("gdtr", 0, 0x1000, 0x2F) == (
        "gdtr[0]\t\t0x0000000000001000/0x0000002f"
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (4096, "4096B"),
        (99_999, "99999B"),
        (100_000, "98KB"),
        (2 << 20, "2048KB"),
        (16 << 20, "16384KB"),
        (256 << 20, "256MB"),
        (3 << 30, "3072MB"),
        (97 << 30, "99328MB"),
        (98 << 30, "98GB"),
        ((1 << 20) + 512, "1025KB"),
        ((99_999 << 10) + 511, "99999KB"),
        ((99_999 << 10) + 512, "98MB"),
    ],
)
def test_sizes_are_those_of_humanize_number(size: int, text: str) -> None:
    assert output.human_size(size) == text


def test_memory() -> None:
    segments = [(0, "", 256 << 20), (8, "bootrom", 16 << 20)]
    assert output.memory_segments(segments) == [
        "ID  Length      Name",
        "0   256MB       sysmem",
        "8   16384KB     bootrom",
    ]
    mappings = [(0, 0, 0, 256 << 20, 7), (0xFF000000, 8, 0, 16 << 20, 5)]
    assert output.memory_map(mappings, {0: "", 8: "bootrom"}) == [
        "Address     Length      Segment     Offset      Prot  Flags",
        "0           256MB       sysmem      0           RWX   ",
        "FF000000    16384KB     bootrom     0           R-X   ",
    ]


def test_cpus() -> None:
    assert output.cpus("active cpus", [0, 1]) == "active cpus:\t 0, 1"
    assert output.cpus("debug cpus", []) == "debug cpus:\t (none)"


@pytest.mark.parametrize(
    ("info", "text"),
    [
        (0, "n/a"),
        (0x80000020, "extint vector 32"),
        (0x80000202, "nmi vector 2"),
        (0x80000B0D, "exception vector 13 errcode 0"),
        (0x5_80000B0E, "exception vector 14 errcode 0x5"),
        (0x80000480, "swint vector 128"),
    ],
)
def test_intinfo(info: int, text: str) -> None:
    assert output.intinfo("pending", info) == f"pending:\t{text}"


def test_capabilities() -> None:
    assert (
        output.capability("hlt_exit", 0, 1) == 'Capability "hlt_exit" is set on vcpu 0'
    )
    assert output.capability("hlt_exit", 1, 0) == (
        'Capability "hlt_exit" is not set on vcpu 1'
    )
    assert output.no_capability("wings") == 'Capability "wings" is not available'


def test_clock_and_topology() -> None:
    assert output.rtc_time(0) == "rtc time 0: Thu Jan 01 00:00:00 1970"
    assert output.rtc_time(0x5F5E0FF) == "rtc time 0x5f5e0ff: Sat Mar 03 09:46:39 1973"
    assert output.topology(2, 1, 1, 4) == (
        "cpu_topology:\tsockets=2, cores=1, threads=1, maxcpus=4"
    )


def test_statistics() -> None:
    assert output.statistics(1, {"vcpu total runtime": 5}) == [
        "vcpu1 stats:",
        f"{'vcpu total runtime':<40}\t5",
    ]


def test_exits() -> None:
    assert output.vm_exit(0, 0x100, (Exit.INOUT, 0x3F8, 1, 0x41)) == [
        "vm exit[0]",
        "\trip\t\t0x0000000000000100",
        "\treason\t\tINOUT",
        "\tdirection\tOUT",
        "\tbytes\t\t1",
        "\tflags\t\t",
        "\tport\t\t0x03f8",
        "\teax\t\t0x00000041",
    ]
    assert output.vm_exit(0, 0, (Exit.INOUT, 0x60, 1, None))[3] == "\tdirection\tIN"
    assert output.vm_exit(0, 0, (Exit.HLT,))[-1] == "\treason\t\tHLT"
