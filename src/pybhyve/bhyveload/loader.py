"""A plan carried out: guest memory written, vCPU 0 put at the kernel's entry."""

from __future__ import annotations

from pybhyve.bhyveload.plan import CpuState, LoadPlan
from pybhyve.vmmapi import REGISTERS, VmCtx


def apply(ctx: VmCtx, plan: LoadPlan, state: CpuState) -> None:
    """Load what `make_plan` planned into a VM whose memory is set up and zero.

    Other vCPUs stay in reset, waiting to be started.
    """
    for piece in plan.pieces:
        ctx.write(piece.gpa, piece.data)
    vcpu = ctx.vcpu(0)
    vcpu.reset()
    for name, value in state.registers.items():
        vcpu.set_register(REGISTERS[name], value)
    for name, (base, limit, access) in state.descriptors.items():
        vcpu.set_desc(REGISTERS[name], base, limit, access)
