r"""AML, the byte code of ACPI's definition blocks (ACPI 6.5, chapter 20).

    aml = Aml()
    with aml.device("COM1"):
        aml.name("_HID", eisaid("PNP0501"))
        aml.name("_CRS", template(io(0x3F8, 8), irq(4)))
    aml.to_bytes()

Arguments of type :data:`Term` are ints (constants), strs (names of objects, such as
``"PICM"`` or ``r"\_SB.PC00"``) or bytes (terms already encoded by a function here).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

Term = int | str | bytes

# 20.2.3 Data objects
_ZERO_OP: Final = b"\x00"
_ONE_OP: Final = b"\x01"
_NAME_OP: Final = b"\x08"
_BYTE_PREFIX: Final = b"\x0a"
_WORD_PREFIX: Final = b"\x0b"
_DWORD_PREFIX: Final = b"\x0c"
_STRING_PREFIX: Final = b"\x0d"
_QWORD_PREFIX: Final = b"\x0e"
_SCOPE_OP: Final = b"\x10"
_BUFFER_OP: Final = b"\x11"
_PACKAGE_OP: Final = b"\x12"
_METHOD_OP: Final = b"\x14"
_DUAL_NAME_PREFIX: Final = b"\x2e"
_MULTI_NAME_PREFIX: Final = b"\x2f"
_LOCAL0_OP: Final = 0x60
_ARG0_OP: Final = 0x68
_STORE_OP: Final = b"\x70"
_DECREMENT_OP: Final = b"\x76"
_SHIFT_LEFT_OP: Final = b"\x79"
_AND_OP: Final = b"\x7b"
_FIND_SET_RIGHT_BIT_OP: Final = b"\x82"
_NOTIFY_OP: Final = b"\x86"
_CREATE_WORD_FIELD_OP: Final = b"\x8b"
_LNOT_OP: Final = b"\x92"
_LLESS_OP: Final = b"\x95"
_IF_OP: Final = b"\xa0"
_ELSE_OP: Final = b"\xa1"
_RETURN_OP: Final = b"\xa4"
_OP_REGION_OP: Final = b"\x5b\x80"
_FIELD_OP: Final = b"\x5b\x81"
_DEVICE_OP: Final = b"\x5b\x82"

PCI_CONFIG: Final = 2  # region space
BYTE_ACC: Final = 1  # field access type
METHOD_ARGS_MAX: Final = 7


def pkg_length(size: int) -> bytes:
    """The length of a package that has ``size`` bytes behind the length (20.2.4)."""
    if size + 1 < 1 << 6:
        return bytes((size + 1,))
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes((extra << 6 | total & 0xF,)) + (total >> 4).to_bytes(
                extra, "little"
            )
    raise ValueError(f"an AML package of {size} bytes")


def name_path(path: str) -> bytes:
    r"""A NameString (20.2.2): segments of 1 to 4 characters, ``\`` and ``^`` before."""
    prefix = path[: len(path) - len(path.lstrip("\\^"))]
    rest = path[len(prefix) :]
    segments = rest.split(".") if rest else []
    encoded = b""
    for segment in segments:
        valid = segment.isascii() and segment.upper() == segment
        valid = valid and segment.replace("_", "A").isalnum()
        if not valid or len(segment) > 4 or segment[0].isdigit():
            raise ValueError(f"{path!r} is not a name of ACPI")
        encoded += segment.ljust(4, "_").encode()
    if not segments:
        return prefix.encode() + b"\x00"
    if len(segments) == 2:
        encoded = _DUAL_NAME_PREFIX + encoded
    elif len(segments) > 2:
        encoded = _MULTI_NAME_PREFIX + bytes((len(segments),)) + encoded
    return prefix.encode() + encoded


def integer(value: int) -> bytes:
    """An integer constant, as short as it can be."""
    if value == 0:
        return _ZERO_OP
    if value == 1:
        return _ONE_OP
    for size, prefix in (
        (1, _BYTE_PREFIX),
        (2, _WORD_PREFIX),
        (4, _DWORD_PREFIX),
        (8, _QWORD_PREFIX),
    ):
        if value < 1 << 8 * size:
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} is larger than an integer of AML")


def term(value: Term) -> bytes:
    """The encoding of an argument."""
    if isinstance(value, int):
        return integer(value)
    return name_path(value) if isinstance(value, str) else value


def string(text: str) -> bytes:
    """A string constant."""
    return _STRING_PREFIX + text.encode("ascii") + b"\x00"


def buffer(data: bytes) -> bytes:
    """A buffer with these contents."""
    body = integer(len(data)) + data
    return _BUFFER_OP + pkg_length(len(body)) + body


def package(elements: Sequence[Term]) -> bytes:
    """A package of up to 255 elements."""
    body = bytes((len(elements),)) + b"".join(map(term, elements))
    return _PACKAGE_OP + pkg_length(len(body)) + body


def eisaid(text: str) -> bytes:
    """A compressed EISA id such as ``PNP0501`` (6.1.5)."""
    value = 0
    for letter in text[:3]:
        value = value << 5 | ord(letter) - ord("@")
    value = value << 16 | int(text[3:], 16)
    return integer(int.from_bytes(value.to_bytes(4, "big"), "little"))


def arg(number: int) -> bytes:
    """A method's argument, 0 to 6."""
    return bytes((_ARG0_OP + number,))


