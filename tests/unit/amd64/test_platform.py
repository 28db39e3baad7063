"""The board: what is where after set-up, and what late_init() leaves in memory."""

from __future__ import annotations

import time

import pytest

from pybhyve.amd64 import platform
from pybhyve.errors import BhyveError


@pytest.mark.parametrize(
    ("port", "owner"),
    [
        (0x60, "atkbdc"),
        (0x64, "atkbdc"),
        (0x80, "post"),
        (0x84, "post"),
        (0xB2, "smi"),
        (0x2E8, "com4"),
        (0x3FF, "com1"),
        (0x400, "pm1"),
        (0x405, "pm1"),
        (0x40D, "gpe0"),
        (0xCF8, "pcicfg-addr"),
        (0xCF9, "reset"),
        (0xCFF, "pcicfg-data"),
        (0x408, None),  # vmm's
        (0xF4, None),  # only with pc-testdev
    ],
)
def test_ports(build, port, owner):
    assert build("31,lpc").inout.owner(port) == owner


def test_post_codes(build):
    machine = build()
    machine.inout.write(0x80, 1, 0x42)

    assert machine.inout.read(0x84, 1) == 0xFF


def test_pci_hole_reads_ones(build):
    machine = build()

    assert machine.mem.read(0, 0xD0000000, 4) == 0xFFFFFFFF
    assert machine.mem.unknown == 0


def test_memory_sizes_in_cmos(build):
    vm = build(memory=256 << 20).ctx.vm

    assert vm.rtc_read(0x34) | vm.rtc_read(0x35) << 8 == (240 << 20) >> 16
    assert vm.rtc_read(0x5B) == 0


@pytest.mark.parametrize("local", ["0", "1"])
def test_clock(build, local):
    vm = build(rtc__use_localtime=local).ctx.vm
    offset = time.localtime().tm_gmtoff if local == "1" else 0

    assert abs(vm.rtc_gettime() - time.time() - offset) < 5


def test_in_kernel_devices_are_reached_through_the_shims(build):
    machine = build()

    assert machine.mem.read(0, 0xFEE00030, 4) == 0x00060010
    assert machine.mem.read(0, 0xFED00004, 4) == 59604644
    machine.mem.write(0, 0xFEC00000, 4, 1)
    assert machine.mem.read(0, 0xFEC00010, 4) == 0x001F0011


def test_tables_in_memory(build):
    machine = build("31,lpc")
    platform.late_init(machine)

    assert machine.ctx.read(0xF0000, 4) == b"_MP_"
    assert machine.ctx.read(0xF2400, 8) == b"RSD PTR "


def test_tables_can_be_left_out(build):
    machine = build("31,lpc", x86__mptable="0", acpi_tables="0")
    platform.late_init(machine)

    assert machine.ctx.read(0xF0000, 4) == bytes(4)
    assert machine.ctx.read(0xF2400, 8) == bytes(8)


def test_several_buses_need_no_mptable(build):
    machine = build("3,dummy", "1:3:0,dummy")
    with pytest.raises(BhyveError, match="-Y"):
        platform.late_init(machine)

    platform.late_init(build("3,dummy", "1:3:0,dummy", x86__mptable="0"))


def test_every_device_round_trips(build):
    first = build("0,hostbridge", "3,uart", "31,lpc", cpus=2)
    second = build("0,hostbridge", "3,uart", "31,lpc", cpus=2)
    for name, device in first.devices.items():
        state = device.save()
        assert not state or state["version"] == 1
        second.devices[name].restore(state)
        assert second.devices[name].save() == state
