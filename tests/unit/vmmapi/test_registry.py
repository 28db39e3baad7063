"""VMs by name: their directories, locks, memory files and states."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybhyve.errors import (
    MemorySizeError,
    VmBusyError,
    VmError,
    VmExistsError,
    VmNameError,
    VmNotFoundError,
)
from pybhyve.vmmapi import MB, registry
from pybhyve.vmmapi.registry import SHM, VmDir, _decoded, _encoded, run_dir


@pytest.fixture(autouse=True)
def rundir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    monkeypatch.setenv("PYBHYVE_RUNDIR", str(path))
    return path


# -- the run directory -----------------------------------------------------------------


def test_the_run_directory_is_private(rundir):
    assert run_dir() == rundir
    assert stat.S_IMODE(rundir.stat().st_mode) == 0o700


def test_the_run_directory_of_a_session(monkeypatch, tmp_path):
    monkeypatch.delenv("PYBHYVE_RUNDIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    assert run_dir() == tmp_path / "pybhyve"


def test_a_run_directory_open_to_others_is_refused(rundir):
    rundir.mkdir(mode=0o755)

    with pytest.raises(VmError, match="open to other users: chmod 700"):
        run_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_run_directory_of_somebody_else_is_refused(rundir):
    rundir.mkdir(mode=0o700)
    os.chown(rundir, 12345, -1)

    with pytest.raises(VmError, match="belongs to user 12345"):
        run_dir()


def test_a_run_directory_behind_a_link_is_refused(rundir, tmp_path):
    rundir.symlink_to(tmp_path)

    with pytest.raises(VmError, match="is not a directory"):
        run_dir()


def test_a_run_directory_that_cannot_be_made(monkeypatch):
    monkeypatch.setenv("PYBHYVE_RUNDIR", "/proc/none/run")

    with pytest.raises(VmError, match="set PYBHYVE_RUNDIR"):
        run_dir()


# -- names and life --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/", "a\0b", "x" * 230, "é" * 115]
)
def test_names_that_cannot_be(name):
    with pytest.raises(VmNameError):
        VmDir.create(name)


@pytest.mark.parametrize("name", ["vm", "x" * 229, "a b", "-x", "é\udcff", ".x"])
def test_names_that_can_be(name):
    with VmDir.create(name) as vm:
        assert vm.path.is_dir()


def test_a_name_is_taken_once():
    with VmDir.create("vm"), pytest.raises(VmExistsError, match="'vm' exists already"):
        VmDir.create("vm")


def test_only_what_exists_can_be_opened(rundir):
    with pytest.raises(VmNotFoundError, match="there is no VM 'vm'"):
        VmDir.open("vm")

    assert list(rundir.iterdir()) == []


def test_a_vm_outlives_who_made_it():
    VmDir.create("vm").close()

    VmDir.open("vm").close()


def test_a_vm_in_use_is_refused_and_the_user_named():
    with (
        VmDir.create("vm"),
        pytest.raises(VmBusyError, match=f"in use by process {os.getpid()}"),
    ):
        VmDir.open("vm")


def test_a_vm_whose_user_was_killed_is_free():
    code = (
        "import os, signal\n"
        "from pybhyve.vmmapi.registry import VmDir\n"
        "vm = VmDir.create('vm')\n"
        "print('made', flush=True)\n"
        "signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(VmBusyError, match=f"process {other.pid}"):
            VmDir.open("vm")
        other.kill()

    VmDir.open("vm").close()


def test_destroying_removes_everything(rundir):
    vm = VmDir.create("vm")
    os.close(memory_of(vm))
    memory = (vm.path / "memory").resolve()
    vm.save_state({"a": 1})

    vm.destroy()

    assert not memory.exists()
    assert list(rundir.iterdir()) == []


def memory_of(vm: VmDir, size: int = MB) -> int:
    vm.make_memory(size)
    return vm.open_memory("sysmem", size)


# -- memory ----------------------------------------------------------------------------


def test_memory_keeps_its_contents():
    with VmDir.create("vm") as vm:
        fd = memory_of(vm)
        os.pwrite(fd, b"kept", 4096)
        os.close(fd)

    with VmDir.open("vm") as vm:
        fd = memory_of(vm)
        assert os.pread(fd, 4, 4096) == b"kept"
        assert os.fstat(fd).st_size == MB
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
        os.close(fd)


def test_memory_is_sparse_and_not_on_a_disk():
    with VmDir.create("vm") as vm:
        fd = memory_of(vm, 64 * MB)
        blocks = os.fstat(fd).st_blocks
        os.close(fd)
        kind = subprocess.run(
            ["stat", "-f", "-c", "%T", vm.path / "memory" / "sysmem"],
            capture_output=True,
            text=True,
            check=True,
        )
        vm.discard()

    assert blocks == 0
    assert kind.stdout.strip() == "tmpfs"


def test_memory_of_another_size_is_refused():
    with VmDir.create("vm") as vm:
        os.close(memory_of(vm))

        with pytest.raises(MemorySizeError, match="made with 1M of memory, not 2M"):
            vm.open_memory("sysmem", 2 * MB)
        vm.discard()


def test_memory_that_does_not_fit_leaves_nothing():
    with VmDir.create("vm") as vm:
        with pytest.raises(MemorySizeError, match=r"memory\.size 900T does not fit: /"):
            vm.make_memory(900 << 40)

        assert not vm.has_memory()


def test_memory_is_on_a_disk_where_nothing_else_has_room(monkeypatch, rundir):
    free = registry._free_space
    monkeypatch.setattr(
        registry, "_free_space", lambda where: 0 if where == SHM else free(where)
    )
    monkeypatch.setattr(registry, "_is_tmpfs", lambda path: False)
    with VmDir.create("vm") as vm:
        os.close(memory_of(vm))

        assert (rundir / "vm" / "memory" / "sysmem").stat().st_size == MB


def test_memory_that_was_lost_with_the_host_is_made_again():
    with VmDir.create("vm") as vm:
        os.close(memory_of(vm))
        link = vm.path / "memory"
        if link.is_symlink():
            shutil.rmtree(link.readlink())
            assert not vm.has_memory()
        os.close(memory_of(vm))

        assert vm.has_memory()
        vm.discard()


def test_memory_of_a_vm_removed_by_hand_is_swept():
    with VmDir.create("lost") as lost:
        os.close(memory_of(lost))
        memory = (lost.path / "memory").resolve()
        shutil.rmtree(lost.path)

    with VmDir.create("vm") as vm:
        os.close(memory_of(vm))
        kept = (vm.path / "memory").resolve()

        assert not memory.exists()
        assert (kept / "sysmem").exists()
        vm.discard()


# -- state -----------------------------------------------------------------------------


def test_a_new_vm_has_no_state():
    with VmDir.create("vm") as vm:
        assert vm.load_state() is None


def test_state_comes_back():
    state = {"a": [1, {"b": b"\0\xff"}], "c": 2**64 - 1, "d": None, "e": (1, True)}
    with VmDir.create("vm") as vm:
        vm.save_state(state)

        assert vm.load_state() == {**state, "e": [1, True], "version": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": 2}',
        '{"version": 1, "a": {"$bytes": "?"}}',
        '{"version": 1, "a": {"$bytes": 1}}',
        "\xff",
        "[" * 100000,
    ],
)
def test_a_damaged_state_says_so(text):
    with VmDir.create("vm") as vm:
        (vm.path / "state.json").write_bytes(text.encode("latin-1"))

        with pytest.raises(VmError, match="state of VM 'vm' is damaged"):
            vm.load_state()


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text().filter(lambda name: name != "$bytes"), inner)
    ),
)


@given(plain)
def test_any_plain_value_comes_back(value):
    assert _decoded(json.loads(json.dumps(_encoded(value)))) == value
