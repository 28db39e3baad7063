"""A firmware's half of the table loader: follows the script of ``etc/table-loader``."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

ENTRY: Final = 128


def text(field: bytes) -> str:
    return field.rstrip(b"\0").decode()


def run_script(
    script: bytes, read: Callable[[str], bytes], allocate: Callable[[int, int], int]
) -> dict[str, tuple[int, bytes]]:
    """Do what the commands say; where each file is afterwards, and what it contains.

    ``read`` gives a file, ``allocate(size, align)`` memory.
    """
    assert len(script) % ENTRY == 0
    where: dict[str, int] = {}
    files: dict[str, bytearray] = {}
    for at in range(0, len(script), ENTRY):
        entry = script[at : at + ENTRY]
        (command,) = struct.unpack_from("<I", entry)
        match command:
            case 1:
                name, align, zone = struct.unpack_from("<56sIB", entry, 4)
                assert zone == (2 if text(name).endswith("RSDP") else 1)
                assert text(name) not in files
                files[text(name)] = bytearray(read(text(name)))
                where[text(name)] = allocate(len(files[text(name)]), align)
            case 2:
                name, target, offset, size = struct.unpack_from("<56s56sIB", entry, 4)
                data = files[text(name)]
                assert offset + size <= len(data)
                value = int.from_bytes(data[offset : offset + size], "little")
                value += where[text(target)]
                data[offset : offset + size] = value.to_bytes(size, "little")
            case 3:
                name, offset, start, length = struct.unpack_from("<56sIII", entry, 4)
                data = files[text(name)]
                assert start + length <= len(data)
                rest = data[offset] - sum(data[start : start + length])
                data[offset] = rest % 256
            case _:
                raise AssertionError(f"command {command}")
    return {name: (where[name], bytes(data)) for name, data in files.items()}
