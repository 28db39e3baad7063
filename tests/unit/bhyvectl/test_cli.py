"""bhyvectl as a user has it, on stopped and on running VMs."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pybhyve.bhyvectl import cli
from pybhyve.bhyvectl.options import GET_REGISTERS, OPTIONS, RAW_FIELDS, SELECTORS
from pybhyve.bhyverun.machine import Machine
from pybhyve.config import Config
from pybhyve.control import server
from pybhyve.errors import VmNotFoundError
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import MB, REGISTERS, SuspendHow, VmCtx

Text = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rundir = tmp_path / "run"
    rundir.mkdir(mode=0o700)
    monkeypatch.setenv("PYBHYVE_RUNDIR", str(rundir))
    return rundir


@pytest.fixture
def stopped() -> Iterator[str]:
    """A VM with 4 MiB that has not run."""
    assert cli.main(["--vm=vm", "--create", "--set-mem=3"]) == 0
    yield "vm"
    cli.main(["--vm=vm", "--destroy"])


@pytest.fixture
def running() -> Iterator[Machine]:
    """A machine whose event loop runs, and ends when the VM is suspended."""
    ctx = VmCtx.create("vm", maxcpus=2)
    ctx.setup_memory(4 * MB)
    machine = Machine(ctx, Config(), GlobalOptions.parse(None), 2)
    server.start(machine)
    loop = threading.Thread(target=machine.mevent.run)
    loop.start()
    yield machine
    machine.mevent.stop()
    loop.join()
    machine.halt()
    ctx.destroy()


@pytest.fixture(params=["stopped", "running"])
def vm(request: pytest.FixtureRequest) -> str:
    """A VM in each of both states: what is shown must not depend on it."""
    request.getfixturevalue(request.param)
    return "--vm=vm"


def test_create_and_destroy(run_dir: Path, capfd: Text) -> None:
    assert cli.main(["--vm=new", "--create"]) == 0
    assert (run_dir / "new").is_dir()
    assert cli.main(["--vm=new", "--create"]) == errno.EEXIST
    assert capfd.readouterr().out == "errno = 17\n"
    assert cli.main(["--vm=new", "--destroy"]) == 0
    assert not (run_dir / "new").exists()


def test_create_and_destroy_at_once(run_dir: Path) -> None:
    argv = ["--vm=new", "--destroy", "--create", "--set-mem=2", "--set-rax=1"]
    assert cli.main(argv) == 0
    assert list(run_dir.iterdir()) == []


def test_a_vm_that_is_not_there(capfd: Text) -> None:
    for option in ("--get-rip", "--destroy"):
        assert cli.main(["--vm=none", option]) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert err == ("vm_open: none could not be opened: there is no VM 'none'\n")


def test_usage(capfd: Text) -> None:
    assert cli.main(["--nonsense"]) == 1

    err = capfd.readouterr().err
    assert err.startswith("bhyvectl: option --nonsense not recognized\nUsage: bhyvectl")


def test_a_vm_with_a_damaged_state_can_be_destroyed(
    stopped: str, run_dir: Path, capfd: Text
) -> None:
    (run_dir / stopped / "state.json").write_text("{")

    assert cli.main(["--vm=vm", "--get-rip"]) == 1
    assert "is damaged: destroy the VM" in capfd.readouterr().err
    assert cli.main(["--vm=vm", "--destroy"]) == 0


def test_a_vm_held_without_a_socket_is_busy(capfd: Text) -> None:
    ctx = VmCtx.create("vm")

    assert cli.main(["--vm=vm", "--get-rip"]) == 1
    assert "could not be opened: VM 'vm' is in use by process" in capfd.readouterr().err
    ctx.destroy()


def test_what_is_set_is_shown(vm: str, capfd: Text) -> None:
    sets = ["--set-rip=0xfff0", "--set-cr3=8192", "--set-rflags=2", "--set-cs=0x10"]
    desc = ["--set-desc-ds", "--desc-base=0x1000", "--desc-limit=0xfff"]
    assert cli.main([vm, *sets, *desc, "--desc-access=0x93"]) == 0
    gets = ["--get-cs", "--get-rflags", "--get-rip", "--get-cr3", "--get-desc-ds"]
    assert cli.main([vm, *gets]) == 0

    assert capfd.readouterr().out.splitlines() == [
        "cr3[0]\t\t0x0000000000002000",
        "rip[0]\t\t0x000000000000fff0",
        "rflags[0]\t0x0000000000000002",
        "ds desc[0]\t0x0000000000001000/0x00000fff/0x00000093",
        "cs[0]\t\t0x0010",
    ]


def test_every_register_can_be_shown(vm: str, capfd: Text) -> None:
    names = [*GET_REGISTERS, *SELECTORS]
    assert cli.main([vm, *(f"--get-{name}" for name in names)]) == 0

    lines = capfd.readouterr().out.splitlines()
    assert [line.split("[")[0] for line in lines] == names


def test_memory(vm: str, capfd: Text) -> None:
    assert cli.main([vm, "--get-memmap", "--get-memseg"]) == 0

    assert capfd.readouterr().out == (
        "ID  Length      Name\n"
        "0   4096KB      sysmem\n"
        "Address     Length      Segment     Offset      Prot  Flags\n"
        "0           4096KB      sysmem      0           RWX   \n"
    )


def test_capabilities(vm: str, capfd: Text) -> None:
    assert cli.main([vm, "--capname=hlt_exit", "--setcap=1", "--getcap"]) == 0
    assert capfd.readouterr().out == 'Capability "hlt_exit" is set on vcpu 0\n'

    assert cli.main([vm, "--getcap"]) == 0
    assert 'Capability "bpt_exit" is not set on vcpu 0' in capfd.readouterr().out

    assert cli.main([vm, "--capname=wings", "--setcap=1"]) == errno.ENOENT
    assert capfd.readouterr().out == (
        'Capability "wings" is not available\nerrno = 2\n'
    )


def test_clock(vm: str, capfd: Text) -> None:
    argv = [vm, "--rtc-nvram-offset=0x70", "--set-rtc-nvram=0x5a", "--get-rtc-nvram"]
    assert cli.main(argv) == 0
    assert capfd.readouterr().out == "rtc nvram[112]: 0x5a\n"

    assert cli.main([vm, "--set-rtc-time=1000000000", "--get-rtc-time"]) == 0
    assert capfd.readouterr().out == ("rtc time 0x3b9aca00: Sun Sep 09 01:46:40 2001\n")


def test_cpus_and_topology(vm: str, capfd: Text) -> None:
    options = ["active-cpus", "suspended-cpus", "debug-cpus", "intinfo"]
    assert cli.main([vm, *(f"--get-{option}" for option in options)]) == 0

    assert capfd.readouterr().out.splitlines() == [
        *("active cpus:\t (none)", "suspended cpus:\t (none)", "debug cpus:\t (none)"),
        *("pending:\tn/a", "current:\tn/a"),
    ]


def test_a_pending_nmi_is_delivered_to_the_right_place(vm: str) -> None:
    assert cli.main([vm, "--inject-nmi"]) == 0
    assert cli.main([vm, "--assert-lapic-lvt=5"]) == 0


def test_get_all_shows_it_all(vm: str, capfd: Text) -> None:
    assert cli.main([vm, "--get-all"]) == 0

    out, err = capfd.readouterr()
    assert err == ""
    for start in (
        *("ID  Length", "Address  ", "efer[0]", "ds desc[0]", "gdtr[0]", "cs[0]"),
        *("x2apic_state[0]", "Capability", "rtc nvram[000]", "rtc time", "active cpus"),
        *("suspended cpus", "debug cpus", "pending", "current", "vcpu0 stats:"),
        "cpu_topology:\tsockets=",
    ):
        assert f"\n{start}" in f"\n{out}"


@pytest.mark.parametrize("name", [f"get-{RAW_FIELDS[0]}", "suspend", "get-gpa-pmap"])
def test_what_is_missing_says_so(vm: str, capfd: Text, name: str) -> None:
    value = "=1" if OPTIONS[name].value else ""
    assert cli.main([vm, f"--{name}{value}"]) == errno.EOPNOTSUPP

    out, err = capfd.readouterr()
    assert out == "errno = 95\n"
    assert err.startswith(f"bhyvectl: --{name} is not available")


@pytest.mark.parametrize(
    ("argv", "number"),
    [
        (["--cpu=7", "--get-rip"], errno.EINVAL),
        (["--cpu=7", "--run"], errno.EINVAL),
        (["--assert-lapic-lvt=7"], errno.EINVAL),
        (["--get-rtc-nvram", "--rtc-nvram-offset=128"], errno.EINVAL),
        (["--set-desc-ds", "--desc-limit=0x100000000"], errno.EINVAL),
    ],
)
def test_a_failing_operation_gives_its_errno(
    stopped: str, capfd: Text, argv: list[str], number: int
) -> None:
    assert cli.main([f"--vm={stopped}", *argv]) == number

    out, err = capfd.readouterr()
    assert out == f"errno = {number}\n"
    assert len(err.splitlines()) == 1


def test_a_running_vm_keeps_its_memory_and_its_processors(
    running: Machine, capfd: Text
) -> None:
    assert cli.main(["--vm=vm", "--set-mem=64"]) == errno.EBUSY
    assert cli.main(["--vm=vm", "--run"]) == errno.EBUSY
    assert cli.main(["--vm=vm", "--cpu=1", "--set-rip=5", "--get-rip"]) == 0
    assert running.vm.vcpu(1).get_register(REGISTERS["rip"]) == 5
    assert capfd.readouterr().out.endswith("rip[1]\t\t0x0000000000000005\n")


@pytest.mark.parametrize("option", ["--force-reset", "--force-poweroff"])
def test_a_run_is_ended(running: Machine, option: str) -> None:
    assert cli.main(["--vm=vm", option]) == 0
    assert cli.main(["--vm=vm", option]) == errno.EALREADY


def test_destroying_a_running_vm_waits_for_its_process(run_dir: Path) -> None:
    ctx = VmCtx.create("vm")
    ctx.setup_memory(4 * MB)
    machine = Machine(ctx, Config(), GlobalOptions.parse(None), 1)
    server.start(machine)
    ended: list[object] = []

    def bhyve() -> None:
        """What is left of a bhyve without vCPUs: notice the end, and let go."""
        machine.mevent.add_timer(0.05, look, periodic=True)
        ended.append(machine.mevent.run())
        machine.halt()
        ctx.close()

    def look() -> None:
        try:
            ctx.vm.suspend(SuspendHow.HALT)
        except OSError:
            machine.mevent.stop("ended")

    loop = threading.Thread(target=bhyve)
    # Only a suspend that came before ours is refused.
    machine.mevent.add_timer(0.0, lambda: None)
    loop.start()
    assert cli.main(["--vm=vm", "--destroy"]) == 0
    loop.join()
    assert not (run_dir / "vm").exists()
    with pytest.raises(VmNotFoundError):
        VmCtx.open("vm")
