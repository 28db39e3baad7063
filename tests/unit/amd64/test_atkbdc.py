"""The 8042 with keyboard and mouse, as a driver talks to them."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.amd64.atkbdc import Atkbdc
from pybhyve.amd64.ps2kbd import Ps2Keyboard
from pybhyve.amd64.ps2mouse import Ps2Mouse

OBF, AUX = 0x01, 0x20
IRQ1 = ("isa_pulse_irq", 1, 1)
IRQ12 = ("isa_pulse_irq", 12, 12)


class Rig:
    def __init__(self, build) -> None:
        self.machine = build()
        device = self.machine.devices["atkbdc"]
        assert isinstance(device, Atkbdc)
        self.device = device
        self.resets = 0
        self.machine.request_reset = self._reset
        self.wires = self.machine.vm.take
        self.wires()

    def _reset(self) -> None:
        self.resets += 1

    def status(self) -> int:
        return int(self.machine.inout.read(0x64, 1))

    def command(self, *values: int) -> None:
        self.machine.inout.write(0x64, 1, values[0])
        for value in values[1:]:
            self.machine.inout.write(0x60, 1, value)

    def data(self, value: int) -> None:
        self.machine.inout.write(0x60, 1, value)

    def get(self) -> list[int]:
        """Everything that is there to read."""
        got = []
        while self.status() & OBF:
            got.append(self.machine.inout.read(0x60, 1))
        return got


@pytest.fixture
def rig(build) -> Rig:
    return Rig(build)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (0x20, [0]),
        (0xA9, [0]),
        (0xAA, [0x55]),
        (0xAB, [0]),
        (0xC0, [0]),
        (0xD0, [0x03]),
        (0xFF, []),
        (0x99, []),
    ],
)
def test_controller_commands(rig, command, answer):
    rig.command(command)

    assert rig.get() == answer
    assert rig.resets == 0


def test_command_byte_and_ram(rig):
    rig.command(0x60, 0x47)
    rig.command(0x7F, 0x12)
    rig.command(0x20)
    rig.command(0x3F)

    assert rig.get() == [0x47, 0x12]
    assert rig.status() & 0x04


def test_self_test_sets_the_system_flag(rig):
    assert not rig.status() & 0x04
    rig.command(0xAA)

    assert rig.status() & 0x04


def test_ports_off_and_on(rig):
    rig.command(0xA7)
    rig.command(0xAD)
    rig.command(0x20)

    assert rig.get() == [0x30]

    rig.device.key(0x1C, True)
    assert rig.get() == []

    rig.command(0xAE)
    rig.command(0xA8)

    assert rig.get() == [0x1C]
    rig.command(0x20)
    assert rig.get() == [0]


def test_loop_back_into_the_buffers(rig):
    rig.command(0x60, 0x03)
    rig.command(0xD2, 0x5A)

    assert rig.status() & (OBF | AUX) == OBF
    assert rig.wires() == [IRQ1]
    assert rig.get() == [0x5A]

    rig.command(0xD3, 0xA5)

    assert rig.status() & (OBF | AUX) == OBF | AUX
    assert rig.wires() == [IRQ12]
    assert rig.get() == [0xA5]


@pytest.mark.parametrize("commands", [(0xFE,), (0xF0,), (0xD1, 0x02)])
def test_processor_reset(rig, commands):
    rig.command(*commands)

    assert rig.resets == 1


def test_output_port(rig):
    rig.command(0xD1, 0x01)
    rig.command(0xD0)

    assert rig.get() == [0x01]
    assert rig.resets == 0


def test_keyboard_commands(rig):
    for sent, answer in [
        ((0xFF,), [0xFA, 0xAA]),
        ((0xF2,), [0xFA, 0xAB, 0x83]),
        ((0xEE,), [0xEE]),
        ((0xED, 0x07), [0xFA, 0xFA]),
        ((0xF3, 0x20), [0xFA, 0xFA]),
        ((0xF0, 0x00), [0xFA, 0xFA, 0x02]),
        ((0xF0, 0x01), [0xFA, 0xFA]),
        ((0xF4,), [0xFA]),
        ((0xF5,), [0xFA]),
        ((0xF6,), [0xFA]),
        ((0xFE,), [0xFA]),
        ((0x00,), [0xFE]),
        ((0xED, 0xF4), [0xFA, 0xFA]),
    ]:
        for value in sent:
            rig.data(value)
        assert rig.get() == answer, sent
    assert rig.device.keyboard.leds == 7


def test_keys_in_set_2_and_translated_to_set_1(rig):
    rig.device.key(0x1C, True)
    rig.device.key(0x1C, False)

    assert rig.get() == [0x1C, 0xF0, 0x1C]

    rig.command(0x60, 0x41)
    rig.wires()
    rig.device.key(0x1C, True)  # A
    rig.device.key(0x1C, False)
    rig.device.key(0x75, True, extended=True)  # up
    rig.device.key(0x75, False, extended=True)
    rig.device.key(0x83, True)  # F7

    assert rig.get() == [0x1E, 0x9E, 0xE0, 0x48, 0xE0, 0xC8, 0x41]
    assert rig.wires() == [IRQ1] * 7


def test_keys_are_lost_when_not_scanning_or_full(rig):
    rig.data(0xF5)
    rig.get()
    rig.device.key(0x1C, True)
    assert rig.get() == []

    rig.data(0xF4)
    rig.get()
    for _ in range(100):
        rig.device.key(0x1C, False)

    assert rig.get() == [0xF0, 0x1C] * 8


def mouse(rig, *values):
    got = []
    for value in values:
        rig.command(0xD4, value)
        got += rig.get()
    return got


def test_mouse_commands(rig):
    for sent, answer in [
        ((0xFF,), [0xFA, 0xAA, 0x00]),
        ((0xF2,), [0xFA, 0x00]),
        ((0xF3, 200), [0xFA, 0xFA]),
        ((0xE8, 3), [0xFA, 0xFA]),
        ((0xE7,), [0xFA]),
        ((0xE9,), [0xFA, 0x10, 3, 200]),
        ((0xE6,), [0xFA]),
        ((0xF4,), [0xFA]),
        ((0xE9,), [0xFA, 0x20, 3, 200]),
        ((0xF0,), [0xFA]),
        ((0xEB,), [0xFA, 0x08, 0, 0]),
        ((0xEA,), [0xFA]),
        ((0xEE,), [0xFA]),
        ((0x12,), [0x12]),
        ((0xEC,), [0xFA]),
        ((0xF5,), [0xFA]),
        ((0xF6,), [0xFA]),
        ((0xE9,), [0xFA, 0, 4, 100]),
        ((0xFE,), [100]),
        ((0x01,), [0xFE]),
    ]:
        assert mouse(rig, *sent) == answer, sent


def test_mouse_moves(rig):
    rig.device.move(5, 5, 0)
    assert rig.get() == []

    mouse(rig, 0xF4)
    rig.command(0x60, 0x02)
    rig.wires()
    rig.device.move(3, -2, 1)

    assert rig.status() & AUX
    assert rig.get() == [0x09, 8, 3]  # what moved while reporting was off counts
    assert rig.wires() == [IRQ12] * 3


def test_a_long_move_takes_several_packets(rig):
    mouse(rig, 0xF4)
    rig.device.move(-300, 0, 0)

    assert rig.get() == [0x18, 0x01, 0]

    rig.device.move(0, 0, 2)

    assert rig.get() == [0x1A, 0xD3, 0]


script = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from([0x60, 0x64]), st.integers(0, 255)),
        st.tuples(st.just("read"), st.sampled_from([0x60, 0x64])),
        st.tuples(st.just("key"), st.integers(0, 0x84), st.booleans()),
        st.tuples(
            st.just("move"),
            st.integers(-1000, 1000),
            st.integers(-1000, 1000),
            st.integers(0, 7),
        ),
    ),
    max_size=60,
)


def play(rig: Rig, steps) -> list[int]:
    answers = []
    for name, *arguments in steps:
        match name:
            case "write":
                rig.machine.inout.write(arguments[0], 1, arguments[1])
            case "read":
                answers.append(rig.machine.inout.read(arguments[0], 1))
            case "key":
                rig.device.key(*arguments)
            case "move":
                rig.device.move(*arguments)
    return answers


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(script, script)
def test_any_guest_then_save_restore_goes_on_the_same(build, before, after):
    first, second = rigs(build)
    play(first, before)
    second.device.restore(first.device.save())

    assert second.device.save() == first.device.save()
    first.wires()
    second.wires()
    assert play(first, after) == play(second, after)
    assert first.wires() == second.wires()


_RIGS: list[Rig] = []


def rigs(build) -> list[Rig]:
    """Two controllers as after power-on; a machine for each example is too slow."""
    if not _RIGS:
        _RIGS[:] = Rig(build), Rig(build)
    for rig in _RIGS:
        rig.device.reset()
    return _RIGS


@given(st.lists(st.integers(0, 255), max_size=300))
def test_unread_output_is_bounded(values):
    for device in (Ps2Keyboard(), Ps2Mouse()):
        for value in values:
            device.write(value)

        assert len(device.output) <= 32
