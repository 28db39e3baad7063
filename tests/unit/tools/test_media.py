"""Disks with programs: mtools, which did not make their contents, reads them back."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import media

MIB = 1 << 20


def read(image: Path, name: str) -> bytes:
    return subprocess.run(
        ["mtype", "-i", str(image), f"::{name}"], check=True, capture_output=True
    ).stdout


def test_files_of_every_kind(tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"\x7f" * (40 * MIB))
    image = media.fat(
        tmp_path / "disk.img",
        {"EFI/BOOT/BOOTX64.EFI": program, "EFI/words.txt": b"words\n", "empty": b""},
    )

    assert read(image, "EFI/BOOT/BOOTX64.EFI") == program.read_bytes()
    assert read(image, "EFI/words.txt") == b"words\n"
    assert read(image, "empty") == b""
    assert image.stat().st_size % MIB == 0


def test_without_mtools(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(media.MediaError, match="apt-get install mtools"):
        media.fat(tmp_path / "disk.img", {})
