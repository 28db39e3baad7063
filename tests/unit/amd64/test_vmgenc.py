"""The VM generation counter: where its page is, and that only a new run changes it."""

from __future__ import annotations

import pytest

from pybhyve.amd64 import bootrom
from pybhyve.amd64.vmgenc import Vmgenc
from pybhyve.errors import DeviceError
from pybhyve.vmmapi import VM_BOOTROM

GPA = 0xFF000000


def identifier(machine, gpa=GPA) -> bytes:
    return machine.ctx.read(gpa, 16)


def test_each_run_has_its_own(build):
    one, other = build(), build()

    assert identifier(one) != identifier(other)
    assert identifier(one) != bytes(16)
    assert one.ctx.read(GPA + 16, 4080) == bytes(4080)


def test_the_guest_cannot_write_it(build):
    machine = build()
    ((_, _, _, length, prot),) = [m for m in machine.vm.memmap() if m[0] == GPA]

    assert (length, prot) == (4096, 1)


def test_pc_testdev_keeps_its_memory(build):
    machine = build("31,lpc", **{"lpc__pc-testdev": "true"})

    machine.mem.write(0, GPA, 4, 0x12345678)
    assert machine.mem.read(0, GPA, 4) == 0x12345678
    assert identifier(machine, GPA + 0x10000) != bytes(16)


def test_not_without_acpi(build):
    machine = build(acpi_tables="false")

    assert "vmgenc" not in machine.devices
    assert GPA not in [mapping[0] for mapping in machine.vm.memmap()]


def test_a_state_has_it(build):
    one, other = build(), build()
    saved = one.devices["vmgenc"].save()
    other.devices["vmgenc"].restore(saved)

    assert identifier(other) == identifier(one)

    other.ctx.write(GPA, bytes(16))
    other.devices["vmgenc"].reset()

    assert identifier(other) == identifier(one)
    for wrong in ({"version": 2, "id": bytes(16)}, {"version": 1, "id": b""}):
        with pytest.raises(ValueError, match="version"):
            other.devices["vmgenc"].restore(wrong)


def test_firmware_that_leaves_no_page(build):
    machine = build(acpi_tables="false")
    size = bootrom.BOOTROM_SIZE
    machine.vm.mmap_memseg(bootrom.BOOTROM_BASE, VM_BOOTROM, 0, size, 5)

    with pytest.raises(DeviceError, match="leave no page"):
        Vmgenc(machine)
