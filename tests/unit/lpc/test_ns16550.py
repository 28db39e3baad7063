"""The UART chip, driven as a driver would."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybhyve.lpc import ns16550
from pybhyve.lpc.ns16550 import Ns16550

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR = IIR


class Wire:
    """A line that remembers, and takes no more once it holds ``limit`` bytes."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.sent = bytearray()
        self.resumed = 0
        self.limit = limit

    def write(self, byte: int) -> bool:
        self.sent.append(byte)
        return len(self.sent) < self.limit

    def resume_input(self) -> None:
        self.resumed += 1


class Rig:
    def __init__(self, limit: int = 1 << 30) -> None:
        self.edges: list[bool] = []
        self.wire = Wire(limit)
        self.chip = Ns16550(self.edges.append, self.wire)

    def get(self, offset: int) -> int:
        return self.chip.regs.read(offset, 1)

    def set(self, offset: int, value: int) -> None:
        self.chip.regs.write(offset, 1, value)

    @property
    def irq(self) -> bool:
        return bool(self.edges) and self.edges[-1]


@pytest.fixture
def uart() -> Rig:
    return Rig()


def test_power_on_registers(uart):
    assert [uart.get(r) for r in (IER, IIR, LCR, MCR, LSR, MSR, SCR)] == [
        0,
        0x01,
        0,
        0,
        0x60,
        0xB0,
        0,
    ]
    assert uart.get(DATA) == 0xFF
    assert not uart.edges


def test_divisor_latch_hides_data_and_ier(uart):
    uart.set(LCR, 0x83)

    assert (uart.get(DATA), uart.get(IER)) == (1, 0)  # 115200 baud

    uart.set(DATA, 0x0C)
    uart.set(IER, 0x01)

    assert (uart.get(DATA), uart.get(IER)) == (0x0C, 0x01)

    uart.set(LCR, 0x03)

    assert uart.get(IER) == 0
    assert not uart.wire.sent


def test_transmit(uart):
    for byte in b"ok\n":
        assert uart.get(LSR) & 0x60 == 0x60
        uart.set(DATA, byte)

    assert uart.wire.sent == b"ok\n"


def test_two_byte_access_is_two_registers(uart):
    uart.chip.regs.write(DATA, 2, 0x0141)

    assert uart.wire.sent == b"A"
    assert uart.get(IER) == 1
    assert uart.chip.regs.read(LCR, 2) == 0


def test_thre_interrupt_is_raised_by_enabling_and_cleared_by_iir(uart):
    uart.set(IER, 0x02)

    assert uart.irq
    assert uart.get(IIR) == 0x02
    assert not uart.irq
    assert uart.get(IIR) == 0x01


def test_each_write_gives_the_line_an_edge(uart):
    uart.set(IER, 0x02)
    uart.get(IIR)
    uart.edges.clear()
    uart.set(DATA, 1)
    uart.set(DATA, 2)  # without reading IIR in between

    assert uart.edges == [True, False, True]


def test_receive_without_fifo(uart):
    uart.set(IER, 0x01)

    assert uart.chip.room() == 1

    uart.chip.receive(b"x")

    assert uart.irq
    assert uart.get(IIR) == 0x04
    assert uart.chip.room() == 0
    assert uart.get(DATA) == ord("x")
    assert not uart.irq
    assert uart.wire.resumed == 1


def test_overrun_without_fifo_destroys_the_old_character(uart):
    uart.set(IER, 0x05)
    uart.chip.receive(b"ab")

    assert uart.get(IIR) == 0x06
    assert uart.get(LSR) == 0x63
    assert uart.get(LSR) == 0x61
    assert uart.get(IIR) == 0x04
    assert uart.get(DATA) == ord("b")


def test_overrun_with_fifo_keeps_the_fifo(uart):
    uart.set(FCR, 0x01)
    uart.chip.receive(bytes(range(17)))

    assert uart.get(LSR) & 0x02
    assert bytes(uart.get(DATA) for _ in range(16)) == bytes(range(16))
    assert not uart.get(LSR) & 0x01


@pytest.mark.parametrize(("code", "level"), list(enumerate([1, 4, 8, 14])))
def test_trigger_level(uart, code, level):
    uart.set(FCR, 0x01 | code << 6)
    uart.set(IER, 0x01)
    uart.chip.receive(bytes(level - 1))
    if level > 1:
        assert uart.get(IIR) == 0xCC  # below the level: character timeout

    uart.chip.receive(b"\0")

    assert uart.get(IIR) == 0xC4


