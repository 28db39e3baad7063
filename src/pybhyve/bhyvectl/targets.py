"""The VM that bhyvectl works on: stopped, or run by another process."""

from __future__ import annotations

import errno
import signal
import threading
import time
from typing import Any, Final, Protocol

from pybhyve.control.client import ControlClient
from pybhyve.control.operations import Operations
from pybhyve.control.protocol import ControlError
from pybhyve.errors import VmBusyError
from pybhyve.vmmapi import REGISTERS, SuspendHow, VmCtx
from pybhyve.vmmapi.registry import VmDir, control_path

DESTROY_SECONDS: Final = 30.0  # for a bhyve to end when its VM is taken away
POLL_SECONDS: Final = 0.05


class Target(Protocol):
    """A VM, wherever it is."""

    def call(self, op: str, **args: Any) -> Any:
        """Do one of :class:`~pybhyve.control.operations.Operations`; ControlError."""

    def set_memory(self, size: int) -> None:
        """Give a new VM ``size`` bytes of RAM.  ControlError, MemorySizeError."""

    def run(self, vcpu: int) -> tuple[int, tuple[Any, ...]]:
        """Run a vCPU to its next exit: RIP and exit tuple.  ControlError."""

    def destroy(self) -> None:
        """Remove the VM.  BhyveError."""

    def close(self) -> None:
        """Done; keep what was changed."""


class StoppedVm:
    """A VM that no process runs, and that is now locked by this one."""

    def __init__(self, ctx: VmCtx) -> None:
        self._ctx = ctx
        self._operations = Operations(ctx.vm)
        self._changed = False
        self._gone = False

    def call(self, op: str, **args: Any) -> Any:
        """Do an operation on the saved state."""
        return self._operations.call(op, args)

    def set_memory(self, size: int) -> None:
        """Create the memory files."""
        self._ctx.setup_memory(size)
        self._changed = True

    def run(self, vcpu: int) -> tuple[int, tuple[Any, ...]]:
        """Run on a thread, so that an interrupt from the terminal can end it."""
        self.call("get_register", vcpu=vcpu, register="rip")  # is there such a vCPU?
        self._changed = True
        if vcpu not in self._ctx.vm.active_cpus():
            self._ctx.vm.activate_cpu(vcpu)
        cpu = self._ctx.vcpu(vcpu)
        exits: list[tuple[Any, ...]] = []
        thread = threading.Thread(target=lambda: exits.append(cpu.run()), daemon=True)
        previous = signal.signal(signal.SIGINT, lambda *_: cpu.kick())
        try:
            thread.start()
            thread.join()
        finally:
            signal.signal(signal.SIGINT, previous)
        if not exits:
            raise ControlError(errno.EIO, "the vCPU cannot run")
        return cpu.get_register(REGISTERS["rip"]), exits[0]

    def destroy(self) -> None:
        """Remove the directory."""
        self._ctx.destroy()
        self._gone = True

    def close(self) -> None:
        """Write the state back if it has changed; let go of the lock."""
        if not self._gone and (self._changed or self._operations.changed):
            self._ctx.save_changes()
        self._ctx.close()


class RunningVm:
    """A VM that a ``bhyve`` runs, asked through its control socket."""

    def __init__(self, name: str, client: ControlClient) -> None:
        self._name = name
        self._client = client

    def call(self, op: str, **args: Any) -> Any:
        """Have an operation done in the other process."""
        return self._client.call(op, **args)

    def set_memory(self, size: int) -> None:
        """Memory is for a VM that has not run."""
        raise ControlError(errno.EBUSY, f"VM '{self._name}' runs and has its memory")

    def run(self, vcpu: int) -> tuple[int, tuple[Any, ...]]:
        """Somebody else does that."""
        raise ControlError(errno.EBUSY, f"vcpu {vcpu} is run by bhyve")

    def destroy(self) -> None:
        """End the run, wait for the process to let go, remove the directory."""
        try:
            self.call("suspend", how=int(SuspendHow.DESTROY))
        except ControlError as error:
            if error.errno not in (errno.EALREADY, errno.ECONNRESET):
                raise
        self._client.close()
        deadline = time.monotonic() + DESTROY_SECONDS
        while True:
            try:
                VmDir.open(self._name).destroy()
            except VmBusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)
            else:
                return

    def close(self) -> None:
        """Hang up."""
        self._client.close()


def open_target(name: str) -> Target:
    """The VM of this name.  Raises VmError."""
    try:
        return StoppedVm(VmCtx.open(name))
    except VmBusyError as busy:
        return _running(name, busy)


def destroy(name: str) -> None:
    """Remove a VM, also one whose state cannot be read.  Raises BhyveError."""
    try:
        VmDir.open(name).destroy()
    except VmBusyError as busy:
        _running(name, busy).destroy()


def _running(name: str, busy: VmBusyError) -> RunningVm:
    try:
        return RunningVm(name, ControlClient(control_path(name)))
    except OSError:
        # Its holder loads it, or is not that far yet.
        raise busy from None
