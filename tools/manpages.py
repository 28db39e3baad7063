r"""What the manual pages have from declarations, rewritten: ``make man``.

A page marks such a part with two comments of mdoc(7)::

    .\" generated: NAME
    .\" end generated

`PARTS` has the names and what makes their text; everything else is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import pybhyve.pci  # noqa: F401  # registers the devices
from pybhyve.bhyverun import cli
from pybhyve.errors import NotAvailableError
from pybhyve.options import KeyDoc, Options
from pybhyve.pci import registry
from pybhyve.variables import GlobalOptions

MAN: Final = Path(__file__).parents[1] / "man"
PAGES: Final = ("bhyve.8", "bhyve_config.5")

_PART = re.compile(
    r'(?P<begin>^\.\\" generated: (?P<name>\S+)\n)'
    r"(?P<text>.*?)"
    r'(?P<end>^\.\\" end generated\n)',
    re.MULTILINE | re.DOTALL,
)
_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z])")


def escape(text: str) -> str:
    """A word or a line as roff shows it unchanged, also at the beginning of a line."""
    text = text.replace("\\", r"\e")
    return rf"\&{text}" if text.startswith((".", "'")) else text


def sentences(text: str) -> str:
    """Running text, one sentence a line as mdoc(7) wants it."""
    return "".join(f"{escape(line)}\n" for line in _SENTENCE_END.split(text))


def option_item(option: cli.Flag | cli.Argument) -> str:
    """The macros for an option with its argument, as they follow ``.It`` or ``.Op``."""
    if isinstance(option, cli.Flag):
        return f"Fl {option.letter}"
    return f"Fl {option.letter} Ar {escape(option.grammar)}"


def synopsis() -> str:
    """Every option of bhyve: flags together, then those with an argument."""
    letters = "".join(flag.letter for flag in cli.FLAGS)
    arguments = "".join(f".Op {option_item(option)}\n" for option in cli.ARGUMENTS)
    return f".Op Fl {letters}\n{arguments}"


def variable_list(rows: Iterator[KeyDoc]) -> str:
    """A list of variables with type, default and meaning; empty for none."""
    items = [
        f".It Va {escape(row.name)} Pq {_type_and_default(row)}\n{sentences(row.doc)}"
        for row in rows
    ]
    if not items:
        return ""
    return f".Bl -tag -width indent\n{''.join(items)}.El\n"


def _type_and_default(row: KeyDoc) -> str:
    if not row.default:
        return escape(row.kind)
    return f"{escape(row.kind)}, default Cm {escape(row.default)}"


def global_variables() -> str:
    """The variables of the machine as a whole."""
    return variable_list(GlobalOptions.describe())


def device_variables() -> str:
    """A subsection for each device, and a line of those that are not available."""
    aliases: dict[str, list[str]] = {}
    devices: dict[str, type[Options]] = {}
    missing = []
    for name in registry.names():
        try:
            emulation = registry.lookup(name)
        except NotAvailableError:
            missing.append(name)
            continue
        if emulation is not None and name != emulation.name:
            aliases.setdefault(emulation.name, []).append(name)
        elif emulation is not None:
            devices[name] = emulation.options
    text = ""
    for name, options in devices.items():
        text += f".Ss {escape(name)}\n"
        for alias in aliases.get(name, ()):
            text += f"Named\n.Cm {escape(alias)}\nwith\n.Fl s ,\n"
            text += "it has other values from the start.\n"
        rows = options.describe("pci.B.S.F.")
        text += variable_list(rows) or "This device has no variables of its own.\n"
    if missing:
        text += ".Ss Devices that are not available in this version\n"
        text += "".join(f".Cm {escape(name)} ,\n" for name in missing[:-1])
        text += f".Cm {escape(missing[-1])} .\n"
    return text


PARTS: Final[Mapping[str, Callable[[], str]]] = MappingProxyType(
    {
        "synopsis": synopsis,
        "globals": global_variables,
        "devices": device_variables,
    }
)


def regenerate(page: str) -> str:
    """The text of a page with its generated parts made anew."""

    def part(match: re.Match[str]) -> str:
        return match["begin"] + PARTS[match["name"]]() + match["end"]

    return _PART.sub(part, page)


def main() -> None:
    """Rewrite the pages that are not up to date."""
    for name in PAGES:
        path = MAN / name
        before = path.read_text()
        after = regenerate(before)
        if after != before:
            path.write_text(after)
            print(f"{name}: rewritten")


if __name__ == "__main__":
    main()
