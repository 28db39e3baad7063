r"""The language of the control socket: lines of JSON, requests and one reply each.

A stream socket, ``control`` in the VM's directory, for its owner only.  A line is at
most `LINE_MAX` bytes with its ``\n``.  Version 1::

    > {"version": 1, "op": "get_register", "args": {"vcpu": 0, "register": "rip"}}
    < {"version": 1, "ok": true, "result": 1048576}
    < {"version": 1, "ok": false, "errno": 22, "error": "vcpu 9: the VM has 1"}

Operations and their arguments: :mod:`pybhyve.control.operations`.  A client sends the
next request when it has the reply.  After a line that is too long the server closes.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pybhyve.errors import BhyveError

VERSION: Final = 1
LINE_MAX: Final = 64 << 10


class ControlError(BhyveError):
    """An operation on a VM that is refused; ``errno`` says why, as vmm.ko would."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.errno = number


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as a line."""
    return json.dumps({"version": VERSION, **message}).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """A line as a message.  Raises ControlError for one that is not of version 1."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise ControlError(errno.EBADMSG, "not a line of JSON") from None
    if not isinstance(message, dict):
        raise ControlError(errno.EBADMSG, "not a JSON object")
    if message.get("version") != VERSION:
        raise ControlError(errno.EPROTONOSUPPORT, f"only version {VERSION} is spoken")
    return message


def connect(path: Path) -> socket.socket:
    """A connection to a control socket, or OSError."""
    return _at_path(path, socket.socket.connect)


def listen(path: Path) -> socket.socket:
    """A socket that listens at ``path``, usable by its owner only, or OSError."""

    def bind(listener: socket.socket, address: str) -> None:
        # The mode of the socket file is that of the descriptor: no moment of 0777.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(address)
        listener.listen()

    return _at_path(path, bind)


def _at_path(
    path: Path, action: Callable[[socket.socket, str], object]
) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # A socket's address has 107 bytes, and a VM's name alone may have 229.
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        action(sock, f"/proc/self/fd/{directory}/{path.name}")
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)
    return sock
