"""The VMs of this user by name: what /dev/vmm is on FreeBSD.

A VM has a directory under the run directory and lives as long as that, whether a
process runs it or not.  In it:

``lock``        held (flock) by the process that loads, runs or destroys the VM
``memory``      where its memory files are: a link to a directory on tmpfs
``state.json``  memory size, topology and vCPU registers, as the last process left them
``control``     socket of the process that runs the VM
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any, Final, Self

from pybhyve.errors import (
    MemorySizeError,
    VmBusyError,
    VmError,
    VmExistsError,
    VmNameError,
    VmNotFoundError,
)
from pybhyve.vmmapi.memory import size_text

NAME_MAX: Final = 229  # bytes; vmm.ko's limit
STATE_VERSION: Final = 1
STATE_MAX: Final = 64 << 20  # bytes; a state file that is larger is not ours
SHM: Final = Path("/dev/shm")  # noqa: S108  # used with a private directory below it


def check_name(name: str) -> str:
    """The name itself; VmNameError where no VM can have it."""
    try:
        length = len(os.fsencode(name))
    except ValueError:
        raise VmNameError(f"{name!a} is not a VM name") from None
    if length > NAME_MAX:
        raise VmNameError(f"the VM name is {length} bytes long, at most {NAME_MAX}")
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise VmNameError(f"{name!a} is not a VM name")
    return name


def run_dir() -> Path:
    """The directory that holds the VMs' directories, made if need be.

    $PYBHYVE_RUNDIR, else $XDG_RUNTIME_DIR/pybhyve, else /run/pybhyve.  Raises VmError
    where it cannot be made, or others could have put something into it.
    """
    if chosen := os.environ.get("PYBHYVE_RUNDIR"):
        path = Path(chosen)
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(runtime, "pybhyve")
    else:
        path = Path("/run/pybhyve")
    _private_dir(path, "run directory")
    return path


def _private_dir(path: Path, what: str) -> None:
    """Make a directory only its owner can use, or see that it is one."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise VmError(
            f"cannot make the {what} {path} (set PYBHYVE_RUNDIR to choose another)"
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise VmError(f"the {what} {path} is not a directory")
    if found.st_uid != os.geteuid():
        raise VmError(f"the {what} {path} belongs to user {found.st_uid}, not to you")
    if found.st_mode & 0o077:
        raise VmError(f"the {what} {path} is open to other users: chmod 700 it")


def _is_tmpfs(path: Path) -> bool:
    """Whether the file system of ``path`` keeps its files in memory."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        if fields[2].decode() == number and b"-" in fields:
            return fields[fields.index(b"-") + 1] in (b"tmpfs", b"ramfs")
    return False


def control_path(name: str) -> Path:
    """The control socket of a VM; its length may be above a socket address's limit."""
    return run_dir() / check_name(name) / "control"


def _free_space(where: Path | int) -> int:
    """The bytes that a file system has for this user."""
    space = os.statvfs(where)
    return space.f_bavail * space.f_frsize


def _sweep(private: Path) -> None:
    """Remove the memory of VMs whose directories were removed by hand."""
    for directory in private.iterdir():
        owner = directory / "owner"
        if owner.is_symlink() and not owner.exists():
            shutil.rmtree(directory, ignore_errors=True)


