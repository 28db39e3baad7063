"""Bring-up: from the variables to a running VM, and to its exit status.

The steps and their order are bhyve's, main() of bhyverun.c.
"""

from __future__ import annotations

import difflib
import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pybhyve.amd64 import platform
from pybhyve.amd64.bootrom import Firmware
from pybhyve.amd64.xmsr import host_vendor
from pybhyve.bhyveload import loader
from pybhyve.bhyveload.formats import make_plan
from pybhyve.bhyveload.image import MAX_KERNEL_SIZE, read_file
from pybhyve.bhyveload.linux import DEFAULT_CMDLINE
from pybhyve.bhyveload.plan import CpuState, LoadPlan
from pybhyve.bhyverun import exitstatus, slots
from pybhyve.bhyverun.cpuset import build_vcpumaps
from pybhyve.bhyverun.machine import Machine
from pybhyve.bhyverun.topology import Topology, calc_domains, calc_topology
from pybhyve.bhyverun.vcpus import BSP
from pybhyve.config import Config
from pybhyve.control import server as control
from pybhyve.errors import (
    BhyveError,
    ConfigError,
    HostError,
    ImageError,
    NotAvailableError,
    OptionError,
    VmNotFoundError,
)
from pybhyve.pci import init_pci
from pybhyve.program import set_log_level
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import (
    LOWMEM_LIMIT,
    VM_MAXCPU,
    SuspendHow,
    Vcpu,
    VmCtx,
    VmmError,
    VmPhase,
    parse_memsize,
)

log = logging.getLogger(__name__)

# How long a thread may keep the interpreter from one that waits for it.  With Python's
# 5 ms a vCPU stood still for 5.2 ms in one exit of a hundred beside a thread that
# computes, with this for 0.6 ms; what both get done is the same.
SWITCH_SECONDS: Final = 100e-6

# Of core(5)'s filter: shared memory of files, which guest memory is.
COREDUMP_FILE_SHARED: Final = 1 << 3


def run_vm(config: Config) -> int:
    """Run the VM that the variables describe until it ends; bhyve's exit status.

    Raises BhyveError for what cannot be set up and for what ends the VM in error.
    """
    replace_deprecated(config)
    options = GlobalOptions.parse(config)
    set_log_level(options.log_level)
    if options.config_check:
        report_unknown(config)
    check_available(options)

    topology = calc_topology(options)
    affinity = build_vcpumaps(options, topology.cpus)
    try:
        memsize = parse_memsize(options.memory_size)
    except ValueError as error:
        raise OptionError(f"invalid memsize '{options.memory_size}'") from error
    domains = calc_domains(options, topology.cpus, memsize)
    host_vendor()
    # Before the VM is touched: what cannot be loaded leaves it as it was.
    total = sum(domain.size for domain in domains) or memsize
    image = plan_kernel(options, total)
    firmware = Firmware.open(options)
    try:
        ctx, created = do_open(options, topology)
    except BaseException:
        if firmware is not None:
            firmware.close()
        raise
    try:
        init_vcpus(ctx, options, topology)
        ctx.setup_memory(memsize, [domain.size for domain in domains])
        set_memory_flags(ctx, options)
        if image is not None:
            loader.apply(ctx, *image)
            image = None  # it may be large
        vcpus = [domain.vcpus for domain in domains]
        machine = Machine(ctx, config, options, topology.cpus, vcpus, firmware)
        try:
            set_up(machine)
            created = False  # from here on it stays, whatever happens
            result = run(machine, affinity)
        finally:
            machine.halt()
        return finish(ctx, options, result)
    finally:
        if created:
            ctx.destroy()
        ctx.close()
        if firmware is not None:
            firmware.close()


def run(machine: Machine, affinity: dict[int, frozenset[int]]) -> SuspendHow | int:
    """Run until the end, and leave memory and registers for bhyvectl to look at."""
    how = SuspendHow.NONE
    machine.ctx.save_running()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()  # what is there now stays: a collection, with vCPUs waiting, is short
    try:
        machine.start(affinity)
        result = machine.run()
        if isinstance(result, SuspendHow):
            how = result
    finally:
        machine.halt()
        machine.ctx.save_ended(how)
    return result


def set_up(machine: Machine) -> None:
    """Put devices and tables into the machine, and listen to bhyvectl."""
    platform.init_platform(machine)
    hand_over_kernel(machine)
    init_pci(machine)
    platform.late_init(machine)
    set_title(machine.ctx.name)
    control.start(machine)


def do_open(options: GlobalOptions, topology: Topology) -> tuple[VmCtx, bool]:
    """The VM, and whether it is new.

    With a boot ROM, or a kernel, the VM starts afresh, made if there is none; without
    one it must be there and loaded.
    """
    name = options.name or ""
    if topology.cpus > VM_MAXCPU:
        raise BhyveError(
            f"{topology.cpus} vCPUs requested but only {VM_MAXCPU} available"
        )
    afresh = options.bootrom is not None or options.kernel is not None
    created = False
    try:
        ctx = VmCtx.open(name, topology.cpus, reinit=afresh)
    except VmNotFoundError:
        if not afresh:
            raise BhyveError(
                f"no bootrom was configured: give -l bootrom,FILE or -o kernel=FILE, "
                f"or load VM '{name}' with bhyveload first"
            ) from None
        ctx = VmCtx.create(name, topology.cpus)
        created = True
    else:
        if not afresh and ctx.phase is not VmPhase.LOADED:
            ctx.close()
            raise BhyveError(f"{UNLOADED[ctx.phase].format(name)}: use bhyveload")
    try:
        ctx.vm.set_topology(topology.sockets, topology.cores, topology.threads)
    except VmmError as error:
        ctx.close()
        raise HostError("vm_set_topology") from error
    return ctx, created


