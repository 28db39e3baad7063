"""The options table, and what follows from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybhyve.bhyvectl.options import OPTIONS, Arguments, usage
from pybhyve.errors import UsageError

MAN = Path(__file__).parents[3] / "man" / "bhyvectl.8"


def test_usage_has_one_option_a_line() -> None:
    lines = usage().splitlines()

    assert lines[0] == "Usage: bhyvectl --vm=<vmname>"
    assert "       [--get-rax]" in lines
    assert "       [--set-rax=<RAX>]" in lines
    assert "       [--setcap=<0|1>]" in lines
    assert len(lines) == len(OPTIONS)


def test_options_may_be_shortened_and_have_values_both_ways() -> None:
    arguments = Arguments(["--vm", "x", "--cpu=1", "--set-rip=0x10", "--get-gpa=7"])

    assert (arguments.vm, arguments.cpu) == ("x", 1)
    assert arguments.number("set-rip") == 16
    assert "get-gpa-pmap" in arguments


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "--vm=<vmname> is needed"),
        (["--vm="], "--vm=<vmname> is needed"),
        (["--nonsense"], "--nonsense"),
        (["--vm=x", "--get-r"], "--get-r"),
        (["--vm=x", "--create=1"], "--create"),
        (["--vm=x", "extra"], "'extra' is not an option"),
        (["--vm=x", "--cpu=one"], "--cpu=one: expected a number"),
        (["--vm=x", "--cpu=-1"], "--cpu=-1: expected a number"),
        (["--vm=x", "--set-cr3=0x10000000000000000"], "at most 64 bits"),
        (["--vm=x", "--setcap=1"], "--setcap needs --capname"),
    ],
)
def test_what_is_wrong_is_said(argv: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(complaint)):
        Arguments(argv)


@given(
    st.lists(
        st.text(max_size=12)
        | st.sampled_from([f"--{name}" for name in OPTIONS])
        | st.builds("--{}={}".format, st.sampled_from([*OPTIONS]), st.text(max_size=8)),
        max_size=6,
    )
)
def test_any_command_line_is_read_or_refused(argv: list[str]) -> None:
    try:
        arguments = Arguments(argv)
    except UsageError:
        return
    for name, option in OPTIONS.items():
        if option.value is None:
            assert arguments.text(name) in (None, "")


def test_the_manual_has_every_option_and_no_other() -> None:
    items = re.findall(r"^\.It Fl -([\w-]+)(?: Ns = Ns (.+))?$", MAN.read_text(), re.M)
    documented = dict(items)

    assert documented.keys() == OPTIONS.keys()
    for name, value in documented.items():
        assert bool(value) == (OPTIONS[name].value is not None), name
