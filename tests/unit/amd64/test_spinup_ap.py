"""INIT and start-up IPIs: which vCPU runs, from where, and with what left."""

from __future__ import annotations

import pytest

from pybhyve.amd64.spinup_ap import (
    APIC_DELMODE_INIT,
    APIC_DELMODE_STARTUP,
    handle_ipi,
)
from pybhyve.vmmapi import REGISTERS

AP = 1
VECTOR = 0x9A


@pytest.fixture
def machine(build):
    machine = build(cpus=2)
    for cpu in (0, AP):
        machine.vm.activate_cpu(cpu)
    return machine


def start(machine) -> None:
    handle_ipi(machine, APIC_DELMODE_INIT, 0, [AP])
    handle_ipi(machine, APIC_DELMODE_STARTUP, VECTOR, [AP])


def test_it_runs_from_the_page_of_the_vector(machine):
    handle_ipi(machine, APIC_DELMODE_INIT, 0, [AP])
    assert AP in machine.vm.debug_cpus()

    handle_ipi(machine, APIC_DELMODE_STARTUP, VECTOR, [AP])

    vcpu = machine.vm.vcpu(AP)
    assert AP not in machine.vm.debug_cpus()
    assert vcpu.get_register(REGISTERS["rip"]) == 0
    assert vcpu.get_register(REGISTERS["cs"]) == VECTOR << 8
    assert vcpu.get_desc(REGISTERS["cs"])[0] == VECTOR << 12


def test_another_start_up_ipi_changes_nothing(machine):
    start(machine)
    vcpu = machine.vm.vcpu(AP)
    vcpu.set_register(REGISTERS["rip"], 0x123)

    handle_ipi(machine, APIC_DELMODE_STARTUP, 0x10, [AP])

    assert vcpu.get_register(REGISTERS["rip"]) == 0x123
    assert vcpu.get_register(REGISTERS["cs"]) == VECTOR << 8


def test_msrs_stay(machine):
    vcpu = machine.vm.vcpu(AP)
    state = vcpu.save()
    mtrrs = {"mtrr_def_type": 0xC06, "mtrr_fixed": (0x0606060606060606,) * 11}
    state["cpu"]["msr"] |= mtrrs
    vcpu.restore(state)

    start(machine)

    assert mtrrs.items() <= vcpu.save()["cpu"]["msr"].items()
