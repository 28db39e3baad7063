"""Boot a guest of ``tests/guests`` on this terminal: what ``make run`` does.

Fetches and builds what is missing, shows the bhyve command and becomes it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tools import fetch, guests

ERROR: Final = 4
"""Exit status when there is nothing to boot: bhyve's own for an error."""


def arguments(image: Sequence[str], cpus: int, memory: str, name: str) -> list[str]:
    """Bhyve's arguments for a machine with its serial console on this terminal.

    ``image`` are the options that say what to boot.
    """
    machine = ["-A", "-H", "-P", "-c", str(cpus), "-m", memory]
    devices = ["-s", "0,hostbridge", "-s", "31,lpc", "-l", "com1,stdio"]
    return [*machine, *devices, *image, name]


def main() -> None:
    """Boot the guest that the command line names."""
    known = ", ".join(guests.load())
    parser = argparse.ArgumentParser(description="Boot a guest to its console.")
    parser.add_argument("guest", nargs="?", default="debian12-cloud", help=known)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--memory", default="512M", help="as bhyve -m takes it")
    parser.add_argument("--name", default="vm0", help="the virtual machine's name")
    args = parser.parse_args()
    try:
        image = guests.find(args.guest).image()
    except (fetch.FetchError, guests.GuestError, OSError) as error:
        print(f"boot: {error}", file=sys.stderr)
        sys.exit(ERROR)
    bhyve = ["bhyve", *arguments(image.options(), args.cpus, args.memory, args.name)]
    print(f"{image.package}", shlex.join(bhyve), sep="\n", flush=True)
    # The program installed beside the interpreter that runs this.
    os.execv(Path(sys.executable).with_name("bhyve"), bhyve)  # noqa: S606 no shell


if __name__ == "__main__":
    main()
