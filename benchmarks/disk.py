"""4 KiB requests a second to a virtio-blk disk, beside QEMU's TCG on the same machine.

``python -m benchmarks.disk``: Debian's fio in the same guest with the same disk images,
``direct=1``.  The aim is a ratio of at least 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.compare import Stopwatch, Workload, require_qemu, table
from tools import disk, fetch, guests, initramfs

MODULES: Final = ("virtio_pci", "virtio_blk", "ext4")
PATTERNS: Final = ("read", "write", "randread", "randwrite")
DEPTHS: Final = (1, 32)
DISK_SIZE: Final = 256 << 20

# fio's terse format, version 3: the fields with the requests a second.
READ_IOPS: Final = 7
WRITE_IOPS: Final = 48


@dataclass(frozen=True, slots=True)
class Job:
    """What fio is to do."""

    pattern: str
    depth: int
    seconds: int

    def command(self) -> str:
        """The command inside the guest, one line of output."""
        options = {
            "name": self.pattern,
            "filename": "/dev/vda",
            "rw": self.pattern,
            "bs": "4k",
            "iodepth": self.depth,
            "ioengine": "libaio",
            "direct": 1,
            "time_based": 1,
            "runtime": self.seconds,
            "output-format": "terse",
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        return f"chroot /mnt fio {' '.join(words)}"

    def iops(self, output: str) -> float:
        """Requests a second, from fio's output."""
        line = next(line for line in output.splitlines() if line.startswith("3;fio-"))
        fields = line.split(";")
        return float(fields[WRITE_IOPS if "write" in self.pattern else READ_IOPS])


def run(command: Sequence[str], jobs: Sequence[Job]) -> list[float]:
    """Boot a machine and run the jobs one after the other."""
    machine = Stopwatch(command)
    try:
        machine.until(initramfs.PROMPT)
        for line in (
            "echo 1 > /proc/sys/kernel/printk",
            # Debian's disk has fio and its fifty libraries.
            "mkdir /mnt && mount -t ext4 -o ro,noload /dev/vdb2 /mnt",
            "mount -t devtmpfs dev /mnt/dev && mount -t proc proc /mnt/proc",
            "mount -t sysfs sys /mnt/sys && mount -t tmpfs tmp /mnt/tmp",
        ):
            machine.send(f"{line}\n")
            machine.until(initramfs.PROMPT)
        results = []
        for job in jobs:
            machine.send(f"cd /tmp; {job.command()}\n")
            _, output = machine.until(initramfs.PROMPT)
            results.append(job.iops(output))
    finally:
        machine.end()
    return results


def main() -> None:
    """Run every job under both machines and print the table."""
    parser = argparse.ArgumentParser(description="Compare disk requests a second.")
    parser.add_argument("--guest", default="debian12-cloud")
    parser.add_argument("--seconds", type=int, default=10, help="of each job")
    parser.add_argument("--repeat", type=int, default=1, help="runs; the median counts")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, choices=PATTERNS)
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    args = parser.parse_args()
    require_qemu()
    jobs = [
        Job(pattern, depth, args.seconds)
        for pattern in args.patterns
        for depth in args.depths
    ]
    try:
        image = guests.find(args.guest).image(modules=MODULES)
        system = disk.debian(["fio"])
    except (disk.DiskError, fetch.FetchError) as error:
        sys.exit(f"disk: {error}")
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "disk.img"
        target.write_bytes(os.urandom(DISK_SIZE))
        programs = Path(directory) / "programs.img"
        disk.copy(system, programs)
        workload = Workload(
            image.kernel,
            initrd=image.initrd,
            cmdline=f"{image.cmdline} quiet",
            disks=(target, programs),
        )
        ours, theirs = [], []
        for turn in range(args.repeat):
            ours.append(run(workload.bhyve(f"bench{turn}"), jobs))
            theirs.append(run(workload.qemu(), jobs))
    print(f"4 KiB requests a second, direct, {image.package}, 1 vCPU")
    rows = [["pattern", "depth", "bhyve", "TCG", "ratio"]]
    for index, job in enumerate(jobs):
        here = statistics.median(result[index] for result in ours)
        there = statistics.median(result[index] for result in theirs)
        rows.append(
            [
                *(job.pattern, str(job.depth)),
                *(f"{here:.0f}", f"{there:.0f}", f"{here / there:.2f}"),
            ]
        )
    print(table(rows))


if __name__ == "__main__":
    main()
