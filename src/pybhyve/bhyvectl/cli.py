"""The command line of bhyvectl(8).

As in bhyve's program, the order of the work is fixed, whatever the order of the
options: create, set, show, run, suspend, destroy.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Sequence
from typing import Final

from pybhyve.bhyvectl import output
from pybhyve.bhyvectl.options import (
    GET_REGISTERS,
    GET_SEGMENTS,
    OPTIONS,
    SELECTORS,
    SET_REGISTERS,
    SET_SEGMENTS,
    TABLES,
    Arguments,
    usage,
)
from pybhyve.bhyvectl.targets import StoppedVm, Target, destroy, open_target
from pybhyve.control.protocol import ControlError
from pybhyve.errors import VmError, one_line
from pybhyve.program import run_program
from pybhyve.vmmapi import CAPABILITIES, MB, SuspendHow, VmCtx

EXIT_FAILURE: Final = 1
MEMORY_UNIT: Final = 2 * MB
STATUS_MAX: Final = 255


class _Failed(Exception):  # noqa: N818  # not an error: the way out after one
    """An operation has failed, with this errno."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.errno = number


class Session:
    """The work of one command line on one VM."""

    def __init__(self, target: Target, arguments: Arguments) -> None:
        self._target = target
        self._call = target.call
        self._args = arguments
        self._cpu = arguments.cpu

    def work(self) -> None:
        """Everything but create and destroy.  Raises BhyveError and _Failed."""
        self._set()
        self._show_memory()
        self._show_registers()
        self._show_x2apic()
        self._refuse_missing()
        self._capability()
        self._rtc()
        self._show_cpus()
        self._run()

    def _set(self) -> None:
        args, cpu = self._args, self._cpu
        if size := args.number("set-mem"):
            self._target.set_memory(-(-size * MB // MEMORY_UNIT) * MEMORY_UNIT)
        for register in SET_REGISTERS:
            self._set_register(register)
        base = args.number("desc-base") or 0
        limit = args.number("desc-limit") or 0
        access = args.number("desc-access") or 0
        for register in (*SET_SEGMENTS, *TABLES):
            if f"set-desc-{register}" in args:
                self._call(
                    "set_desc",
                    vcpu=cpu,
                    register=register,
                    base=base,
                    limit=limit,
                    access=0 if register in TABLES else access,
                )
        for register in SELECTORS:
            self._set_register(register)
        if (state := args.number("set-x2apic-state")) is not None:
            self._call("set_x2apic_state", vcpu=cpu, state=state)
        if "inject-nmi" in args:
            self._call("inject_nmi", vcpu=cpu)
        if (lvt := args.number("assert-lapic-lvt")) is not None:
            self._call("lapic_local_irq", vcpu=cpu, lvt=lvt)

    def _set_register(self, register: str) -> None:
        if (value := self._args.number(f"set-{register}")) is not None:
            self._call("set_register", vcpu=self._cpu, register=register, value=value)

    def _show_memory(self) -> None:
        if self._args.shown("get-memseg"):
            _print(*output.memory_segments(self._call("get_memsegs")))
        if self._args.shown("get-memmap"):
            names = {segid: name for segid, name, _ in self._call("get_memsegs")}
            _print(*output.memory_map(self._call("get_memmap"), names))

    def _show_registers(self) -> None:
        cpu, shown = self._cpu, self._args.shown
        for name in GET_REGISTERS:
            if shown(f"get-{name}"):
                _print(output.register(name, cpu, self._register(name)))
        for name in GET_SEGMENTS:
            if shown(f"get-desc-{name}"):
                base, limit, access = self._call("get_desc", vcpu=cpu, register=name)
                _print(output.descriptor(name, cpu, base, limit, access))
        for name in TABLES:
            if shown(f"get-desc-{name}"):
                base, limit, _ = self._call("get_desc", vcpu=cpu, register=name)
                _print(output.table(name, cpu, base, limit))
        for name in SELECTORS:
            if shown(f"get-{name}"):
                _print(output.selector(name, cpu, self._register(name)))

    def _register(self, name: str) -> int:
        return int(self._call("get_register", vcpu=self._cpu, register=name))

    def _show_x2apic(self) -> None:
        if self._args.shown("get-x2apic-state"):
            state = self._call("get_x2apic_state", vcpu=self._cpu)
            _print(f"x2apic_state[{self._cpu}]\t{state}")

    def _refuse_missing(self) -> None:
        # --get-all leaves these out; asked for by name, they are missed.
        for name in self._args:
            if missing := OPTIONS[name].missing:
                raise _Failed(errno.EOPNOTSUPP, f"--{name} {missing}")

    def _capability(self) -> None:
        args, cpu = self._args, self._cpu
        chosen = args.text("capname")
        if chosen is not None and (value := args.number("setcap")) is not None:
            try:
                self._call("set_capability", vcpu=cpu, name=chosen, value=value)
            except ControlError as error:
                if error.errno == errno.ENOENT:
                    _print(output.no_capability(chosen))
                raise
        if not args.shown("getcap"):
            return
        # deviation: a name that is not known is answered, not taken for all names.
        one = chosen if "getcap" in args else None
        for name in CAPABILITIES if one is None else [one]:
            try:
                current = self._call("get_capability", vcpu=cpu, name=name)
            except ControlError as error:
                if error.errno != errno.ENOENT:
                    raise
                _print(output.no_capability(name))
            else:
                _print(output.capability(name, cpu, current))

    def _rtc(self) -> None:
        args = self._args
        offset = args.number("rtc-nvram-offset") or 0
        if (value := args.number("set-rtc-nvram")) is not None:
            self._call("rtc_write", offset=offset, value=value)
        if args.shown("get-rtc-nvram"):
            value = self._call("rtc_read", offset=offset)
            _print(f"rtc nvram[{offset:03d}]: 0x{value:02x}")
        if (secs := args.number("set-rtc-time")) is not None:
            self._call("rtc_settime", secs=secs)
        if args.shown("get-rtc-time"):
            _print(output.rtc_time(self._call("rtc_gettime")))

    def _show_cpus(self) -> None:
        cpu, shown = self._cpu, self._args.shown
        for name in ("active", "suspended", "debug"):
            if shown(f"get-{name}-cpus"):
                _print(output.cpus(f"{name} cpus", self._call("get_cpus")[name]))
        if shown("get-intinfo"):
            pending, current = self._call("get_intinfo", vcpu=cpu)
            _print(output.intinfo("pending", pending))
            _print(output.intinfo("current", current))
        if shown("get-stats"):
            _print(*output.statistics(cpu, self._call("get_stats", vcpu=cpu)))
        if shown("get-cpu-topology"):
            _print(output.topology(*self._call("get_topology")))

    def _run(self) -> None:
        args, cpu = self._args, self._cpu
        if "run" in args:
            _print(*output.vm_exit(cpu, *self._target.run(cpu)))
        if "force-reset" in args:
            self._call("suspend", how=int(SuspendHow.RESET))
        if "force-poweroff" in args:
            self._call("suspend", how=int(SuspendHow.POWEROFF))


def _print(*lines: str) -> None:
    for line in lines:
        print(line)


def perform(arguments: Arguments) -> None:
    """Do what a command line asks for.  Raises BhyveError and _Failed."""
    name = arguments.vm
    if set(arguments) <= {"vm", "cpu", "destroy"} and "destroy" in arguments:
        # Also a VM whose memory is lost or whose state is damaged can be removed.
        destroy(name)
        return
    target: Target
    if "create" in arguments:
        try:
            target = StoppedVm(VmCtx.create(name))
        except VmError as error:
            raise _Failed(error.errno, one_line(error)) from error
    else:
        target = open_target(name)
    with contextlib.closing(target):
        try:
            Session(target, arguments).work()
        except ControlError as error:
            raise _Failed(error.errno, one_line(error)) from error
        except VmError as error:
            raise _Failed(error.errno, one_line(error)) from error
        if "destroy" in arguments:
            target.destroy()


def main(argv: Sequence[str] | None = None) -> int:
    """Run bhyvectl; its exit status."""
    return run_program("bhyvectl", _main, argv, usage(), EXIT_FAILURE)


def _main(argv: Sequence[str]) -> int:
    arguments = Arguments(argv)
    try:
        perform(arguments)
    except _Failed as failure:
        print(f"errno = {failure.errno}")
        print(f"bhyvectl: {failure}", file=sys.stderr)
        return min(failure.errno, STATUS_MAX)
    except VmError as error:
        reason = one_line(error)
        message = f"vm_open: {arguments.vm} could not be opened: {reason}"
        print(message, file=sys.stderr)
        return EXIT_FAILURE
    return 0
