"""Register blocks: splitting, widening, handlers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybhyve.regs import RO, W1C, WO, Reg, RegBlock


class Regs(RegBlock, size=0x20, fill=0xFF):
    CTRL = Reg(0x00, 4, mask=0x00FF_FFFF, reset=0x0100_0000)
    STAT = Reg(0x04, 2, W1C, reset=0x0FF0)
    CMD = Reg(0x06, 1, WO)
    INFO = Reg(0x08, 8, RO, reset=0x1122_3344_5566_7788)
    LIVE = Reg(0x10, 2)


class Chip:
    def __init__(self) -> None:
        self.regs = Regs(self)
        self.written: list[int] = []

    @Regs.LIVE.read
    def _live(self) -> int:
        return self.regs.LIVE + 1

    @Regs.LIVE.write
    def _set_live(self, value: int) -> None:
        self.written.append(value)
        self.regs.LIVE = value


@pytest.fixture
def chip() -> Chip:
    return Chip()


def test_exact_accesses(chip):
    chip.regs.write(0, 4, 0xFFABCDEF)

    assert chip.regs.read(0, 4) == 0x01AB_CDEF
    assert chip.regs.CTRL == 0x01AB_CDEF


def test_narrow_read_takes_its_bytes(chip):
    assert chip.regs.read(0x0A, 2) == 0x5566
    assert chip.regs.read(0x0F, 1) == 0x11


def test_narrow_write_keeps_the_other_bytes(chip):
    chip.regs.write(0, 4, 0x112233)
    chip.regs.write(1, 1, 0xEE)

    assert chip.regs.CTRL & 0xFFFFFF == 0x11EE33


def test_narrow_write_to_w1c_clears_only_what_was_written(chip):
    chip.regs.write(4, 1, 0x10)

    assert chip.regs.STAT == 0x0FE0


def test_wide_access_covers_several_registers_and_holes(chip):
    assert chip.regs.read(4, 4) == 0xFF00_0FF0

    chip.regs.write(4, 4, 0xAA5A_0FF0)

    assert chip.regs.STAT == 0
    assert chip.regs.CMD == 0x5A


def test_read_only_ignores_writes(chip):
    chip.regs.write(8, 8, 0)

    assert chip.regs.INFO == 0x1122_3344_5566_7788


def test_handlers_see_whole_values(chip):
    chip.regs.write(0x10, 2, 0x1234)
    chip.regs.write(0x11, 1, 0xAB)

    assert chip.written == [0x1234, 0xAB34]
    assert chip.regs.read(0x10, 2) == 0xAB35


def test_write_handler_on_read_only_is_refused():
    with pytest.raises(TypeError, match="INFO"):
        Regs.INFO.write(lambda _self, _value: None)


def test_overlap_is_refused():
    with pytest.raises(TypeError, match=r"Bad\.B"):

        class Bad(RegBlock, size=8):
            A = Reg(0, 4)
            B = Reg(3, 4)


def test_save_restore_round_trip(chip):
    chip.regs.write(0, 4, 0x42)
    chip.regs.write(0x10, 2, 7)
    state = chip.regs.save()
    other = Chip()
    other.regs.restore(state)

    assert other.regs.save() == state
    chip.regs.reset()
    assert chip.regs.save() == Chip().regs.save()


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 0x28),
            st.sampled_from([1, 2, 4, 8]),
            st.integers(0, 2**64 - 1),
        )
    )
)
def test_any_access_gives_a_value_of_its_size(accesses):
    chip = Chip()
    for write, offset, size, value in accesses:
        if write:
            chip.regs.write(offset, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= chip.regs.read(offset, size) < 1 << 8 * size


@given(st.integers(0, 0x20), st.sampled_from([2, 4, 8]))
def test_wide_read_equals_its_bytes(offset, size):
    chip = Chip()
    parts = [chip.regs.read(offset + i, 1) for i in range(size)]

    assert chip.regs.read(offset, size) == int.from_bytes(bytes(parts), "little")
