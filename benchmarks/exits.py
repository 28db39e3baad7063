"""What an exit costs: nanoseconds from the guest's instruction to its next.

``python -m benchmarks.exits``: real-mode loops that do nothing but one access each, to
handlers that do nothing, then to a serial port; and a round from a notification over a
worker's thread and its message back to the guest, which has halted.
"""

from __future__ import annotations

import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.compare import table
from pybhyve.amd64.mem import MemRange
from pybhyve.bhyverun.machine import Machine
from pybhyve.config import Config
from pybhyve.lpc.com import COM_PORTS, ComPort
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import MB, REGISTERS, VmCtx

RUNS: Final = 5
CODE: Final = 0x1000
STACK: Final = 0x7000
PORT: Final = 0x84
END: Final = 0xF4
MMIO: Final = 0xD0000000
LAPIC: Final = 0xFEE00000
VECTOR: Final = 0x41
HANDLER: Final = 0x2000

ENABLE_LAPIC: Final = bytes.fromhex(
    "6626c706f000ff010000"
)  # mov dword es:[0xf0], 0x1ff
EOI_IRET: Final = bytes.fromhex("6626c706b00000000000cf")  # mov dword es:[0xb0], 0
NOTIFY_AND_WAIT: Final = bytes.fromhex("fae684fbf4")  # cli; out 0x84, al; sti; hlt
LSR_THEN_THR: Final = bytes.fromhex("bafd03ecbaf803ee")  # in al, 0x3fd; out 0x3f8, al
POWER_OFF: Final = bytes.fromhex("baf400eeebfe")  # mov dx, 0xf4; out dx, al; jmp $


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop's body, how many exits it has, and what answers them."""

    name: str
    body: bytes
    exits: int = 1
    prepare: Callable[[Machine], None] = lambda _machine: None
    rounds: int = 50_000

    def code(self) -> bytes:
        """``mov ecx, rounds``; the body; ``dec ecx``; ``jnz`` to it; power off."""
        head = ENABLE_LAPIC + b"\x66\xb9" + self.rounds.to_bytes(4, "little")
        back = (-len(self.body) - 4).to_bytes(1, "little", signed=True)
        return head + self.body + b"\x66\x49\x75" + back + POWER_OFF

    def nanoseconds(self) -> float:
        """Of one exit, the best of some runs: the host may have other things to do."""
        return min(self._run() for _ in range(RUNS))

    def _run(self) -> float:
        ctx = VmCtx.create(f"bench{os.getpid()}")
        try:
            machine = self._machine(ctx)
            self.prepare(machine)
            machine.start()
            begun = time.monotonic()
            machine.run()
            ended = time.monotonic()
            machine.halt()
        finally:
            ctx.destroy()
        return (ended - begun) / self.rounds / self.exits * 1e9

    def _machine(self, ctx: VmCtx) -> Machine:
        ctx.setup_memory(MB)
        ctx.write(4 * VECTOR, HANDLER.to_bytes(4, "little"))
        ctx.write(HANDLER, EOI_IRET)
        ctx.write(CODE, self.code())
        vcpu = ctx.vcpu(0)
        vcpu.reset()
        vcpu.set_register(REGISTERS["cs"], 0)
        for name, base in (("cs", 0), ("ss", 0), ("ds", MMIO), ("es", LAPIC)):
            vcpu.set_desc(REGISTERS[name], base, 0xFFFF, 0x93)
        vcpu.set_register(REGISTERS["rip"], CODE)
        vcpu.set_register(REGISTERS["rsp"], STACK)
        config = Config()
        machine = Machine(ctx, config, GlobalOptions.parse(config), 1)

        def end(_port: int, _size: int, _value: int) -> None:
            machine.request_poweroff()

        machine.inout.register("end", END, 1, None, end)
        return machine


def read_nothing(_address: int, _size: int) -> int:
    """A register that is zero."""
    return 0


def write_nothing(_address: int, _size: int, _value: int) -> None:
    """A register that takes anything."""


def port(machine: Machine) -> None:
    """A device at a port."""
    machine.inout.register("nothing", PORT, 1, read_nothing, write_nothing)


def memory(machine: Machine) -> None:
    """A device at an address."""
    machine.mem.register(MemRange("nothing", MMIO, 0x1000, read_nothing, write_nothing))


def message(machine: Machine) -> None:
    """A device that answers at once."""

    def notified(_port: int, _size: int, _value: int) -> None:
        machine.vm.lapic_msi(LAPIC, VECTOR)

    machine.inout.register("notify", PORT, 1, None, notified)


def worker(machine: Machine) -> None:
    """A device that answers from a thread of its own."""
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        while True:
            requests.get()
            machine.vm.lapic_msi(LAPIC, VECTOR)

    def notified(_port: int, _size: int, _value: int) -> None:
        requests.put(None)

    threading.Thread(target=work, daemon=True).start()
    machine.inout.register("notify", PORT, 1, None, notified)


def serial(machine: Machine) -> None:
    """A serial port to which nothing is connected."""
    machine.add_device("com1", ComPort(machine, COM_PORTS[0], None))


def terminal(machine: Machine) -> None:
    """A serial port whose output another program reads."""
    ours, theirs = os.openpty()
    quiet = subprocess.DEVNULL
    subprocess.Popen(["cat"], stdin=ours, stdout=quiet, stderr=quiet)
    machine.add_device("com1", ComPort(machine, COM_PORTS[0], os.ttyname(theirs)))
    os.close(ours)


LOOPS: Final = (
    Loop("OUT", b"\xe6\x84", prepare=port),
    Loop("IN", b"\xe4\x84", prepare=port),
    Loop("MMIO store", b"\xa2\x00\x00", prepare=memory),
    Loop("MMIO load", b"\xa0\x00\x00", prepare=memory),
    Loop("serial output to nobody", LSR_THEN_THR, 2, serial),
    Loop("serial output to a terminal", LSR_THEN_THR, 2, terminal),
    Loop("notify, message, HLT", NOTIFY_AND_WAIT, prepare=message, rounds=20_000),
    Loop("the same over a thread", NOTIFY_AND_WAIT, prepare=worker, rounds=5_000),
)


def main() -> None:
    """Run the loops and print the table."""
    with tempfile.TemporaryDirectory() as rundir:
        os.environ["PYBHYVE_RUNDIR"] = rundir
        rows = [[loop.name, f"{loop.nanoseconds():.0f}"] for loop in LOOPS]
    print("Nanoseconds an exit")
    print(table([["loop", "ns"], *rows]))


if __name__ == "__main__":
    main()
