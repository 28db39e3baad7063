"""INIT and start-up IPIs: how the first CPU starts the others.

SDM volume 3, 9.4 (multiple-processor initialization).  bhyve: spinup_ap.c and
vmexit_ipi().
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pybhyve.vmmapi import REGISTERS, Vm

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

log = logging.getLogger(__name__)

APIC_DELMODE_INIT: Final = 5
APIC_DELMODE_STARTUP: Final = 6

CS_ACCESS: Final = 0x93  # real mode: present, data, writable, accessed


def handle_ipi(
    machine: Machine, mode: int, vector: int, targets: Sequence[int]
) -> None:
    """INIT stops the targets, a start-up IPI starts those that are stopped.

    A start-up IPI to a CPU that runs is ignored, as a processor does: guests send two.
    """
    suspended = machine.vm.debug_cpus()
    for target in targets:
        if mode == APIC_DELMODE_INIT:
            machine.vm.suspend_cpu(target)
        elif mode == APIC_DELMODE_STARTUP and target in suspended:
            _start(machine.vm, target, vector)


def _start(vm: Vm, target: int, vector: int) -> None:
    """Begin at the start of the page that the vector names, in real mode."""
    log.debug("sipi vcpu=%d vector=%#x", target, vector)
    vcpu = vm.vcpu(target)
    vcpu.init()
    vcpu.set_register(REGISTERS["cs"], vector << 8)
    vcpu.set_desc(REGISTERS["cs"], vector << 12, 0xFFFF, CS_ACCESS)
    vcpu.set_register(REGISTERS["rip"], 0)
    vm.resume_cpu(target)
