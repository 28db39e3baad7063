"""Declared once: parsing, string forms, tables, presets and the unknown."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pybhyve.config import Config, parse_int
from pybhyve.errors import ConfigError
from pybhyve.options import (
    POSITIONAL,
    WHOLE,
    KeyDoc,
    Options,
    key,
    numbered,
    one_of,
)
from pybhyve.variables import GlobalOptions


class DiskOptions(Options):
    path: str = key(doc="File.", legacy=POSITIONAL)
    ro: bool = key(False, doc="Read only.")
    size: int | None = key(None, parse=parse_int, doc="Sector size.")
    cache: str = key("on", parse=one_of("on", "off"), name="cache.mode", doc="Cache.")


class HbaOptions(Options):
    port: Mapping[int, DiskOptions] = numbered(DiskOptions, doc="A port.")
    name: str | None = key(None, doc="Name.")


class TtyOptions(Options):
    path: str = key(doc="Backend.", legacy=WHOLE)


def node_of(*assignments: str) -> Config:
    config = Config()
    for text in assignments:
        config.assign(text)
    return config


def test_typed_values():
    options = DiskOptions.parse(node_of("path=/d", "ro=on", "size=0x200"))

    assert options == DiskOptions(path="/d", ro=True, size=512, cache="on")


def test_defaults():
    options = DiskOptions.parse(node_of("path=/d"))

    assert (options.ro, options.size, options.cache) == (False, None, "on")


def test_what_must_be_set():
    config = Config()
    config.create("pci.0.3.0")

    with pytest.raises(ConfigError, match=r"^pci\.0\.3\.0\.path is not set$"):
        DiskOptions.parse(config.node("pci.0.3.0"))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("d.ro=maybe", "Invalid value maybe for boolean variable d.ro"),
        ("d.size=x", "Invalid value x for integer variable d.size"),
        (
            "d.cache.mode=x",
            r"Invalid value x for on\|off variable d.cache.mode: expected on or off",
        ),
    ],
)
def test_a_wrong_value_is_named(assignment, message):
    config = node_of("d.path=p", assignment)

    with pytest.raises(ConfigError, match=message):
        DiskOptions.parse(config.node("d"))


def test_values_are_expanded():
    config = node_of("name=vm", "d.path=/dev/%(name)")

    assert DiskOptions.parse(config.node("d")).path == "/dev/vm"


def test_numbered_nodes_are_sorted_by_number():
    config = node_of("port.10.path=b", "port.2.path=a", "port.x.path=ignored")

    options = HbaOptions.parse(config)

    assert list(options.port) == [2, 10]
    assert options.port[10].path == "b"


def test_instances_do_not_change():
    options = DiskOptions(path="/d")

    with pytest.raises(AttributeError):
        options.path = "/e"  # type: ignore[misc]  # what is tested


@pytest.mark.parametrize("values", [{}, {"path": "a", "pth": "b"}])
def test_an_instance_needs_the_declared_values(values):
    with pytest.raises(TypeError):
        DiskOptions(**values)


@pytest.mark.parametrize(
    ("text", "dump"),
    [
        ("/d", "path=/d\n"),
        ("/d,ro", "path=/d\nro=true\n"),
        ("/d,ro,size=512", "path=/d\nro=true\nsize=512\n"),
        ("a=b,size=4,other=x=y", "path=a=b\nsize=4\nother=x=y\n"),
    ],
)
def test_string_form_with_a_first_item(text, dump):
    config = Config()

    DiskOptions.legacy_config(config, text)

    assert config.dump() == dump


def test_string_form_that_is_one_value():
    config = Config()

    TtyOptions.legacy_config(config, "tcp=a,b")

    assert config.dump() == "path=tcp=a,b\n"


def test_string_form_of_names_and_values():
    config = Config()

    HbaOptions.legacy_config(config, "name=x,flag")

    assert config.dump() == "name=x\nflag=true\n"


@pytest.mark.parametrize("text", ["/d,", "/d,,ro", "/d,=x"])
def test_string_form_with_an_empty_name(text):
    with pytest.raises(ConfigError, match="empty name"):
        DiskOptions.legacy_config(Config(), text)


def test_tables_follow_the_declaration():
    assert list(HbaOptions.describe("pci.B.S.F.")) == [
        KeyDoc("pci.B.S.F.name", "string", "", "Name."),
        KeyDoc("pci.B.S.F.port.N.path", "string", "", "File."),
        KeyDoc("pci.B.S.F.port.N.ro", "boolean", "false", "Read only."),
        KeyDoc("pci.B.S.F.port.N.size", "integer", "", "Sector size."),
        KeyDoc("pci.B.S.F.port.N.cache.mode", "on|off", "on", "Cache."),
    ]


def test_unknown_variables_are_found_everywhere():
    config = node_of(
        "name=x",
        "nam=y",
        "port.0.path=p",
        "port.0.pth=q",
        "port.x.path=r",
        "port.1=s",
        "other.z=1",
    )

    assert sorted(HbaOptions.unknown(config)) == [
        "nam",
        "other.z",
        "port.0.pth",
        "port.1",
        "port.x.path",
    ]


def test_subclasses_have_the_keys_of_their_base():
    class NamedDisk(DiskOptions):
        ser: str = key("none", doc="Serial number.")

    options = NamedDisk.parse(node_of("path=p", "ser=1"))

    assert (options.path, options.ser) == ("p", "1")


def test_presets_are_bhyves():
    assert list(GlobalOptions.presets()) == [
        ("acpi_tables", "true"),
        ("acpi_tables_in_memory", "true"),
        ("memory.size", "256M"),
        ("x86.strictmsr", "true"),
        ("x86.verbosemsr", "false"),
        ("lpc.fwcfg", "bhyve"),
    ]


def test_every_global_default_parses_back():
    config = Config()
    for row in GlobalOptions.describe():
        if row.default and ".N." not in row.name:
            config.set(row.name, row.default)

    assert GlobalOptions.parse(config) == GlobalOptions.parse(Config())
