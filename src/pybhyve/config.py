r"""The tree of configuration variables: nodes with names, and string leaves.

bhyve_config(5).  Path components are separated by dots.  Values are expanded when they
are read: ``%(path)`` is the value of another variable, ``%%`` a percent sign, and a
backslash quotes the next character (only in values that contain a percent sign, as in
bhyve, so that other values keep their backslashes).  Unknown variables are kept.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pybhyve.errors import ConfigError

log = logging.getLogger(__name__)

DEPTH_MAX: Final = 15  # bhyve's limit of references inside references
LEVELS_MAX: Final = 64  # nodes inside nodes; a walk recurses
REFERENCES_MAX: Final = 4096  # a few lines could otherwise ask for 10**20 expansions

TRUE_WORDS: Final = frozenset({"true", "on", "yes", "1"})
FALSE_WORDS: Final = frozenset({"false", "off", "no", "0"})

_INTEGER = re.compile(r"\s*([+-]?)(?:0[xX]([0-9a-fA-F]+)|0([0-7]*)|([1-9][0-9]*))")


def strtol(text: str) -> tuple[int, str]:
    """Split a text into the number of base 0 that it begins with, and what follows.

    Raises ValueError where ``text`` begins with no number.
    """
    match = _INTEGER.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a number")
    sign, hexa, octal, decimal = match.groups()
    digits, base = next(
        (d, b) for d, b in ((hexa, 16), (octal, 8), (decimal, 10)) if d is not None
    )
    if len(digits) > 64:  # longer than any number of 64 bits; int() is quadratic
        raise ValueError("the number is too large")
    value = int(digits or "0", base)
    return (-value if sign == "-" else value), text[match.end() :]


def parse_int(text: str) -> int:
    """A whole string as a number of base 0: ``12``, ``0x1f``, ``017``, ``-3``."""
    value, rest = strtol(text)
    if rest:
        raise ValueError(f"{text!r} is not a number")
    return value


def parse_bool(text: str) -> bool:
    """One of bhyve's words for true and false, in any case."""
    word = text.lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError("expected true, on, yes, 1 or false, off, no, 0")


class Node:
    """A node of the tree: an ordered set of named leaves and nodes.

    Paths given to its methods are relative to the node.
    """

    def __init__(self, root: Node | None = None, path: str = "") -> None:
        self.root: Node = self if root is None else root
        self.path = path
        self._children: dict[str, str | Node] = {}

    def path_of(self, path: str) -> str:
        """The full name of a variable below this node, for messages."""
        return f"{self.path}.{path}" if self.path else path

    def _walk_to(self, parts: list[str]) -> Node | None:
        node: Node = self
        for part in parts:
            child = node._children.get(part)
            if not isinstance(child, Node):
                return None
            node = child
        return node

    def node(self, path: str) -> Node | None:
        """The node at ``path``; None where there is none, or where a leaf is."""
        return self._walk_to(path.split("."))

    def create(self, path: str) -> Node:
        """The node at ``path``, made together with the nodes above it if need be.

        Raises ConfigError where a component is empty or a leaf is in the way.
        """
        node: Node = self
        for part in self._parts(path):
            child = node._children.get(part)
            if child is None:
                child = Node(self.root, node.path_of(part))
                node._children[part] = child
            elif isinstance(child, str):
                raise ConfigError(
                    f"Invalid configuration node {self.path_of(path)}: "
                    f"{node.path_of(part)} is a variable"
                )
            node = child
        return node

    def _parts(self, path: str) -> list[str]:
        parts = path.split(".")
        wrong = "too deep" if len(parts) > LEVELS_MAX else "empty name"
        if not all(parts) or len(parts) > LEVELS_MAX:
            raise ConfigError(
                f"Invalid configuration node {self.path_of(path)[:80]}: {wrong}"
            )
        return parts

    def set(self, path: str, value: str) -> None:
        """Give a leaf a value; a leaf that exists moves to the end of its node.

        Raises ConfigError where the path has an empty component, passes through a leaf
        or names a node.
        """
        *above, name = self._parts(path)
        node = self.create(".".join(above)) if above else self
        if isinstance(node._children.get(name), Node):
            raise ConfigError(
                f"Attempting to add value {value} to existing node {self.path_of(path)}"
            )
        node._children.pop(name, None)
        node._children[name] = value

    def set_default(self, path: str, value: str) -> None:
        """Give a leaf a value unless it has one."""
        if self.raw(path) is None:
            self.set(path, value)

    def raw(self, path: str) -> str | None:
        """The value of a leaf as it was set; None where it was not."""
        *above, name = path.split(".")
        node = self._walk_to(above)
        value = node._children.get(name) if node is not None else None
        return value if isinstance(value, str) else None

    def get(self, path: str) -> str | None:
        """The expanded value of a leaf; None where it was not set.

        Raises ConfigError where references are too many or too deep, or go round.
        """
        value = self.raw(path)
        if value is None or "%" not in value:
            return value
        return _Expansion(self.root, self.path_of(path)).expand(value, 0)

    def get_bool(self, path: str, default: bool) -> bool:
        """The value of a leaf as a truth value."""
        value = self.get(path)
        if value is None:
            return default
        try:
            return parse_bool(value)
        except ValueError:
            raise ConfigError(
                f"Invalid value {value} for boolean variable {self.path_of(path)}"
            ) from None

    def get_int(self, path: str, default: int) -> int:
        """The value of a leaf as a number of base 0."""
        value = self.get(path)
        if value is None:
            return default
        try:
            return parse_int(value)
        except ValueError:
            raise ConfigError(
                f"Invalid value {value} for integer variable {self.path_of(path)}"
            ) from None

    def children(self) -> Iterator[tuple[str, Node]]:
        """The nodes directly below, with their names, oldest first."""
        for name, child in self._children.items():
            if isinstance(child, Node):
                yield name, child

    def leaves(self) -> Iterator[tuple[str, str]]:
        """The leaves directly below, with their raw values, oldest first."""
        for name, child in self._children.items():
            if isinstance(child, str):
                yield name, child

    def walk(self) -> Iterator[tuple[str, str]]:
        """Every leaf below as (full path, raw value), in the order of the dump."""
        for name, child in self._children.items():
            if isinstance(child, str):
                yield self.path_of(name), child
            else:
                yield from child.walk()


