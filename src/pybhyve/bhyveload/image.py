"""Files that become guest memory, read with every offset checked.

An image comes from anywhere: it may be cut short, be something else altogether, or be
made to harm the reader.  Formats read it only through :class:`Image`, so that a bad
offset is an :class:`~pybhyve.errors.ImageError` and nothing else.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from pybhyve.errors import ImageError

MAX_KERNEL_SIZE: Final = 1 << 30
"""Bytes of a kernel file; one with all its debugging data is a third of this."""


class Image:
    """The bytes of an image; reading behind their end is an ImageError."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def bytes(self, offset: int, length: int, what: str) -> memoryview:
        """``length`` bytes at ``offset``; ``what`` names them in the error."""
        if offset < 0 or length < 0 or offset + length > len(self.data):
            raise ImageError(
                f"truncated: {what} is at bytes {offset} to {offset + length},"
                f" but the file has {len(self.data)}"
            )
        return memoryview(self.data)[offset : offset + length]

    def uint(self, offset: int, size: int, what: str = "the header") -> int:
        """A little-endian number of ``size`` bytes."""
        return int.from_bytes(self.bytes(offset, size, what), "little")


def read_file(path: Path, limit: int) -> bytes:
    """A whole regular file of 1 to ``limit`` bytes.  Raises ImageError."""
    try:
        # Without O_NONBLOCK the open of a FIFO waits for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise ImageError("cannot be opened") from error
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError("is a directory, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("is not a regular file")
        if status.st_size == 0:
            raise ImageError("is empty")
        if status.st_size > limit:
            raise ImageError(
                f"is {status.st_size} bytes long, and there is room for {limit}"
            )
        with open(fd, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ImageError("cannot be read") from error
    finally:
        os.close(fd)
    if not 0 < len(data) <= limit:
        raise ImageError("changed its size while it was read")
    return data
