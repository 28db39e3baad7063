"""Megabits a second over a tap, beside QEMU's TCG on the same machine.

``python -m benchmarks.net``: Debian's iperf3 in the same guest and, at the other end of
the same tap, on the host.  The aim is a ratio of at least 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from benchmarks.compare import Stopwatch, Workload, require_qemu, table
from tools import fetch, guests, initramfs
from tools.initramfs import Entry
from tools.network import Network, NetworkError

DEVICES: Final[Mapping[str, tuple[str, Sequence[str]]]] = MappingProxyType(
    {
        "virtio-net": ("debian12-cloud", ("virtio_net", "virtio_pci")),
        "e1000": ("debian12-generic", ("e1000",)),
    }
)
QEMU_NAMES: Final = MappingProxyType({"virtio-net": "virtio-net-pci", "e1000": "e1000"})
TAP: Final = "tap0"
SLOT: Final = 2
HOST: Final = "192.168.77.1"
GUEST: Final = "192.168.77.2"

LIBRARIES: Final = "lib/x86_64-linux-gnu"
LOADER: Final = "lib64/ld-linux-x86-64.so.2"
# What iperf3 is made of: place in the guest, package, file in it.
IPERF3: Final = (
    ("bin/iperf3", "iperf3", "usr/bin/iperf3"),
    (LOADER, "libc6", f"{LIBRARIES}/ld-linux-x86-64.so.2"),
    (f"{LIBRARIES}/libc.so.6", "libc6", f"{LIBRARIES}/libc.so.6"),
    (f"{LIBRARIES}/libm.so.6", "libc6", f"{LIBRARIES}/libm.so.6"),
    (f"{LIBRARIES}/libcrypto.so.3", "libssl3", f"usr/{LIBRARIES}/libcrypto.so.3"),
    (f"{LIBRARIES}/libiperf.so.0", "libiperf0", f"usr/{LIBRARIES}/libiperf.so.0.*"),
    (f"{LIBRARIES}/libsctp.so.1", "libsctp1", f"usr/{LIBRARIES}/libsctp.so.1.*"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """What iperf3 is to do."""

    to_guest: bool
    streams: int
    seconds: int

    @property
    def direction(self) -> str:
        """The name for the table."""
        return "host to guest" if self.to_guest else "guest to host"

    def command(self) -> str:
        """The command inside the guest."""
        reverse = "-R" if self.to_guest else ""
        options = f"-t {self.seconds} -P {self.streams} -f m {reverse}"
        return f"iperf3 -c {HOST} {options}"

    def megabits(self, output: str) -> float:
        """What the receiver got, from iperf3's output."""
        lines = [line for line in output.splitlines() if line.endswith("receiver")]
        fields = lines[-1].split()  # of several streams: their sum
        return float(fields[fields.index("Mbits/sec") - 1])


def install(root: Path) -> dict[str, Path]:
    """Debian's iperf3 below a directory; the files by their place."""
    files = {}
    for place, package, pattern in IPERF3:
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(fetch.package(package).file(pattern).read_bytes())
        path.chmod(0o755)
        files[place] = path
    return files


def add_files(archive: bytes, files: Mapping[str, Path]) -> bytes:
    """An initial file system with programs in it."""
    directories = {str(parent) for place in files for parent in Path(place).parents}
    entries = list(initramfs.unpack(archive))
    missing = directories - {entry.path for entry in entries} - {"."}
    entries += map(Entry.directory, sorted(missing))
    entries += [
        Entry.file(place, path.read_bytes(), 0o755) for place, path in files.items()
    ]
    return initramfs.pack(entries)


def run(command: Sequence[str], jobs: Sequence[Job]) -> list[float]:
    """Boot a machine and run the jobs one after the other."""
    machine = Stopwatch(command)
    try:
        machine.until(initramfs.PROMPT)
        for line in (
            "echo 1 > /proc/sys/kernel/printk; ip link set lo up",
            f"ip addr add {GUEST}/24 dev eth0; ip link set eth0 up",
            f"until ping -c 1 -W 1 {HOST} > /dev/null; do true; done",
        ):
            machine.send(f"{line}\n")
            machine.until(initramfs.PROMPT)
        results = []
        for job in jobs:
            machine.send(f"{job.command()}\n")
            _, output = machine.until(initramfs.PROMPT)
            results.append(job.megabits(output.replace("\r", "")))
    finally:
        machine.end()
    return results


