"""The machine: one VM with its buses, its devices and its event loop.

Devices get it when they are built and keep it.  It walks them in the order in which
they were added to start, resume, reset and restore, and backwards to pause, save and
halt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from typing import Any, Final

from pybhyve.amd64.bootrom import Firmware
from pybhyve.amd64.e820 import E820
from pybhyve.amd64.inout import InoutTable
from pybhyve.amd64.mem import MemBus
from pybhyve.amd64.qemu_fwcfg import FwCfg
from pybhyve.bhyverun.vcpus import BSP, VcpuThreads
from pybhyve.bhyverun.vmexit import vcpu_loop
from pybhyve.config import Config
from pybhyve.device import Device
from pybhyve.errors import BhyveError, DeviceError
from pybhyve.mevent import EventLoop
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import SuspendHow, Vcpu, VmCtx

STATE_VERSION: Final = 1
JOIN_SECONDS: Final = 5.0  # for a vCPU thread to come out of a device


class Phase(Enum):
    """Where a machine is in its life."""

    SETUP = "being set up"
    RUNNING = "running"
    PAUSED = "paused"
    HALTED = "halted"


class Machine:
    """All parts of one running VM."""

    def __init__(
        self,
        ctx: VmCtx,
        config: Config,
        options: GlobalOptions,
        ncpu: int,
        domains: Sequence[Collection[int]] = (),
        firmware: Firmware | None = None,
    ) -> None:
        """``ctx`` has its memory set up; ``options`` are the values of ``config``.

        ``domains`` are the vCPUs of each NUMA domain, if the user wants any.
        ``firmware`` stays the caller's to close, after `halt`.
        """
        self.ctx = ctx
        self.vm = ctx.vm
        self.config = config
        self.options = options
        self.ncpu = ncpu
        self.domains = domains
        self.firmware = firmware
        self.mevent = EventLoop()
        self.inout = InoutTable(strict=options.x86_strictio)
        self.mem = MemBus(ncpu)
        self.e820 = E820(ctx.lowmem_size, ctx.highmem_size)
        """The memory map that firmware gets; to be changed during set-up only."""
        self.fwcfg = FwCfg(ctx, ncpu)
        """Items for firmware; to be added during set-up only."""
        self.devices: dict[str, Device] = {}
        """Every device, in the order of registration."""
        self.phase = Phase.SETUP
        self.random_bytes: Callable[[int], bytes] = os.urandom
        """The one source of randomness of all devices: as many bytes as asked for."""
        self._vcpus: VcpuThreads | None = None

    def add_device(self, name: str, device: Device) -> None:
        """Have the machine look after a device; the name is its name in saved states.

        Raises DeviceError where the name is taken.
        """
        if name in self.devices:
            raise DeviceError(f"device {name} is there already")
        self.devices[name] = device

    # -- running ---------------------------------------------------------------------

    def start(self, affinity: Mapping[int, Collection[int]] | None = None) -> None:
        """Start the devices and the vCPU threads; no vCPU runs before `run`."""

        def loop(vcpu: Vcpu) -> SuspendHow:
            return vcpu_loop(self, vcpu)

        self._expect(Phase.SETUP)
        for device in self.devices.values():
            device.start()
        self._vcpus = VcpuThreads(
            self.vm, self.ncpu, affinity or {}, loop, self.mevent.stop
        )
        self._vcpus.start()
        self.phase = Phase.RUNNING

    def run(self) -> SuspendHow | int:
        """Let the BSP run and dispatch events until the VM ends.

        Returns why, or the exit status that a device asked for with `exit`.  Raises the
        BhyveError that ended it.  The caller goes on with `halt`.
        """
        self.vm.resume_cpu(BSP)
        return self.dispatch()

    def dispatch(self) -> SuspendHow | int:
        """Dispatch events until the VM ends: `run` for a machine that runs already."""
        result = self.mevent.run()
        if isinstance(result, BhyveError):
            raise result
        if not isinstance(result, int):
            raise BhyveError("the event loop ended without a reason")
        return result

    @property
    def vcpus(self) -> VcpuThreads:
        """The vCPU threads; only after `start`."""
        if self._vcpus is None:
            raise RuntimeError("the machine has not started")
        return self._vcpus

    def halt(self) -> None:
        """End vCPU threads and devices, whatever state they are in."""
        if self.phase is Phase.HALTED:
            return
        self.phase = Phase.HALTED
        if self._vcpus is not None:
            self.ctx.suspend(SuspendHow.POWEROFF)
            self._vcpus.join(JOIN_SECONDS)
        for device in reversed(self.devices.values()):
            device.halt()
        self.mevent.close()

    # -- what devices and the control socket may ask ---------------------------------

    def request_reset(self) -> None:
        """The guest asked for a reset.  Any thread."""
        self.ctx.suspend(SuspendHow.RESET)

    def request_poweroff(self) -> None:
        """The guest asked to be switched off.  Any thread."""
        self.ctx.suspend(SuspendHow.POWEROFF)

    def exit(self, status: int) -> None:
        """End the program with an exit status of a device's own.  Any thread."""
        self.mevent.stop(status)

    # -- state -----------------------------------------------------------------------

    def pause(self) -> None:
        """Stop vCPUs, devices and clock.  Any thread but a vCPU's.

        On return nothing changes the guest's state by itself: no vCPU is in the guest
        or in a device's handler, no device works, no timer fires.  Each vCPU stands
        between two instructions, or in one that waits for an answer which it has had.
        A VM that has ended can be paused; `dispatch` returns after `resume`.
        """
        self._expect(Phase.RUNNING)
        self.vcpus.pause()
        for device in reversed(self.devices.values()):
            device.pause()
        self.vm.pause_clock()
        self.phase = Phase.PAUSED

    def resume(self) -> None:
        """Go on after `pause`.  For the guest, no time has passed."""
        self._expect(Phase.PAUSED)
        self.vm.resume_clock()
        for device in self.devices.values():
            device.resume()
        self.phase = Phase.RUNNING
        self.vcpus.resume()

    def reset(self) -> None:
        """Everything as after power-on, RAM included; the machine is paused.

        The BSP runs from its reset vector when the machine goes on.
        """
        self._expect(Phase.PAUSED)
        self.vm.reinit()
        self.vcpus.activate()
        self.vm.resume_cpu(BSP)
        for device in self.devices.values():
            device.reset()

    def save(self) -> dict[str, Any]:
        """The state of everything but memory, as plain values; the machine is paused.

        Of memory it has the layout; the contents are the caller's to copy, with
        ``ctx.read`` and ``ctx.write``.  The variables are there so that a machine of
        the same kind can be set up; `restore` does not look at them.
        """
        self._expect(Phase.PAUSED)
        return {
            "version": STATE_VERSION,
            "config": dict(self.config.walk()),
            "topology": list(self.vm.get_topology()),
            "memsegs": [list(segment) for segment in self.vm.memsegs()],
            "memmap": [list(mapping) for mapping in self.vm.memmap()],
            # Before the in-kernel devices, whose inputs they drive.
            "devices": {
                name: device.save() for name, device in reversed(self.devices.items())
            },
            "kernel": self.vm.save_devices(),
            "vcpus": [self.vm.vcpu(index).save() for index in range(self.ncpu)],
            "suspended": self.vm.suspended(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take a state that `save` gave, of a machine that is configured the same.

        The machine is paused, and has not ended; one that was just set up is paused
        right after `start`.  Its memory is the caller's to fill, before or after.
        Raises BhyveError where the state is of another machine, before anything has
        changed; ValueError, VmmError or KeyError where it is damaged, and then the
        machine is of no use.
        """
        self._expect(Phase.PAUSED)
        if state["version"] != STATE_VERSION:
            raise ValueError(f"state version {state['version']}")
        here = {
            "memory": [list(segment) for segment in self.vm.memsegs()],
            "devices": sorted(self.devices),
            "vCPUs": self.ncpu,
            "topology": list(self.vm.get_topology()),
        }
        there = {
            "memory": state["memsegs"],
            "devices": sorted(state["devices"]),
            "vCPUs": len(state["vcpus"]),
            "topology": state["topology"],
        }
        for what, value in here.items():
            if value != there[what]:
                raise BhyveError(f"the saved state is of a machine with other {what}")
        # The local APICs' deadlines count in their vCPU's TSC.
        for index, saved in enumerate(state["vcpus"]):
            self.vm.vcpu(index).restore(saved)
        self.vm.restore_devices(state["kernel"])
        for name, device in self.devices.items():
            device.restore(state["devices"][name])
        if state["suspended"] != SuspendHow.NONE:
            # It was about to end: that its vCPUs notice is still to come.
            self.ctx.suspend(SuspendHow(state["suspended"]))

    def _expect(self, phase: Phase) -> None:
        if self.phase is not phase:
            raise RuntimeError(f"the machine is {self.phase.value}, not {phase.value}")
