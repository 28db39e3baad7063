"""The whole state moves to another machine during a boot, and the boot goes on.

At pseudo-random moments the machine is paused; its variables, its state and its memory,
as text and bytes, become another machine in the same process.  The last move is made
while a command sleeps.  Time on the host decides what the kernel does at a moment, so
that a seed, which the output names, gives the same moments but not the same places.
"""

from __future__ import annotations

import json
import os
import pty
import random
import re
import threading
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pybhyve.amd64.bootrom import Firmware
from pybhyve.bhyveload.loader import apply
from pybhyve.bhyverun import exitstatus
from pybhyve.bhyverun import main as bringup
from pybhyve.bhyverun.cli import new_config, parse_args
from pybhyve.bhyverun.machine import Machine
from pybhyve.bhyverun.topology import calc_topology
from pybhyve.config import Config
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import MB, SuspendHow, VmCtx
from tests.functional.machine import BOOT_TIMEOUT
from tools import firmware, guests

MEMORY = 128 * MB
MOVES = 5  # before the shell
LOOK_SECONDS = 0.02
GUID = "01234567-89ab-cdef-0123-456789abcdef"


class Typist:
    """Someone at the far end of com1's line, who waits for a text and then types."""

    def __init__(self, script: list[tuple[str, str]]) -> None:
        self._script = [(re.compile(what.encode(), re.DOTALL), t) for what, t in script]
        self.shown = b""
        self.typed = 0
        """How many lines of the script have been typed."""
        self._fd, self._line = pty.openpty()
        tty.setraw(self._line)  # also while no machine has it open
        self.path = os.ttyname(self._line)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        read = 0
        while True:
            try:
                self.shown += os.read(self._fd, 4096)
            except OSError:
                return
            while self.typed < len(self._script):
                what, line = self._script[self.typed]
                match = what.search(self.shown, read)
                if match is None:
                    break
                read = match.end()
                os.write(self._fd, line.encode() + b"\n")
                self.typed += 1

    def close(self) -> None:
        os.close(self._line)
        self._thread.join(10)
        os.close(self._fd)


class Machines:
    """Machines that follow each other, each ended before the next is set up."""

    def __init__(self) -> None:
        self.count = 0
        self._last: Machine | None = None
        self._firmware: Firmware | None = None

    def set_up(self, config: Config, load: bool) -> Machine:
        self.end()
        config.set("name", f"moved-{self.count}")
        self.count += 1
        options = GlobalOptions.parse(config)
        topology = calc_topology(options)
        self._firmware = Firmware.open(options)
        ctx, _ = bringup.do_open(options, topology)
        bringup.init_vcpus(ctx, options, topology)
        ctx.setup_memory(MEMORY)
        if load:
            plan = bringup.plan_kernel(options, MEMORY)
            assert plan is not None
            apply(ctx, *plan)
        machine = Machine(ctx, config, options, topology.cpus, firmware=self._firmware)
        self._last = machine
        bringup.set_up(machine)
        machine.start()
        return machine

    def end(self) -> None:
        if self._last is not None:
            self._last.halt()
            self._last.ctx.destroy()
            self._last = None
        if self._firmware is not None:
            self._firmware.close()
            self._firmware = None


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    monkeypatch.setenv("PYBHYVE_RUNDIR", str(tmp_path / "run"))
    machines = Machines()
    yield machines
    machines.end()


@pytest.fixture
def guest() -> guests.Guest:
    return guests.find("debian12-cloud")


@pytest.fixture
def typist(guest: guests.Guest, ncpus: int) -> Iterator[Typist]:
    prompt = re.escape(guest.prompt)
    typist = Typist(
        [
            # Halves, so that the echo of what is typed does not look like its result.
            (prompt, "sleep 2; echo sl''ept; sleep 0.1; echo aga''in"),
            (rf"slept\r+\nagain\r+\n.*{prompt}", "echo CP''Us $(nproc), $((6 * 7))"),
            (rf"CPUs {ncpus}, 42\r+\n.*{prompt}", "poweroff -f"),
        ]
    )
    yield typist
    typist.close()


