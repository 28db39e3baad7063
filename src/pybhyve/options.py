"""Options declared once: variables, their parsing, their text forms, their manual.

A device, or bhyve as a whole, declares its variables as a class::

    class BlockOptions(Options):
        path: str = key(doc="File or device behind the disk.", legacy=POSITIONAL)
        nocache: bool = key(False, doc="Open with O_DIRECT.")
        sectorsize: Sectors | None = key(None, parse=Sectors.parse, doc="…")

and from that follow the typed values (`Options.parse`), the ``-s`` and ``-l`` string
form (`Options.legacy_config`), the tables of the manual (`Options.describe`), the
variables that ``config.dump`` shows without being set (`Options.presets`) and the
report of unknown variables (`Options.unknown`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import (
    Any,
    ClassVar,
    Final,
    Generic,
    Self,
    TypeVar,
    cast,
    dataclass_transform,
    overload,
)

from pybhyve.config import Node, parse_bool, parse_int
from pybhyve.errors import ConfigError

T = TypeVar("T")
O = TypeVar("O", bound="Options")  # noqa: E741  # the letter of Options

POSITIONAL: Final = "positional"
"""The string form's first item, up to the first comma, is this key's value."""
WHOLE: Final = "whole"
"""The whole string form, commas included, is this key's value."""


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Final = _Required()


@dataclass(slots=True, frozen=True)
class Parser(Generic[T]):
    """A parser for `key`, with the manual's word for what it takes."""

    kind: str
    parse: Callable[[str], T]

    def __call__(self, text: str) -> T:
        """The value of a text; ValueError says what was expected."""
        return self.parse(text)


def parser(kind: str) -> Callable[[Callable[[str], T]], Parser[T]]:
    """Decorate a function that parses values which the manual calls ``kind``."""
    return lambda parse: Parser(kind, parse)


def integer(least: int, most: int) -> Parser[int]:
    """A parser of numbers from ``least`` to ``most``."""

    @parser("integer")
    def parse(text: str) -> int:
        value = parse_int(text)
        if not least <= value <= most:
            raise ValueError(f"expected {least} to {most}")
        return value

    return parse


@dataclass(slots=True, frozen=True)
class Key:
    """One declared variable, relative to the node its class describes."""

    name: str
    default: Any
    parse: Callable[[str], Any]
    kind: str  # for the manual: string, boolean, integer or the parser's word
    doc: str
    legacy: str | None = None
    preset: bool = False  # in the tree, and so in the dump, from the start
    deprecated: str | None = None  # the variable to use instead

    def value_of(self, node: Node | None) -> Any:  # the key says
        """The typed value in ``node``, or the default."""
        text = node.get(self.name) if node is not None else None
        if node is None or text is None:
            if isinstance(self.default, _Required):
                where = f"{node.path}." if node is not None and node.path else ""
                raise ConfigError(f"{where}{self.name} is not set")
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            what = f"Invalid value {text} for {self.kind} variable"
            detail = str(error)
            message = f"{what} {node.path_of(self.name)}"
            raise ConfigError(f"{message}: {detail}" if detail else message) from None

    def default_text(self) -> str:
        """The default as the manual and the dump write it."""
        if isinstance(self.default, _Required) or self.default is None:
            return ""
        if isinstance(self.default, bool):
            return "true" if self.default else "false"
        if self.kind == "hexadecimal":
            return f"{self.default:#x}"
        return str(self.default)


@dataclass(slots=True, frozen=True)
class Group:
    """Numbered nodes below a node: ``port.N.…``."""

    name: str
    options: type[Options]
    doc: str

    def has(self, member: str) -> bool:
        """Whether a node of that name is a member, that is, a number."""
        return member.isascii() and member.isdigit() and len(member) < 10

    def value_of(self, node: Node | None) -> Mapping[int, Options]:
        """The parsed options of each member, in the order of the numbers."""
        members = node.node(self.name) if node is not None else None
        parsed: dict[int, Options] = {}
        for name, child in members.children() if members is not None else ():
            if self.has(name):
                parsed[int(name)] = self.options.parse(child)
        return MappingProxyType(dict(sorted(parsed.items())))


@dataclass(slots=True, frozen=True)
class KeyDoc:
    """A row of a table in the manual."""

    name: str
    kind: str
    default: str
    doc: str


@overload
def key(*, doc: str, name: str = "", legacy: str | None = None) -> str: ...
@overload
def key(
    *, parse: Callable[[str], T], doc: str, name: str = "", legacy: str | None = None
) -> T: ...
@overload
def key(
    default: None,
    *,
    parse: Callable[[str], T],
    doc: str,
    name: str = "",
    legacy: str | None = None,
    deprecated: str | None = None,
) -> T | None: ...
@overload
def key(
    default: T,
    *,
    parse: Callable[[str], T],
    doc: str,
    name: str = "",
    legacy: str | None = None,
    preset: bool = False,
    deprecated: str | None = None,
) -> T: ...
@overload
def key(
    default: None,
    *,
    doc: str,
    name: str = "",
    legacy: str | None = None,
    deprecated: str | None = None,
) -> str | None: ...
@overload
def key(
    default: bool,
    *,
    doc: str,
    name: str = "",
    legacy: str | None = None,
    preset: bool = False,
    deprecated: str | None = None,
) -> bool: ...
@overload
def key(
    default: int,
    *,
    doc: str,
    name: str = "",
    legacy: str | None = None,
    preset: bool = False,
    deprecated: str | None = None,
) -> int: ...
@overload
def key(
    default: str,
    *,
    doc: str,
    name: str = "",
    legacy: str | None = None,
    preset: bool = False,
    deprecated: str | None = None,
) -> str: ...
def key(
    default: Any = REQUIRED,
    *,
    parse: Callable[[str], Any] | None = None,
    doc: str,
    name: str = "",
    legacy: str | None = None,
    preset: bool = False,
    deprecated: str | None = None,
) -> Any:
    """Declare a variable; its name is the attribute's unless ``name`` says another.

    ``parse`` turns the text into the value and raises ValueError with what was
    expected; without it the default's type decides (bool, int, else str).  A variable
    without a default must be set.
    """
    if parse is not None:
        kind = parse.kind if isinstance(parse, Parser) else parse.__name__
    elif isinstance(default, bool):
        parse, kind = parse_bool, "boolean"
    elif isinstance(default, int):
        parse, kind = parse_int, "integer"
    else:
        parse, kind = str, "string"
    kind = {"parse_int": "integer", "parse_bool": "boolean"}.get(kind, kind)
    return Key(name, default, parse, kind, doc, legacy, preset, deprecated)


