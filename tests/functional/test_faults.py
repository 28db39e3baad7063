"""What a user gets wrong: one clear line, the right exit status, never a traceback."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.functional.machine import Programs
from tools import guests

USAGE = 1
EX_USAGE = 64
ERROR = 4


@pytest.fixture(scope="module")
def linux() -> bytes:
    """A kernel that boots."""
    return guests.find("debian12-cloud").image().kernel.read_bytes()


@pytest.fixture
def refused(programs: Programs):
    """Run bhyve, which must refuse: one line on standard error, which is returned."""

    def run(status: int, *args: str, program: str = "bhyve") -> str:
        done = programs.run(program, *args, timeout=60)
        lines = done.stderr.splitlines()

        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        assert "internal error" not in done.stderr
        assert lines
        assert lines[0].startswith(f"{program}: ")
        # Only a command line that cannot be understood gets more: the usage text.
        assert status == USAGE or len(lines) == 1

        return lines[0]

    return run


def bad_kernels(linux: bytes) -> dict[str, bytes]:
    """Files that are no kernel, or less than one."""
    setup_sectors = linux[0x1F1]
    without_kernel = linux[: (setup_sectors + 1) * 512]
    elf = guests.compile_kernel("idle").read_bytes()
    program_headers = struct.unpack_from("<I", elf, 28)[0]
    far = bytearray(elf)
    struct.pack_into("<I", far, program_headers + 12, 0xFFFF_F000)  # p_paddr
    return {
        "empty": b"",
        "text": b"#!/bin/sh\nexit 0\n" * 100,
        "bzImage cut in its header": linux[:0x210],
        "bzImage cut after its set-up code": without_kernel,
        "bzImage cut in its kernel": linux[: len(linux) // 2],
        "ELF cut in its header": elf[:40],
        "ELF cut in its program": elf[: program_headers + 40],
        "ELF that is loaded where no memory is": bytes(far),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "text",
        "bzImage cut in its header",
        "bzImage cut after its set-up code",
        "bzImage cut in its kernel",
        "ELF cut in its header",
        "ELF cut in its program",
        "ELF that is loaded where no memory is",
    ],
)
@pytest.mark.parametrize("program", ["bhyve", "bhyveload"])
def test_bad_kernel(
    refused, tmp_path: Path, linux: bytes, kind: str, program: str
) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bad_kernels(linux)[kind])
    if program == "bhyve":
        line = refused(ERROR, "-m", "64M", "-o", f"kernel={kernel}", "fault")
    else:
        line = refused(1, "-m", "64M", "-k", str(kernel), "fault", program=program)

    assert str(kernel) in line


def test_kernel_is_not_there(refused, tmp_path: Path) -> None:
    kernel = tmp_path / "none"
    line = refused(ERROR, "-o", f"kernel={kernel}", "fault")

    assert str(kernel) in line
    assert "No such file" in line


def test_kernel_is_a_directory(refused, tmp_path: Path) -> None:
    line = refused(ERROR, "-o", f"kernel={tmp_path}", "fault")

    assert str(tmp_path) in line


@pytest.mark.parametrize("what", ["kernel", "initrd"])
def test_huge_file(refused, tmp_path: Path, linux: bytes, what: str) -> None:
    files = {"kernel": tmp_path / "kernel", "initrd": tmp_path / "initrd"}
    for path in files.values():
        path.write_bytes(linux)
    with files[what].open("ab") as file:
        file.truncate(1 << 42)  # sparse
    image = [f"-okernel={files['kernel']}", f"-oinitrd={files['initrd']}"]
    line = refused(ERROR, "-m", "512M", *image, "fault")

    assert str(files[what]) in line


@pytest.mark.parametrize("what", ["missing", "directory"])
def test_bad_initrd(refused, tmp_path: Path, linux: bytes, what: str) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(linux)
    initrd = tmp_path / "initrd"
    if what == "directory":
        initrd.mkdir()
    image = [f"-okernel={kernel}", f"-oinitrd={initrd}"]
    line = refused(ERROR, "-m", "512M", *image, "fault")

    assert str(initrd) in line


def test_kernel_does_not_fit_in_memory(refused, tmp_path: Path, linux: bytes) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(linux)

    assert "memory" in refused(ERROR, "-m", "4M", f"-okernel={kernel}", "fault")


@pytest.mark.parametrize(
    ("status", "option"),
    [
        (EX_USAGE, ["-c", "chips=1"]),
        (ERROR, ["-c", "none"]),
        (ERROR, ["-c", "0"]),
        (ERROR, ["-c", "cpus=4,sockets=3"]),
        (EX_USAGE, ["-m", "much"]),
        (EX_USAGE, ["-m", "0"]),
        (EX_USAGE, ["-p", "0"]),
        (EX_USAGE, ["-o", "novalue"]),
        (ERROR, ["-s", "99,hostbridge"]),
        (ERROR, ["-s", "garbage"]),
        (EX_USAGE, ["-l", "com9,stdio"]),
        (ERROR, ["-m", "900T"]),
        (ERROR, ["-k", "/nonexistent/file"]),
        (ERROR, ["-s", "3,no-such-device"]),
        (ERROR, ["-s", "3,virtio-blk,disk.img"]),
        (ERROR, ["-l", "com1,/nonexistent/device"]),
        (ERROR, ["-o", "acpi_tables=perhaps"]),
        (USAGE, ["-?"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_bad_option(refused, status: int, option: list[str]) -> None:
    kernel = guests.compile_kernel("idle")

    refused(status, "-s", "31,lpc", *option, "-o", f"kernel={kernel}", "fault")


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\xff\xfe binary",
        b"memory.size\n",
        b"=value\n",
        b"a=%(b)\nb=%(a)\nname=%(a)",
    ],
    ids=["binary", "no value", "no name", "loop"],
)
def test_bad_configuration_file(refused, tmp_path: Path, content: bytes) -> None:
    config = tmp_path / "config"
    config.write_bytes(content)
    kernel = guests.compile_kernel("idle")

    refused(ERROR, "-k", str(config), "-o", f"kernel={kernel}")


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 300])
def test_bad_name(refused, name: str) -> None:
    kernel = guests.compile_kernel("idle")

    refused(ERROR, "-m", "64M", "-o", f"kernel={kernel}", name)


def test_nothing_to_boot(refused) -> None:
    line = refused(ERROR, "-m", "64M", "nothing")

    assert "kernel" in line


def test_no_such_machine(programs: Programs) -> None:
    done = programs.run("bhyvectl", "--vm=nothing", "--destroy")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("vm_open: nothing could not be opened: ")
    assert len(done.stderr.splitlines()) == 1


def test_refusal_leaves_no_machine(refused, programs: Programs) -> None:
    run_dir = Path(programs.env["XDG_RUNTIME_DIR"])
    refused(ERROR, "-m", "64M", "-o", "kernel=/nonexistent/kernel", "leftover")

    assert not list(run_dir.rglob("leftover*"))
