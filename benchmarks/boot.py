"""Seconds from the command to user space, beside QEMU's TCG on the same machine.

``python -m benchmarks.boot``: the same kernel, initial file system, memory and CPUs.
The aim of the interpreter is a ratio of at most 5.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from benchmarks.compare import Stopwatch, Workload, require_qemu, table
from tools import guests, initramfs


def seconds_to_user_space(command: Sequence[str]) -> float:
    """Boot once."""
    machine = Stopwatch(command)
    try:
        moment, _ = machine.until(initramfs.SHELL_MARKER)
    finally:
        machine.end()
    return moment - machine.started


def main() -> None:
    """Boot and print the table."""
    parser = argparse.ArgumentParser(description="Compare boot times.")
    parser.add_argument("--guest", default="debian12-cloud")
    parser.add_argument(
        "--repeat", type=int, default=1, help="boots; the median counts"
    )
    parser.add_argument("--cpus", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    require_qemu()
    image = guests.find(args.guest).image()
    print(f"Boot to user space, {image.package}, 512 MiB, seconds")
    rows = [["vCPUs", "bhyve", "TCG", "ratio"]]
    for ncpus in args.cpus:
        workload = Workload(
            image.kernel, ncpus=ncpus, initrd=image.initrd, cmdline=image.cmdline
        )
        each = range(args.repeat)
        ours = statistics.median(
            seconds_to_user_space(workload.bhyve(f"bench{i}")) for i in each
        )
        theirs = statistics.median(seconds_to_user_space(workload.qemu()) for _ in each)
        rows.append(
            [str(ncpus), f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.1f}"]
        )
    print(table(rows))


if __name__ == "__main__":
    main()
