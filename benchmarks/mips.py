"""Millions of guest instructions a second, beside QEMU's TCG on the same machine.

``python -m benchmarks.mips``: the loops of tests/guests/src/speed.S, which say how many
instructions each has (the string loop: bytes).
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.compare import Stopwatch, Workload, require_qemu, table
from tools import guests

LOOPS = ("alu", "memory", "calls", "strings")


def rates(command: Sequence[str]) -> dict[str, float]:
    """Millions a second of each loop."""
    machine = Stopwatch(command)
    found = {}
    try:
        for loop in LOOPS:
            machine.until(f"{loop} ")
            begun, size = machine.until("\n")
            ended, _ = machine.until("done")
            found[loop] = int(size.split()[0]) / (ended - begun) / 1e6
    finally:
        machine.end()
    return found


def main() -> None:
    """Run the loops and print the table."""
    require_qemu()
    workload = Workload(guests.compile_kernel("speed"), memory="64M")
    ours, theirs = rates(workload.bhyve("bench")), rates(workload.qemu())
    print("Guest speed, millions of instructions (strings: bytes) a second")
    rows = [["loop", "bhyve", "TCG", "bhyve/TCG"]]
    for loop in LOOPS:
        ratio = ours[loop] / theirs[loop]
        rows.append([loop, f"{ours[loop]:.0f}", f"{theirs[loop]:.0f}", f"{ratio:.2f}"])
    print(table(rows))


if __name__ == "__main__":
    main()