class Config(Node):
    """The root of the tree, with what bhyve fills it from."""

    def assign(self, text: str) -> None:
        """``var=value`` of ``-o``.

        Raises ValueError where there is no ``=`` or nothing behind it, ConfigError
        where the tree refuses the variable.
        """
        path, _, value = text.partition("=")
        if not value:
            raise ValueError("expected variable=value")
        self.set(path, value)

    def load(self, path: str | Path) -> None:
        """Read a configuration file: a ``var=value`` a line, ``#`` starts a comment.

        Raises ConfigError where the file cannot be read or a line is none of these.
        """
        try:
            text = Path(path).read_bytes().decode(errors="surrogateescape")
        except (OSError, ValueError) as error:
            raise ConfigError(f"Failed to open configuration file {path}") from error
        for number, line in enumerate(text.split("\n"), 1):
            if not line or line.startswith("#"):
                continue
            try:
                self.assign(line)
            except ValueError:
                raise ConfigError(
                    f"{path} line {number}: invalid config option '{line}'"
                ) from None
            except ConfigError as error:
                raise ConfigError(f"{path} line {number}") from error

    def dump(self) -> str:
        """``full.path=value`` a line for every leaf, unexpanded, in order."""
        return "".join(f"{path}={value}\n" for path, value in self.walk())


class _Expansion:
    """The expansion of one value."""

    def __init__(self, root: Node, path: str) -> None:
        self._root = root
        self._path = path
        self._references = 0

    def expand(self, value: str, depth: int) -> str:
        if "%" not in value:
            return value
        out: list[str] = []
        at = 0
        while at < len(value):
            char = value[at]
            if char == "\\" and at + 1 < len(value):
                out.append(value[at + 1])
                at += 2
            elif value.startswith("%%", at):
                # deviation: bhyve leaves both signs, against its manual.
                out.append("%")
                at += 2
            elif char == "%" and (end := self._end(value, at)) is not None:
                out.append(self._reference(value[at + 2 : end], depth))
                at = end + 1
            else:
                if char == "%":
                    log.warning(
                        "Invalid reference in configuration value %s of %s",
                        value,
                        self._path,
                    )
                out.append(char)
                at += 1
        return "".join(out)

    @staticmethod
    def _end(value: str, at: int) -> int | None:
        if not value.startswith("%(", at):
            return None
        end = value.find(")", at)
        return end if end >= 0 else None

    def _reference(self, path: str, depth: int) -> str:
        if not path:
            log.warning("Empty reference in configuration value of %s", self._path)
            return ""
        self._references += 1
        if depth >= DEPTH_MAX or self._references > REFERENCES_MAX:
            # deviation: bhyve warns, and goes on with a value that is not meant.
            raise ConfigError(f"Too many references in the value of {self._path}")
        value = self._root.raw(path)
        if value is None:
            log.warning(
                "Failed to expand %%(%s) in the value of %s: no such variable",
                path,
                self._path,
            )
            return ""
        return self.expand(value, depth + 1)
