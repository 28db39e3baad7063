"""Structures in guest memory: a struct format and the specification's field names.

DESC = Layout("<QIHH", "addr len flags next")   # virtio 1.2, 2.7.5
desc = DESC.at(mem, gpa)
desc.addr, desc.next
"""

from __future__ import annotations

import struct
from collections import namedtuple
from typing import Any, Protocol


class GuestMemory(Protocol):
    """What devices need of guest memory; :class:`pybhyve.vmmapi.VmCtx` has it."""

    def read_mem(self, gpa: int, length: int, /) -> bytes:
        """Bytes at guest-physical ``gpa``."""

    def write_mem(self, gpa: int, data: bytes, /) -> None:
        """Store ``data`` at guest-physical ``gpa``."""


class Layout:
    """A packed record of ``size`` bytes; records read from it are named tuples.

    ``format`` is one of :mod:`struct`, with its byte order spelled; ``fields`` are
    blank-separated names, one for each value the format yields.
    """

    __slots__ = ("_make", "_struct", "fields", "size")

    def __init__(self, format: str, fields: str) -> None:
        if format[:1] not in "<>=!":
            raise ValueError(f"{format!r} leaves the byte order to the host")
        self._struct = struct.Struct(format)
        self.size = self._struct.size
        record: Any = namedtuple("Record", fields)  # type: ignore[misc]  # names by data
        self.fields: tuple[str, ...] = record._fields
        self._make = record._make
        if len(self._struct.unpack(bytes(self.size))) != len(self.fields):
            raise ValueError(f"{format!r} does not have the fields {fields!r}")

    def at(self, mem: GuestMemory, gpa: int) -> Any:
        """The record at ``gpa``; raises what ``mem`` raises for a bad address."""
        return self._make(self._struct.unpack(mem.read_mem(gpa, self.size)))

    def put(self, mem: GuestMemory, gpa: int, *values: Any) -> None:
        """Store a record at ``gpa``; raises what ``mem`` raises for a bad address."""
        mem.write_mem(gpa, self._struct.pack(*values))

    def unpack(self, buffer: Any, offset: int = 0) -> Any:
        """The record in a bytes-like object; struct.error when it is too short."""
        return self._make(self._struct.unpack_from(buffer, offset))

    def pack(self, *values: Any) -> bytes:
        """The record's bytes; struct.error when a value does not fit its field."""
        return self._struct.pack(*values)
