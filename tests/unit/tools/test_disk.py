"""What making a disk costs a user, as far as it goes without making one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import disk


def test_missing_packages_are_named_once(tmp_path: Path) -> None:
    program = tmp_path / "sfdisk"
    program.touch(0o755)

    assert disk.missing_packages("") == sorted({*disk.TOOLS.values()})
    assert "fdisk" not in disk.missing_packages(str(tmp_path))


def test_copy_keeps_holes(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.write(b"head")
        file.seek(64 << 20)
        file.write(b"tail")
    copied = tmp_path / "new" / "copy"
    disk.copy(image, copied)

    assert copied.read_bytes() == image.read_bytes()
    assert copied.stat().st_blocks * 512 < 1 << 20
    assert [path.name for path in copied.parent.iterdir()] == ["copy"]


def test_nothing_to_copy_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(disk.DiskError, match="cp ended with status 1"):
        disk.copy(tmp_path / "none", tmp_path / "copy")
