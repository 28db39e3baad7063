"""The machine with real vCPUs: exits, start-up IPIs, pause, save and restore.

The guests are a few real-mode instructions each, at 0x1000.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pybhyve.amd64.mem import MemRange
from pybhyve.bhyverun import exitstatus
from pybhyve.bhyverun.machine import Machine, Phase
from pybhyve.config import Config
from pybhyve.device import Device
from pybhyve.errors import BhyveError, DeviceError, GuestAbortError
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import MB, REGISTERS, SuspendHow, VmCtx

CODE = 0x1000
LAPIC = 0xFEE00000
PORT = 0x80

Builder = Callable[..., Machine]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Builder]:
    """Machines that run some bytes from 0x1000, DS based where asked."""
    monkeypatch.setenv("PYBHYVE_RUNDIR", str(tmp_path / "run"))
    machines: list[Machine] = []

    def build(code: str, ncpu: int = 1, ds: int = 0, **variables: str) -> Machine:
        ctx = VmCtx.create(f"vm{len(machines)}", ncpu)
        ctx.vm.set_topology(ncpu, 1, 1)
        ctx.setup_memory(MB)
        for index in range(ncpu):
            ctx.vcpu(index).set_capability("ipi_exit", 1)
        # jmp $: who ends the VM may come a moment after the code's last instruction.
        ctx.write(CODE, bytes.fromhex(code) + b"\xeb\xfe")
        vcpu = ctx.vcpu(0)
        vcpu.reset()
        vcpu.set_register(REGISTERS["cs"], 0)
        vcpu.set_desc(REGISTERS["cs"], 0, 0xFFFF, 0x93)
        vcpu.set_desc(REGISTERS["ds"], ds, 0xFFFF, 0x93)
        vcpu.set_register(REGISTERS["rip"], CODE)
        config = Config()
        for name, value in variables.items():
            config.set(name.replace("__", "."), value)
        machine = Machine(ctx, config, GlobalOptions.parse(config), ncpu)
        machines.append(machine)
        return machine

    yield build
    for machine in machines:
        machine.halt()
        machine.ctx.destroy()


class Note(Device):
    """Notes what the machine and the guest do; the guest's first OUT ends the VM."""

    def __init__(self, machine: Machine, name: str, notes: list[Any]) -> None:
        self._machine = machine
        self._name = name
        self._notes = notes
        self.count = 0

    def attach(self, port: int) -> None:
        self._machine.inout.register(self._name, port, 1, self._in, self._out)

    def _in(self, port: int, size: int) -> int:
        self.count += 1
        return self.count & 0xFF

    def _out(self, port: int, size: int, value: int) -> None:
        self._notes.append((port, size, value))
        self._machine.exit(33)

    def start(self) -> None:
        self._notes.append(f"start {self._name}")

    def pause(self) -> None:
        self._notes.append(f"pause {self._name}")

    def resume(self) -> None:
        self._notes.append(f"resume {self._name}")

    def reset(self) -> None:
        self._notes.append(f"reset {self._name}")

    def halt(self) -> None:
        self._notes.append(f"halt {self._name}")

    def save(self) -> dict[str, Any]:
        return {"version": 1, "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_out_reaches_the_port_and_its_device_ends_the_program(build):
    machine = build("b05a e680 f4")  # mov al,5a; out 80,al; hlt
    notes: list[Any] = []
    Note(machine, "dev", notes).attach(PORT)

    machine.start()

    assert machine.run() == 33
    assert notes == [(PORT, 1, 0x5A)]


def test_in_brings_the_value(build):
    machine = build("e480 e680 f4")  # in al,80; out 80,al; hlt
    notes: list[Any] = []
    device = Note(machine, "dev", notes)
    device.attach(PORT)
    device.count = 0x41

    machine.start()

    assert machine.run() == 33
    assert notes == [(PORT, 1, 0x42)]


def test_unknown_ports_read_ones(build):
    machine = build("66 e584 66 e780")  # in eax,84; out 80,eax
    notes: list[Any] = []
    Note(machine, "dev", notes).attach(PORT)

    machine.start()

    assert machine.run() == 33
    assert notes == [(PORT, 4, 0xFFFFFFFF)]
    assert machine.inout.unknown[0x84] == 1


def test_memory_ranges_are_read_and_written(build):
    # mov eax,[10]; inc eax; mov [14],eax; hlt
    machine = build("66 a11000 66 40 66 a31400 f4", ds=0xC0000000)
    written: list[tuple[int, int, int]] = []

    def write(gpa: int, size: int, value: int) -> None:
        written.append((gpa, size, value))
        machine.exit(34)

    machine.mem.register(
        MemRange("dev", 0xC0000000, 0x1000, lambda gpa, size: gpa, write)
    )
    machine.start()

    assert machine.run() == 34
    assert written == [(0xC0000014, 4, 0xC0000011)]


@pytest.mark.parametrize(
    ("how", "status"),
    [
        (SuspendHow.RESET, 0),
        (SuspendHow.POWEROFF, 1),
        (SuspendHow.HALT, 2),
        (SuspendHow.TRIPLEFAULT, 3),
        (SuspendHow.DESTROY, 4),
        (SuspendHow.NONE, 100),
    ],
)
def test_exit_statuses_are_bhyves(how, status):
    assert exitstatus.of_suspend(how) == status


@pytest.mark.parametrize("ncpu", [1, 3])
def test_the_end_of_a_vm_reaches_the_loop(build, ncpu):
    machine = build("ebfe", ncpu=ncpu)  # jmp .
    machine.start()
    machine.mevent.add_timer(0.05, machine.request_reset)

    assert machine.run() is SuspendHow.RESET


def test_a_cpu_that_nothing_can_wake_halts_the_vm(build):
    machine = build("fa f4", ncpu=2)  # cli; hlt
    machine.start()

    assert machine.run() is SuspendHow.HALT


def test_a_fault_without_handlers_is_a_triple_fault(build):
    machine = build("0f0b")  # ud2
    machine.vm.vcpu(0).set_desc(REGISTERS["idtr"], 0, 0, 0)
    machine.start()

    assert machine.run() is SuspendHow.TRIPLEFAULT


def test_an_unknown_msr_faults(build):
    machine = build("66 b934120000 0f32 e680")  # mov ecx,1234; rdmsr; out 80,al
    machine.vm.vcpu(0).set_desc(REGISTERS["idtr"], 0, 0, 0)
    machine.start()

    assert machine.run() is SuspendHow.TRIPLEFAULT


def test_an_unknown_msr_reads_0_if_the_user_wants_so(build):
    # mov ecx,1234; mov al,7; wrmsr; rdmsr; out 80,al
    machine = build("66 b934120000 b007 0f30 0f32 e680", x86__strictmsr="false")
    notes: list[Any] = []
    Note(machine, "dev", notes).attach(PORT)
    machine.start()

    assert machine.run() == 33
    assert notes == [(PORT, 1, 0)]


def test_strict_io_names_port_and_place(build):
    machine = build("90 e484 f4", x86__strictio="true")
    machine.start()

    with pytest.raises(GuestAbortError, match=r"^Unhandled inb 0x0084 at 0x1001$"):
        machine.run()


def test_an_error_of_a_device_ends_the_vm(build):
    machine = build("e480")

    def broken(port: int, size: int) -> int:
        raise ZeroDivisionError("broken device")

    machine.inout.register("dev", PORT, 1, broken, None)
    machine.start()

    with pytest.raises(BhyveError, match="vcpu 0: internal error") as failure:
        machine.run()
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


def test_start_up_ipis_start_the_others(build):
    # mov dword [300],INIT all but self; mov dword [300],SIPI page 2; jmp .
    machine = build(
        "66 c7060003 00450c00 66 c7060003 02460c00 66 c7060003 02460c00 ebfe",
        ncpu=3,
        ds=LAPIC,
    )
    # mov ax,cs; lock inc byte cs:[80]; out 80,ax; hlt
    machine.ctx.write(0x2000, bytes.fromhex("8cc8 2e f0 fe068000 e780 f4"))
    seen: list[int] = []

    def out(port: int, size: int, value: int) -> None:
        seen.append(value)
        if len(seen) == 2:
            machine.exit(35)

    machine.inout.register("dev", PORT, 1, None, out)
    machine.start()

    assert machine.run() == 35
    assert seen == [0x200, 0x200]
    assert machine.ctx.read(0x2080, 1) == b"\2"


def test_devices_go_forward_and_back(build):
    machine = build("ebfe")
    notes: list[Any] = []
    for name in ("a", "b"):
        machine.add_device(name, Note(machine, name, notes))

    machine.start()
    machine.pause()
    machine.reset()
    machine.resume()
    machine.halt()

    assert notes == [
        f"{what} {name}"
        for what, names in [
            ("start", "ab"),
            ("pause", "ba"),
            ("reset", "ab"),
            ("resume", "ab"),
            ("halt", "ba"),
        ]
        for name in names
    ]


def test_a_device_name_is_taken_once(build):
    machine = build("f4")
    machine.add_device("a", Device())

    with pytest.raises(DeviceError, match="device a is there already"):
        machine.add_device("a", Device())


def test_a_machine_that_never_started_halts(build):
    machine = build("f4")
    notes: list[Any] = []
    machine.add_device("a", Note(machine, "a", notes))

    machine.halt()
    machine.halt()

    assert notes == ["halt a"]
    assert machine.phase is Phase.HALTED


@pytest.mark.parametrize("step", ["resume", "save", "reset"])
def test_a_running_machine_is_paused_first(build, step):
    machine = build("ebfe")
    machine.start()

    with pytest.raises(RuntimeError, match="the machine is running, not paused"):
        getattr(machine, step)()


# -- pause, save, restore --------------------------------------------------------------

# inc dword [0]; in al,80; mov [4],al; jmp 1000: counts in memory and asks a device.
COUNTER = "66 ff060000 e480 a20400 ebf4"


def counter(machine: Machine) -> int:
    return int.from_bytes(machine.ctx.read(0x8000, 4), "little")


def counted_on(machine: Machine, since: int) -> bool:
    return counter(machine) > since


def without_hints(state: dict[str, Any]) -> dict[str, Any]:
    """A state without vmm's notes to look for interrupts; one too many is harmless."""
    vcpus = [
        {name: value for name, value in vcpu.items() if name != "events"}
        for vcpu in state["vcpus"]
    ]
    return {**state, "vcpus": vcpus}


def in_background(machine: Machine) -> threading.Thread:
    thread = threading.Thread(target=machine.run, daemon=True)
    thread.start()
    return thread


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_pause_stops_the_guest_and_a_resume_lets_it_go_on(build):
    machine = build(COUNTER, ds=0x8000)
    Note(machine, "dev", []).attach(PORT)
    machine.start()
    thread = in_background(machine)
    wait_for(lambda: counter(machine) > 10)
    for _ in range(20):
        machine.pause()
        before = counter(machine)
        time.sleep(0.005)
        assert counter(machine) == before
        machine.resume()
        wait_for(partial(counted_on, machine, before))

    machine.request_poweroff()
    thread.join(20)
    assert not thread.is_alive()


def test_a_saved_machine_goes_on_as_another(build):
    first = build(COUNTER, ncpu=2, ds=0x8000)
    device = Note(first, "dev", [])
    device.attach(PORT)
    first.add_device("dev", device)
    first.start()
    thread = in_background(first)
    wait_for(lambda: counter(first) > 10)
    first.pause()
    state, memory, count = first.save(), first.ctx.read(0, MB), counter(first)
    asked = device.count
    first.resume()
    first.request_poweroff()
    thread.join(20)

    second = build("f4", ncpu=2)
    other = Note(second, "dev", [])
    other.attach(PORT)
    second.add_device("dev", other)
    second.start()
    second.pause()
    second.ctx.write(0, memory)
    second.restore(state)

    assert without_hints(second.save()) == without_hints(state)
    second.resume()
    wait_for(lambda: counter(second) > count)
    assert other.count > asked
    assert second.vm.debug_cpus() == [1]


def test_a_machine_that_is_about_to_end_ends_as_another(build):
    first = build("ebfe")
    first.start()
    first.vm.resume_cpu(0)
    first.pause()
    first.request_reset()

    state = first.save()
    second = build("f4")
    second.start()
    second.pause()
    second.restore(state)

    assert state["suspended"] == SuspendHow.RESET
    second.resume()
    assert second.dispatch() is SuspendHow.RESET


def test_a_machine_that_has_ended_can_be_paused(build):
    machine = build("ebfe")
    machine.start()
    machine.request_poweroff()

    assert machine.run() is SuspendHow.POWEROFF
    machine.pause()
    assert machine.save()["suspended"] == SuspendHow.POWEROFF
    machine.resume()


def test_a_state_names_the_variables(build):
    machine = build("f4", x86__strictio="true")
    machine.start()
    machine.pause()

    assert machine.save()["config"] == {"x86.strictio": "true"}


def test_a_state_is_plain_values(build):
    machine = build("f4", ncpu=2)
    machine.start()
    machine.pause()
    state = machine.save()

    # Back from text, where tuples are lists.
    machine.restore(json.loads(json.dumps(state)))
    assert without_hints(machine.save()) == without_hints(state)


def test_a_state_of_another_topology_is_refused(build):
    first, second = build("f4", ncpu=2), build("f4", ncpu=2)
    second.vm.set_topology(1, 2, 1)
    for machine in (first, second):
        machine.start()
        machine.pause()

    with pytest.raises(BhyveError, match="of a machine with other topology"):
        second.restore(first.save())


@pytest.mark.parametrize(
    ("change", "what"),
    [({"ncpu": 2}, "vCPUs"), ({"device": "x"}, "devices")],
)
def test_a_state_of_another_machine_is_refused(build, change, what):
    first = build("ebfe")
    first.start()
    first.pause()
    second = build("ebfe", ncpu=change.get("ncpu", 1))
    if "device" in change:
        second.add_device(change["device"], Device())
    second.start()
    second.pause()

    with pytest.raises(BhyveError, match=f"of a machine with other {what}"):
        second.restore(first.save())
