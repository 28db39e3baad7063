"""What a vCPU's thread does: run the guest, act on what it did, run it again.

bhyve: vmexit.c and vm_loop().
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pybhyve.amd64.spinup_ap import handle_ipi
from pybhyve.amd64.xmsr import Msrs
from pybhyve.errors import BhyveError, GuestAbortError
from pybhyve.vmmapi import REGISTERS, Exit, SuspendHow, Vcpu

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine


def vcpu_loop(machine: Machine, vcpu: Vcpu) -> SuspendHow:
    """Run one vCPU until the VM ends; why it ended.

    Raises BhyveError for an exit that nothing handles, GuestAbortError where the user
    wants the VM to end at what the guest did.
    """
    me = vcpu.id
    inout, mem = machine.inout, machine.mem
    msrs = Msrs(vcpu, machine.options)
    try:
        while True:
            match vcpu.run():
                case (Exit.INOUT, port, size, value):
                    if value is None:
                        vcpu.complete(inout.read(port, size))
                    else:
                        inout.write(port, size, value)
                case (Exit.INST_EMUL, gpa, size, value):
                    if value is None:
                        vcpu.complete(mem.read(me, gpa, size))
                    else:
                        mem.write(me, gpa, size, value)
                case (Exit.BOGUS | Exit.DEBUG,):
                    machine.vcpus.rest(vcpu)
                case (Exit.HLT | Exit.MTRAP | Exit.IOAPIC_EOI, *_):
                    pass
                case (Exit.PAUSE,):
                    os.sched_yield()
                case (Exit.RDMSR, msr):
                    msrs.rdmsr(msr)
                case (Exit.WRMSR, msr, value):
                    msrs.wrmsr(msr, value)
                case (Exit.IPI, mode, vector, targets):
                    handle_ipi(machine, mode, vector, targets)
                case (Exit.SUSPENDED, how):
                    return SuspendHow(how)
                case other:
                    raise BhyveError(f"vm_loop: unexpected exitcode {other[0]:#x}")
    except GuestAbortError as error:
        rip = vcpu.get_register(REGISTERS["rip"])
        raise GuestAbortError(f"{error} at {rip:#x}") from None
