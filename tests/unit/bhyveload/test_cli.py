"""bhyveload as a user has it: files in, a VM that can be opened out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pybhyve.bhyveload import cli
from pybhyve.errors import VmNotFoundError
from pybhyve.vmmapi import GB, MB, REGISTERS, VmCtx, VmPhase
from tests.unit.bhyveload.kernel_images import bzimage, elf, pvh_note


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a kernel and an initrd; VMs have another."""
    rundir = tmp_path / "run"
    rundir.mkdir(mode=0o700)
    monkeypatch.setenv("PYBHYVE_RUNDIR", str(rundir))
    (tmp_path / "kernel").write_bytes(bzimage(payload=b"K" * 5000))
    (tmp_path / "initrd").write_bytes(b"I" * 5000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def registers(ctx: VmCtx, *names: str) -> list[int]:
    return [ctx.vcpu(0).get_register(REGISTERS[name]) for name in names]


@pytest.mark.usefixtures("files")
def test_a_vm_is_made_and_loaded() -> None:
    argv = [
        "-m",
        "128",
        "-k",
        "kernel",
        "-i",
        "initrd",
        "-a",
        "quiet",
        "-e",
        "a=b",
        "vm",
    ]
    assert cli.main(argv) == 0

    ctx = VmCtx.open("vm")
    assert ctx.phase is VmPhase.LOADED
    assert ctx.lowmem_size == 128 * MB
    assert ctx.read(16 * MB, 5001) == b"K" * 5000 + b"\0"
    rip, rsi, cr0, cr3, efer = registers(ctx, "rip", "rsi", "cr0", "cr3", "efer")
    assert (rip, efer, cr0 >> 31) == (16 * MB + 0x200, 0x500, 1)
    assert ctx.read(rsi + 0x202, 4) == b"HdrS"
    line = int.from_bytes(ctx.read(rsi + 0x228, 4), "little")
    assert ctx.read(line, 10) == b"quiet a=b\0"
    initrd = int.from_bytes(ctx.read(rsi + 0x218, 4), "little")
    assert ctx.read(initrd, 5000) == b"I" * 5000
    assert cr3 % 4096 == 0
    # The processor reads the page tables as the loader meant them.
    for gla in (0, rsi, rip, 128 * MB - 1):
        assert ctx.vcpu(0).gla2gpa(gla) == gla
    assert ctx.vcpu(0).gla2gpa(4 * GB) is None
    ctx.destroy()


@pytest.mark.usefixtures("files")
def test_descriptors_and_the_rest_of_the_processor() -> None:
    assert cli.main(["-k", "kernel", "vm"]) == 0

    ctx = VmCtx.open("vm")
    vcpu = ctx.vcpu(0)
    base, limit, _ = vcpu.get_desc(REGISTERS["gdtr"])
    gdt = ctx.read(base, limit + 1)
    assert gdt[0x10:0x18] == bytes.fromhex("ffff0000009baf00")
    assert vcpu.get_desc(REGISTERS["cs"]) == (0, 0xFFFFFFFF, 0xA09B)
    assert vcpu.get_desc(REGISTERS["ss"]) == (0, 0xFFFFFFFF, 0xC093)
    assert registers(ctx, "cs", "ss", "tr", "rflags") == [0x10, 0x18, 0x20, 2]
    assert registers(ctx, "dr6", "dr7") == [0xFFFF0FF0, 0x400], "as after a reset"
    ctx.destroy()


def test_loading_again_starts_afresh(files: Path) -> None:
    assert cli.main(["-k", "kernel", "-i", "initrd", "vm"]) == 0
    (files / "other").write_bytes(
        elf([(0, 4 * MB, b"\xf4" * 64, 64)], notes=pvh_note(4 * MB), entry=0)
    )

    assert cli.main(["-m", "64M", "-k", "other", "vm"]) == 0

    ctx = VmCtx.open("vm")
    assert ctx.lowmem_size == 64 * MB
    assert ctx.read(16 * MB, 64) == bytes(64), "nothing is left of the first kernel"
    assert registers(ctx, "rip", "efer") == [4 * MB, 0]
    assert ctx.vcpu(0).gla2gpa(123) == 123
    ctx.destroy()


@pytest.mark.usefixtures("files")
def test_memory_above_3_gib() -> None:
    assert cli.main(["-m", "4G", "-k", "kernel", "vm"]) == 0

    ctx = VmCtx.open("vm")
    (rsi,) = registers(ctx, "rsi")
    high = ctx.read(rsi + 0x2D0 + 80, 20)
    assert (
        high == (4 * GB).to_bytes(8, "little") + GB.to_bytes(8, "little") + b"\1\0\0\0"
    )
    ctx.destroy()


@pytest.mark.parametrize(
    ("argv", "status", "complaint"),
    [
        ([], 1, "exactly one VM name is needed"),
        (["vm"], 1, "a kernel is needed (-k)"),
        (["-k", "kernel", "vm", "more"], 1, "exactly one VM name is needed"),
        (["-x", "vm"], 1, "option -x not recognized"),
        (["-k"], 1, "option -k requires argument"),
        (["-l", "/boot/userboot.so", "vm"], 1, "(-l) is not available in this version"),
        (["-d", "disk.img", "vm"], 1, "(-d) is not available in this version"),
        (["-h", "/", "vm"], 1, "(-h) is not available in this version"),
        (["-m", "much", "-k", "kernel", "vm"], 64, "Invalid memsize 'much'"),
        (["-m", "-1", "-k", "kernel", "vm"], 64, "Invalid memsize '-1'"),
        (["-e", "word", "-k", "kernel", "vm"], 64, "-e 'word' is not of the form"),
        (["-c", "/nonexistent", "vm"], 64, "Could not open '/nonexistent'"),
        (["-c", "kernel", "vm"], 64, "Could not open 'kernel': not a terminal device"),
        (["-k", "nonexistent", "vm"], 1, "kernel nonexistent: cannot be opened"),
        (["-k", ".", "vm"], 1, "kernel .: is a directory"),
        (["-k", "a\0b", "vm"], 1, "cannot be opened: embedded null byte"),
        (["-k", "kernel", "-i", "nonexistent", "vm"], 1, "initrd nonexistent: cannot"),
        (["-m", "32M", "-k", "kernel", "vm"], 1, "needs 48 MiB of memory, and the VM"),
        (["-m", "100000001", "-k", "kernel", "vm"], 1, "multiple of 4096"),
        (["-m", "8192T", "-k", "kernel", "vm"], 1, "does not fit"),
        (["-k", "kernel", "a/b"], 1, "is not a VM name"),
        (["-k", "kernel", "v" * 230], 1, "at most 229"),
    ],
)
@pytest.mark.usefixtures("files")
def test_what_is_wrong_is_said(
    capfd: pytest.CaptureFixture[str], argv: list[str], status: int, complaint: str
) -> None:
    assert cli.main(argv) == status

    out, err = capfd.readouterr()
    assert out == ""
    first, *rest = err.splitlines()
    assert first.startswith("bhyveload: ")
    assert complaint in first
    assert not rest or rest == cli.USAGE.splitlines()
    with pytest.raises(VmNotFoundError):
        VmCtx.open("vm")


@pytest.mark.usefixtures("files")
def test_a_bad_kernel_leaves_an_existing_vm_as_it_was() -> None:
    assert cli.main(["-k", "kernel", "vm"]) == 0
    assert cli.main(["-k", "initrd", "vm"]) == 1

    ctx = VmCtx.open("vm")
    assert ctx.read(16 * MB, 5000) == b"K" * 5000
    ctx.destroy()


@pytest.mark.usefixtures("files")
def test_a_vm_in_use_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    ctx = VmCtx.create("vm")

    assert cli.main(["-k", "kernel", "vm"]) == 1
    assert "VM 'vm' is in use by process" in capfd.readouterr().err
    ctx.destroy()


@pytest.mark.usefixtures("files")
def test_a_terminal_is_a_console() -> None:
    assert (
        cli.main(["-CS", "-c", "/dev/null", "-c", "stdio", "-k", "kernel", "vm"]) == 0
    )
    VmCtx.open("vm").destroy()


def test_the_manual_has_every_option_and_no_other() -> None:
    man = (Path(__file__).parents[3] / "man" / "bhyveload.8").read_text()
    documented = {f"-{letter}" for letter in re.findall(r"^\.It Fl (\w)", man, re.M)}
    taken = {f"-{letter}" for letter in cli.OPTSTRING if letter != ":"}

    assert documented == taken - cli.USERBOOT.keys()
