"""Opening images: what is refused and how, locking, sector sizes, block devices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pybhyve.block import BlockOptions, SectorSize, blockif
from pybhyve.config import Config
from pybhyve.errors import ConfigError, DeviceError, one_line
from tests.unit.block.requests import SIZE, do, read, write


def refusal(open_image, *path: Path, **options: object) -> str:
    with pytest.raises(DeviceError) as caught:
        open_image(*path, **options)
    return one_line(caught.value)


# -- options -------------------------------------------------------------------------


def parse(text: str) -> BlockOptions:
    config = Config()
    node = config.create("disk")
    BlockOptions.legacy_config(node, text)
    return BlockOptions.parse(node)


def test_the_string_form():
    options = parse("/a/disk.img,nocache,sectorsize=512/4096,ro=true")

    assert options == BlockOptions(
        path="/a/disk.img", nocache=True, ro=True, sectorsize=SectorSize(512, 4096)
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", (4096, 4096)), ("512/512", (512, 512)), ("0x200/8192", (512, 8192))],
)
def test_sector_sizes(text, value):
    assert parse(f"x,sectorsize={text}").sectorsize == value


@pytest.mark.parametrize(
    "text", ["", "0", "256", "511", "513", "4096/512", "512/", "512/1000", "a", "-512"]
)
def test_sector_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match=r"disk\.sectorsize: expected L or L/P"):
        parse(f"x,sectorsize={text}")


def test_sector_sizes_of_a_file(open_image, image):
    blk = open_image()
    assert (blk.sectsz, blk.psectsz, blk.psectoff) == (512, image.stat().st_blksize, 0)
    blk.close()

    blk = open_image(sectorsize=SectorSize(4096, 8192))
    assert (blk.sectsz, blk.psectsz, blk.psectoff) == (4096, 8192, 0)


# -- refusals ------------------------------------------------------------------------


def test_no_path(mevent):
    from pybhyve.block import BlockIf

    with pytest.raises(DeviceError) as caught:
        BlockIf(BlockOptions(), "nvme 0:4:0", mevent)

    assert one_line(caught.value) == 'Missing "path" for block device.'


def test_no_file(open_image, tmp_path):
    path = tmp_path / "none"

    assert refusal(open_image, path) == (
        f"Could not open backing file: {path}: No such file or directory"
    )


@pytest.mark.parametrize("kind", ["directory", "fifo", "character device"])
def test_what_is_no_disk(open_image, tmp_path, kind):
    path = tmp_path / "thing"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path("/dev/zero")

    assert refusal(open_image, path) == (
        f"{path}: neither a regular file nor a block device"
    )


# -- who has it ----------------------------------------------------------------------

IN_USE = "in use by another virtual machine or device"


def test_a_writer_excludes_everybody(open_image, image):
    open_image()

    assert refusal(open_image) == f"{image}: {IN_USE}"
    assert refusal(open_image, ro=True) == f"{image}: {IN_USE}"


def test_readers_exclude_writers_only(open_image, image):
    first = open_image(ro=True)
    second = open_image(ro=True)

    assert refusal(open_image) == f"{image}: {IN_USE}"
    first.close()
    second.close()
    open_image()


def test_another_process_is_excluded(open_image, image):
    open_image()
    program = (
        "import sys; from pybhyve.block.backing import Backing, BlockOptions\n"
        "Backing(BlockOptions(path=sys.argv[1]))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def other() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, image]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    assert IN_USE in other().stderr


def test_a_name_of_its_own_does_not_help(open_image, image, tmp_path):
    other = tmp_path / "other.img"
    other.hardlink_to(image)
    open_image()

    assert IN_USE in refusal(open_image, other)


def test_what_cannot_be_written_is_read(open_image, tmp_path):
    """A running program's file cannot be opened for writing, by root neither."""
    path = tmp_path / "program"
    shutil.copy(shutil.which("sleep") or "", path)
    with subprocess.Popen([path, "60"]) as running:
        try:
            blk = open_image(path)
            assert blk.ro
            assert read(blk, 0, 4) == b"\x7fELF"
        finally:
            running.kill()


