"""The options of bhyvectl(8), declared once: parsing, usage and manual follow."""

from __future__ import annotations

import getopt
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from pybhyve.config import parse_int
from pybhyve.errors import UsageError

# In the order in which they are set, and shown.
SET_REGISTERS: Final = (
    *("efer", "cr0", "cr2", "cr3", "cr4"),
    *("dr0", "dr1", "dr2", "dr3", "dr6", "dr7"),
    *("rsp", "rip", "rax", "rflags"),
)
GET_REGISTERS: Final = (
    *("efer", "cr0", "cr2", "cr3", "cr4"),
    *("dr0", "dr1", "dr2", "dr3", "dr6", "dr7"),
    *("rsp", "rip", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rflags"),
)
SET_SEGMENTS: Final = ("ds", "es", "ss", "cs", "fs", "gs", "tr", "ldtr")
GET_SEGMENTS: Final = ("ds", "es", "fs", "gs", "ss", "cs", "tr", "ldtr")
TABLES: Final = ("gdtr", "idtr")
SELECTORS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr")

# What only a processor's own virtualisation has.  Intel, then AMD, then both.
RAW_FIELDS: Final = (
    "vmcs-cr0-mask",
    "vmcs-cr0-shadow",
    "vmcs-cr4-mask",
    "vmcs-cr4-shadow",
    "vmcs-cr3-targets",
    "vmcs-pinbased-ctls",
    "vmcs-procbased-ctls",
    "vmcs-procbased-ctls2",
    "vmcs-guest-linear-address",
    "vmcs-guest-physical-address",
    "vmcs-entry-interruption-info",
    "vmcs-tpr-threshold",
    "vmcs-instruction-error",
    "vmcs-exit-ctls",
    "vmcs-entry-ctls",
    "vmcs-host-pat",
    "vmcs-host-cr0",
    "vmcs-host-cr3",
    "vmcs-host-cr4",
    "vmcs-host-rip",
    "vmcs-host-rsp",
    "vmcs-vpid",
    "vmcs-link",
    "vmcs-exit-interruption-info",
    "vmcs-exit-interruption-error",
    "vmcs-interruptibility",
    "vmcs-exit-inst-length",
    "vmcs-exit-qualification",
    "apic-access-address",
    "virtual-apic-address",
    "vmcb-intercepts",
    "vmcb-asid",
    "vmcb-exit-details",
    "vmcb-tlb-ctrl",
    "vmcb-virq",
    "avic-apic-bar",
    "avic-backing-page",
    "avic-table",
    "eptp",
    "exception-bitmap",
    "io-bitmap-address",
    "tsc-offset",
    "msr-bitmap",
    "msr-bitmap-address",
    "guest-pat",
    "guest-sysenter",
    "exit-reason",
)


NOT_YET: Final = "is not available in this version"
NO_FIELDS: Final = "is not available: the engine is a processor in software"


class Option(NamedTuple):
    """``--name``, or ``--name=<value>``."""

    name: str
    value: str | None
    doc: str
    missing: str = ""  # why it only has a place in the list


def _options() -> Iterator[Option]:
    yield Option("vm", "vmname", "the VM; always needed")
    yield Option("cpu", "vcpu_number", "the vCPU that other options are about, 0")
    yield Option("create", None, "make the VM first")
    yield Option("destroy", None, "remove the VM at last, ending its run")
    yield Option("checkpoint", "filename", "save the VM, and go on", NOT_YET)
    yield Option("suspend", "filename", "save the VM, and end its run", NOT_YET)
    yield Option("set-mem", "memory in units of MB", "give a new VM its memory")
    yield Option("get-all", None, "show everything there is to show")
    yield Option("get-stats", None, "show the statistics of the vCPU")
    yield Option("get-memseg", None, "show the memory segments")
    yield Option("get-memmap", None, "show where segments are in the guest's memory")
    yield Option("get-gpa-pmap", "gpa", "show nested page table entries", NO_FIELDS)
    for register in SET_REGISTERS:
        yield Option(f"set-{register}", register.upper(), f"set register {register}")
    for register in GET_REGISTERS:
        yield Option(f"get-{register}", None, f"show register {register}")
    yield Option("desc-base", "BASE", "the base for --set-desc-*, 0")
    yield Option("desc-limit", "LIMIT", "the limit for --set-desc-*, 0")
    yield Option("desc-access", "ACCESS", "the access word for --set-desc-*, 0")
    for register in (*SET_SEGMENTS, *TABLES):
        yield Option(f"set-desc-{register}", None, f"set the descriptor in {register}")
        yield Option(f"get-desc-{register}", None, f"show the descriptor in {register}")
    for register in SELECTORS:
        yield Option(f"set-{register}", register.upper(), f"set selector {register}")
        yield Option(f"get-{register}", None, f"show selector {register}")
    yield Option("set-x2apic-state", "state", "1: the guest's APIC is an x2APIC")
    yield Option("get-x2apic-state", None, "show it")
    yield Option("capname", "capname", "the capability for --getcap and --setcap")
    yield Option("getcap", None, "show the capability, or all")
    yield Option("setcap", "0|1", "set the capability")
    yield Option("inject-nmi", None, "send the vCPU a non-maskable interrupt")
    yield Option("assert-lapic-lvt", "pin", "raise a local APIC interrupt, 0 to 6")
    yield Option("get-intinfo", None, "show pending and current event of the vCPU")
    yield Option("get-rtc-time", None, "show the time of the real-time clock")
    yield Option("set-rtc-time", "secs", "set it, in seconds since 1970")
    yield Option("rtc-nvram-offset", "offset", "the byte for --*-rtc-nvram, 0 to 127")
    yield Option("get-rtc-nvram", None, "show a byte of the clock's memory")
    yield Option("set-rtc-nvram", "val", "set it")
    yield Option("get-active-cpus", None, "show the vCPUs that are started")
    yield Option("get-suspended-cpus", None, "show the vCPUs that have ended")
    yield Option("get-debug-cpus", None, "show the vCPUs that are held")
    yield Option("get-cpu-topology", None, "show sockets, cores and threads")
    yield Option("run", None, "run the vCPU of a stopped VM until its next exit")
    yield Option("force-reset", None, "end the VM's run as if the guest had reset")
    yield Option("force-poweroff", None, "end it as if the guest had switched off")
    yield Option("unassign-pptdev", "bus/slot/func", "take a host device back", NOT_YET)
    for field in RAW_FIELDS:
        yield Option(f"get-{field}", None, "show a field of VMCS or VMCB", NO_FIELDS)


OPTIONS: Final = {option.name: option for option in _options()}


class Arguments:
    """A command line that has been read: which options it has, and their values."""

    def __init__(self, argv: Sequence[str]) -> None:
        """Raises UsageError; values are looked at by whoever wants them."""
        names = [o.name + "=" * (o.value is not None) for o in OPTIONS.values()]
        try:
            found, rest = getopt.getopt(list(argv), "", names)
        except getopt.GetoptError as error:
            raise UsageError(error.msg) from None
        if rest:
            raise UsageError(f"'{rest[0]}' is not an option")
        self._values = {name.removeprefix("--"): value for name, value in found}
        self.vm = self._values.get("vm", "")
        if not self.vm:
            raise UsageError("--vm=<vmname> is needed")
        self.cpu = self.number("cpu") or 0
        if "setcap" in self and "capname" not in self:
            raise UsageError("--setcap needs --capname=<capname>")
        # A bad number is told before anything is done.
        for name, option in OPTIONS.items():
            if option.value is not None and name not in NOT_NUMBERS:
                self.number(name)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def shown(self, name: str) -> bool:
        """Whether an option, or ``--get-all``, asks for its output."""
        return name in self or "get-all" in self

    def text(self, name: str) -> str | None:
        """The value of an option that is there."""
        return self._values.get(name)

    def number(self, name: str) -> int | None:
        """The value of an option that is there, as a number of base 0; UsageError."""
        text = self._values.get(name)
        if text is None:
            return None
        try:
            value = parse_int(text)
        except ValueError:
            value = -1
        if not 0 <= value < 1 << 64:
            raise UsageError(f"--{name}={text}: expected a number of at most 64 bits")
        return value


NOT_NUMBERS: Final = ("vm", "capname", "checkpoint", "suspend", "unassign-pptdev")


def usage() -> str:
    """One line for each option, as bhyvectl prints them."""
    lines = [
        f"[--{o.name}]" if o.value is None else f"[--{o.name}=<{o.value}>]"
        for o in OPTIONS.values()
        if o.name != "vm"
    ]
    return "\n       ".join(["Usage: bhyvectl --vm=<vmname>", *lines]) + "\n"
