"""What can be asked of a VM, whether a process runs it or not.

Each operation is a method of :class:`Operations`; its annotations are the types that a
request's arguments are checked against.  Results are what JSON can say.
"""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar, get_type_hints

from pybhyve.control.protocol import ControlError
from pybhyve.vmmapi import CAPABILITIES, REGISTERS, SuspendHow, Vcpu, Vm, VmmError

F = TypeVar("F", bound=Callable[..., Any])

U64_MAX: Final = (1 << 64) - 1
VECTORS_LVT: Final = 7  # CMCI, timer, thermal, performance, LINT0, LINT1, error
NVRAM_SIZE: Final = 128


class _Operation(NamedTuple):
    parameters: dict[str, type]
    changes: bool  # whether a VM is not the same afterwards


_OPERATIONS: dict[str, _Operation] = {}


def _declare(method: F, changes: bool) -> F:
    hints = get_type_hints(method)
    parameters = list(inspect.signature(method).parameters)[1:]
    _OPERATIONS[method.__name__] = _Operation(
        {name: hints[name] for name in parameters}, changes
    )
    return method


def query(method: F) -> F:
    """Let a method be called by name, with arguments of its annotated types."""
    return _declare(method, changes=False)


def command(method: F) -> F:
    """Declare a method as `query` does, one that changes the VM."""
    return _declare(method, changes=True)


