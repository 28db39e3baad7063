"""The file or block device with a disk's contents: opening, locking, transfers.

Transfers are synchronous and return an errno, 0 for success.  They may be called from
several threads at once.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pybhyve.block.options import SECTOR_MIN, BlockOptions, SectorSize
from pybhyve.errors import DeviceError
from pybhyve.vmmapi import Iov

log = logging.getLogger(__name__)

# linux/fs.h
BLKROGET: Final = 0x125E
BLKSSZGET: Final = 0x1268
BLKDISCARD: Final = 0x1277
BLKALIGNOFF: Final = 0x127A
BLKPBSZGET: Final = 0x127B
BLKZEROOUT: Final = 0x127F
BLKGETSIZE64: Final = 0x80081272

# linux/falloc.h
FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10
_PUNCH: Final = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_ZERO: Final = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE

IOV_MAX: Final = os.sysconf("SC_IOV_MAX")
ZEROES: Final = bytes(1 << 20)  # written where the host cannot make zeroes itself

_FLOCK: Final = struct.Struct("hhqqi4x")  # type, whence, start, length, pid
_RANGE: Final = struct.Struct("QQ")  # of BLKDISCARD and BLKZEROOUT

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_Call = Callable[..., int]


class Backing:
    """An open image.

    Raises DeviceError where it cannot be opened, is no disk, has a sector size that
    does not go with ``sectorsize``, or is in use: a writer excludes everybody else,
    readers only writers, other virtual machines and other devices of this one alike.
    """

    def __init__(self, options: BlockOptions) -> None:
        if not options.path:
            raise DeviceError('Missing "path" for block device.')
        self.path = options.path
        self.ro = options.ro
        self._fd = self._buffered = -1
        try:
            mode = Path(self.path).stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise DeviceError(
                    f"{self.path}: neither a regular file nor a block device"
                )
            self.is_device = stat.S_ISBLK(mode)
            try:
                self._open(options)
                self._lock()
                self._probe(options)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise DeviceError(f"Could not open backing file: {self.path}") from error

    def close(self) -> None:
        """Close it, which also gives up the lock.  No transfer may be under way."""
        for fd in {self._fd, self._buffered} - {-1}:
            os.close(fd)
        self._fd = self._buffered = -1

    # -- opening ---------------------------------------------------------------------

    def _open(self, options: BlockOptions) -> None:
        flags = os.O_CLOEXEC
        self._sync = options.sync or options.direct
        if self._sync:
            flags |= os.O_SYNC
        if options.nocache:
            flags |= os.O_DIRECT
        if not self.ro:
            # On a device: fails where the host has mounted it, or anybody else did so.
            exclusive = os.O_EXCL if self.is_device else 0
            try:
                self._fd = os.open(self.path, flags | os.O_RDWR | exclusive)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise DeviceError(f"{self.path}: in use, or mounted") from None
                log.info("%s is opened for reading only: %s", self.path, error.strerror)
                self.ro = True
        if self.ro:
            self._fd = os.open(self.path, flags | os.O_RDONLY)
        elif self.is_device and self._ioctl_int(BLKROGET):
            self.ro = True
        self._buffered = self._fd
        if options.nocache:
            # For what O_DIRECT refuses: buffers and lengths the host's blocks do not
            # divide.  The host keeps both ways consistent.
            way = os.O_RDONLY if self.ro else os.O_RDWR
            self._buffered = os.open(
                f"/proc/self/fd/{self._fd}", flags & ~os.O_DIRECT | way
            )

    def _lock(self) -> None:
        # Of the open file description: a second open in this process conflicts too.
        kind = fcntl.F_RDLCK if self.ro else fcntl.F_WRLCK
        lock = _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, lock)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                log.warning("%s: cannot be locked: %s", self.path, error.strerror)
                return
            raise DeviceError(
                f"{self.path}: in use by another virtual machine or device"
            ) from None

    def _probe(self, options: BlockOptions) -> None:
        wanted = options.sectorsize
        if self.is_device:
            device = self._ioctl_int(BLKSSZGET)
            if wanted is not None and wanted.logical % device:
                raise DeviceError(
                    f"Sector size {wanted.logical} incompatible with underlying "
                    f"device sector size {device}"
                )
            self.sectors = SectorSize(device, max(device, self._ioctl_int(BLKPBSZGET)))
            self.psectoff = max(0, self._ioctl_int(BLKALIGNOFF))
        else:
            block = os.fstat(self._fd).st_blksize
            usable = block > SECTOR_MIN and not block & block - 1
            self.sectors = SectorSize(SECTOR_MIN, block if usable else SECTOR_MIN)
            self.psectoff = 0
        if wanted is not None:
            self.sectors = wanted
            self.psectoff = 0
        # deviation: bhyve does not heed nodelete for files.
        self.candelete = not self.ro and not options.nodelete and self._can_delete()
        self._zero_modes = [_ZERO, _PUNCH]
        # What is read without waiting comes out of the host's cache.
        self._cached = not options.nocache

    def _can_delete(self) -> bool:
        if self.is_device:
            try:
                # One byte is no sector: EINVAL, unless the device has no discard.
                fcntl.ioctl(self._fd, BLKDISCARD, _RANGE.pack(1, 1))
            except OSError as error:
                return error.errno == errno.EINVAL
            return True
        # Beyond the end, where nothing is lost.
        return _fallocate(self._fd, _PUNCH, self.size(), self.sectors.logical) == 0

    def _ioctl_int(self, request: int) -> int:
        answer = bytearray(4)
        fcntl.ioctl(self._fd, request, answer)
        (value,) = struct.unpack("i", answer)
        return int(value)

    # -- transfers -------------------------------------------------------------------

    def size(self) -> int:
        """Bytes there are now.  OSError where the host cannot tell."""
        if self.is_device:
            answer = bytearray(8)
            fcntl.ioctl(self._fd, BLKGETSIZE64, answer)
            return int.from_bytes(answer, "little")
        return os.fstat(self._fd).st_size

    def read_now(self, iov: Iov, offset: int, most: int) -> bool:
        """Read up to ``most`` bytes if that needs no waiting.

        False: it does, or there are more; nothing, or a part, was read.
        """
        length = sum(map(len, iov))
        if length > most or not self._cached or len(iov) > IOV_MAX:
            return False
        try:
            count = os.preadv(self._fd, iov, offset, os.RWF_NOWAIT)
        except OSError as error:
            self._cached = error.errno != errno.EOPNOTSUPP
            return False
        return count == length

    def read(self, iov: Iov, offset: int) -> int:
        """Fill the buffers; EIO beyond the end."""
        return self._transfer(os.preadv, iov, offset)

    def write(self, iov: Iov, offset: int) -> int:
        """Write the buffers; EIO beyond the end, which never moves."""
        if self.ro:
            return errno.EROFS
        return self._beyond(offset, sum(map(len, iov))) or self._transfer(
            os.pwritev, iov, offset
        )

    def flush(self) -> int:
        """Have the disk itself keep what was written."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def delete(self, offset: int, length: int) -> int:
        """Give the blocks of a range up: the guest does not need their contents."""
        if not self.candelete:
            return errno.EOPNOTSUPP
        if not length:
            return 0
        if self.is_device:
            return self._ioctl_range(BLKDISCARD, offset, length)
        return _fallocate(self._fd, _PUNCH, offset, length)

    def write_zeroes(self, offset: int, length: int) -> int:
        """Have a range read as zeroes; EIO beyond the end, which never moves."""
        if self.ro:
            return errno.EROFS
        if not length:
            return 0
        if self.is_device:
            return self._ioctl_range(BLKZEROOUT, offset, length)
        if error := self._beyond(offset, length):
            return error
        for mode in tuple(self._zero_modes):
            error = _fallocate(self._fd, mode, offset, length)
            if error != errno.EOPNOTSUPP:
                return error or (self.flush() if self._sync else 0)
            self._zero_modes = [other for other in self._zero_modes if other != mode]
        error = 0
        while length and not error:
            part = min(length, len(ZEROES))
            error = self._transfer(os.pwritev, [memoryview(ZEROES)[:part]], offset)
            offset += part
            length -= part
        return error

    def _beyond(self, offset: int, length: int) -> int:
        """EIO where a file that somebody has truncated does not have the range.

        Writing there would make it longer again, with zeroes for what is lost.
        """
        if self.is_device or os.lseek(self._fd, 0, os.SEEK_END) >= offset + length:
            return 0
        return errno.EIO

    def _ioctl_range(self, request: int, offset: int, length: int) -> int:
        try:
            fcntl.ioctl(self._fd, request, _RANGE.pack(offset, length))
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _transfer(self, call: _Call, iov: Iov, offset: int) -> int:
        fd = self._fd
        left = sum(map(len, iov))
        while left:
            try:
                count = call(fd, iov[:IOV_MAX], offset)
            except OSError as error:
                if error.errno == errno.EINVAL and fd != self._buffered:
                    fd = self._buffered
                    continue
                return error.errno or errno.EIO
            if count == left:
                return 0
            if count == 0:
                return errno.EIO
            left -= count
            offset += count
            iov = _advance(iov, count)
        return 0


def _advance(iov: Iov, count: int) -> Iov:
    """What is left of the buffers after ``count`` bytes."""
    for index, buffer in enumerate(iov):
        if count < len(buffer):
            return [buffer[count:], *iov[index + 1 :]]
        count -= len(buffer)
    return []


def _fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    while _libc.fallocate(fd, mode, offset, length):
        error = ctypes.get_errno()
        if error != errno.EINTR:
            return error
    return 0
