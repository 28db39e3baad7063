"""The guests of ``tests/guests``: which there are, and their files.

Built files go to ``build/guests``.
"""

from __future__ import annotations

import gzip
import subprocess
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools import fetch, initramfs

ROOT: Final = Path(__file__).resolve().parent.parent
GUESTS_DIR: Final = ROOT / "tests" / "guests"
BUILD_DIR: Final = ROOT / "build" / "guests"

PROGRAMS: Final = ("processes", "signals", "floats", "vectors", "threads")
"""The programs of tests/guests/src that exercise a guest's user space."""


class GuestError(Exception):
    """A guest that is not known or cannot be built."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a boot loader needs: files and a command line."""

    package: fetch.Package
    kernel: Path
    initrd: Path | None
    cmdline: str

    def options(self) -> list[str]:
        """The image as options of bhyve."""
        found = ["-o", f"kernel={self.kernel}", "-o", f"cmdline={self.cmdline}"]
        if self.initrd is not None:
            found += ["-o", f"initrd={self.initrd}"]
        return found


@dataclass(frozen=True, slots=True)
class Guest:
    """A line of guests.toml, where the fields are explained."""

    name: str
    package: str
    kernel: str
    cmdline: str
    prompt: str
    initrd: str = ""
    sha256: str | None = None
    keep: tuple[str, ...] = ()

    def image(
        self, programs: Iterable[Path] = (), modules: Sequence[str] = ()
    ) -> Image:
        """Fetch and build the guest's files.

        ``programs`` go into busybox's /bin; ``modules`` are the kernel's, loaded with
        what they need before the shell starts.
        """
        package = fetch.package(self.package, self.sha256)
        return Image(
            package,
            package.file(self.kernel),
            self._initrd(package, programs, modules),
            self.cmdline,
        )

    def _initrd(
        self, package: fetch.Package, programs: Iterable[Path], modules: Sequence[str]
    ) -> Path | None:
        if not self.initrd:
            return None
        if self.initrd == "busybox":
            files = []
            if modules:
                tree = package.file("lib/modules/*")
                files = initramfs.modules_with_dependencies(tree, modules)
            archive = initramfs.busybox(programs, files)
        else:
            archive = gzip.decompress(package.file(self.initrd).read_bytes())
            archive = initramfs.subset(archive, self.keep)
        BUILD_DIR.mkdir(parents=True, exist_ok=True)
        # Machines with other modules may run at the same time.
        path = BUILD_DIR / f"{'-'.join([self.name, *modules])}.cpio"
        path.write_bytes(archive)
        return path


def load() -> dict[str, Guest]:
    """All guests, by name."""
    tables = tomllib.loads((GUESTS_DIR / "guests.toml").read_text())
    return {
        name: Guest(name, **{**table, "keep": tuple(table.get("keep", ()))})
        for name, table in tables.items()
    }


def find(name: str) -> Guest:
    """The guest of that name.  Raises GuestError."""
    known = load()
    if name not in known:
        raise GuestError(f"no guest {name!r}; there are {', '.join(known)}")
    return known[name]


def compile_program(name: str) -> Path:
    """A program of tests/guests/src for a Linux guest: static, it runs alone."""
    source = GUESTS_DIR / "src" / f"{name}.c"
    return _compile(source, BUILD_DIR / name, ["-O1", "-static", "-pthread"], ["-lm"])


def compile_library(name: str) -> Path:
    """A library of tests/guests/src that is loaded into a program of the host's."""
    source = GUESTS_DIR / "src" / f"{name}.c"
    return _compile(source, BUILD_DIR / f"{name}.so", ["-O1", "-shared", "-fPIC"])


def compile_kernel(name: str, **defines: int) -> Path:
    """A Multiboot kernel of tests/guests/src: an ELF file at 1 MiB."""
    layout = "-Wl,-Ttext=0x100000,-N,--build-id=none,--no-warn-rwx-segments"
    flags = ["-m32", "-nostdlib", "-static", "-no-pie", layout]
    flags += [f"-D{key}={value}" for key, value in defines.items()]
    target = "-".join([name, *(f"{value:x}" for value in defines.values())])
    return _compile(
        GUESTS_DIR / "src" / f"{name}.S", BUILD_DIR / f"{target}.elf", flags
    )


def compile_boot_disk(name: str) -> Path:
    """A disk image that a BIOS boots, of tests/guests/src."""
    layout = "-Wl,-Ttext=0x7c00,--oformat=binary,--build-id=none"
    flags = ["-m32", "-nostdlib", "-static", "-no-pie", layout]
    return _compile(GUESTS_DIR / "src" / f"{name}.S", BUILD_DIR / f"{name}.img", flags)


def _compile(
    source: Path, target: Path, flags: Iterable[str], libraries: Iterable[str] = ()
) -> Path:
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    command = ["gcc", "-Wall", "-Wextra", "-Werror", "-s", *flags]
    command += ["-o", str(target), str(source), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GuestError(f"{source.name} does not compile:\n{done.stderr}")
    return target