def memory_of(ctx: VmCtx) -> list[bytes]:
    return [ctx.read(gpa, MB) for gpa in range(0, MEMORY, MB)]


def as_text(state: dict[str, Any]) -> str:
    """A state as JSON, which has no bytes."""
    return json.dumps(state, default=lambda value: {"hex": bytes.hex(value)})


def from_text(text: str) -> dict[str, Any]:
    def revive(value: dict[str, Any]) -> Any:
        return bytes.fromhex(value["hex"]) if value.keys() == {"hex"} else value

    state: dict[str, Any] = json.loads(text, object_hook=revive)
    return state


def without_hints(state: dict[str, Any]) -> dict[str, Any]:
    """A state without its name, and without vmm's notes to look for interrupts."""
    config = {key: value for key, value in state["config"].items() if key != "name"}
    vcpus = [{**vcpu, "events": 0} for vcpu in state["vcpus"]]
    return {**state, "config": config, "vcpus": vcpus}


def run_until(
    machine: Machine, end: float, due: Callable[[], bool] = lambda: False
) -> Any:
    """State as text and memory at ``end``, or once ``due``; or how the VM has ended."""
    moved: list[tuple[str, list[bytes]]] = []

    def look() -> None:
        if not moved and (time.monotonic() >= end or due()):
            machine.pause()
            moved.append((as_text(machine.save()), memory_of(machine.ctx)))
            machine.exit(0)

    machine.mevent.add_timer(LOOK_SECONDS, look, periodic=True)
    how = machine.dispatch()
    return moved[0] if moved else how


def go_on(machines: Machines, text: str, memory: list[bytes]) -> Machine:
    """Another machine in the same state, running."""
    state = from_text(text)
    config = new_config()
    for path, value in state["config"].items():
        config.set(path, value)
    machine = machines.set_up(config, load=False)
    machine.pause()
    for index, chunk in enumerate(memory):
        machine.ctx.write(index * MB, chunk)
    machine.restore(state)

    again = from_text(as_text(machine.save()))
    assert without_hints(again) == without_hints(state)
    machine.resume()
    return machine


@pytest.mark.parametrize(
    ("ncpus", "seed"), [(1, 20011), (2, 20012)], ids=["1cpu", "2cpu"]
)
def test_boot_goes_on_in_another_machine(
    guest: guests.Guest, machines: Machines, typist: Typist, ncpus: int, seed: int
) -> None:
    argv = ["-c", str(ncpus), "-m", str(MEMORY), "-s", "0,hostbridge", "-s", "31,lpc"]
    argv += ["-l", f"com1,{typist.path}", *guest.image().options(), "moved"]
    config = new_config()
    assert parse_args(argv, config) is None
    machine = machines.set_up(config, load=True)
    machine.vm.resume_cpu(0)

    # In the first seconds, when the kernel meets its devices and starts its CPUs.
    moments = random.Random(seed)
    pauses = [moments.uniform(0.1, 0.4) for _ in range(MOVES)]
    print(f"seed {seed}: moves after", " ".join(f"{pause:.3f}" for pause in pauses))
    for pause in pauses:
        result = run_until(machine, time.monotonic() + pause)
        assert not isinstance(result, SuspendHow), typist.shown[-1000:]
        machine = go_on(machines, *result)

    end = time.monotonic() + BOOT_TIMEOUT
    # While the command sleeps: all CPUs are idle, and a timer has to end that.
    result = run_until(machine, end, lambda: typist.typed > 0)
    print(typist.shown.decode(errors="replace"))
    assert typist.typed > 0
    machine = go_on(machines, *result)
    result = run_until(machine, end)
    print(typist.shown.decode(errors="replace"))

    assert result is SuspendHow.POWEROFF
    assert typist.typed == 3
    assert exitstatus.of_suspend(result) == 1


ROUNDS = 12
"""Writes of 4 MiB, each flushed and read back from the disk."""
USE_DISK = (
    "dd if=/dev/urandom of=/tmp/d bs=64k count=64; n=0; "
    f"while [ $n -lt {ROUNDS} ]; do dd if=/tmp/d of={{disk}} bs=64k conv=fsync; "
    "echo 3 > /proc/sys/vm/drop_caches; "
    "dd if={disk} bs=64k count=64 | cmp - /tmp/d || break; n=$((n + 1)); done; "
    "echo rou''nds $n, errors $(dmesg | grep -ciE 'exception|i/o error|timeout')"
)


