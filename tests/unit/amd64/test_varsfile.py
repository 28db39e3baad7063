"""The variable store's file: its lock, and how it is replaced."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pybhyve.amd64.varsfile import VarsFile
from pybhyve.errors import DeviceError, one_line


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "VARS.fd"
    path.write_bytes(b"old")
    path.chmod(0o640)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DeviceError) as error:
        VarsFile(str(path))
    return one_line(error.value).removeprefix(
        f'Error opening bootrom variable file "{path}": '
    )


def test_store(path):
    file = VarsFile(str(path))
    assert (file.read(), file.size) == (b"old", 3)

    file.store(b"new")
    file.store(b"now")

    file.close()
    assert path.read_bytes() == b"now"
    assert path.stat().st_mode & 0o7777 == 0o640
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_one(path, tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "there" / "link"
    link.symlink_to(path)
    file = VarsFile(str(link))

    file.store(b"new")

    file.close()
    assert link.is_symlink()
    assert path.read_bytes() == b"new"


def test_what_a_killed_process_left_is_no_obstacle(path):
    left = path.with_name(".VARS.fd.new")
    left.write_bytes(b"half")
    file = VarsFile(str(path))

    file.store(b"new")

    file.close()
    assert path.read_bytes() == b"new"
    assert not left.exists()


def test_a_full_disk_leaves_the_old_one(path):
    file = VarsFile(str(path))
    # A limit on the size of files is as good as a full disk.
    script = (
        "import resource, signal, sys\n"
        "from pybhyve.amd64.varsfile import VarsFile\n"
        "file = VarsFile(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "try:\n"
        "    file.store(bytes(1 << 20))\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
    )
    file.close()
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True
    )

    assert (done.stdout, done.stderr) == ("File too large\n", "")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_killed_process_leaves_one_whole_store(path):
    script = (
        "import sys\n"
        "from pybhyve.amd64.varsfile import VarsFile\n"
        "file = VarsFile(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for byte in b'ab':\n"
        "        file.store(bytes([byte]) * 600_000)\n"
    )
    path.write_bytes(b"b" * 600_000)
    moments = random.Random(20010)
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", script, path], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, 0.1))
            process.kill()
        store = path.read_bytes()
        assert len(store) == 600_000
        assert len(set(store)) == 1
    VarsFile(str(path)).close()


def test_one_user_at_a_time(path):
    file = VarsFile(str(path))
    in_use = "it is in use, each VM needs a copy of its own"
    assert refusal(path) == in_use
    file.store(b"new")
    assert refusal(path) == in_use

    file.close()

    VarsFile(str(path)).close()


def test_what_cannot_be_a_store(path, tmp_path):
    assert refusal(tmp_path / "no") == "No such file or directory"
    assert refusal(tmp_path) == "Is a directory"
    assert refusal(Path("/dev/null")) == "not a regular file"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "not a regular file"


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """A directory that every user reaches."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        yield path
        path.chmod(0o700)


def test_permissions(public_dir):
    script = (
        "import os, sys\n"
        "from pybhyve.amd64.varsfile import VarsFile\n"
        "from pybhyve.errors import DeviceError, one_line\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try:\n"
        "    VarsFile(sys.argv[1])\n"
        "except DeviceError as error:\n"
        "    print(one_line(error))\n"
    )

    def refused() -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, "VARS.fd"],
            cwd=public_dir,
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr

    failure = 'Error opening bootrom variable file "VARS.fd": '
    path = public_dir / "VARS.fd"
    path.write_bytes(b"old")
    public_dir.chmod(0o555)
    path.chmod(0o444)
    assert refused() == f"{failure}Permission denied\n"
    path.chmod(0o666)
    assert refused() == (
        f"{failure}its directory must be writable, a new file takes its place\n"
    )
