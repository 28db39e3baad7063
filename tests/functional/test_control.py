"""A machine looked into and ended from outside, and one started in two steps."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from tests.functional.machine import Machine, Programs, Starter
from tests.unit.bhyveload.kernel_images import vmlinux
from tools import fetch, guests


def image(kernel: str) -> list[str]:
    return ["-o", f"kernel={guests.compile_kernel(kernel)}"]


@pytest.fixture
def idle(start: Starter) -> Machine:
    """A guest whose processor sleeps."""
    machine = start("control", image("idle"), memory="64M")
    machine.console.expect("idle", 30)
    return machine


@pytest.fixture
def busy(start: Starter) -> Machine:
    """A guest whose processor counts ECX down."""
    machine = start("control", image("speed"), memory="64M")
    machine.console.expect("alu", 30)
    return machine


def register(programs: Programs, name: str) -> int:
    done = programs.run("bhyvectl", "--vm=control", f"--get-{name}")
    assert (done.returncode, done.stderr) == (0, "")
    found = re.fullmatch(rf"{name}\[0\]\t\t0x([0-9a-f]{{16}})\n", done.stdout)
    assert found, done.stdout
    return int(found[1], 16)


@pytest.mark.usefixtures("busy")
def test_registers_of_a_running_processor_change(programs: Programs) -> None:
    # It counts down, and begins again for its next loop.
    first = register(programs, "rcx")

    assert register(programs, "rcx") != first
    assert 0x100000 <= register(programs, "rip") < 0x101000


@pytest.mark.usefixtures("idle")
def test_everything_about_a_sleeping_machine(programs: Programs) -> None:
    done = programs.run("bhyvectl", "--vm=control", "--get-all")

    assert (done.returncode, done.stderr) == (0, "")
    assert "\nactive cpus:\t 0\n" in done.stdout
    assert "\nsuspended cpus:\t (none)\n" in done.stdout
    assert "\ncpu_topology:\tsockets=1, cores=1, threads=1, maxcpus=1\n" in done.stdout


@pytest.mark.parametrize("state", ["idle", "busy"])
@pytest.mark.parametrize(
    ("option", "status"), [("--force-reset", 0), ("--force-poweroff", 1)]
)
def test_a_run_is_ended_from_outside(
    request: pytest.FixtureRequest,
    programs: Programs,
    state: str,
    option: str,
    status: int,
) -> None:
    machine: Machine = request.getfixturevalue(state)

    assert programs.run("bhyvectl", "--vm=control", option).returncode == 0
    assert machine.console.wait(10) == status
    # What is left can be looked at.
    assert 0x100000 <= register(programs, "rip") < 0x101000


def test_destroying_ends_the_run(idle: Machine, programs: Programs) -> None:
    done = programs.run("bhyvectl", "--vm=control", "--destroy")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert idle.console.wait(10) == 4
    again = programs.run("bhyvectl", "--vm=control", "--get-rip")
    assert again.returncode == 1
    assert "there is no VM 'control'" in again.stderr


def test_a_crashed_bhyve_leaves_nothing_in_the_way(
    idle: Machine, start: Starter, programs: Programs
) -> None:
    idle.console.process.kill()
    idle.console.wait(10)

    done = programs.run("bhyvectl", "--vm=control", "--get-active-cpus")
    assert (done.returncode, done.stdout) == (0, "active cpus:\t (none)\n")
    again = start("control", image("idle"), memory="64M")
    again.console.expect("idle", 30)


def test_two_steps(start: Starter, programs: Programs) -> None:
    kernel = str(guests.compile_kernel("poweroff"))
    loaded = programs.run("bhyveload", "-m", "64M", "-k", kernel, "control")
    assert (loaded.returncode, loaded.stdout, loaded.stderr) == (0, "", "")

    console = start("control", [], memory="64M").console
    console.expect("powering off", 30)

    assert console.wait(30) == 1


def test_a_pvh_kernel(start: Starter, programs: Programs, tmp_path: Path) -> None:
    """Linux entered without its decompressor, as far as its first words."""
    guest = guests.find("debian12-generic")
    package = fetch.package(guest.package, guest.sha256)
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(vmlinux(package.file(guest.kernel).read_bytes()))
    line = "console=ttyS0 earlyprintk=serial"
    argv = ["-m", "512M", "-k", str(kernel), "-a", line, "-e", "a=b", "control"]
    assert programs.run("bhyveload", *argv).returncode == 0

    console = start("control", []).console

    console.expect("Linux version 6", 60)
    console.expect(f"Command line: {line} a=b", 60)
    console.expect(r"0x0000000000100000-0x000000001fffffff\] usable", 60)


def test_a_vcpu_runs_to_its_first_exit(programs: Programs) -> None:
    kernel = str(guests.compile_kernel("idle"))
    assert programs.run("bhyveload", "-k", kernel, "control").returncode == 0

    done = programs.run("bhyvectl", "--vm=control", "--run", "--get-rip")
    programs.run("bhyvectl", "--vm=control", "--destroy")

    assert (done.returncode, done.stderr) == (0, "")
    assert "\treason\t\tINOUT\n" in done.stdout
    assert "\tport\t\t0x03f" in done.stdout


@pytest.mark.usefixtures("idle")
def test_a_running_machine_is_not_run_twice(programs: Programs) -> None:
    done = programs.run("bhyvectl", "--vm=control", "--run")

    assert (done.returncode, done.stdout) == (errno.EBUSY, "errno = 16\n")
    assert "Traceback" not in done.stderr
