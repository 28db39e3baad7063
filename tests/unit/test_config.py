"""The configuration tree: order, expansion, words, files, dump (bhyve_config(5))."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybhyve.config import Config, parse_bool, parse_int, strtol
from pybhyve.errors import ConfigError


def config_of(**values: str) -> Config:
    config = Config()
    for name, value in values.items():
        config.set(name.replace("__", "."), value)
    return config


# -- the tree --------------------------------------------------------------------------


def test_dump_is_depth_first_in_order_of_insertion():
    config = Config()
    for text in ("a=1", "n.x=2", "b=3", "n.m.y=4", "n.z=5"):
        config.assign(text)

    assert config.dump() == "a=1\nn.x=2\nn.m.y=4\nn.z=5\nb=3\n"


def test_setting_a_leaf_again_moves_it_to_the_end():
    config = config_of(a="1", b="2")

    config.set("a", "3")

    assert config.dump() == "b=2\na=3\n"


def test_dump_is_not_expanded():
    config = config_of(a="%(b)", b="2")

    assert config.dump() == "a=%(b)\nb=2\n"


@pytest.mark.parametrize("path", ["", ".", "a.", ".a", "a..b", "a.b..", "..a"])
def test_an_empty_component_is_refused(path):
    with pytest.raises(ConfigError, match="Invalid configuration node"):
        Config().set(path, "x")


def test_a_leaf_is_no_node():
    config = config_of(a="1")

    with pytest.raises(ConfigError, match=r"a\.b: a is a variable"):
        config.set("a.b.c", "2")


def test_a_node_takes_no_value():
    config = config_of(a__b="1")

    with pytest.raises(
        ConfigError, match="Attempting to add value 2 to existing node a"
    ):
        config.set("a", "2")


def test_a_node_below_knows_its_full_path():
    config = config_of(a__b__c="1")
    node = config.node("a.b")

    assert node is not None
    assert node.path_of("c") == "a.b.c"
    assert list(node.walk()) == [("a.b.c", "1")]


def test_nodes_are_not_nested_without_end():
    with pytest.raises(ConfigError, match="too deep"):
        Config().set(".".join("a" * 5000), "1")


# -- expansion -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expanded"),
    [
        ("plain", "plain"),
        ("%(name)", "vm1"),
        ("a%(name)b%(name)", "avm1bvm1"),
        ("%(twice)", "vm1-vm1"),
        ("%(missing)", ""),
        ("%()", ""),
        ("50%", "50%"),
        ("%(name", "%(name"),
        ("%d", "%d"),
        ("%%", "%"),
        ("%%(name)", "%(name)"),
        ("100%%%(name)", "100%vm1"),
        (r"\%(name)", "%(name)"),
        (r"a\bc", r"a\bc"),  # no percent sign, no quoting
        (r"\b%(name)", "bvm1"),
        ("trailing%(name)\\", "trailingvm1\\"),
    ],
)
def test_expansion(value, expanded):
    config = config_of(name="vm1", twice="%(name)-%(name)", v=value)

    assert config.get("v") == expanded


def test_expansion_warns_of_what_it_cannot_expand(caplog):
    config_of(v="%(missing)").get("v")

    assert "no such variable" in caplog.text


def test_references_go_fifteen_deep():
    config = config_of(v0="end")
    for depth in range(1, 20):
        config.set(f"v{depth}", f"%(v{depth - 1})")

    assert config.get("v15") == "end"
    with pytest.raises(ConfigError, match="Too many references in the value of v16"):
        config.get("v16")


def test_a_reference_to_itself_is_refused():
    with pytest.raises(ConfigError, match="Too many references in the value of v"):
        config_of(v="%(v)").get("v")


def test_expansion_ends_when_references_multiply():
    config = Config()
    config.set("v0", "x")
    for depth in range(1, 15):
        config.set(f"v{depth}", f"%(v{depth - 1})" * 50)

    with pytest.raises(ConfigError, match="Too many references"):
        config.get("v14")


# -- words -----------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["true", "on", "yes", "1", "TRUE", "On"])
def test_words_for_true(word):
    assert parse_bool(word) is True


@pytest.mark.parametrize("word", ["false", "off", "no", "0", "FALSE", "oFF"])
def test_words_for_false(word):
    assert parse_bool(word) is False


@pytest.mark.parametrize("word", ["", "2", "y", "truee", " true"])
def test_other_words_are_no_truth_values(word):
    with pytest.raises(
        ConfigError, match=f"Invalid value {word} for boolean variable a.b"
    ):
        config_of(a__b=word).get_bool("a.b", False)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("12", 12), ("0x1F", 31), ("017", 15), ("-3", -3), (" +4", 4)],
)
def test_integers_of_base_0(text, value):
    assert parse_int(text) == value


@pytest.mark.parametrize("text", ["", "x", "0x", "1x", "08", "1 ", "--1", "1_0", "٣"])
def test_other_texts_are_no_integers(text):
    with pytest.raises(ValueError, match="not a number"):
        parse_int(text)


def test_strtol_stops_where_the_number_ends():
    assert strtol("12-15") == (12, "-15")


# -- files -----------------------------------------------------------------------------


def test_config_file(tmp_path):
    file = tmp_path / "vm.conf"
    file.write_text("# comment\n\na=1\nb.c=x=y \n")
    config = Config()

    config.load(file)

    assert config.dump() == "a=1\nb.c=x=y \n"


def test_a_comment_begins_in_the_first_column(tmp_path):
    file = tmp_path / "vm.conf"
    file.write_text(" #a=1\n")
    config = Config()

    config.load(file)

    assert config.dump() == " #a=1\n"


@pytest.mark.parametrize("line", ["a", "a=", " "])
def test_a_line_that_sets_nothing_is_refused(tmp_path, line):
    file = tmp_path / "vm.conf"
    file.write_text(f"# x\n{line}\n")

    with pytest.raises(ConfigError, match="line 2: invalid config option"):
        Config().load(file)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="Failed to open"):
        Config().load(tmp_path / "missing")
    with pytest.raises(ConfigError, match="Failed to open"):
        Config().load(tmp_path)


names = st.text(
    st.characters(exclude_characters=".=\n\0", exclude_categories=["Cs"]), min_size=1
).filter(lambda name: not name.startswith("#"))
paths = st.lists(names, min_size=1, max_size=4).map(".".join)
values = st.text(
    st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), min_size=1
)


@given(st.lists(st.tuples(paths, values)))
def test_a_dump_reads_back_as_the_same_tree(tmp_path_factory, assignments):
    config = Config()
    for path, value in assignments:
        try:
            config.set(path, value)
        except ConfigError:
            assert config.node(path) or any(
                config.raw(path[:dot]) is not None
                for dot in range(len(path))
                if path[dot] == "."
            )
    file = tmp_path_factory.getbasetemp() / "dump"
    file.write_text(config.dump(), newline="\n")
    again = Config()

    again.load(file)

    assert again.dump() == config.dump()


@given(st.text(st.sampled_from("ab%()\\.")), st.text(st.sampled_from("ab%()\\.")))
def test_expansion_takes_any_text(first, second):
    config = config_of(a=first, b=second)

    with contextlib.suppress(ConfigError):
        assert isinstance(config.get("a"), str)
        assert isinstance(config.get("b"), str)