@dataclass(frozen=True, slots=True)
class Contest:
    """One device under both machines."""

    device: str
    workload: Workload
    network: Network

    def bhyve(self, name: str) -> list[str]:
        """Our command."""
        command = self.workload.bhyve(name)
        command[1:1] = ["-s", f"{SLOT},{self.device},{TAP}"]
        return [*self.network.enter, *command]

    def qemu(self) -> list[str]:
        """QEMU's, with the same device on the same tap."""
        netdev = f"tap,id=net0,ifname={TAP},script=no,downscript=no"
        nic = f"{QEMU_NAMES[self.device]},netdev=net0,addr={SLOT:#x}"
        machine = [*self.workload.qemu(), "-netdev", netdev, "-device", nic]
        return [*self.network.enter, *machine]

    def rows(self, jobs: Sequence[Job], repeat: int) -> list[list[str]]:
        """Run all jobs; the rows of the table."""
        ours, theirs = [], []
        for turn in range(repeat):
            ours.append(run(self.bhyve(f"bench{turn}"), jobs))
            theirs.append(run(self.qemu(), jobs))
        rows = []
        for index, job in enumerate(jobs):
            here = statistics.median(result[index] for result in ours)
            there = statistics.median(result[index] for result in theirs)
            figures = [f"{here:.0f}", f"{there:.0f}", f"{here / there:.2f}"]
            rows.append([self.device, job.direction, str(job.streams), *figures])
        return rows


def contests(directory: Path, devices: Sequence[str], cpus: int) -> Iterator[Contest]:
    """A tap with iperf3 at the host's end, and for each device what to boot."""
    files = install(directory)
    network = Network()
    try:
        network.run("ip", "tuntap", "add", TAP, "mode", "tap")
        network.run("ip", "addr", "add", f"{HOST}/24", "dev", TAP)
        network.run("ip", "link", "set", TAP, "up")
        loader = [str(files[LOADER]), "--library-path", str(directory / LIBRARIES)]
        network.start(*loader, str(files["bin/iperf3"]), "-s")
        for device in devices:
            guest, modules = DEVICES[device]
            image = guests.find(guest).image(modules=modules)
            archive = image.initrd.read_bytes() if image.initrd is not None else b""
            initrd = directory / f"{device}.cpio"
            initrd.write_bytes(add_files(archive, files))
            cmdline = f"{image.cmdline} quiet"
            workload = Workload(
                image.kernel, ncpus=cpus, initrd=initrd, cmdline=cmdline
            )
            yield Contest(device, workload, network)
    finally:
        network.close()


def main() -> None:
    """Run every job under both machines and print the table."""
    parser = argparse.ArgumentParser(description="Compare network throughput.")
    parser.add_argument("--seconds", type=int, default=10, help="of each job")
    parser.add_argument("--repeat", type=int, default=1, help="runs; the median counts")
    parser.add_argument("--devices", nargs="+", default=["virtio-net"], choices=DEVICES)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--cpus", type=int, default=1)
    args = parser.parse_args()
    require_qemu()
    jobs = [
        Job(to_guest, streams, args.seconds)
        for to_guest in (False, True)
        for streams in args.streams
    ]
    rows = [["device", "direction", "streams", "bhyve", "TCG", "ratio"]]
    with tempfile.TemporaryDirectory() as directory:
        try:
            for contest in contests(Path(directory), args.devices, args.cpus):
                rows += contest.rows(jobs, args.repeat)
        except (fetch.FetchError, NetworkError) as error:
            sys.exit(f"net: {error}")
    print(f"iperf3 over a tap, Mbit/s, {args.cpus} vCPU(s)")
    print(table(rows))


if __name__ == "__main__":
    main()
