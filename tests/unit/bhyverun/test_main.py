"""Bring-up: which VM is opened, made or made anew, and what is left behind."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from pybhyve.bhyverun.cli import main
from pybhyve.vmmapi import MB, SuspendHow, VmCtx, VmPhase
from pybhyve.vmmapi.registry import VmDir

# Multiboot kernel at 1 MiB, 32-bit: mov dx,404; mov ax,3400 (SLP_EN, S5); out dx,ax.
POWEROFF = "66 ba0404 66 b80034 66 ef f4"
RESET = "66 ba f90c b006 ee f4"  # mov dx,cf9; mov al,6; out dx,al
TRIPLE_FAULT = "0f0b"


@pytest.fixture(autouse=True)
def rundir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    monkeypatch.setenv("PYBHYVE_RUNDIR", str(path))
    return path


@pytest.fixture
def kernel(tmp_path: Path):
    def make(code: str) -> str:
        """A multiboot kernel with its own load addresses (0.6.96, 3.1.2)."""
        text = bytes.fromhex(code)
        magic, flags, base = 0x1BADB002, 1 << 16, 0x100000
        end = base + 32 + len(text)
        header = (magic, flags, -(magic + flags) & 0xFFFFFFFF, base, base, end, end)
        path = tmp_path / "kernel"
        path.write_bytes(struct.pack("<8I", *header, base + 32) + text)
        return f"kernel={path}"

    return make


def lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("ncpus", ["1", "2"])
@pytest.mark.parametrize(
    ("code", "status"), [(RESET, 0), (POWEROFF, 1), (TRIPLE_FAULT, 3)]
)
def test_how_a_guest_ends_is_the_status(capfd, kernel, code, status, ncpus):
    argv = ["-c", ncpus, "-s", "0,hostbridge", "-s", "31,lpc", "-o", kernel(code)]

    assert main([*argv, "vm"]) == status

    assert lines(capfd) == []
    with VmDir.open("vm") as directory:
        state = directory.load_state()
        directory.destroy()
    assert state is not None
    assert state["phase"] == "ended"


def test_the_debug_port_ends_with_its_own_status(capfd, kernel):
    code = kernel("b010 e6f4 f4")  # mov al,10; out f4,al

    assert main(["-D", "-s", "31,lpc", "-l", "pc-testdev", "-o", code, "vm"]) == 33

    VmDir.open("vm").destroy()


def test_a_vm_is_destroyed_at_power_off_if_the_user_wants_so(rundir, kernel):
    assert main(["-D", "-o", kernel(POWEROFF), "vm"]) == 1

    assert list(rundir.iterdir()) == []


def test_a_kernel_makes_a_vm_anew(kernel):
    assert main(["-m", "64M", "-o", kernel(RESET), "vm"]) == 0
    assert main(["-m", "32M", "-o", kernel(POWEROFF), "vm"]) == 1

    VmDir.open("vm").destroy()


@pytest.fixture
def bootrom(tmp_path: Path):
    def make(code: str, *options: str) -> str:
        """A ROM of one page with 16 bytes of 16-bit code at the reset vector."""
        path = tmp_path / "ROM.fd"
        path.write_bytes(bytes.fromhex(code).ljust(16, b"\xf4").rjust(4096, b"\0"))
        return ",".join(["bootrom", str(path), *options])

    return make


ROM_POWEROFF = "ba0404 b80034 ef"
ROM_RESET = "ba f90c b006 ee"


@pytest.mark.parametrize("ncpus", ["1", "2"])
def test_firmware_runs_from_the_reset_vector(capfd, bootrom, ncpus):
    assert main(["-c", ncpus, "-l", bootrom(ROM_RESET), "vm"]) == 0
    assert main(["-c", ncpus, "-l", bootrom(ROM_POWEROFF), "vm"]) == 1

    assert lines(capfd) == []
    VmDir.open("vm").destroy()


def test_firmware_starts_a_loaded_vm_anew(bootrom):
    ctx = VmCtx.create("vm")
    ctx.setup_memory(64 * MB)
    ctx.save_loaded()
    ctx.close()

    assert main(["-m", "32M", "-l", bootrom(ROM_POWEROFF), "vm"]) == 1

    VmDir.open("vm").destroy()


def test_firmware_that_cannot_be_used_leaves_the_vm_as_it_was(capfd, bootrom, tmp_path):
    assert main(["-l", bootrom(ROM_RESET), "vm"]) == 0
    (tmp_path / "VARS.fd").write_bytes(bytes(100))

    variables = str(tmp_path / "VARS.fd")
    assert main(["-l", bootrom(ROM_RESET, variables), "vm"]) == 4

    assert lines(capfd) == [
        f'bhyve: Invalid bootrom variable size 100 of "{variables}": '
        "expected a multiple of 4096, at most 16777216"
    ]
    ctx = VmCtx.open("vm")
    assert (ctx.phase, ctx.ended) == (VmPhase.ENDED, SuspendHow.RESET)
    ctx.destroy()


def test_what_firmware_wrote_is_there_after_the_run(bootrom, tmp_path):
    variables = tmp_path / "VARS.fd"
    variables.write_bytes(bytes(4096))
    # Big real mode: the reset vector's CS reaches the page below the ROM's.
    code = "2e c606 00e0 10  2e c606 00e0 42  b0fe e664"

    assert main(["-s", "31,lpc", "-l", bootrom(code, str(variables)), "vm"]) == 0

    assert variables.read_bytes() == b"\x42" + bytes(4095)
    assert main(["-l", bootrom(ROM_POWEROFF, str(variables)), "vm"]) == 1
    VmDir.open("vm").destroy()


def test_firmware_gets_the_kernel(capfd, bootrom, tmp_path):
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"\x15")
    # Select item 0x11, read a byte, give it to pc-testdev as the exit status.
    rom = bootrom("ba1005 b81100 ef 42 ec e6f4", "fwcfg=qemu")
    argv = ["-D", "-s", "31,lpc", "-l", "pc-testdev", "-l", rom]

    assert main([*argv, "-o", f"kernel={kernel}", "vm"]) == 0x15 << 1 | 1
    assert main([*argv, "-o", f"kernel={kernel}.not", "-D", "vm"]) == 4
    assert main([*argv, "-o", f"kernel={kernel}", "-o", "initrd=/no", "vm"]) == 4

    assert lines(capfd) == [
        f"bhyve: kernel {kernel}.not: cannot be opened: No such file or directory",
        "bhyve: initrd /no: cannot be opened: No such file or directory",
    ]
    VmDir.open("vm").destroy()


def test_a_vm_without_a_kernel_has_nothing_to_run(capfd):
    VmCtx.create("vm").close()

    assert main(["vm"]) == 4

    assert lines(capfd) == ["bhyve: VM 'vm' has nothing to run: use bhyveload"]


def test_a_vm_that_has_run_is_not_run_again(capfd, kernel):
    assert main(["-o", kernel(RESET), "vm"]) == 0

    assert main(["vm"]) == 4

    assert lines(capfd) == ["bhyve: VM 'vm' has run already: use bhyveload"]
    VmDir.open("vm").destroy()


def test_a_vm_that_was_killed_is_not_run_again(capfd):
    ctx = VmCtx.create("vm")
    ctx.setup_memory(MB)
    ctx.save_running()
    ctx.close()

    assert main(["vm"]) == 4

    assert lines(capfd) == [
        "bhyve: VM 'vm' was killed while it ran, and cannot go on: use bhyveload"
    ]
    VmDir.open("vm").destroy()


def test_a_loaded_vm_has_its_memory_already(capfd):
    ctx = VmCtx.create("vm")
    ctx.setup_memory(64 * MB)
    ctx.save_loaded()
    ctx.close()

    assert main(["-m", "32M", "vm"]) == 4

    assert lines(capfd) == ["bhyve: VM 'vm' has 64M of memory, not 32M"]
    ctx = VmCtx.open("vm")
    assert ctx.phase is VmPhase.LOADED
    ctx.destroy()


def test_a_vm_in_use_is_not_run(capfd, kernel):
    with VmDir.create("vm"):
        assert main(["-o", kernel(RESET), "vm"]) == 4

    assert len(lines(capfd)) == 1


def test_a_bad_kernel_leaves_the_vm_as_it_was(capfd, kernel, tmp_path):
    assert main(["-o", kernel(RESET), "vm"]) == 0
    (tmp_path / "kernel").write_bytes(b"")

    assert main(["-o", f"kernel={tmp_path}/kernel", "vm"]) == 4

    assert len(lines(capfd)) == 1
    ctx = VmCtx.open("vm")
    assert (ctx.phase, ctx.ended) == (VmPhase.ENDED, SuspendHow.RESET)
    ctx.destroy()


def test_memory_that_does_not_fit(capfd, kernel, rundir):
    assert main(["-m", "900T", "-o", kernel(RESET), "vm"]) == 4

    (line,) = lines(capfd)
    assert line.startswith("bhyve: memory.size 900T does not fit: ")
    assert list(rundir.iterdir()) == []


def test_devices_that_cannot_be_set_up_leave_nothing(capfd, kernel, rundir):
    argv = ["-s", "31,lpc", "-l", "com1,/nonexistent", "-o", kernel(RESET)]

    assert main([*argv, "vm"]) == 4

    assert len(lines(capfd)) == 1
    assert list(rundir.iterdir()) == []


def test_strict_io_ends_by_sigabrt(kernel, rundir):
    argv = [sys.executable, "-m", "pybhyve.bhyverun.cli", "-e", "-o"]
    done = subprocess.run(
        [*argv, kernel("e499 f4"), "vm"], capture_output=True, text=True
    )

    assert done.returncode == -signal.SIGABRT
    assert done.stderr == "bhyve: Unhandled inb 0x0099 at 0x100020\n"
    VmDir.open("vm").destroy()