class Operations:
    """Operations on one VM.  Any of them raises ControlError."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.changed = False
        """Whether a command has been done."""

    def call(self, op: object, args: object) -> Any:  # by operation
        """Do the operation named ``op``; its name and arguments may be anything."""
        declared = _OPERATIONS.get(op) if isinstance(op, str) else None
        if declared is None:
            raise ControlError(errno.EOPNOTSUPP, f"there is no operation {op!a:.40}")
        types = declared.parameters
        if not isinstance(args, Mapping) or args.keys() != types.keys():
            expected = ", ".join(types) or "none"
            raise ControlError(errno.EINVAL, f"{op}: its arguments are: {expected}")
        for name, wanted in types.items():
            # Not isinstance(): true and false are numbers to Python.
            if type(args[name]) is not wanted:
                raise ControlError(
                    errno.EINVAL, f"{op}: {name} is not of type {wanted.__name__}"
                )
            if wanted is int and not 0 <= args[name] <= U64_MAX:
                raise ControlError(errno.ERANGE, f"{op}: {name} is not a 64-bit number")
        self.changed |= declared.changes
        try:
            return getattr(self, str(op))(**args)
        except VmmError as error:
            number = error.errno or errno.EIO
            raise ControlError(number, f"{op}: {error.strerror or error}") from error
        except (ValueError, OverflowError) as error:
            raise ControlError(errno.EINVAL, f"{op}: {error}") from error

    def _vcpu(self, index: int) -> Vcpu:
        if index >= self._vm.maxcpus:
            raise ControlError(
                errno.EINVAL, f"there is no vcpu {index}: the VM has {self._vm.maxcpus}"
            )
        return self._vm.vcpu(index)

    # -- registers -------------------------------------------------------------------

    @query
    def get_register(self, vcpu: int, register: str) -> int:
        """A register, or the selector of a segment register."""
        return self._vcpu(vcpu).get_register(_register(register))

    @command
    def set_register(self, vcpu: int, register: str, value: int) -> None:
        """Change what `get_register` gives."""
        self._vcpu(vcpu).set_register(_register(register), value)

    @query
    def get_desc(self, vcpu: int, register: str) -> list[int]:
        """Base, limit and access word of a segment or table register."""
        return list(self._vcpu(vcpu).get_desc(_register(register)))

    @command
    def set_desc(
        self, vcpu: int, register: str, base: int, limit: int, access: int
    ) -> None:
        """Change what `get_desc` gives."""
        self._vcpu(vcpu).set_desc(_register(register), base, limit, access)

    @query
    def get_x2apic_state(self, vcpu: int) -> int:
        """1 where the guest sees an x2APIC."""
        return self._vcpu(vcpu).get_x2apic_state()

    @command
    def set_x2apic_state(self, vcpu: int, state: int) -> None:
        """Change it, before the guest runs."""
        self._vcpu(vcpu).set_x2apic_state(state)

    # -- capabilities ----------------------------------------------------------------

    @query
    def get_capability(self, vcpu: int, name: str) -> int:
        """A capability's value; ENOENT where there is none of this name."""
        _check_capability(name)
        return self._vcpu(vcpu).get_capability(name)

    @command
    def set_capability(self, vcpu: int, name: str, value: int) -> None:
        """Change it."""
        _check_capability(name)
        self._vcpu(vcpu).set_capability(name, value)

    # -- interrupts ------------------------------------------------------------------

    @command
    def inject_nmi(self, vcpu: int) -> None:
        """A non-maskable interrupt."""
        self._vcpu(vcpu).inject_nmi()

    @command
    def lapic_local_irq(self, vcpu: int, lvt: int) -> None:
        """An interrupt as an entry of the local vector table has it."""
        if lvt >= VECTORS_LVT:
            raise ControlError(errno.EINVAL, f"lvt {lvt} is not 0 to {VECTORS_LVT - 1}")
        self._vcpu(vcpu)
        self._vm.lapic_local_irq(vcpu, lvt)

    @query
    def get_intinfo(self, vcpu: int) -> list[int]:
        """The pending and the current event, as VM_INTINFO words."""
        return list(self._vcpu(vcpu).get_intinfo())

    # -- memory ----------------------------------------------------------------------

    @query
    def get_memmap(self) -> list[list[int]]:
        """Mappings: gpa, segment id, offset, length, protection."""
        return [list(mapping) for mapping in self._vm.memmap()]

    @query
    def get_memsegs(self) -> list[list[Any]]:
        """Segments: id, name (empty for RAM), length."""
        return [list(segment) for segment in self._vm.memsegs()]

    # -- vCPUs -----------------------------------------------------------------------

    @query
    def get_stats(self, vcpu: int) -> dict[str, int]:
        """Counters by description."""
        return self._vcpu(vcpu).get_stats()

    @query
    def get_cpus(self) -> dict[str, list[int]]:
        """The vCPUs that are ``active``, ``suspended`` and stopped for ``debug``."""
        return {
            "active": self._vm.active_cpus(),
            "suspended": self._vm.suspended_cpus(),
            "debug": self._vm.debug_cpus(),
        }

    @query
    def get_topology(self) -> list[int]:
        """Sockets, cores, threads, maxcpus."""
        return list(self._vm.get_topology())

    # -- real-time clock -------------------------------------------------------------

    @query
    def rtc_gettime(self) -> int:
        """Seconds since 1970, in whatever zone the guest's clock is."""
        return self._vm.rtc_gettime()

    @command
    def rtc_settime(self, secs: int) -> None:
        """Set the guest's clock."""
        self._vm.rtc_settime(secs)

    @query
    def rtc_read(self, offset: int) -> int:
        """A byte of the RTC's non-volatile memory."""
        return self._vm.rtc_read(_nvram(offset))

    @command
    def rtc_write(self, offset: int, value: int) -> None:
        """Change a byte of the RTC's non-volatile memory."""
        self._vm.rtc_write(_nvram(offset), value & 0xFF)

    # -- life ------------------------------------------------------------------------

    @command
    def suspend(self, how: int) -> None:
        """End the VM's run: a SuspendHow of RESET, POWEROFF or DESTROY."""
        if how not in (SuspendHow.RESET, SuspendHow.POWEROFF, SuspendHow.DESTROY):
            raise ControlError(errno.EINVAL, f"suspend reason {how} is not for users")
        self._vm.suspend(how)


def _register(name: str) -> int:
    try:
        return REGISTERS[name]
    except KeyError:
        raise ControlError(errno.EINVAL, f"there is no register {name!a:.40}") from None


def _check_capability(name: str) -> None:
    if name not in CAPABILITIES:
        raise ControlError(errno.ENOENT, f"there is no capability {name!a:.40}")


def _nvram(offset: int) -> int:
    if offset >= NVRAM_SIZE:
        raise ControlError(
            errno.EINVAL, f"the RTC has {NVRAM_SIZE} bytes, not {offset}"
        )
    return offset
