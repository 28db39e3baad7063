"""Machines for device tests: a real VM whose interrupt wires can be watched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pybhyve.amd64 import platform
from pybhyve.amd64.bootrom import Firmware
from pybhyve.bhyverun.machine import Machine
from pybhyve.config import Config
from pybhyve.pci import init_pci
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import Vm, VmCtx

WIRES = frozenset(
    {
        "ioapic_assert_irq",
        "ioapic_deassert_irq",
        "ioapic_pulse_irq",
        "isa_assert_irq",
        "isa_deassert_irq",
        "isa_pulse_irq",
        "isa_set_irq_trigger",
        "lapic_msi",
    }
)


class WatchedVm:
    """A VM, and the list of what devices did to its interrupt lines."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.wires: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._vm, name)
        if name not in WIRES:
            return method

        def watched(*arguments: Any) -> None:
            self.wires.append((name, *arguments))
            method(*arguments)

        return watched

    def take(self) -> list[tuple[Any, ...]]:
        """What happened since the last call."""
        wires, self.wires = self.wires, []
        return wires


Build = Callable[..., Machine]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """Set machines up, as in ``build("3,uart", "4:1,dummy", cpus=2)``.

    Slots are "[BUS:]SLOT[:FUNC],DEVICE"; other arguments are variables, with "__" for
    dots.  Its ``vm`` is a WatchedVm.
    """
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with contextlib.ExitStack() as stack:

        def make(
            *slots: str, cpus: int = 1, memory: int = 32 << 20, **variables: str
        ) -> Machine:
            config = Config()
            for slot in slots:
                place, _, device = slot.partition(",")
                numbers = place.split(":")
                path = {
                    1: lambda n: ["0", *n, "0"],
                    2: lambda n: ["0", *n],
                    3: lambda n: n,
                }[len(numbers)](numbers)
                config.set(f"pci.{'.'.join(path)}.device", device)
            for name, value in variables.items():
                config.set(name.replace("__", "."), value)
            ctx = VmCtx.create(f"vm{len(list(tmp_path.rglob('*')))}", cpus)
            stack.callback(ctx.destroy)
            ctx.setup_memory(memory)
            options = GlobalOptions.parse(config)
            firmware = Firmware.open(options)
            if firmware is not None:
                stack.callback(firmware.close)
            machine = Machine(ctx, config, options, cpus, firmware=firmware)
            stack.callback(machine.halt)
            machine.vm = WatchedVm(ctx.vm)  # type: ignore[assignment]  # stands in
            platform.init_platform(machine)
            init_pci(machine)
            return machine

        yield make
