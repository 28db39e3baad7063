"""The MP table, read as a guest does."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from pybhyve.amd64.mptable import build_mptable
from pybhyve.errors import BhyveError
from pybhyve.pci.bus import pci_host


def parse(table: bytes) -> tuple[list[Any], list[Any]]:
    """Header fields, and entries as (type, fields...)."""
    assert sum(table[:16]) & 0xFF == 0
    signature, where, length, revision = struct.unpack_from("<4sIBB", table)
    assert (signature, where, length, revision) == (b"_MP_", 0xF0010, 1, 4)
    config = table[16:]
    assert sum(config) & 0xFF == 0
    header = struct.unpack_from("<4sHBB8s12sIHHI", config)
    assert header[1] == len(config)
    layouts = {0: "<BBBBII8x", 1: "<BB6s", 2: "<BBBBI", 3: "<BBHBBBB", 4: "<BBHBBBB"}
    entries, at = [], 44
    while at < len(config):
        layout = layouts[config[at]]
        entries.append(struct.unpack_from(layout, config, at))
        at += struct.calcsize(layout)
    assert at == len(config)
    assert header[8] == len(entries)
    return [header], entries


def test_contents(build):
    machine = build("3,uart", "4:1,uart", "31,lpc", cpus=2)
    [header], entries = parse(build_mptable(2, pci_host(machine)))

    assert header[0] == b"PCMP"
    assert header[4:6] == (b"BHyVe   ", b"Hypervisor  ")
    assert header[9] == 0xFEE00000
    assert entries[:5] == [
        (0, 0, 0x10, 3, 0x6A5, 0xBFEBFBFF),
        (0, 1, 0x10, 1, 0x6A5, 0xBFEBFBFF),
        (1, 0, b"PCI   "),
        (1, 1, b"ISA   "),
        (2, 0, 0x11, 1, 0xFEC00000),
    ]
    isa = [entry[1:] for entry in entries if entry[0] == 3 and entry[3] == 1]
    assert len(isa) == 16
    assert isa[0] == (3, 0, 1, 0, 0, 0)
    assert (0, 0, 1, 0, 0, 2) in isa
    assert (0, 0xF, 1, 9, 0, 9) in isa
    assert (0, 0, 1, 4, 0, 4) in isa
    pci = [entry[1:] for entry in entries if entry[0] == 3 and entry[3] == 0]
    assert pci == [(0, 0, 0, 3 << 2, 0, 16), (0, 0, 0, 4 << 2, 0, 17)]
    assert [entry for entry in entries if entry[0] == 4] == [
        (4, 3, 0, 1, 0, 0xFF, 0),
        (4, 1, 0, 1, 0, 0xFF, 1),
    ]


def test_several_buses_cannot_be_described(build):
    machine = build("3,dummy", "1:3:0,dummy")

    with pytest.raises(BhyveError, match="multiple PCI hierarchies"):
        build_mptable(1, pci_host(machine))


def test_too_many_processors(build):
    host = pci_host(build("3,dummy"))
    parse(build_mptable(128, host))

    with pytest.raises(BhyveError, match="-Y"):
        build_mptable(250, host)