def numbered(options: type[O], *, doc: str, name: str = "") -> Mapping[int, O]:
    """Declare nodes ``name.N``, N a number, each of which holds ``options``."""
    return cast("Mapping[int, O]", Group(name, options, doc))


def one_of(*words: str) -> Parser[str]:
    """A parser that takes exactly one of some words."""

    @parser("|".join(words))
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"expected {', '.join(words[:-1])} or {words[-1]}")
        return text

    return parse


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=())
class Options:
    """Base of all declarations; an instance holds typed values and cannot change."""

    keys: ClassVar[Mapping[str, Key]] = MappingProxyType({})  # by attribute
    groups: ClassVar[Mapping[str, Group]] = MappingProxyType({})

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        keys = dict(cls.keys)
        groups = dict(cls.groups)
        for attribute, declared in list(vars(cls).items()):
            if isinstance(declared, Key):
                keys[attribute] = replace(declared, name=declared.name or attribute)
                delattr(cls, attribute)
            elif isinstance(declared, Group):
                groups[attribute] = replace(declared, name=declared.name or attribute)
                delattr(cls, attribute)
        cls.keys = MappingProxyType(keys)
        cls.groups = MappingProxyType(groups)

    def __init__(self, **values: Any) -> None:  # the keys say
        for attribute, declared in self.keys.items():
            if attribute not in values and isinstance(declared.default, _Required):
                raise TypeError(f"{type(self).__name__}: {attribute} is required")
            object.__setattr__(self, attribute, values.pop(attribute, declared.default))
        for attribute in self.groups:
            object.__setattr__(
                self, attribute, values.pop(attribute, MappingProxyType({}))
            )
        if values:
            raise TypeError(f"{type(self).__name__} has no {', '.join(values)}")

    def __setattr__(self, attribute: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} cannot change")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # values may be mappings

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"

    @classmethod
    def parse(cls, node: Node | None) -> Self:
        """The typed values that a node of the tree holds; None is an empty node.

        Raises ConfigError for a value that cannot be read, or one that must be there
        and is not.  Variables that are not declared are ignored.
        """
        values = {a: declared.value_of(node) for a, declared in cls.keys.items()}
        values |= {a: group.value_of(node) for a, group in cls.groups.items()}
        return cls(**values)

    @classmethod
    def legacy_config(cls, node: Node, text: str) -> None:
        """Put the string form of ``-s`` into a node of the tree.

        The keys that are declared WHOLE or POSITIONAL take the text or its first item;
        the rest is ``name=value`` items between commas, a bare name means ``true``.  A
        device whose string form is different overrides this.
        """
        rest: str | None = text
        for declared in cls.keys.values():
            if declared.legacy == WHOLE:
                node.set(declared.name, text)
                return
            if declared.legacy == POSITIONAL and rest is not None:
                first, comma, rest_text = rest.partition(",")
                node.set(declared.name, first)
                rest = rest_text if comma else None
        if rest is not None:
            parse_legacy_config(node, rest)

    @classmethod
    def presets(cls) -> Iterator[tuple[str, str]]:
        """The variables that are in the tree from the start, with their values."""
        for declared in cls.keys.values():
            if declared.preset:
                yield declared.name, declared.default_text()

    @classmethod
    def describe(cls, prefix: str = "") -> Iterator[KeyDoc]:
        """The rows of the manual's table, in the order of declaration."""
        for declared in cls.keys.values():
            yield KeyDoc(
                prefix + declared.name,
                declared.kind,
                declared.default_text(),
                declared.doc,
            )
        for group in cls.groups.values():
            yield from group.options.describe(f"{prefix}{group.name}.N.")

    @classmethod
    def unknown(cls, node: Node) -> Iterator[str]:
        """The full paths of the variables below ``node`` that are not declared."""
        names = {declared.name for declared in cls.keys.values()}
        groups = {group.name: group for group in cls.groups.values()}
        skip = len(node.path) + 1 if node.path else 0
        for path, _ in node.walk():
            name = path[skip:]
            if name in names:
                continue
            first, _, below = name.partition(".")
            group = groups.get(first)
            member, dot, _ = below.partition(".")
            if group is not None and dot and group.has(member):
                continue
            yield path
        for name, group in groups.items():
            members = node.node(name)
            for member, child in members.children() if members is not None else ():
                if group.has(member):
                    yield from group.options.unknown(child)


def parse_legacy_config(node: Node, text: str) -> None:
    """Put ``name=value,name,…`` into a node; a bare name means ``name=true``."""
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not name:
            raise ConfigError(f"Invalid option '{item}' in '{text}': empty name")
        node.set(name, value if equals else "true")
