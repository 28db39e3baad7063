"""A firmware's variable store on disk, which no crash leaves half written.

The file is replaced as a whole: what is under its name is the old store or the new one,
also after a power failure.  bhyve maps the file instead, and leaves the order of its
pages to the host.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Final

from pybhyve.errors import DeviceError

REPLACED_TRIES: Final = 10  # times that another process replaces it as we open it


class VarsFile:
    """An open variable store, locked against other users until `close`."""

    def __init__(self, name: str) -> None:
        """Open and lock it.

        DeviceError: it cannot be read, written or replaced, is in use, or is not a
        regular file.
        """
        # The file is replaced, not a symbolic link to it.
        self._path = Path(os.path.realpath(name))
        self._fd = _open_locked(name, self._path)
        if not os.access(self._path.parent, os.W_OK | os.X_OK):
            self.close()
            raise DeviceError(
                f'Error opening bootrom variable file "{name}": its directory must be '
                "writable, a new file takes its place"
            )
        self.size = os.fstat(self._fd).st_size
        """Bytes in the file."""

    def read(self) -> bytes:
        """The store."""
        return os.pread(self._fd, self.size, 0)

    def store(self, data: bytes | bytearray | memoryview) -> None:
        """Replace the store; on return it is on the disk.

        OSError: the old one is still there.
        """
        new = self._path.with_name(f".{self._path.name}.new")
        new.unlink(missing_ok=True)  # of a process that was killed; the lock is ours
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(new, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            old = os.fstat(self._fd)
            mine = os.fstat(fd)
            if (old.st_uid, old.st_gid) != (mine.st_uid, mine.st_gid):
                os.fchown(fd, old.st_uid, old.st_gid)
            os.fchmod(fd, stat.S_IMODE(old.st_mode))
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
            os.fsync(fd)
            new.replace(self._path)
        except BaseException:
            os.close(fd)
            new.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd = fd
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Let others have the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _check_regular(fd: int, failure: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise DeviceError(f"{failure}: not a regular file")


def _open_locked(name: str, path: Path) -> int:
    failure = f'Error opening bootrom variable file "{name}"'
    for _ in range(REPLACED_TRIES):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise DeviceError(failure) from error
        try:
            _check_regular(fd, failure)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had the lock may have put another file in its place.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(fd)):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise DeviceError(
                f"{failure}: it is in use, each VM needs a copy of its own"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise DeviceError(f"{failure}: another process keeps replacing it")
