"""An installed Debian on a serial console, driven as a person drives it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.functional.console import Console
from tools import disk

BOOT_TIMEOUT = 500  # seconds from the firmware to the login, on a busy machine
PROMPT = "bhyve# "


def log_in(console: Console) -> None:
    """Wait for the login and become root, at a shell that has a plain prompt."""
    console.expect("debian login: ", BOOT_TIMEOUT)
    console.send("root\n")
    console.expect("root@debian:~# ", 60)
    # bash would write control sequences around what is typed.
    console.send(f"exec env PS1='{PROMPT}' sh\n")
    console.expect(f"\r\n.*{re.escape(PROMPT)}", 60)


def check_file_systems(image: Path) -> None:
    """Both of the disk's file systems are clean and were unmounted."""
    root = f"{image}?offset={disk.ROOT_START}"
    _check("/usr/sbin/e2fsck", "-f", "-n", root)
    superblock = _check("/usr/sbin/dumpe2fs", "-h", root)
    assert re.search(r"^Filesystem state: +clean$", superblock, re.MULTILINE)
    assert "needs_recovery" not in superblock

    esp = image.with_suffix(".esp")
    with image.open("rb") as file:
        file.seek(disk.ESP_START)
        esp.write_bytes(file.read(disk.ESP_SIZE))
    _check("/usr/sbin/fsck.vfat", "-n", str(esp))


def _check(*command: str) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
