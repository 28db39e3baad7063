"""Stock Debian kernels: to a shell, commands typed and read back, and to their end."""

from __future__ import annotations

import re

import pytest

from tests.functional.machine import Machine
from tools import guests

CLOUD = [("debian12-cloud", 1), ("debian12-cloud", 2)]
ALL = [*CLOUD, ("debian12-generic", 1)]


def _id(dimensions: tuple[str, int]) -> str:
    name, ncpus = dimensions
    return f"{name}-{ncpus}cpu"


def with_guests(dimensions):
    """Run the test once for each guest and number of CPUs, each booted once."""
    return pytest.mark.parametrize("at_prompt", dimensions, indirect=True, ids=_id)


def interrupts(machine: Machine, name: str) -> list[int]:
    """The counts of one line of /proc/interrupts, one for each CPU."""
    text = machine.console.run("cat /proc/interrupts")
    line = re.search(rf"^ *{name}:((?: +\d+)+)", text, re.MULTILINE)
    assert line is not None, text

    return [int(count) for count in line[1].split()]


@with_guests(ALL)
def test_commands_are_read_back(at_prompt: Machine) -> None:
    uname = at_prompt.console.run("uname -srm")

    assert re.fullmatch(r"Linux 6\.1\.0-\d+(-cloud)?-amd64 x86_64\n", uname)
    assert at_prompt.console.run("echo $((6 * 7))") == "42\n"
    assert at_prompt.console.run("nproc") == f"{at_prompt.ncpus}\n"


@with_guests(ALL)
def test_memory_is_what_was_asked_for(at_prompt: Machine) -> None:
    meminfo = at_prompt.console.run("cat /proc/meminfo")
    total = re.search(r"MemTotal: +(\d+) kB", meminfo)

    # The kernel's own text, tables and initial file system are not counted.
    assert total is not None
    assert 400 * 1024 < int(total[1]) <= 512 * 1024


@with_guests(CLOUD)
def test_every_cpu_takes_timer_interrupts(at_prompt: Machine) -> None:
    console = at_prompt.console
    before = interrupts(at_prompt, "LOC")
    work = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"
    each = range(at_prompt.ncpus)
    console.run(
        f"for c in {' '.join(map(str, each))}; do taskset -c $c "
        f"sh -c '{work}' & done; wait; sleep 1",
        timeout=180,
    )
    after = interrupts(at_prompt, "LOC")

    assert len(after) == at_prompt.ncpus
    assert all(b < a for b, a in zip(before, after, strict=True))


@with_guests(CLOUD)
def test_console_takes_interrupts(at_prompt: Machine) -> None:
    before = sum(interrupts(at_prompt, "4"))
    after = sum(interrupts(at_prompt, "4"))

    assert after > before


@with_guests(CLOUD)
def test_sleep_agrees_with_this_clock(at_prompt: Machine) -> None:
    text = at_prompt.console.run("date +%s; sleep 3; date +%s")
    first, second = map(int, text.split())

    assert 3 <= second - first <= 5


@with_guests(CLOUD)
def test_control_c_stops_a_command(at_prompt: Machine) -> None:
    console = at_prompt.console
    console.send("sh -c \"echo star''ted; sleep 1000\"\n")
    console.expect("started", 30)
    console.send("\x03")
    console.expect(re.escape(guests.find("debian12-cloud").prompt), 30)

    assert console.run("echo $((2 + 2))") == "4\n"


@pytest.mark.parametrize("program", guests.PROGRAMS)
@with_guests(CLOUD)
def test_user_space(at_prompt: Machine, program: str) -> None:
    text = at_prompt.console.run(f"{program} || true", timeout=240)

    assert "FAIL" not in text, text
    assert f"DONE {program}: 0 failed" in text
    assert "PASS" in text


# What ends a machine comes last: the tests above share it.


@pytest.mark.parametrize(
    ("at_prompt", "command", "status"),
    [
        (("debian12-cloud", 1), "poweroff", 1),
        (("debian12-cloud", 2), "reboot", 0),
        (("debian12-generic", 1), "halt -f", 2),
    ],
    indirect=["at_prompt"],
    ids=["poweroff", "reboot", "halt"],
)
def test_exit_status(at_prompt: Machine, command: str, status: int) -> None:
    at_prompt.console.send(f"{command}\n")

    assert at_prompt.console.wait(60) == status
