"""fwctl: firmware asks for the machine's configuration, by requests over two ports.

The protocol is bhyve's own, of fwctl.c; its other end is edk2's
OvmfPkg/Library/BhyveFwCtlLib.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from pybhyve.device import Device

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

FWCTL_OUT: Final = 0x510
FWCTL_IN: Final = 0x511

SIGNATURE: Final = b"BHYV"

OP_GET: Final = 3
OP_GET_LEN: Final = 4

HEADER: Final = struct.Struct("<III")  # bytes of the request, operation, transaction
REPLY: Final = struct.Struct("<IIII")  # ... of the reply, ..., error
LENGTH: Final = struct.Struct("<Q")

NAME_MAX: Final = 80
"""Bytes of a name; a longer one is counted and thrown away."""

ENOENT: Final = 2
E2BIG: Final = 7
"""Errors of the protocol, in FreeBSD's numbers."""


class Fwctl(Device):
    """The ports; the only value is ``hw.ncpu``.

    deviation: a name has to match as a whole, and a request that says it is shorter
    than its header is one without a name; bhyve ends.
    """

    def __init__(self, machine: Machine) -> None:
        self._lock = threading.Lock()
        self._values = {b"hw.ncpu": machine.ncpu.to_bytes(4, "little")}
        self._clear()
        inout = machine.inout
        inout.register("fwctl", FWCTL_OUT, 1, self._read, self._write)
        inout.register("fwctl", FWCTL_IN, 1, self._read, None)

    def _clear(self) -> None:
        self._signature: deque[int] = deque()  # still to be read
        self._request = bytearray()
        self._missing = 0  # bytes of the request
        self._reply: deque[int] = deque()  # words still to be read

    def _read(self, _port: int, size: int) -> int:
        with self._lock:
            if size == 1 and self._signature:
                return self._signature.popleft()
            if size == 4 and self._reply:
                return self._reply.popleft()
            return 0xFFFFFFFF

    def _write(self, _port: int, size: int, value: int) -> None:
        with self._lock:
            if size == 2 and value == 0:
                self._clear()
                self._signature.extend(SIGNATURE)
            elif size == 4 and not self._signature:
                self._take(value)

    def _take(self, word: int) -> None:
        if not self._request:
            self._reply.clear()
            self._missing = max(word, HEADER.size)
        if len(self._request) <= HEADER.size + NAME_MAX:
            self._request += word.to_bytes(4, "little")
        self._missing -= 4
        if self._missing <= 0:
            self._answer()

    def _answer(self) -> None:
        length, operation, transaction = HEADER.unpack_from(self._request)
        name = bytes(self._request[HEADER.size : max(length, HEADER.size)])
        self._request.clear()
        error, data = self._operate(operation, name)
        data += bytes(-len(data) % 4)
        size = REPLY.size + len(data)
        reply = REPLY.pack(size, operation, transaction, error) + data
        self._reply.extend(struct.unpack(f"<{size // 4}I", reply))

    def _operate(self, operation: int, name: bytes) -> tuple[int, bytes]:
        if len(name) > NAME_MAX:
            return E2BIG, b""
        value = self._values.get(name.rstrip(b"\0"))
        if value is None or operation not in (OP_GET, OP_GET_LEN):
            return ENOENT, b""
        length = LENGTH.pack(len(value))
        return 0, length if operation == OP_GET_LEN else length + value

    # -- state -----------------------------------------------------------------------

    def reset(self) -> None:
        """No request is under way."""
        self._clear()

    def save(self) -> dict[str, Any]:
        """The request or reply that is under way."""
        return {
            "version": 1,
            "signature": bytes(self._signature),
            "request": bytes(self._request),
            "missing": self._missing,
            "reply": list(self._reply),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        if state["version"] != 1:
            raise ValueError(f"fwctl: unknown state version {state['version']}")
        self._signature = deque(state["signature"])
        self._request = bytearray(state["request"])
        self._missing = state["missing"]
        self._reply = deque(state["reply"])
