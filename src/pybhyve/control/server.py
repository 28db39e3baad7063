"""The control socket of a running VM: a device that no guest sees.

It works on the machine's event loop, so that requests are done one at a time.  A client
is not trusted to be well-behaved: lines and clients are limited in number and length,
and one that does not read its replies is not listened to until it does.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pybhyve.control.operations import Operations
from pybhyve.control.protocol import LINE_MAX, ControlError, decode, encode, listen
from pybhyve.device import Device
from pybhyve.errors import BhyveError

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.mevent import EventLoop, Handle

log = logging.getLogger(__name__)

CLIENTS_MAX: Final = 16
"""More wait in the socket's backlog until one of these hangs up."""
RECEIVE_SIZE: Final = 4096


def start(machine: Machine) -> None:
    """Give a machine that is being set up its control socket.  Raises BhyveError."""
    machine.add_device("control", ControlServer(machine))


class ControlServer(Device):
    """Listens in the VM's directory while the machine lives."""

    def __init__(self, machine: Machine) -> None:
        self._loop = machine.mevent
        self._operations = Operations(machine.vm)
        self._path = machine.ctx.directory.control_path
        self._clients: set[_Client] = set()
        # The VM's lock is ours: a socket that is there is left over from a crash.
        self._path.unlink(missing_ok=True)
        try:
            self._listener = listen(self._path)
        except OSError as error:
            raise BhyveError(f"cannot listen on {self._path}") from error
        self._listener.setblocking(False)
        self._accept = self._loop.add_read(self._listener.fileno(), self._accepted)

    def halt(self) -> None:
        """Hang up on everybody and remove the socket."""
        for client in list(self._clients):
            client.hang_up()
        self._loop.delete(self._accept)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accepted(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            # The client has gone again, or this process has no descriptor left.
            log.debug("control accept failed error=%s", error)
            return
        connection.setblocking(False)
        self._clients.add(_Client(connection, self._loop, self._operations, self._left))
        if len(self._clients) >= CLIENTS_MAX:
            self._loop.disable(self._accept)

    def _left(self, client: _Client) -> None:
        self._clients.discard(client)
        self._loop.enable(self._accept)


class _Client:
    """One connection: bytes received and not yet a line, reply bytes not yet sent."""

    def __init__(
        self,
        connection: socket.socket,
        loop: EventLoop,
        operations: Operations,
        left: Callable[[_Client], None],
    ) -> None:
        self._connection = connection
        self._loop = loop
        self._operations = operations
        self._left = left
        self._received = bytearray()
        self._unsent = bytearray()
        self._closing = False
        self._reader: Handle = loop.add_read(connection.fileno(), self._readable)
        self._writer: Handle | None = None

    def hang_up(self) -> None:
        """End the connection, whatever is under way."""
        self._loop.delete(self._reader)
        if self._writer is not None:
            self._loop.delete(self._writer)
        self._connection.close()
        self._left(self)

    def _readable(self) -> None:
        try:
            data = self._connection.recv(RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.hang_up()
            return
        self._received += data
        self._go_on()

    def _writable(self) -> None:
        try:
            sent = self._connection.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            self.hang_up()
            return
        del self._unsent[:sent]
        self._go_on()

    def _go_on(self) -> None:
        """Answer the lines that are there; listen, or wait to send, accordingly."""
        while not self._unsent and not self._closing:
            end = self._received.find(b"\n", 0, LINE_MAX)
            if end >= 0:
                line = bytes(self._received[:end])
                del self._received[: end + 1]
                self._unsent += self._reply(line)
            elif len(self._received) >= LINE_MAX:
                message = f"a request has at most {LINE_MAX} bytes"
                self._unsent += _refusal(errno.EMSGSIZE, message)
                self._closing = True
            else:
                break
            with contextlib.suppress(OSError):
                del self._unsent[: self._connection.send(self._unsent)]
        if self._unsent:
            self._loop.disable(self._reader)
            if self._writer is None:
                fd = self._connection.fileno()
                self._writer = self._loop.add_write(fd, self._writable)
            self._loop.enable(self._writer)
        elif self._closing:
            self.hang_up()
        else:
            if self._writer is not None:
                self._loop.disable(self._writer)
            self._loop.enable(self._reader)

    def _reply(self, line: bytes) -> bytes:
        try:
            request = decode(line)
            result = self._operations.call(request.get("op"), request.get("args"))
        except ControlError as error:
            return _refusal(error.errno, str(error))
        return encode({"ok": True, "result": result})


def _refusal(number: int, message: str) -> bytes:
    return encode({"ok": False, "errno": number, "error": message})
