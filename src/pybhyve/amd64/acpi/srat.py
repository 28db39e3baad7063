"""SRAT: which processors and which memory are near each other (ACPI 6.5, 5.2.16)."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from pybhyve.amd64.acpi.table import Table, build_table

PROCESSOR: Final = struct.Struct("<BBBBIB3sI")  # 5.2.16.1
MEMORY: Final = struct.Struct("<BBIHQQIIQ")  # 5.2.16.2
ENABLED: Final = 1


def build_srat(
    domains: Sequence[Collection[int]], memmap: Iterable[tuple[int, int, int, int, int]]
) -> Table:
    """The vCPUs of each NUMA domain, and the RAM: the segment of a domain's number.

    ``memmap`` is the VM's, (gpa, segment, offset, length, prot).
    """
    body = struct.pack("<IQ", 1, 0)
    for number, vcpus in enumerate(domains):
        for vcpu in sorted(vcpus):
            body += PROCESSOR.pack(
                0, PROCESSOR.size, number, vcpu, ENABLED, 0, bytes(3), 0
            )
    for gpa, segment, _offset, length, _prot in memmap:
        if segment < len(domains):
            body += MEMORY.pack(1, MEMORY.size, segment, 0, gpa, length, 0, ENABLED, 0)
    return build_table("SRAT", 3, body)
