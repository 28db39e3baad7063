"""A kernel, its initrd and its command line, loaded into a VM without firmware."""

from __future__ import annotations

from pathlib import Path

from pybhyve.bhyveload.formats import make_plan
from pybhyve.bhyveload.plan import CpuState, LoadPlan
from pybhyve.vmmapi import REGISTERS, VmCtx


def load(
    ctx: VmCtx,
    kernel: Path,
    initrd: Path | None = None,
    cmdline: str | None = None,
    env: list[str] | None = None,
) -> None:
    """Load a kernel into a VM whose memory is set up and zero; vCPU 0 is at its entry.

    The format is found out: Linux bzImage, ELF with a PVH entry, multiboot 2 or 1.
    Without a command line the kernel gets one that makes Linux talk on com1; the
    ``name=value`` words of ``env`` follow it.  Other vCPUs stay in reset.  Raises
    ImageError, and then has changed nothing.
    """
    plan, state = make_plan(
        kernel, initrd, cmdline, env or [], ctx.lowmem_size, ctx.highmem_size
    )
    apply(ctx, plan, state)


def apply(ctx: VmCtx, plan: LoadPlan, state: CpuState) -> None:
    """Write a plan into a VM's memory and its first vCPU."""
    for piece in plan.pieces:
        ctx.write(piece.gpa, piece.data)
    vcpu = ctx.vcpu(0)
    vcpu.reset()
    for name, value in state.registers.items():
        vcpu.set_register(REGISTERS[name], value)
    for name, (base, limit, access) in state.descriptors.items():
        vcpu.set_desc(REGISTERS[name], base, limit, access)