def local(number: int) -> bytes:
    """A method's local variable, 0 to 7."""
    return bytes((_LOCAL0_OP + number,))


def and_(left: Term, right: Term) -> bytes:
    """Bitwise and; the result is the term's value."""
    return _AND_OP + term(left) + term(right) + _ZERO_OP


def shift_left(value: Term, count: Term) -> bytes:
    """``value << count``."""
    return _SHIFT_LEFT_OP + term(value) + term(count) + _ZERO_OP


def find_set_right_bit(value: Term) -> bytes:
    """The number of the lowest bit set, from 1; 0: none is."""
    return _FIND_SET_RIGHT_BIT_OP + term(value) + _ZERO_OP


def lnot(value: Term) -> bytes:
    """Logical not."""
    return _LNOT_OP + term(value)


def lless(left: Term, right: Term) -> bytes:
    """``left < right``."""
    return _LLESS_OP + term(left) + term(right)


def call(method: str, *arguments: Term) -> bytes:
    """The value of a method that is defined in the same table."""
    return name_path(method) + b"".join(map(term, arguments))


class Aml:
    """A term list being written; blocks are context managers."""

    def __init__(self) -> None:
        self._blocks = [bytearray()]

    def to_bytes(self) -> bytes:
        """What has been written; only outside of all blocks."""
        if len(self._blocks) != 1:
            raise ValueError("a block of AML is still open")
        return bytes(self._blocks[0])

    def emit(self, code: bytes) -> None:
        """Append a term."""
        self._blocks[-1] += code

    @contextmanager
    def _block(self, opcode: bytes, header: bytes) -> Iterator[None]:
        self._blocks.append(bytearray(header))
        try:
            yield
        finally:
            body = self._blocks.pop()
            self.emit(opcode + pkg_length(len(body)) + body)

    @contextmanager
    def scope(self, path: str) -> Iterator[None]:
        """``Scope (path)``."""
        with self._block(_SCOPE_OP, name_path(path)):
            yield

    @contextmanager
    def device(self, name: str) -> Iterator[None]:
        """``Device (name)``."""
        with self._block(_DEVICE_OP, name_path(name)):
            yield

    @contextmanager
    def method(self, name: str, arguments: int = 0) -> Iterator[None]:
        """``Method (name, arguments, NotSerialized)``."""
        if not 0 <= arguments <= METHOD_ARGS_MAX:
            raise ValueError(f"a method of {arguments} arguments")
        with self._block(_METHOD_OP, name_path(name) + bytes((arguments,))):
            yield

    @contextmanager
    def if_(self, predicate: Term) -> Iterator[None]:
        """``If (predicate)``."""
        with self._block(_IF_OP, term(predicate)):
            yield

    @contextmanager
    def else_(self) -> Iterator[None]:
        """``Else``, right behind an ``If``."""
        with self._block(_ELSE_OP, b""):
            yield

    def name(self, path: str, value: Term) -> None:
        """``Name (path, value)``."""
        self.emit(_NAME_OP + name_path(path) + term(value))

    def store(self, source: Term, target: Term) -> None:
        """``target = source``."""
        self.emit(_STORE_OP + term(source) + term(target))

    def decrement(self, target: Term) -> None:
        """``target--``."""
        self.emit(_DECREMENT_OP + term(target))

    def notify(self, device: str, value: Term) -> None:
        """``Notify (device, value)``."""
        self.emit(_NOTIFY_OP + name_path(device) + term(value))

    def return_(self, value: Term) -> None:
        """``Return (value)``."""
        self.emit(_RETURN_OP + term(value))

    def create_word_field(self, source: Term, offset: int, name: str) -> None:
        """``CreateWordField (source, offset, name)``."""
        self.emit(
            _CREATE_WORD_FIELD_OP + term(source) + integer(offset) + name_path(name)
        )

    def op_region(self, name: str, space: int, offset: int, length: int) -> None:
        """``OperationRegion (name, space, offset, length)``."""
        self.emit(
            _OP_REGION_OP
            + name_path(name)
            + bytes((space,))
            + integer(offset)
            + integer(length)
        )

    def field(self, region: str, access: int, units: Sequence[tuple[str, int]]) -> None:
        """``Field (region, access, NoLock, Preserve)``; units are (name, bits).

        A unit without a name leaves bits out.
        """
        body = name_path(region) + bytes((access,))
        for name, bits in units:
            body += (name_path(name) if name else b"\x00") + _bit_length(bits)
        self.emit(_FIELD_OP + pkg_length(len(body)) + body)


def _bit_length(bits: int) -> bytes:
    """Written as a package's length, but it does not count its own bytes."""
    if bits < 1 << 6:
        return bytes((bits,))
    for extra in (1, 2, 3):
        if bits < 1 << 4 + 8 * extra:
            return bytes((extra << 6 | bits & 0xF,)) + (bits >> 4).to_bytes(
                extra, "little"
            )
    raise ValueError(f"a field of {bits} bits")