# -- block devices -------------------------------------------------------------------


@pytest.fixture
def loop(image: Path) -> Iterator[Path]:
    """A loop device, which only root can make."""
    if os.geteuid() != 0:
        pytest.skip("loop devices are root's")
    done = subprocess.run(
        ["losetup", "--find", "--show", image], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    yield Path(done.stdout.strip())
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


def test_block_device(open_image, loop, image):
    blk = open_image(loop)

    assert (blk.size, blk.sectsz, blk.ro, blk.candelete) == (SIZE, 512, False, True)
    assert write(blk, 4096, b"x" * 4096) == 0
    assert do(blk.delete, 8192, 4096) == 0
    assert do(blk.write_zeroes, 16384, 4096) == 0
    assert do(blk.flush) == 0
    assert image.read_bytes()[4096:12288] == b"x" * 4096 + bytes(4096)
    assert read(blk, 16384, 4096) == bytes(4096)
    with pytest.raises(OSError, match="error"):
        read(blk, SIZE, 512)
    assert "in use" in refusal(open_image, loop)
    blk.close()


def test_a_block_device_that_grows(open_image, loop, image, monkeypatch):
    monkeypatch.setattr(blockif, "RESIZE_SECONDS", 0.02)
    blk = open_image(loop)
    noticed = threading.Event()
    blk.on_resize(noticed.set)
    os.truncate(image, 2 * SIZE)
    subprocess.run(["losetup", "--set-capacity", loop], check=True)

    assert noticed.wait(30)
    assert blk.size == 2 * SIZE
    assert write(blk, SIZE, b"x" * 4096) == 0
    blk.close()


def test_block_device_for_reading_only(open_image, loop):
    subprocess.run(["blockdev", "--setro", loop], check=True)
    blk = open_image(loop)

    assert (blk.ro, blk.candelete) == (True, False)
    blk.close()
    subprocess.run(["blockdev", "--setrw", loop], check=True)


def test_sectors_that_a_block_device_does_not_have(open_image, loop):
    subprocess.run(["losetup", "--sector-size", "4096", loop], check=True)

    assert refusal(open_image, loop, sectorsize=SectorSize(512, 4096)) == (
        "Sector size 512 incompatible with underlying device sector size 4096"
    )
    blk = open_image(loop, nocache=True)
    assert blk.sectsz == 4096
    # Not what O_DIRECT takes, and done nevertheless.
    assert write(blk, 512, b"odd" * 100) == 0
    assert read(blk, 512, 300) == b"odd" * 100
    blk.close()


# -- a host that is full -------------------------------------------------------------

FULL = """
import errno, os, sys
from pybhyve.block.backing import Backing, BlockOptions
path = sys.argv[1] + "/disk.img"
with open(path, "wb") as file:
    file.truncate(1 << 20)
disk = Backing(BlockOptions(path=path))
page = [memoryview(b"x" * 4096)]
errors = [disk.write(page, offset) for offset in range(0, 1 << 20, 4096)]
print(*(errno.errorcode.get(error, error) for error in sorted(set(errors))))
print(errors.index(errno.ENOSPC) > 0, disk.write(page, 0), disk.flush())
print(errno.errorcode[disk.write([memoryview(bytes(1 << 20))], 0)])
print(disk.delete(0, 1 << 20), disk.write(page, 1020 << 10))
"""


def test_a_full_file_system(tmp_path):
    """A tmpfs of 256 KiB, which a namespace of its own lets anybody mount."""
    done = subprocess.run(
        [
            *("unshare", "--mount", "--map-root-user", "sh", "-c"),
            'mount -t tmpfs -o size=256k none "$0" && exec "$1" -c "$2" "$0"',
            *(str(tmp_path), sys.executable, FULL),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )

    assert done.stderr == ""
    assert done.stdout.splitlines() == ["0 ENOSPC", "True 0 0", "ENOSPC", "0 0"]
