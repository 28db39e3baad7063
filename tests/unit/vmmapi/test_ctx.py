"""A VM in this process: memory layout, registers, and what the next process finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pybhyve.errors import MemorySizeError, VmError
from pybhyve.vmmapi import (
    GB,
    HIGHMEM_BASE,
    LOWMEM_LIMIT,
    MB,
    REGISTERS,
    SuspendHow,
    VmCtx,
    VmmError,
    VmPhase,
)

RBX = REGISTERS["rbx"]


@pytest.fixture(autouse=True)
def rundir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    monkeypatch.setenv("PYBHYVE_RUNDIR", str(path))
    return path


@pytest.fixture
def ctx() -> Iterator[VmCtx]:
    ctx = VmCtx.create("vm", 2)
    yield ctx
    ctx.destroy()


def again(maxcpus: int | None = None) -> VmCtx:
    """The VM as the next process has it."""
    return VmCtx.open("vm", maxcpus)


def test_low_memory(ctx):
    ctx.setup_memory(64 * MB)

    assert (ctx.lowmem_size, ctx.highmem_size) == (64 * MB, 0)
    ctx.write(64 * MB - 4, b"last")
    assert ctx.read(64 * MB - 4, 4) == b"last"
    with pytest.raises(VmmError):
        ctx.read(64 * MB - 2, 4)


def test_memory_above_3_gib_is_above_4(ctx, monkeypatch):
    monkeypatch.setattr("pybhyve.vmmapi.registry._free_space", lambda where: 1 << 40)

    ctx.setup_memory(5 * GB)

    assert (ctx.lowmem_size, ctx.highmem_size) == (LOWMEM_LIMIT, 2 * GB)
    ctx.write(HIGHMEM_BASE + 2 * GB - 4, b"last")
    assert [entry[:4] for entry in ctx.vm.memmap()] == [
        (0, 0, 0, LOWMEM_LIMIT),
        (HIGHMEM_BASE, 0, LOWMEM_LIMIT, 2 * GB),
    ]


def test_domains_follow_each_other(ctx, monkeypatch):
    monkeypatch.setattr("pybhyve.vmmapi.registry._free_space", lambda where: 1 << 40)

    ctx.setup_memory(0, [2 * GB, 2 * GB, GB])

    assert [entry[:4] for entry in ctx.vm.memmap()] == [
        (0, 0, 0, 2 * GB),
        (2 * GB, 1, 0, GB),
        (4 * GB, 1, GB, GB),
        (5 * GB, 2, 0, GB),
    ]


def test_memory_is_whole_pages(ctx):
    with pytest.raises(MemorySizeError, match="not a multiple of 4096"):
        ctx.setup_memory(MB + 1)


def test_the_same_memory_again_is_no_error(ctx):
    ctx.setup_memory(MB)
    ctx.write(0, b"kept")

    ctx.setup_memory(MB)

    assert ctx.read(0, 4) == b"kept"
    with pytest.raises(MemorySizeError, match="has 1M of memory, not 2M"):
        ctx.setup_memory(2 * MB)


def test_wired_memory_is_locked(ctx):
    def locked() -> int:
        status = Path("/proc/self/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmLck"))
        return int(line.split()[1]) << 10

    before = locked()
    ctx.setup_memory(MB)

    ctx.wire_memory()

    assert locked() - before == MB


def test_what_a_loader_prepares_is_there_for_the_next(ctx):
    ctx.setup_memory(MB)
    ctx.write(0x1000, b"code")
    ctx.vcpu(0).set_register(RBX, 0x1234)
    ctx.save_loaded()
    ctx.close()

    with_more = again(maxcpus=4)

    assert with_more.phase is VmPhase.LOADED
    assert with_more.read(0x1000, 4) == b"code"
    assert with_more.vcpu(0).get_register(RBX) == 0x1234
    assert with_more.vm.maxcpus == 4
    with_more.close()


def test_what_a_run_left_is_there_to_look_at(ctx):
    ctx.setup_memory(MB)
    ctx.vm.set_topology(1, 2, 1)
    ctx.vcpu(1).set_register(RBX, 7)
    ctx.vm.rtc_write(0x40, 0x5A)
    ctx.save_ended(SuspendHow.HALT)
    ctx.close()

    later = again()

    assert (later.phase, later.ended) == (VmPhase.ENDED, SuspendHow.HALT)
    assert later.vm.get_topology()[:3] == (1, 2, 1)
    assert later.vcpu(1).get_register(RBX) == 7
    assert later.vm.rtc_read(0x40) == 0x5A
    later.close()


def test_a_vm_can_begin_anew(ctx):
    ctx.setup_memory(MB)
    ctx.write(0, b"old")
    ctx.save_loaded()
    ctx.close()

    anew = VmCtx.open("vm", 1, reinit=True)

    assert anew.phase is VmPhase.CREATED
    anew.setup_memory(2 * MB)
    assert anew.read(0, 3) == bytes(3)
    anew.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("maxcpus", "x"),
        ("maxcpus", -1),
        ("maxcpus", 1 << 30),
        ("maxcpus", 1 << 70),
        ("phase", "none"),
        ("ended", 99),
        ("memory", ["x"]),
        ("memory", None),
        ("vcpus", [{}, {}]),
        ("vcpus", 1),
        ("topology", [0, 0, 0]),
        ("topology", [1]),
        ("devices", {}),
    ],
)
def test_a_state_that_makes_no_sense_is_damaged(ctx, name, value):
    ctx.setup_memory(MB)
    ctx.save_ended(SuspendHow.RESET)
    state = ctx.directory.load_state()
    assert state is not None
    ctx.directory.save_state({**state, name: value})
    ctx.close()

    with pytest.raises(VmError):
        again()

    VmCtx.open("vm", reinit=True).close()


def test_only_one_reason_ends_a_vm(ctx):
    ctx.suspend(SuspendHow.RESET)

    ctx.suspend(SuspendHow.POWEROFF)
