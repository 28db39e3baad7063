"""The AML encoder, against bytes from the specification and against iasl."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybhyve.amd64.acpi.aml import (
    Aml,
    and_,
    arg,
    buffer,
    call,
    eisaid,
    find_set_right_bit,
    integer,
    lless,
    lnot,
    local,
    name_path,
    package,
    pkg_length,
    shift_left,
    string,
)
from pybhyve.amd64.acpi.dsdt import Dsdt, build_dsdt
from pybhyve.amd64.acpi.resources import (
    bus_range,
    io,
    io_range,
    irq,
    irq_level_low_shared,
    memory32_fixed,
    memory32_range,
    memory64_range,
    template,
)
from pybhyve.amd64.acpi.table import build_table, checksum
from pybhyve.device import Device


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("PIC", b"PIC_"),
        ("\\", b"\\\0"),
        ("\\_SB", b"\\_SB_"),
        ("^^PCI0", b"^^PCI0"),
        ("\\_SB.PC00", b"\\\x2e_SB_PC00"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
    ],
)
def test_names(path, encoded):
    assert name_path(path) == encoded


@pytest.mark.parametrize("path", ["abcd", "ABCDE", "A..B", "1AB", "A-B", "A.B\\"])
def test_bad_names(path):
    with pytest.raises(ValueError, match="not a name"):
        name_path(path)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0x10000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
    ],
)
def test_integers(value, encoded):
    assert integer(value) == bytes.fromhex(encoded)


def test_integer_too_large():
    with pytest.raises(ValueError, match="larger"):
        integer(1 << 64)


def decode_pkg_length(data: bytes) -> tuple[int, int]:
    """Total length and bytes of the length, by the words of 20.2.4."""
    lead = data[0]
    extra = lead >> 6
    if extra == 0:
        return lead & 0x3F, 1
    value = lead & 0x0F
    for index in range(extra):
        value |= data[1 + index] << 4 + 8 * index
    return value, 1 + extra


@given(st.one_of(st.integers(0, 5000), st.integers(0, (1 << 28) - 5)))
def test_package_lengths(size):
    encoded = pkg_length(size)

    assert decode_pkg_length(encoded) == (size + len(encoded), len(encoded))


def test_package_length_too_large():
    with pytest.raises(ValueError, match="AML package"):
        pkg_length(1 << 28)


def test_eisa_id():
    assert eisaid("PNP0A03") == b"\x0c\x41\xd0\x0a\x03"


def test_open_block():
    aml = Aml()
    with (
        aml.device("DEV0"),
        pytest.raises(ValueError, match="still open"),
    ):
        aml.to_bytes()


def test_too_many_arguments():
    with pytest.raises(ValueError, match="arguments"), Aml().method("M", 8):
        pass


def everything() -> bytes:
    """A table with each construct of the encoder once."""
    aml = Aml()
    aml.name("NUMB", 0x123456789A)
    aml.name("TEXT", string("text"))
    aml.name("BUFF", buffer(bytes(100)))
    aml.name("PACK", package([0, 1, 0x1234, package([string("x"), "NUMB"])]))
    with aml.method("SHFT", 1):
        aml.store(shift_left(1, and_(arg(0), 0x0F)), local(0))
        aml.decrement(local(0))
        aml.return_(local(0))
    with aml.scope("\\_SB"):
        with aml.device("PCI0"):
            aml.name("_HID", eisaid("PNP0A03"))
            aml.name("_CRS", template(bus_range(0, 255), io_range(0, 0xCF7)))
        with aml.device("DEV0"):
            aml.name("_ADR", 0x10000)
            aml.op_region("REGN", 2, 0, 0x100)
            aml.field("REGN", 1, [("", 0x300), ("FLD0", 8), ("", 40), ("FLD1", 16)])
            aml.name(
                "_CRS",
                template(
                    io(0x3F8, 8),
                    irq(4),
                    irq_level_low_shared([3, 5]),
                    memory32_fixed(0xFED00000, 0x400),
                    memory32_range(0xC0000000, 0xC01FFFFF),
                    memory64_range(1 << 35, (1 << 36) - 1),
                ),
            )
            with aml.method("_SRS", 1):
                aml.create_word_field(arg(0), 1, "WORD")
                aml.store(find_set_right_bit("WORD"), local(1))
                with aml.if_(lnot(lless(local(1), 3))):
                    aml.store(call("SHFT", "WORD"), "FLD0")
                with aml.else_():
                    aml.store(0, "FLD0")
    return build_table("DSDT", 2, aml.to_bytes()).at({})


def test_iasl_reads_and_recompiles_it_to_the_same(iasl, tmp_path):
    table = everything()
    (tmp_path / "dsdt.dat").write_bytes(table)
    iasl(tmp_path, "-d", "dsdt.dat")
    source = (tmp_path / "dsdt.dsl").read_text()

    assert "CreateWordField (Arg0, One, WORD)" in source
    assert "Local1 = FindSetRightBit (WORD)" in source

    output = iasl(tmp_path, "-oa", "dsdt.dsl")  # without the optimiser

    assert "0 Errors" in output
    # Not to the same bytes: it merges a store into the operator before.
    (tmp_path / "dsdt.aml").rename(tmp_path / "dsdt.dat")
    iasl(tmp_path, "-d", "dsdt.dat")
    again = (tmp_path / "dsdt.dsl").read_text()
    assert (
        again.partition("DefinitionBlock")[2] == source.partition("DefinitionBlock")[2]
    )


class Part(Device):
    def __init__(self, scope: str) -> None:
        self.acpi_scope = scope

    def dsdt(self, aml: Dsdt) -> None:
        with aml.device("PART"):
            aml.name("_ADR", 0)


def test_a_part_without_a_place_is_an_error():
    with pytest.raises(ValueError, match="no place for lost"):
        build_dsdt({"lost": Part("PC07"), "found": Part("ISA")})


def test_checksum():
    table = build_table("TEST", 1, b"abc").at({})

    assert checksum(table) == 0
    assert len(table) == 39
    assert table[16:24] == b"BVTEST \0"
