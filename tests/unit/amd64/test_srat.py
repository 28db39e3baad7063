"""SRAT: domains of processors and of memory."""

from __future__ import annotations

from pybhyve.amd64.acpi.srat import build_srat

HEADER_SIZE = 48  # with the 12 reserved bytes


def test_processors_and_memory_of_two_domains():
    gib = 1 << 30
    memmap = [
        (0, 0, 0, 2 * gib, 7),
        (2 * gib, 1, 0, gib, 7),
        (4 * gib, 1, gib, gib, 7),
        (0xFF000000, 8, 0, 1 << 24, 5),  # the boot ROM is no memory
    ]

    table = build_srat([{0, 1}, {2}], memmap).at({})

    assert table[:4] == b"SRAT"
    assert sum(table) & 0xFF == 0
    processors, memory = [], []
    at = HEADER_SIZE
    while at < len(table):
        entry = table[at : at + table[at + 1]]
        if entry[0] == 0:
            processors.append(
                (entry[2], entry[3], int.from_bytes(entry[4:8], "little"))
            )
        else:
            fields = (entry[2:6], entry[8:16], entry[16:24], entry[28:32])
            memory.append(tuple(int.from_bytes(field, "little") for field in fields))
        at += len(entry)
    assert processors == [(0, 0, 1), (0, 1, 1), (1, 2, 1)]
    assert memory == [
        (0, 0, 2 * gib, 1),
        (1, 2 * gib, gib, 1),
        (1, 4 * gib, gib, 1),
    ]
