"""Where pieces of a guest go, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybhyve.bhyveload.plan import LoadPlan
from pybhyve.errors import ImageError

MIB = 1 << 20
GIB = 1 << 30


def test_ram_is_what_the_memory_map_says() -> None:
    assert LoadPlan(3 * GIB, GIB).ram == [
        (0, 0xA0000),
        (0x100000, 3 * GIB),
        (4 * GIB, 5 * GIB),
    ]


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (0x9FFFF, 2),  # into VGA memory
        (0xF0000, 16),  # firmware area
        (64 * MIB - 1, 2),  # past the end
        (1 << 70, 1),
        (4 * GIB, 1),  # no high memory in this VM
    ],
)
def test_a_piece_outside_the_ram_is_refused(gpa: int, size: int) -> None:
    with pytest.raises(ImageError, match=r"the piece .*memory"):
        LoadPlan(64 * MIB).place("the piece", gpa, bytes(size))


def test_memory_that_is_too_small_is_said_in_megabytes() -> None:
    with pytest.raises(ImageError, match="needs 65 MiB of memory, and the VM has 64"):
        LoadPlan(64 * MIB).place("it", 64 * MIB, b"x")


@pytest.mark.parametrize("gpa", [0x1FFF, 0x2000, 0x2001, 0x2FFF])
def test_an_overlap_names_both(gpa: int) -> None:
    plan = LoadPlan(64 * MIB)
    plan.place("the first", 0x2000, b"", 0x1000)

    with pytest.raises(ImageError, match=r"the second .* overlaps the first"):
        plan.place("the second", gpa, b"ab")


def test_neighbours_do_not_overlap() -> None:
    plan = LoadPlan(64 * MIB)
    plan.place("middle", 0x2000, b"", 0x1000)

    plan.place("below", 0x1000, b"", 0x1000)
    plan.place("above", 0x3000, b"", 0x1000)

    assert [piece.name for piece in plan.pieces] == ["below", "middle", "above"]


@given(
    st.lists(
        st.tuples(st.sampled_from(["at", "low", "high"]), st.integers(0, 9 * MIB)),
        max_size=30,
    ),
    st.integers(1, 3 * MIB),
)
def test_pieces_never_overlap_and_lie_in_ram(
    requests: list[tuple[str, int]], size: int
) -> None:
    """Whatever is asked for, what was granted is disjoint and inside RAM."""
    plan = LoadPlan(8 * MIB)
    for how, where in requests:
        try:
            if how == "at":
                plan.place(how, where, b"x", size)
            elif how == "low":
                plan.place_lowest(how, bytes(size), where)
            else:
                plan.place_highest(how, bytes(size), where)
        except ImageError:
            continue

    ends = 0
    for piece in plan.pieces:
        assert piece.gpa >= ends
        ends = piece.gpa + piece.size
        assert any(start <= piece.gpa and ends <= stop for start, stop in plan.ram)
