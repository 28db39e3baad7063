"""Power management: status, SCI, sleep, reset, the power button."""

from __future__ import annotations

import os
import signal

import pytest

from pybhyve.amd64.pm import PowerManagement
from pybhyve.vmmapi import SuspendHow

ASSERT = ("isa_assert_irq", 9, 9)
DEASSERT = ("isa_deassert_irq", 9, 9)


class Rig:
    def __init__(self, build) -> None:
        self.machine = build()
        pm = self.machine.devices["pm"]
        assert isinstance(pm, PowerManagement)
        self.pm = pm
        self.ended: list[str] = []
        self.machine.request_reset = lambda: self.ended.append("reset")
        self.machine.request_poweroff = lambda: self.ended.append("off")
        self.read = self.machine.inout.read
        self.write = self.machine.inout.write
        self.wires = self.machine.vm.take
        self.wires()

    def enable_acpi(self) -> None:
        self.write(0xB2, 1, 0xA0)


@pytest.fixture
def rig(build) -> Rig:
    return Rig(build)


def test_sci_is_level_triggered(build):
    assert ("isa_set_irq_trigger", 9, True) in build().vm.wires


def test_acpi_enable_and_disable(rig):
    assert rig.read(0x404, 2) == 0
    rig.enable_acpi()

    assert rig.read(0x404, 2) == 1

    rig.write(0xB2, 1, 0x55)
    assert rig.read(0x404, 2) == 1
    rig.write(0xB2, 1, 0xA1)

    assert rig.read(0x404, 2) == 0
    assert rig.read(0xB2, 1) == 0xFF


def test_soft_off(rig):
    rig.write(0x404, 2, 5 << 10)
    assert rig.ended == []
    rig.write(0x404, 2, 5 << 10 | 1 << 13)

    assert rig.ended == ["off"]
    assert rig.read(0x404, 2) == 5 << 10


def test_soft_off_in_byte_accesses(rig):
    rig.write(0x405, 1, 0x34)

    assert rig.ended == ["off"]


def test_other_sleep_states_do_nothing(rig):
    for sleep_type in (0, 1, 3, 4, 6, 7):
        rig.write(0x404, 2, sleep_type << 10 | 1 << 13)

    assert rig.ended == []


def test_control_keeps_sci_enable_and_zeroes(rig):
    rig.enable_acpi()
    rig.write(0x404, 2, 0xDFFE)

    assert rig.read(0x404, 2) == 0x1FFD


def test_power_button(rig):
    assert not rig.pm.power_button()
    rig.enable_acpi()
    rig.write(0x402, 2, 0xFFFF)

    assert rig.read(0x402, 2) == 0x0520
    assert rig.pm.power_button()
    assert rig.pm.power_button()
    assert rig.read(0x400, 2) == 0x0100
    assert rig.wires() == [ASSERT]

    rig.write(0x400, 2, 0x0100)

    assert rig.read(0x400, 2) == 0
    assert rig.wires() == [DEASSERT]


def test_power_button_of_a_paused_machine_waits(rig):
    rig.enable_acpi()
    rig.pm.pause()

    assert rig.pm.power_button()
    assert rig.read(0x400, 2) == 0

    rig.pm.resume()

    assert rig.read(0x400, 2) == 0x0100


def test_masking_the_event_lowers_sci(rig):
    rig.enable_acpi()
    rig.write(0x402, 2, 0x0100)
    rig.pm.power_button()
    rig.write(0x402, 2, 0)

    assert rig.wires() == [ASSERT, DEASSERT]


def test_gpe0(rig):
    rig.write(0x40D, 1, 0xFF)

    assert rig.read(0x40D, 1) == 1

    rig.pm.general_event(1)

    assert rig.read(0x40C, 2) == 0x0101
    assert rig.wires() == [ASSERT]

    rig.write(0x40C, 1, 1)

    assert rig.wires() == [DEASSERT]


@pytest.mark.parametrize(
    ("value", "ended"), [(0x02, []), (0x06, ["reset"]), (0x04, ["reset"])]
)
def test_reset_register(rig, value, ended):
    rig.write(0xCF9, 1, value)

    assert rig.ended == ended
    assert rig.read(0xCF9, 1) == value


def dispatch(machine) -> None:
    machine.mevent.add_timer(0.02, machine.mevent.stop)
    machine.mevent.run()


def test_sigterm_is_the_power_button_once_acpi_is_enabled(rig):
    killed = []
    before = signal.getsignal(signal.SIGTERM)
    try:
        rig.pm.start()
        # As a console on the terminal does, whose start comes later.
        signal.signal(signal.SIGTERM, lambda *_: killed.append(1))
        dispatch(rig.machine)
        rig.enable_acpi()
        os.kill(os.getpid(), signal.SIGTERM)
        dispatch(rig.machine)

        assert rig.read(0x400, 2) == 0x0100
        assert killed == []

        rig.write(0xB2, 1, 0xA1)
        os.kill(os.getpid(), signal.SIGTERM)
        dispatch(rig.machine)

        assert killed == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_round_trip(rig, build):
    rig.enable_acpi()
    rig.write(0x402, 2, 0x0100)
    rig.write(0xCF9, 1, 2)
    rig.pm.power_button()
    other = Rig(build)
    other.pm.restore(rig.pm.save())

    assert other.pm.save() == rig.pm.save()
    assert other.wires() == []
    other.write(0x400, 2, 0x0100)
    assert other.wires() == [DEASSERT]

    rig.pm.reset()
    assert rig.read(0x402, 2) == 0


def test_requests_end_the_vm(build):
    machine = build()
    machine.ctx.vm.activate_cpu(0)
    machine.inout.write(0x404, 2, 5 << 10 | 1 << 13)

    assert machine.ctx.vm.vcpu(0).run()[-1] == SuspendHow.POWEROFF
