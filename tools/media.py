"""Disks and CDs with other people's programs, for machines to start from.

``python -m tools.media FILE PROGRAM.efi`` writes a disk that UEFI firmware starts the
program from.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from tools import fetch

MIB: Final = 1 << 20
ROOM: Final = 4 * MIB  # for what a file system needs beside its files
MTOOLS: Final = ("mformat", "mmd", "mcopy")

STARTED: Final = "EFI/BOOT/BOOTX64.EFI"
"""What UEFI firmware starts of a disk that it does not know."""
GRUB: Final = "boot/grub"
"""Where Debian's GRUB for CDs looks for its configuration and modules."""


class MediaError(Exception):
    """A disk that cannot be made; the message says why."""


def fat(path: Path, files: Mapping[str, Path | bytes]) -> Path:
    """Write a FAT file system with these files; MediaError without mtools."""
    if missing := [name for name in MTOOLS if not shutil.which(name)]:
        raise MediaError(f"no {', '.join(missing)}: apt-get install mtools")
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        for name, contents in files.items():
            place = tree / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(contents, Path):
                place.symlink_to(contents)
            else:
                place.write_bytes(contents)
        size = sum(each.stat().st_size for each in tree.rglob("*") if each.is_file())
        with path.open("wb") as image:
            image.truncate(-(-(size + ROOM) // MIB) * MIB)
        _run("mformat", "-i", str(path), "-v", "PYBHYVE", "::")
        _run("mcopy", "-s", "-i", str(path), *map(str, sorted(tree.iterdir())), "::")
    return path


def grub(path: Path, files: Mapping[str, Path | bytes], config: str = "") -> Path:
    """Write a disk with Debian's GRUB for UEFI and more files.

    Without a configuration GRUB's shell starts.  Raises MediaError and FetchError.
    """
    package = fetch.package("grub-efi-amd64-bin")
    program = package.file("usr/lib/grub/x86_64-efi/monolithic/gcdx64.efi")
    own: dict[str, Path | bytes] = {
        STARTED: program,
        ".disk/info": b"pybhyve\n",  # by this it knows its disk
    }
    for each in program.parent.parent.iterdir():
        if each.suffix in (".mod", ".lst"):
            own[str(PurePosixPath(GRUB) / "x86_64-efi" / each.name)] = each
    if config:
        own[f"{GRUB}/grub.cfg"] = config.encode()
    return fat(path, {**own, **files})


def _run(*command: str) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "MTOOLS_SKIP_CHECK": "1"},
        check=False,
    )
    if done.returncode:
        raise MediaError(f"{command[0]}: {done.stderr.strip()}")


def main() -> int:
    """Write a disk with one program."""
    parser = argparse.ArgumentParser(description="Write a disk that UEFI starts.")
    parser.add_argument("disk", type=Path)
    parser.add_argument("program", type=Path)
    args = parser.parse_args()
    try:
        fat(args.disk, {STARTED: args.program.absolute()})
    except (MediaError, OSError) as error:
        print(f"media: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
