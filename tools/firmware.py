"""Firmware images: edk2's for bhyve, built here, and Debian's OVMF and SeaBIOS.

``python -m tools.firmware [NAME...]`` prints where the images lie.

No package ships edk2's firmware for bhyve, but Debian's source package has all that it
is built from.  The result is kept under ``$XDG_CACHE_HOME/pybhyve/firmware``, by the
version of the source; remove the directory to have it built again.  The other two are
packages as `tools.fetch` has them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools import fetch

RECIPE: Final = 1
"""Part of the cached directory's name: a change here builds the firmware again."""

PATCHES: Final = "debian/patches/*brotli*"
"""The one patch to apply, of BrotliCompress, which the source package does not have.
With all of Debian's the shell wants a library that bhyve's platform file lacks."""

PLATFORM: Final = "OvmfPkg/Bhyve/BhyveX64.dsc"
OUTPUT: Final = "Build/BhyveX64/RELEASE_GCC5/FV"
IMAGES: Final = ("BHYVE.fd", "BHYVE_CODE.fd", "BHYVE_VARS.fd")

_BUILD: Final = f"""\
set -e
make -C BaseTools/Source/C -j"$JOBS"
. ./edksetup.sh
build -n "$JOBS" -a X64 -t GCC5 -b RELEASE -p {PLATFORM}
"""

PROGRAMS: Final = {
    "dpkg-source": "dpkg-dev",
    "g++": "g++",
    "gcc": "gcc",
    "iasl": "acpica-tools",
    "make": "make",
    "nasm": "nasm",
    "patch": "patch",
    "python3": "python3",
}
"""The programs that build it, and the Debian packages that have them."""

LOG_TAIL: Final = 20  # lines of the log that a failed build shows


class FirmwareError(Exception):
    """Firmware that cannot be had; the message says why."""


@dataclass(frozen=True, slots=True)
class Image:
    """A boot ROM, and what its VARS file is a copy of, if it has one."""

    rom: Path
    vars: Path | None = None
    fwcfg: str = "bhyve"

    def option(self, variables: Path | None = None) -> str:
        """The argument of ``-l``; the variables are made where there are none yet.

        Without ``variables`` the guest has none.
        """
        words = ["bootrom", str(self.rom)]
        if variables is not None and self.vars is not None:
            if not variables.exists():
                shutil.copyfile(self.vars, variables)
            words.append(str(variables))
        return ",".join([*words, f"fwcfg={self.fwcfg}"])


def bhyve() -> Image:
    """edk2's firmware for bhyve, built if it was not yet: three minutes.

    Raises FirmwareError or FetchError.
    """
    return _bhyve_image(_bhyve_directory())


def bhyve_without_variables() -> Image:
    """The same as one ROM, which keeps no variables."""
    return Image(_bhyve_directory() / "BHYVE.fd")


def ovmf() -> Image:
    """Debian's edk2 firmware for QEMU; FetchError where it cannot be had."""
    package = fetch.package("ovmf")
    return Image(
        package.file("usr/share/OVMF/OVMF_CODE_4M.fd"),
        package.file("usr/share/OVMF/OVMF_VARS_4M.fd"),
        fwcfg="qemu",
    )


def seabios() -> Image:
    """Debian's SeaBIOS for QEMU; FetchError where it cannot be had."""
    rom = fetch.package("seabios").file("usr/share/seabios/bios-256k.bin")
    return Image(rom, fwcfg="qemu")


def ready() -> Image:
    """Firmware for bhyve if it was built, else Debian's OVMF, which need not be.

    Raises FetchError.
    """
    built = _built(fetch.cache_dir() / "firmware")
    return _bhyve_image(built) if built else ovmf()


FIRMWARE: Final = {
    "bhyve": bhyve,
    "bhyve-without-variables": bhyve_without_variables,
    "ovmf": ovmf,
    "seabios": seabios,
}