@pytest.mark.parametrize(
    ("device", "modules", "disk"),
    [
        ("ahci-hd", ["ahci", "sd_mod"], "/dev/sda"),
        ("nvme", ["nvme"], "/dev/nvme0n1"),
        ("virtio-blk", ["virtio_pci", "virtio_blk"], "/dev/vda"),
    ],
    ids=lambda value: value if isinstance(value, str) and value[0] != "/" else "",
)
def test_a_disk_goes_on_in_another_machine(
    machines: Machines, tmp_path: Path, device: str, modules: list[str], disk: str
) -> None:
    """Requests are under way at every move; none is lost and none fails."""
    guest = guests.find("debian12-generic")
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(16 * MB)
    prompt = re.escape(guest.prompt)
    script = [
        (prompt, USE_DISK.format(disk=disk)),
        (rf"rounds {ROUNDS}, errors 0\r+\n.*{prompt}", "poweroff -f"),
    ]
    typist = Typist(script)
    argv = ["-m", str(MEMORY), "-s", "0,hostbridge", "-s", "31,lpc"]
    argv += ["-s", f"3,{device},{image}", "-l", f"com1,{typist.path}"]
    argv += [*guest.image(modules=modules).options(), "moved"]
    config = new_config()
    assert parse_args(argv, config) is None
    machine = machines.set_up(config, load=True)
    machine.vm.resume_cpu(0)

    moments = random.Random(20014)
    end = time.monotonic() + BOOT_TIMEOUT
    result = run_until(machine, end, lambda: typist.typed > 0)
    for _ in range(MOVES):
        assert not isinstance(result, SuspendHow), typist.shown[-1000:]
        machine = go_on(machines, *result)
        result = run_until(machine, time.monotonic() + moments.uniform(0.05, 0.5))
    assert not isinstance(result, SuspendHow), typist.shown[-1000:]
    assert typist.typed == 1  # it was not too late for the moves
    machine = go_on(machines, *result)
    result = run_until(machine, time.monotonic() + BOOT_TIMEOUT)
    typist.close()
    print(typist.shown.decode(errors="replace"))

    assert result is SuspendHow.POWEROFF
    assert typist.typed == 2


@pytest.fixture
def firmware_typist() -> Iterator[Typist]:
    typist = Typist(
        [
            ("startup.nsh", "\r"),
            ("Shell> ", f"setvar Kept -guid {GUID} -bs -nv =0a141e28\r"),
            ("Shell> ", f"setvar Kept -guid {GUID}\r"),
            ("0A 14 1E 28.*Shell> ", "reset -s\r"),
        ]
    )
    yield typist
    typist.close()


def test_firmware_goes_on_in_another_machine(
    machines: Machines, firmware_typist: Typist, tmp_path: Path
) -> None:
    """Its variables' flash moves with it, in the middle of what it writes."""
    typist = firmware_typist
    variables = tmp_path / "VARS.fd"
    argv = ["-m", str(MEMORY), "-s", "0,hostbridge", "-s", "31,lpc"]
    argv += ["-l", f"com1,{typist.path}", "-l", firmware.bhyve().option(variables)]
    config = new_config()
    assert parse_args([*argv, "moved"], config) is None
    machine = machines.set_up(config, load=False)
    machine.vm.resume_cpu(0)

    moments = random.Random(20013)
    for _ in range(MOVES):
        result = run_until(machine, time.monotonic() + moments.uniform(0.2, 1))
        assert not isinstance(result, SuspendHow), typist.shown[-1000:]
        machine = go_on(machines, *result)
    result = run_until(machine, time.monotonic() + BOOT_TIMEOUT)
    print(typist.shown.decode(errors="replace"))
    machines.end()

    assert result is SuspendHow.POWEROFF
    assert typist.typed == 4
    assert "Kept".encode("utf-16-le") + bytes.fromhex("0000 0a141e28") in (
        variables.read_bytes()
    )