UNLOADED: Final = {
    VmPhase.CREATED: "VM '{}' has nothing to run",
    VmPhase.RUNNING: "VM '{}' was killed while it ran, and cannot go on",
    VmPhase.ENDED: "VM '{}' has run already",
}


def init_vcpus(ctx: VmCtx, options: GlobalOptions, topology: Topology) -> None:
    """The capabilities that the variables ask for, on each vCPU."""
    if not options.soft_translate:
        ctx.vm.set_translate_after(None)
    for index in range(topology.cpus):
        vcpu = ctx.vcpu(index)
        if options.x86_vmexit_on_hlt:
            # deviation: only asked for.  vmm puts a vCPU that halts to sleep in any
            # case, and with the exit it would have to spin.
            _capability(vcpu, "hlt_exit", "VM exit on HLT not supported")
        if options.x86_vmexit_on_pause:
            _capability(vcpu, "pause_exit", "SMP mux requested, no pause support")
            vcpu.set_capability("pause_exit", 1)
        vcpu.set_x2apic_state(int(options.x86_x2apic))
        vcpu.set_capability("enable_invpcid", 1)
        vcpu.set_capability("ipi_exit", 1)
        if index != BSP or options.bootrom is not None:
            vcpu.set_capability("unrestricted_guest", 1)
    if options.bootrom is not None:
        ctx.vcpu(BSP).reset()


def _capability(vcpu: Vcpu, name: str, missing: str) -> None:
    try:
        vcpu.get_capability(name)
    except VmmError as error:
        raise BhyveError(missing) from error


def set_memory_flags(ctx: VmCtx, options: GlobalOptions) -> None:
    """``memory.wired`` and ``memory.guest_in_core``."""
    if options.memory_wired:
        ctx.wire_memory()
    if options.memory_guest_in_core:
        core = Path("/proc/self/coredump_filter")
        try:
            bits = int(core.read_text(), 16) | COREDUMP_FILE_SHARED
            core.write_text(f"{bits:#x}")
        except OSError as error:
            raise HostError("memory.guest_in_core: cannot be had") from error


def plan_kernel(
    options: GlobalOptions, memsize: int
) -> tuple[LoadPlan, CpuState] | None:
    """``kernel``, ``initrd`` and ``cmdline`` as bhyveload has them.

    None: there is no kernel, or firmware starts it.
    """
    if options.kernel is None or options.bootrom is not None:
        return None
    lowmem = min(memsize, LOWMEM_LIMIT)
    initrd = None if options.initrd is None else Path(options.initrd)
    return make_plan(
        Path(options.kernel), initrd, options.cmdline, [], lowmem, memsize - lowmem
    )


def hand_over_kernel(machine: Machine) -> None:
    """Give ``kernel``, ``initrd`` and ``cmdline``, if set, to firmware to start."""
    options = machine.options
    if options.kernel is None or options.bootrom is None:
        return
    files = {"kernel": b"", "initrd": b""}
    for what, path in (("kernel", options.kernel), ("initrd", options.initrd)):
        if path is None:
            continue
        try:
            files[what] = read_file(Path(path), MAX_KERNEL_SIZE)
        except ImageError as error:
            raise ImageError(f"{what} {path}") from error
    cmdline = DEFAULT_CMDLINE if options.cmdline is None else options.cmdline
    machine.fwcfg.add_kernel(**files, cmdline=os.fsencode(cmdline))


def set_title(name: str) -> None:
    """The name that ps(1) and top(1) show for the process."""
    Path("/proc/self/comm").write_bytes(b"bhyve: " + os.fsencode(name))


def finish(ctx: VmCtx, options: GlobalOptions, result: SuspendHow | int) -> int:
    """Leave the VM as bhyve does; the exit status."""
    if not isinstance(result, SuspendHow):
        return result
    if result is SuspendHow.POWEROFF and options.destroy_on_poweroff:
        ctx.destroy()
    return exitstatus.of_suspend(result)


def check_available(options: GlobalOptions) -> None:
    """Refuse at once what bhyve has and this version has not, and contradictions."""
    if (
        options.bootrom is not None
        and options.kernel is not None
        and options.lpc_fwcfg != "qemu"
    ):
        raise ConfigError(
            "bootrom and kernel exclude each other: both start the VM "
            "(with lpc.fwcfg=qemu the firmware starts the kernel)"
        )
    missing = {
        "engine kvm": options.engine == "kvm",
        "the debug server (gdb.port)": options.gdb_port != 0,
        "a TPM": options.tpm_type is not None,
        "a checkpoint (restore)": options.restore is not None,
    }
    for what, wanted in missing.items():
        if wanted:
            raise NotAvailableError(what)


def replace_deprecated(config: Config) -> None:
    """Give variables with an old name their new one."""
    for declared in GlobalOptions.keys.values():
        value = config.raw(declared.name)
        if declared.deprecated is None or value is None:
            continue
        log.warning(
            "%s is deprecated, use '-o %s' instead", declared.name, declared.deprecated
        )
        config.set_default(declared.deprecated, value)


def report_unknown(config: Config) -> None:
    """``config.check``: a warning for each variable that nothing reads."""
    known = [row.name for row in GlobalOptions.describe()]
    for path in unknown_variables(config):
        close = difflib.get_close_matches(path, known, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        log.warning("unknown variable %s%s", path, hint)


def unknown_variables(config: Config) -> Iterator[str]:
    """The full paths of the variables that neither bhyve nor a device declares."""
    for path in GlobalOptions.unknown(config):
        if not (path.startswith("pci.") and slots.declares(config, path)):
            yield path
