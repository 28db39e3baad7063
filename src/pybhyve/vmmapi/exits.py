"""Why `Vcpu.run` came back, and why a VM's life ended.  vmm.h's numbers."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from pybhyve import _vmm


class Exit:
    """Element 0 of the tuple that `Vcpu.run` returns; what follows is on the right."""

    INOUT: Final = _vmm.EXIT_INOUT  # port, size, value or None for IN
    BOGUS: Final = _vmm.EXIT_BOGUS
    RDMSR: Final = _vmm.EXIT_RDMSR  # msr
    WRMSR: Final = _vmm.EXIT_WRMSR  # msr, value
    HLT: Final = _vmm.EXIT_HLT
    MTRAP: Final = _vmm.EXIT_MTRAP
    PAUSE: Final = _vmm.EXIT_PAUSE
    INST_EMUL: Final = _vmm.EXIT_INST_EMUL  # gpa, size, value or None for a read
    IOAPIC_EOI: Final = _vmm.EXIT_IOAPIC_EOI  # vector
    SUSPENDED: Final = _vmm.EXIT_SUSPENDED  # SuspendHow
    DEBUG: Final = _vmm.EXIT_DEBUG
    BPT: Final = _vmm.EXIT_BPT  # instruction length
    DB: Final = _vmm.EXIT_DB  # dr6
    IPI: Final = _vmm.EXIT_IPI  # mode, vector, destination vCPUs


class SuspendHow(IntEnum):
    """Reasons of ``Vm.suspend``."""

    NONE = _vmm.SUSPEND_NONE
    RESET = _vmm.SUSPEND_RESET
    POWEROFF = _vmm.SUSPEND_POWEROFF
    HALT = _vmm.SUSPEND_HALT
    TRIPLEFAULT = _vmm.SUSPEND_TRIPLEFAULT
    DESTROY = _vmm.SUSPEND_DESTROY
