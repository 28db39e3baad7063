"""The manual pages say what the programs declare; ``make man`` rewrites them."""

from __future__ import annotations

import re

import pytest

from pybhyve.bhyverun import cli, exitstatus
from pybhyve.errors import (
    EX_OSERR,
    EX_USAGE,
    BhyveError,
    GuestAbortError,
    NotAvailableError,
)
from pybhyve.pci import registry
from pybhyve.variables import GlobalOptions
from tools import manpages


def read(page: str) -> str:
    return (manpages.MAN / page).read_text()


def section(text: str, title: str) -> str:
    found = re.search(rf"^\.Sh {title}\n(.*?)(?=^\.Sh |\Z)", text, re.M | re.S)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("page", manpages.PAGES)
def test_generated_parts_are_up_to_date(page: str):
    assert read(page) == manpages.regenerate(read(page))


def test_every_part_is_on_one_page():
    names = re.findall(r"generated: (\w+)$", "".join(map(read, manpages.PAGES)), re.M)

    assert sorted(names) == sorted(manpages.PARTS)


def test_a_changed_part_is_seen():
    page = read("bhyve_config.5")
    changed = page.replace(".It Va cpus ", ".It Va cpu ", 1)

    assert changed != page
    assert manpages.regenerate(changed) == page


def test_every_option_is_described_once_with_its_grammar():
    description = section(read("bhyve.8"), "OPTIONS")
    items = re.findall(r"^\.It (Fl .*)$", description, re.M)
    order = sorted(cli.OPTIONS, key=lambda o: (o.letter.lower(), o.letter.isupper()))

    assert items == [manpages.option_item(option) for option in order]


@pytest.mark.parametrize(
    "flag", [f for f in cli.FLAGS if f.variable], ids=lambda flag: flag.letter
)
def test_a_flag_names_its_variable(flag: cli.Flag):
    description = section(read("bhyve.8"), "OPTIONS")
    item = re.search(
        rf"^\.It Fl {flag.letter}\n(.*?)(?=^\.It |^\.El)", description, re.M | re.S
    )

    assert item is not None
    assert f".Va {flag.variable} Ns = Ns Cm {flag.value}" in item[1]


def test_exit_statuses():
    items = re.findall(r"^\.It (\d+)$", section(read("bhyve.8"), "EXIT STATUS"), re.M)
    statuses = {*exitstatus.STATUSES.values(), exitstatus.UNKNOWN, EX_USAGE, EX_OSERR}
    statuses |= {BhyveError.status, GuestAbortError.status}

    assert items == [str(status) for status in sorted(statuses)]


def test_every_variable_and_device_is_in_the_manual():
    page = read("bhyve_config.5")

    for row in GlobalOptions.describe():
        assert f".It Va {row.name} Pq" in page
    for name in registry.names():
        assert re.search(rf"^\.(Ss|Cm) {name}( [,.])?$", page, re.M), name


def test_a_device_that_is_not_available_has_no_variables():
    page = read("bhyve_config.5")
    missing = page[page.index(".Ss Devices that are not available") :]

    for name in registry.names():
        try:
            registry.lookup(name)
        except NotAvailableError:
            assert f".Cm {name} " in missing
            assert f".Ss {name}\n" not in page


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        (".Sh is no macro", r"\&.Sh is no macro"),
        ("'quoted'", r"\&'quoted'"),
        (r"a\b", r"a\eb"),
    ],
)
def test_text_cannot_become_a_macro(text: str, shown: str):
    assert manpages.escape(text) == shown


def test_one_sentence_a_line():
    assert manpages.sentences("One. Two; three.") == "One.\nTwo; three.\n"
