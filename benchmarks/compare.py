"""The same guest under our bhyve and under QEMU's TCG: commands and a stopwatch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools import boot

QEMU: Final = "qemu-system-x86_64"  # Debian package qemu-system-x86


@dataclass(frozen=True, slots=True)
class Workload:
    """What both machines run."""

    kernel: Path
    memory: str = "512M"
    ncpus: int = 1
    initrd: Path | None = None
    cmdline: str = ""
    disks: tuple[Path, ...] = ()
    """Images behind virtio-blk, from slot 4 on."""

    def bhyve(self, name: str) -> list[str]:
        """Our command."""
        image = ["-o", f"kernel={self.kernel}"]
        if self.cmdline:
            image += ["-o", f"cmdline={self.cmdline}"]
        if self.initrd is not None:
            image += ["-o", f"initrd={self.initrd}"]
        for slot, disk in enumerate(self.disks, 4):
            image += ["-s", f"{slot},virtio-blk,{disk}"]
        program = Path(sys.executable).with_name("bhyve")
        return [str(program), *boot.arguments(image, self.ncpus, self.memory, name)]

    def qemu(self) -> list[str]:
        """QEMU's command for the same machine: the serial port and the disks."""
        command = [QEMU, "-accel", "tcg", "-cpu", "max", "-machine", "pc"]
        command += ["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]
        command += ["-m", self.memory, "-smp", str(self.ncpus)]
        command += ["-kernel", str(self.kernel)]
        if self.cmdline:
            command += ["-append", self.cmdline]
        if self.initrd is not None:
            command += ["-initrd", str(self.initrd)]
        for slot, disk in enumerate(self.disks, 4):
            drive = f"file={disk},format=raw,if=none,id=disk{slot}"
            device = f"virtio-blk-pci,drive=disk{slot},addr={slot:#x}"
            command += ["-drive", drive, "-device", device]
        return command


class Stopwatch:
    """A machine whose serial console says when something happens."""

    def __init__(self, command: Sequence[str]) -> None:
        self._runtime = tempfile.TemporaryDirectory()
        self.started = time.monotonic()
        self._output, output = os.pipe()
        stdin, self._input = os.pipe()  # not closed before the end
        self._process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=output,
            stderr=output,
            env={**os.environ, "XDG_RUNTIME_DIR": self._runtime.name},
        )
        os.close(output)
        os.close(stdin)
        self._unread = b""
        self._shown = b""

    def until(self, marker: str) -> tuple[float, str]:
        """The moment at which the console has shown ``marker``, and what was before."""
        wanted = marker.encode()
        while wanted not in self._unread:
            data = os.read(self._output, 65536)
            if not data:
                tail = self._shown[-2000:].decode(errors="replace")
                sys.exit(f"the machine ended before {marker!r}:\n{tail}")
            self._unread += data
            self._shown += data
        before, _, self._unread = self._unread.partition(wanted)
        return time.monotonic(), before.decode(errors="replace")

    def send(self, text: str) -> None:
        """Type."""
        os.write(self._input, text.encode())

    def end(self) -> None:
        """Stop the machine."""
        self._process.kill()
        self._process.wait()
        os.close(self._output)
        os.close(self._input)
        self._runtime.cleanup()


def require_qemu() -> None:
    """End with one line where the peer is missing."""
    if shutil.which(QEMU) is None:
        sys.exit(f"no {QEMU} here: apt-get install qemu-system-x86")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns; the first row is the heading, the first column is text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
