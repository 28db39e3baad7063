"""What the userland sees of a VM: libvmmapi's nouns, thin over the native module.

Nothing else imports `pybhyve._vmm`.
"""

from __future__ import annotations

from pybhyve._vmm import CAPABILITIES, REGISTERS, MemView, Vcpu, Vm, VmmError
from pybhyve.vmmapi.ctx import (
    VM_BOOTROM,
    VM_FRAMEBUFFER,
    VM_MAXCPU,
    VM_PCIROM,
    VmCtx,
    VmPhase,
)
from pybhyve.vmmapi.exits import Exit, SuspendHow
from pybhyve.vmmapi.iov import Iov, map_iov, release_iov
from pybhyve.vmmapi.memory import (
    GB,
    HIGHMEM_BASE,
    KB,
    LOWMEM_LIMIT,
    MB,
    PAGE_SIZE,
    parse_memsize,
    size_text,
)

__all__ = [
    "CAPABILITIES",
    "GB",
    "HIGHMEM_BASE",
    "KB",
    "LOWMEM_LIMIT",
    "MB",
    "PAGE_SIZE",
    "REGISTERS",
    "VM_BOOTROM",
    "VM_FRAMEBUFFER",
    "VM_MAXCPU",
    "VM_PCIROM",
    "Exit",
    "Iov",
    "MemView",
    "SuspendHow",
    "Vcpu",
    "Vm",
    "VmCtx",
    "VmPhase",
    "VmmError",
    "map_iov",
    "parse_memsize",
    "release_iov",
    "size_text",
]
