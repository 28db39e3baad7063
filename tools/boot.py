"""Boot a guest on this terminal: what ``make run`` does.

Without a name an installed Debian boots from its disk, with firmware and a network;
with one, that guest of ``tests/guests`` does, a kernel to a shell.  Fetches and builds
what is missing, shows the bhyve command and becomes it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tools import disk, fetch, firmware, guests

ERROR: Final = 4
"""Exit status when there is nothing to boot: bhyve's own for an error."""

DISK: Final = guests.ROOT / "build" / "debian12.img"


def arguments(image: Sequence[str], cpus: int, memory: str, name: str) -> list[str]:
    """Bhyve's arguments for a machine with its serial console on this terminal.

    ``image`` are the options that say what to boot.
    """
    machine = ["-A", "-H", "-P", "-c", str(cpus), "-m", memory]
    devices = ["-s", "0,hostbridge", "-s", "31,lpc", "-l", "com1,stdio"]
    return [*machine, *devices, *image, name]


def installed(image: Path, network: str) -> list[str]:
    """The options that boot from a disk, made if there is none yet.

    Beside it are the firmware's variables.  Raises what `tools.disk`,
    `tools.firmware` and `tools.fetch` do.
    """
    if not image.exists():
        disk.copy(disk.debian(), image)
    print(f"{image} is kept: remove it for a new one; root needs no password")
    bootrom = firmware.ready().option(image.with_suffix(".vars"))
    devices = [f"3,ahci-hd,{image}", f"2,virtio-net,{network}"]
    return ["-l", bootrom, *(arg for device in devices for arg in ("-s", device))]


def main() -> None:
    """Boot the guest that the command line names."""
    known = ", ".join(guests.load())
    parser = argparse.ArgumentParser(description="Boot a guest to its console.")
    parser.add_argument("guest", nargs="?", help=f"instead of a disk: {known}")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", default="2G", help="as bhyve -m takes it")
    parser.add_argument("--name", default="vm0", help="the virtual machine's name")
    parser.add_argument("--disk", type=Path, default=DISK, help="the disk's image")
    parser.add_argument(
        "--net",
        default="slirp,open=true",
        help="what virtio-net is connected to: tap0, for one",
    )
    args = parser.parse_args()
    try:
        if args.guest is None:
            options = installed(args.disk, args.net)
        else:
            image = guests.find(args.guest).image()
            options = image.options()
            print(image.package)
    except (
        disk.DiskError,
        fetch.FetchError,
        firmware.FirmwareError,
        guests.GuestError,
        OSError,
    ) as error:
        print(f"boot: {error}", file=sys.stderr)
        sys.exit(ERROR)
    bhyve = ["bhyve", *arguments(options, args.cpus, args.memory, args.name)]
    print(shlex.join(bhyve), flush=True)
    # The program installed beside the interpreter that runs this.
    os.execv(Path(sys.executable).with_name("bhyve"), bhyve)  # noqa: S606 no shell


if __name__ == "__main__":
    main()