def _bhyve_image(built: Path) -> Image:
    return Image(built / "BHYVE_CODE.fd", built / "BHYVE_VARS.fd")


def _bhyve_directory() -> Path:
    firmware = fetch.cache_dir() / "firmware"
    firmware.mkdir(exist_ok=True)
    with _locked(firmware / "lock"):
        for left in firmware.glob("build-*"):  # by a run that was killed
            shutil.rmtree(left)
        return _built(firmware) or _build(firmware)


def _built(firmware: Path) -> Path | None:
    built = sorted(
        firmware.glob(f"edk2-*.{RECIPE}"), key=lambda path: path.stat().st_mtime
    )
    return built[-1] if built else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(firmware: Path) -> Path:
    if missing := _missing():
        raise FirmwareError(
            "building bhyve's firmware needs packages that are not installed: "
            f"apt-get install {' '.join(missing)}"
        )
    with tempfile.TemporaryDirectory(dir=firmware, prefix="build-") as name:
        scratch = Path(name)
        description = fetch.source("edk2", scratch)
        version = description.stem.partition("_")[2]
        print(
            f"building bhyve's firmware from edk2 {version}: about three minutes ...",
            file=sys.stderr,
        )
        log = firmware / "build.log"
        with log.open("w") as output:
            _compile(description, scratch / "edk2", output.fileno(), log)
        images = scratch / "images"
        images.mkdir()
        for image in IMAGES:
            shutil.copyfile(scratch / "edk2" / OUTPUT / image, images / image)
        return images.rename(firmware / f"edk2-{version}.{RECIPE}")


def _missing() -> list[str]:
    """The packages whose files a build needs and does not find."""
    missing = {package for name, package in PROGRAMS.items() if not shutil.which(name)}
    if not Path("/usr/include/uuid/uuid.h").exists():
        missing.add("uuid-dev")
    if "python3" not in missing:
        imported = subprocess.run(
            ["python3", "-W", "ignore", "-c", "import distutils.util"],
            stderr=subprocess.DEVNULL,
            check=False,
        )
        if imported.returncode != 0:
            missing.add("python3-distutils")
    return sorted(missing)


def _compile(description: Path, tree: Path, output: int, log: Path) -> None:
    def run(*command: str, cwd: Path, env: Mapping[str, str] | None = None) -> None:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )
        if done.returncode != 0:
            tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
            print(*tail, sep="\n", file=sys.stderr)
            raise FirmwareError(
                f"{command[0]} ended with status {done.returncode}; all of it: {log}"
            )

    unpack = ["dpkg-source", "--skip-patches", "--extract"]
    run(*unpack, str(description), str(tree), cwd=description.parent)
    for patch in sorted(tree.glob(PATCHES)):
        run("patch", "--strip=1", f"--input={patch}", cwd=tree)
    environment = {
        # A make that runs us has flags and variables that are its own.
        **{name: value for name, value in os.environ.items() if "MAKE" not in name},
        "JOBS": str(len(os.sched_getaffinity(0))),
        "PYTHON_COMMAND": "python3",
    }
    run("bash", "-c", _BUILD, cwd=tree, env=environment)


def main(arguments: Sequence[str] | None = None) -> int:
    """Have the firmware that the command line names in the cache."""
    parser = argparse.ArgumentParser(description="Have firmware in the cache.")
    parser.add_argument(
        "name", nargs="*", help=f"{', '.join(FIRMWARE)}; all if none is named"
    )
    args = parser.parse_args(arguments)
    if unknown := set(args.name) - set(FIRMWARE):
        parser.error(f"no firmware {sorted(unknown)[0]}: {', '.join(FIRMWARE)}")
    try:
        for name in args.name or FIRMWARE:
            image = FIRMWARE[name]()
            print(name, *filter(None, (image.rom, image.vars)), sep="\t")
    except (FirmwareError, fetch.FetchError, OSError) as error:
        print(f"firmware: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
