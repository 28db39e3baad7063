"""Requests that are waited for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from pybhyve.block import BlockIf

SIZE = 256 * 1024


class Answer:
    """A done() to wait for."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.errors: list[int] = []
        self.thread = ""

    def __call__(self, error: int) -> None:
        self.errors.append(error)
        self.thread = threading.current_thread().name
        self._event.set()

    def error(self) -> int:
        assert self._event.wait(30)
        assert len(self.errors) == 1
        return self.errors[0]


def do(call: Callable[..., object], *arguments: Any) -> int:
    """The error of a request, or 0, after it is done."""
    answer = Answer()
    call(*arguments, answer)
    return answer.error()


def read(blk: BlockIf, offset: int, *lengths: int) -> bytes:
    iov = [memoryview(bytearray(length)) for length in lengths]
    if error := do(blk.read, iov, offset):
        raise OSError(error, os.strerror(error))
    return b"".join(iov)


def write(blk: BlockIf, offset: int, *parts: bytes) -> int:
    return do(blk.write, [memoryview(part) for part in parts], offset)