def test_fifo_reset_and_toggle_drop_what_was_received(uart):
    uart.set(FCR, 0x01)
    uart.chip.receive(bytes(16))
    uart.set(FCR, 0x03)

    assert uart.chip.room() == 16
    assert uart.wire.resumed == 1

    uart.chip.receive(b"x")
    uart.set(FCR, 0x00)

    assert not uart.get(LSR) & 0x01
    assert uart.get(IIR) == 0x01


def test_fcr_bits_need_the_enable_bit(uart):
    uart.set(FCR, 0xC0)

    assert uart.get(IIR) == 0x01


def test_loopback_returns_data_and_modem_lines(uart):
    uart.set(MCR, 0x10)
    uart.get(MSR)
    uart.set(MCR, 0x1A)  # RTS, OUT2

    assert uart.get(MSR) == 0x99  # CTS, DCD and their deltas
    assert uart.get(MSR) == 0x90

    uart.set(DATA, 0x55)

    assert not uart.wire.sent
    assert uart.chip.room() == 0
    assert uart.get(DATA) == 0x55


def test_ri_reports_its_trailing_edge(uart):
    uart.set(MCR, 0x10)
    uart.get(MSR)
    uart.set(MCR, 0x14)

    assert uart.get(MSR) == 0x40

    uart.set(MCR, 0x10)

    assert uart.get(MSR) == 0x04


def test_modem_status_interrupt(uart):
    uart.set(IER, 0x08)
    uart.set(MCR, 0x10)

    assert uart.irq
    assert uart.get(IIR) == 0x00

    uart.get(MSR)

    assert not uart.irq


def test_leaving_loopback_asks_for_input(uart):
    uart.set(MCR, 0x10)
    uart.set(MCR, 0x00)

    assert uart.wire.resumed == 1


def test_busy_line_holds_the_transmitter():
    uart = Rig(limit=2)
    uart.set(IER, 0x02)
    uart.get(IIR)
    uart.set(DATA, 1)
    uart.get(IIR)
    uart.set(DATA, 2)

    assert uart.get(LSR) == 0
    assert not uart.irq

    uart.set(DATA, 3)  # ignores the busy transmitter: lost

    assert uart.wire.sent == b"\1\2"

    uart.chip.drained()

    assert uart.get(LSR) == 0x60
    assert uart.irq


def test_lsr_and_msr_ignore_writes(uart):
    uart.set(LSR, 0xFF)
    uart.set(MSR, 0xFF)

    assert uart.get(LSR) == 0x60
    assert uart.get(MSR) == 0xB0


accesses = st.lists(
    st.one_of(
        st.tuples(
            st.just("write"),
            st.integers(0, 9),
            st.sampled_from([1, 2, 4]),
            st.integers(0, 2**32 - 1),
        ),
        st.tuples(st.just("read"), st.integers(0, 9), st.sampled_from([1, 2, 4])),
        st.tuples(st.just("receive"), st.binary(max_size=20)),
        st.tuples(st.just("drained")),
    ),
    max_size=60,
)


def play(rig: Rig, script) -> list[int]:
    answers = []
    for name, *arguments in script:
        if name == "write":
            offset, size, value = arguments
            rig.chip.regs.write(offset, size, value & (1 << 8 * size) - 1)
        elif name == "read":
            answers.append(rig.chip.regs.read(*arguments))
            assert 0 <= answers[-1] < 1 << 32
        else:
            getattr(rig.chip, name)(*arguments)
    return answers


@given(accesses, accesses)
def test_any_guest_then_save_restore_goes_on_the_same(before, after):
    first = Rig(limit=10)
    play(first, before)
    second = Rig(limit=10)
    second.chip.restore(first.chip.save())
    second.wire.sent[:] = first.wire.sent

    assert second.chip.save() == first.chip.save()
    assert play(first, after) == play(second, after)
    assert len(second.edges) <= len(first.edges)
    assert first.edges[len(first.edges) - len(second.edges) :] == second.edges


@given(accesses)
def test_irq_follows_iir(script):
    """The interrupt line is up exactly while IIR reports a cause, and only toggles."""
    rig = Rig(limit=10)
    for step in script:
        play(rig, [step])
        assert rig.irq == (rig.chip._cause() != ns16550.IIR_NONE)

    assert all(a != b for a, b in zip(rig.edges, rig.edges[1:], strict=False))


def test_reset_is_power_on_and_touches_no_wire(uart):
    uart.set(IER, 0x02)
    uart.chip.reset()

    assert uart.edges == [True]
    assert uart.chip.save() == Rig().chip.save()


def test_unknown_version_is_refused(uart):
    with pytest.raises(ValueError, match="version"):
        uart.chip.restore({"version": 2})
