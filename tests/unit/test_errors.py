"""The drawn tree is the tree; an error and its causes are one line."""

from __future__ import annotations

import re

import pytest

from pybhyve import errors
from pybhyve.errors import BhyveError, ConfigError, one_line


def classes(base: type[BhyveError] = BhyveError) -> list[type[BhyveError]]:
    return [base, *(leaf for sub in base.__subclasses__() for leaf in classes(sub))]


def test_the_drawing_names_every_class_with_its_status():
    assert errors.__doc__ is not None
    drawn = re.findall(r"^[ │├└─]*(\w+Error) +(\d+) ", errors.__doc__, re.MULTILINE)
    here = [leaf for leaf in classes() if leaf.__module__ == errors.__name__]

    assert drawn == [(leaf.__name__, str(leaf.status)) for leaf in here]


def test_causes_follow():
    error = ConfigError("cannot\nread  /x")
    error.__cause__ = FileNotFoundError(2, "No such file or directory", "/x")

    assert one_line(error) == "cannot read /x: No such file or directory"


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\x1b[0m", r"a\x1b[0m"), ("\udcff", r"\udcff"), ("\0", r"\x00"), ("é", "é")],
)
def test_a_message_does_not_change_the_terminal(text, line):
    assert one_line(BhyveError(text)) == line


def test_an_error_without_text_has_its_name():
    assert one_line(KeyError()) == "KeyError"