class VmDir:
    """The directory of one VM, locked for this process while the object is open."""

    def __init__(self, name: str, path: Path, lock_fd: int) -> None:
        self.name = name
        self.path = path
        self._lock_fd = lock_fd

    # -- life ------------------------------------------------------------------------

    @classmethod
    def create(cls, name: str) -> Self:
        """Make a new VM; VmExistsError where the name is taken."""
        path = run_dir() / check_name(name)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            raise VmExistsError(f"VM '{name}' exists already") from None
        except OSError as error:
            raise VmError(f"cannot create VM '{name}'") from error
        return cls._locked(name, path)

    @classmethod
    def open(cls, name: str) -> Self:
        """Take an existing VM; VmNotFoundError, or VmBusyError if it is taken."""
        path = run_dir() / check_name(name)
        if not path.is_dir():
            raise VmNotFoundError(f"there is no VM '{name}'")
        return cls._locked(name, path)

    @classmethod
    def _locked(cls, name: str, path: Path) -> Self:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(path / "lock", flags, 0o600)
        except FileNotFoundError:
            raise VmNotFoundError(f"there is no VM '{name}'") from None
        except OSError as error:
            raise VmError(f"cannot open VM '{name}'") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(fd, 16, 0).decode(errors="replace").strip()
            os.close(fd)
            by = f"process {holder}" if holder.isdigit() else "another process"
            raise VmBusyError(f"VM '{name}' is in use by {by}") from None
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(fd)
            raise VmError(f"cannot lock VM '{name}'") from error
        return cls(name, path, fd)

    def close(self) -> None:
        """Let other processes have the VM.  Harmless when closed already."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def destroy(self) -> None:
        """Remove the VM and everything it has, and close the object."""
        self.discard()
        self.control_path.unlink(missing_ok=True)
        # The lock goes last: until then nobody else can take what is half removed.
        shutil.rmtree(self.path)
        self.close()

    def discard(self) -> None:
        """Remove memory and state: the VM as newly created."""
        link = self.path / "memory"
        if link.is_symlink():
            shutil.rmtree(link.readlink(), ignore_errors=True)
            link.unlink()
        elif link.exists():
            shutil.rmtree(link)
        (self.path / "state.json").unlink(missing_ok=True)

    # -- contents --------------------------------------------------------------------

    @property
    def control_path(self) -> Path:
        """The control socket.  Its length may be above a socket address's limit."""
        return self.path / "control"

    def make_memory(self, size: int) -> None:
        """Find a place for ``size`` bytes of memory, unless the VM has memory already.

        It is on tmpfs if there is room, so that guest RAM is not written back to a
        disk.  Raises MemorySizeError where no place has room.
        """
        link = self.path / "memory"
        if link.is_symlink() and not link.exists():
            link.unlink()  # the host has restarted, its tmpfs is empty
        if link.exists():
            return
        places = [self.path.parent]
        if SHM.is_dir() and not _is_tmpfs(self.path):
            places.insert(0, SHM)
        small: list[str] = []
        for place in places:
            free = _free_space(place)
            if size <= free:
                break
            small.append(f"{place} has {size_text(free)} free")
        else:
            raise MemorySizeError(
                f"memory.size {size_text(size)} does not fit: {', '.join(small)}"
            )
        try:
            if place == SHM:
                link.symlink_to(self._make_shm())
            else:
                link.mkdir(mode=0o700)
        except OSError as error:
            raise VmError(f"cannot make a memory directory in {place}") from error

    def _make_shm(self) -> Path:
        """A directory of this VM on /dev/shm, where run directories share one."""
        private = SHM / f"pybhyve-{os.geteuid()}"
        _private_dir(private, "memory directory")
        _sweep(private)
        directory = Path(tempfile.mkdtemp(prefix=f"{self.name[:64]}-", dir=private))
        (directory / "owner").symlink_to(self.path.resolve())
        return directory

    def open_memory(self, segment: str, size: int) -> int:
        """A descriptor of the file behind a memory segment of ``size`` bytes.

        A file that exists keeps its contents.  Raises MemorySizeError where its size is
        another, or where the host has less free memory by now.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self.path / "memory" / segment, flags, 0o600)
        except OSError as error:
            raise VmError(f"cannot open the memory of VM '{self.name}'") from error
        try:
            found = os.fstat(fd)
            if found.st_size not in (0, size):
                raise MemorySizeError(
                    f"VM '{self.name}' was made with {size_text(found.st_size)} of "
                    f"memory, not {size_text(size)}: destroy it first"
                )
            free = _free_space(fd)
            if size - found.st_blocks * 512 > free:
                raise MemorySizeError(
                    f"memory of {size_text(size)} no longer fits: "
                    f"{size_text(free)} are free"
                )
            try:
                os.ftruncate(fd, size)
            except OSError as error:
                raise MemorySizeError(
                    f"memory.size {size_text(size)} does not fit"
                ) from error
        except VmError:
            os.close(fd)
            raise
        return fd

    def has_memory(self) -> bool:
        """Whether memory files are there: not so after the host restarted."""
        return (self.path / "memory").exists()

    def load_state(self) -> dict[str, Any] | None:
        """What `save_state` kept; None for a VM that is newly created.

        Raises VmError where the file is not one that `save_state` writes.
        """
        path = self.path / "state.json"
        damaged = f"the state of VM '{self.name}' is damaged: destroy the VM"
        try:
            with path.open("rb") as file:
                data = file.read(STATE_MAX + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise VmError(f"cannot read the state of VM '{self.name}'") from error
        if len(data) > STATE_MAX:
            raise VmError(damaged)
        try:
            state = _decoded(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise VmError(damaged) from error
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise VmError(damaged)
        return state

    def save_state(self, state: dict[str, Any]) -> None:
        """Keep plain values with ``version`` for the process that opens the VM next."""
        text = json.dumps(_encoded({"version": STATE_VERSION, **state}))
        partial = self.path / "state.json.partial"
        try:
            partial.write_text(text)
            partial.replace(self.path / "state.json")
        except OSError as error:
            raise VmError(f"cannot keep the state of VM '{self.name}'") from error


def _encoded(value: Any) -> Any:  # any plain value
    """Plain values as JSON has them: bytes become an object with base64 text."""
    if isinstance(value, bytes | bytearray | memoryview):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise TypeError("state has a name that is not a string")
        return {name: _encoded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    return value


def _decoded(value: Any) -> Any:  # any plain value
    if isinstance(value, dict):
        if value.keys() == {"$bytes"}:
            try:
                return base64.b64decode(value["$bytes"], validate=True)
            except (binascii.Error, TypeError) as error:
                raise ValueError("not base64") from error
        return {name: _decoded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value
