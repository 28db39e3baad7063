"""The client's end of the control socket."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, Final, Self

from pybhyve.control.protocol import LINE_MAX, ControlError, connect, decode, encode

REPLY_SECONDS: Final = 30.0  # a register of a running vCPU has to wait for it to stop


class ControlClient:
    """A connection to the process that runs a VM."""

    def __init__(self, path: Path) -> None:
        """Connect, or raise OSError."""
        self._socket = connect(path)
        self._socket.settimeout(REPLY_SECONDS)
        self._stream = self._socket.makefile("rb")

    def call(self, op: str, **args: Any) -> Any:  # by operation
        """Have an operation done.

        Raises ControlError: what the operation raised there, or ECONNRESET, ETIMEDOUT
        or EPROTO where the other process does not answer as it should.
        """
        request = encode({"op": op, "args": args})
        try:
            self._socket.sendall(request)
            line = self._stream.readline(LINE_MAX)
        except TimeoutError:
            raise ControlError(
                errno.ETIMEDOUT, f"{op}: bhyve does not answer"
            ) from None
        except OSError as error:
            raise ControlError(errno.ECONNRESET, f"{op}: bhyve has gone") from error
        if not line:
            raise ControlError(errno.ECONNRESET, f"{op}: bhyve has gone")
        reply = decode(line)
        match reply:
            case {"ok": True, "result": result}:
                return result
            case {"ok": False, "errno": int(number), "error": str(message)}:
                raise ControlError(number, message)
        raise ControlError(errno.EPROTO, f"{op}: bhyve's answer makes no sense")

    def close(self) -> None:
        """Hang up."""
        self._stream.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
