"""The whole state moves to another machine while a kernel boots, and the boot goes on.

At moments that differ from run to run the machine is paused and its state, as plain
values, and its memory go into a machine that was just set up.  The seed is in the
test's output when it fails.
"""

from __future__ import annotations

import json
import os
import pty
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pybhyve.bhyveload.loader import apply
from pybhyve.bhyverun import main as bringup
from pybhyve.bhyverun.cli import new_config, parse_args
from pybhyve.bhyverun.machine import Machine
from pybhyve.bhyverun.topology import calc_topology
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import MB, SuspendHow, VmCtx
from tests.functional.machine import BOOT_TIMEOUT
from tools import guests

MEMORY = 256 * MB
MOVES = 6
CHUNK = MB


class Terminal:
    """The far end of com1's line: collects what is printed, answers a prompt once."""

    def __init__(self, prompt: str, answer: str) -> None:
        self._prompt = re.compile(re.escape(prompt).encode())
        self._answer = answer.encode() + b"\n"
        self.output = b""
        self._fd, self._line = pty.openpty()
        self.path = os.ttyname(self._line)
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        answered = False
        while True:
            try:
                self.output += os.read(self._fd, 4096)
            except OSError:
                return
            if not answered and self._prompt.search(self.output):
                answered = True
                os.write(self._fd, self._answer)

    def close(self) -> None:
        os.close(self._line)
        self._thread.join(10)
        os.close(self._fd)


@pytest.fixture
def terminal(guest: guests.Guest) -> Iterator[Terminal]:
    terminal = Terminal(guest.prompt, "poweroff -f")
    yield terminal
    terminal.close()


@pytest.fixture
def guest() -> guests.Guest:
    return guests.find("debian12-cloud")


def set_up(name: str, argv: list[str], load: bool = False) -> Machine:
    config = new_config()
    assert parse_args([*argv, name], config) is None
    options = GlobalOptions.parse(config)
    topology = calc_topology(options)
    ctx, _ = bringup.do_open(options, topology)
    bringup.init_vcpus(ctx, options, topology)
    ctx.setup_memory(MEMORY)
    if load:
        plan = bringup.plan_kernel(options, MEMORY)
        assert plan is not None
        apply(ctx, *plan)
    machine = Machine(ctx, config, options, topology.cpus)
    bringup.set_up(machine)
    return machine


def memory_of(ctx: VmCtx) -> dict[int, bytes]:
    chunks = ((gpa, ctx.read(gpa, CHUNK)) for gpa in range(0, MEMORY, CHUNK))
    return {gpa: chunk for gpa, chunk in chunks if chunk.count(0) != CHUNK}


def run_until_moved(machine: Machine, seconds: float) -> Any:
    """State and memory after some time, or how the machine ended before."""
    moved: list[tuple[dict[str, Any], dict[int, bytes]]] = []

    def move() -> None:
        machine.pause()
        moved.append((machine.save(), memory_of(machine.ctx)))
        machine.exit(0)

    machine.mevent.add_timer(seconds, move)
    how = machine.dispatch()
    machine.halt()
    machine.ctx.destroy()
    return moved[0] if moved else how


@pytest.mark.parametrize("ncpus", [1, 2], ids=["1cpu", "2cpu"])
def test_boot_goes_on_in_another_machine(
    guest: guests.Guest,
    terminal: Terminal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ncpus: int,
) -> None:
    monkeypatch.setenv("PYBHYVE_RUNDIR", str(tmp_path / "run"))
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    argv = ["-c", str(ncpus), "-m", str(MEMORY), "-s", "0,hostbridge", "-s", "31,lpc"]
    argv += ["-l", f"com1,{terminal.path}", *guest.image().options()]

    machine = set_up("moved-0", argv, load=True)
    machine.start()
    machine.vm.resume_cpu(0)
    moves = 0
    while True:
        pause = moments.uniform(0.2, 1.5) if moves < MOVES else BOOT_TIMEOUT
        result = run_until_moved(machine, pause)
        if isinstance(result, SuspendHow) or moves == MOVES:
            break
        moves += 1
        state, memory = result
        plain = json.dumps(state, default=bytes.hex)  # no more than values
        assert len(plain) < 16 * MB

        machine = set_up(f"moved-{moves}", argv)
        machine.start()
        machine.pause()
        for gpa, chunk in memory.items():
            machine.ctx.write(gpa, chunk)
        machine.restore(state)
        machine.resume()

    print(terminal.output.decode(errors="replace"))
    assert result is SuspendHow.POWEROFF
    assert guest.prompt.encode() in terminal.output
    assert moves > 1
