"""Model-specific registers that vmm leaves to userland.

Guests read these without asking CPUID first; a #GP there stops them.  Numbers and names
from Intel's SDM volume 4 and AMD's BKDGs.  bhyve: xmsr.c.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Final

from pybhyve.errors import BhyveError
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import Vcpu

log = logging.getLogger(__name__)

GP_VECTOR: Final = 13

# Intel
MSR_PLATFORM_ID: Final = 0x17
MSR_FEATURE_CONTROL: Final = 0x3A
MSR_BIOS_UPDT_TRIG: Final = 0x79
MSR_BIOS_SIGN: Final = 0x8B
MSR_MISC_FEATURE_ENABLES: Final = 0x140
MSR_RAPL_POWER_UNIT: Final = 0x606
MSR_PKG_ENERGY_STATUS: Final = 0x611
MSR_DRAM_ENERGY_STATUS: Final = 0x619
MSR_PP0_ENERGY_STATUS: Final = 0x639
MSR_PP1_ENERGY_STATUS: Final = 0x641
# Uncore counters of Xeons; Linux' perf writes them at start-up.
MSR_UNCORE_C24: Final = 0xC24
MSR_UNCORE_D04: Final = 0xD04

FEATURE_CONTROL_LOCK: Final = 1 << 0  # and VMX stays off
RAPL_UNITS: Final = 0x000A1003  # 2^-10 s, 2^-16 J, 2^-3 W

# AMD
MSR_PERFEVSEL0: Final = 0xC0010000
MSR_K7_PERFCTR0: Final = 0xC0010004
MSR_HWCR: Final = 0xC0010015
MSR_NB_CFG1: Final = 0xC001001F
MSR_P_STATE_LIMIT: Final = 0xC0010061
MSR_P_STATE_CONTROL: Final = 0xC0010062
MSR_P_STATE_STATUS: Final = 0xC0010063
MSR_P_STATE_CONFIG0: Final = 0xC0010064
MSR_SMM_ADDR: Final = 0xC0010112
MSR_SMM_MASK: Final = 0xC0010113
MSR_VM_CR: Final = 0xC0010114
MSR_LS_CFG: Final = 0xC0011020
MSR_IC_CFG: Final = 0xC0011021
MSR_DE_CFG: Final = 0xC0011029

HWCR_RESET: Final = 0x01000010  # TscFreqSel, reserved bit 4 that reads 1
HWCR_MONMWAIT_USER_EN_OFF: Final = 1 << 9  # MonMwaitDis
VM_CR_SVMDIS: Final = 1 << 4
DE_CFG_LFENCE_SERIALIZE: Final = 1 << 0

_PERF: Final = [*range(MSR_PERFEVSEL0, MSR_K7_PERFCTR0 + 4)]

INTEL_READS: Final = {
    MSR_BIOS_SIGN: 0,
    MSR_PLATFORM_ID: 0,
    MSR_PKG_ENERGY_STATUS: 0,
    MSR_PP0_ENERGY_STATUS: 0,
    MSR_PP1_ENERGY_STATUS: 0,
    MSR_DRAM_ENERGY_STATUS: 0,
    MSR_MISC_FEATURE_ENABLES: 0,
    MSR_RAPL_POWER_UNIT: RAPL_UNITS,
    MSR_FEATURE_CONTROL: FEATURE_CONTROL_LOCK,
}
INTEL_WRITES: Final = frozenset(
    {MSR_UNCORE_D04, MSR_UNCORE_C24, MSR_BIOS_UPDT_TRIG, MSR_BIOS_SIGN}
)
AMD_READS: Final = {
    MSR_HWCR: HWCR_RESET | HWCR_MONMWAIT_USER_EN_OFF,
    MSR_VM_CR: VM_CR_SVMDIS,
    MSR_DE_CFG: DE_CFG_LFENCE_SERIALIZE,
    MSR_BIOS_SIGN: 0,
    **dict.fromkeys(
        [
            MSR_NB_CFG1,
            MSR_LS_CFG,
            MSR_IC_CFG,
            MSR_SMM_ADDR,
            MSR_SMM_MASK,
            MSR_P_STATE_LIMIT,
            MSR_P_STATE_CONTROL,
            MSR_P_STATE_STATUS,
            MSR_P_STATE_CONFIG0,
            *_PERF,
        ],
        0,
    ),
}
AMD_WRITES: Final = frozenset(
    {MSR_HWCR, MSR_NB_CFG1, MSR_LS_CFG, MSR_IC_CFG, MSR_P_STATE_CONTROL, *_PERF}
)

VENDORS: Final = {
    "GenuineIntel": (INTEL_READS, INTEL_WRITES),
    "AuthenticAMD": (AMD_READS, AMD_WRITES),
    "HygonGenuine": (AMD_READS, AMD_WRITES),
}


@cache
def host_vendor() -> str:
    """CPUID's vendor of the host, which is the guest's too.

    Raises BhyveError for one whose registers are not known.
    """
    vendor = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("vendor_id"):
            vendor = line.partition(":")[2].strip()
            break
    if vendor not in VENDORS:
        raise BhyveError(f'Unknown cpu vendor "{vendor}"')
    return vendor


class Msrs:
    """The registers of one vCPU."""

    def __init__(self, vcpu: Vcpu, options: GlobalOptions) -> None:
        self._vcpu = vcpu
        self._reads, self._writes = VENDORS[host_vendor()]
        self._strict = options.x86_strictmsr
        self._unknown_level = (
            logging.WARNING if options.x86_verbosemsr else logging.DEBUG
        )

    def rdmsr(self, msr: int) -> None:
        """Answer a RDMSR: a value, or #GP (0 if not ``x86.strictmsr``)."""
        value = self._reads.get(msr)
        if value is not None:
            self._vcpu.complete(value)
            return
        log.log(
            self._unknown_level,
            "rdmsr to register %#x on vcpu %d",
            msr,
            self._vcpu.id,
        )
        if self._strict:
            self._vcpu.inject_exception(GP_VECTOR, 0)
        else:
            self._vcpu.complete(0)

    def wrmsr(self, msr: int, value: int) -> None:
        """Take a WRMSR, or #GP (ignore it if not ``x86.strictmsr``)."""
        if msr in self._writes:
            self._vcpu.complete(0)
            return
        log.log(
            self._unknown_level,
            "wrmsr to register %#x(%#x) on vcpu %d",
            msr,
            value,
            self._vcpu.id,
        )
        if self._strict:
            self._vcpu.inject_exception(GP_VECTOR, 0)
        else:
            self._vcpu.complete(0)
