"""Dimensions (guest, CPUs) and states (machine started, machine at its prompt).

A dimension is narrowed with ``-k``: the id of a test names its guest and CPUs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.functional.machine import BOOT_TIMEOUT, Machine, Programs, Starter
from tools import boot, fetch, guests


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """bhyve, bhyvectl and bhyveload, away from the user's virtual machines."""
    run = tmp_path_factory.mktemp("run")
    logs = tmp_path_factory.mktemp("console")
    return Programs({"XDG_RUNTIME_DIR": str(run)}, logs)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which builds of the guests were run: Debian replaces them."""
    for package in fetch.used.values():
        terminalreporter.line(f"guest package: {package}")


def _starter(programs: Programs) -> Iterator[Starter]:
    started: list[Machine] = []

    def start(
        name: str,
        image: Sequence[str],
        *,
        guest: guests.Guest | None = None,
        ncpus: int = 1,
        memory: str = "512M",
        enter: Sequence[str] = (),
    ) -> Machine:
        args = boot.arguments(image, ncpus, memory, name)
        machine = Machine(name, guest, ncpus, programs.bhyve(*args, enter=enter))
        started.append(machine)
        return machine

    yield start
    for machine in started:
        machine.console.close()
        programs.run("bhyvectl", f"--vm={machine.name}", "--destroy")


@pytest.fixture
def start(programs: Programs) -> Iterator[Starter]:
    """Start machines that end with the test."""
    yield from _starter(programs)


@pytest.fixture(scope="module")
def start_for_module(programs: Programs) -> Iterator[Starter]:
    """Start machines that end with the module's last test."""
    yield from _starter(programs)


@pytest.fixture(scope="session")
def exercises() -> list[Path]:
    """The compiled programs that exercise a guest's user space."""
    return [guests.compile_program(name) for name in guests.PROGRAMS]


@pytest.fixture(scope="module")
def booted() -> dict[tuple[str, int], Machine]:
    """The Linux guests at their prompt that the module's tests share."""
    return {}


@pytest.fixture
def at_prompt(
    request: pytest.FixtureRequest,
    booted: dict[tuple[str, int], Machine],
    start_for_module: Starter,
    exercises: list[Path],
) -> Machine:
    """A Linux guest (parameter: its name and the number of CPUs) at its shell."""
    name, ncpus = request.param
    if (name, ncpus) not in booted:
        guest = guests.find(name)
        image = guest.image(exercises)
        machine = start_for_module(
            f"{name}-{ncpus}", image.options(), guest=guest, ncpus=ncpus
        )
        booted[name, ncpus] = machine
        machine.console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)
        # Kernel messages between the lines of a command's output would look like it.
        machine.console.run("echo 1 > /proc/sys/kernel/printk")
    return booted[name, ncpus]
