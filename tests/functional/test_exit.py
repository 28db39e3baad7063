"""How a machine ends: the reason is bhyve's exit status.

0 reset, 1 power off, 2 halt, 3 triple fault (bhyve(8), EXIT STATUS).
"""

from __future__ import annotations

import os
import signal

import pytest

from tests.functional.machine import Programs, Starter
from tools import guests


@pytest.mark.parametrize(
    ("kernel", "says", "status"),
    [
        ("reset", "resetting", 0),
        ("poweroff", "powering off", 1),
        ("halt", "halting", 2),
        ("triplefault", "faulting", 3),
    ],
    ids=["reset", "poweroff", "halt", "triplefault"],
)
@pytest.mark.parametrize("ncpus", [1, 2], ids=["1cpu", "2cpu"])
def test_status(
    start: Starter, kernel: str, says: str, status: int, ncpus: int
) -> None:
    image = ["-o", f"kernel={guests.compile_kernel(kernel)}"]
    console = start(kernel, image, ncpus=ncpus, memory="64M").console
    console.expect(says, 30)

    assert console.wait(30) == status


@pytest.mark.parametrize("ending", ["escape", "SIGTERM", "SIGINT", "SIGHUP"])
def test_terminal_is_restored(start: Starter, ending: str) -> None:
    image = ["-o", f"kernel={guests.compile_kernel('idle')}"]
    console = start("idle", image, memory="64M").console
    before = console.terminal_modes()
    console.expect("idle", 30)
    if ending == "escape":
        console.send("\x1dq")
    else:
        os.kill(console.process.pid, signal.Signals[ending])
    console.wait(30)

    assert console.terminal_modes() == before


def test_console_is_raw_while_the_guest_runs(start: Starter) -> None:
    image = ["-o", f"kernel={guests.compile_kernel('idle')}"]
    console = start("idle", image, memory="64M").console
    before = console.terminal_modes()
    console.expect("idle", 30)

    assert console.terminal_modes() != before


def test_name_in_use(start: Starter, programs: Programs) -> None:
    image = ["-o", f"kernel={guests.compile_kernel('idle')}"]
    machine = start("idle", image, memory="64M")
    machine.console.expect("idle", 30)
    second = programs.run("bhyve", "-m", "64M", *image, "idle")

    assert second.returncode == 4
    assert len(second.stderr.splitlines()) == 1
    assert "idle" in second.stderr
