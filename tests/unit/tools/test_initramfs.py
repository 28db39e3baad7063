"""cpio archives: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.fetch import FetchError
from tools.initramfs import (
    Entry,
    modules_with_dependencies,
    pack,
    subset,
    unpack,
)

NAMES = st.text("abc-._", min_size=1, max_size=20)
ENTRIES = st.one_of(
    st.builds(Entry.directory, NAMES),
    st.builds(Entry.file, NAMES, st.binary(max_size=50)),
    st.builds(Entry.link, NAMES, NAMES),
    st.builds(Entry.character, NAMES, st.integers(0, 255), st.integers(0, 255)),
)


@given(st.lists(ENTRIES, max_size=5))
def test_round_trip(entries: list[Entry]) -> None:
    archive = pack(entries)

    assert list(unpack(archive)) == entries
    assert len(archive) % 4 == 0
    assert pack(entries) == archive


def test_header_is_the_documented_one() -> None:
    archive = pack([Entry.file("init", b"hello", 0o755)])
    fields = [archive[6 + 8 * i : 14 + 8 * i] for i in range(13)]

    assert archive[:6] == b"070701"
    assert fields == [
        *(b"00000001", b"000081ed"),  # inode, mode
        *(b"00000000", b"00000000", b"00000001"),  # owner, group, links
        *(b"00000000", b"00000005"),  # time, size
        *(b"00000000", b"00000000", b"00000000", b"00000000"),  # devices
        *(b"00000005", b"00000000"),  # name size, checksum
    ]
    assert archive[110:130] == b"init\0\0hello\0\0\0" + b"070701"


@given(st.binary(max_size=300))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="cpio"):
        list(unpack(data))


@given(st.lists(ENTRIES, max_size=3), st.data())
def test_a_cut_archive_is_refused(entries: list[Entry], data: st.DataObject) -> None:
    archive = pack(entries)
    # The trailer's last bytes are padding.
    cut = data.draw(st.integers(0, len(archive) - 5))

    with pytest.raises(ValueError, match="cpio"):
        list(unpack(archive[:cut]))


def test_subset_keeps_what_is_named_its_directories_and_its_links() -> None:
    archive = pack(
        [
            Entry.directory("bin"),
            Entry.file("bin/busybox", b"program"),
            Entry.link("bin/sh", "busybox"),
            Entry.link("bin/vi", "vim"),
            Entry.file("bin/other", b""),
            Entry.directory("dev"),
            Entry.character("dev/console", 5, 1),
            Entry.directory("etc"),
        ]
    )
    kept = [entry.path for entry in unpack(subset(archive, ["bin/busybox", "dev"]))]

    assert kept == ["bin", "bin/busybox", "bin/sh", "dev", "dev/console"]


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A kernel's modules: a disk's needs a bus's, both need what is built in."""
    (tmp_path / "kernel/drivers").mkdir(parents=True)
    (tmp_path / "modules.builtin").write_text("kernel/lib/crc-common.ko\n")
    for name, depends in {
        "disk": b"bus-core,crc_common",
        "bus-core": b"crc-common",
        "lost": b"nowhere",
        "alone": b"",
    }.items():
        info = b"\0license=GPL\0depends=" + depends + b"\0retpoline=Y\0"
        (tmp_path / f"kernel/drivers/{name}.ko").write_bytes(info)
    return tmp_path


def test_modules_come_after_what_they_need(modules: Path) -> None:
    found = modules_with_dependencies(modules, ["alone", "disk", "bus_core"])

    assert [path.name for path in found] == ["alone.ko", "bus-core.ko", "disk.ko"]


def test_a_module_that_is_not_there_is_named(modules: Path) -> None:
    with pytest.raises(FetchError, match="no module nowhere"):
        modules_with_dependencies(modules, ["lost"])
