"""The console on a TCP port: one client at a time."""

from __future__ import annotations

import contextlib
import re
import socket
from typing import Final

from pybhyve.console.backend import Backend, Port, Stream
from pybhyve.errors import DeviceError
from pybhyve.mevent import EventLoop, Handle

REFUSAL: Final = b"Socket already connected\n"

_SPEC = re.compile(r"tcp=(?:\[([^]]+)\]|([^:\[\]]+)):([0-9]{1,5})")


def parse_address(spec: str) -> tuple[str, int]:
    """Host and port of ``tcp=IP:PORT`` or ``tcp=[IPv6]:PORT``; DeviceError if not."""
    match = _SPEC.fullmatch(spec)
    if match is None or int(match[3]) > 0xFFFF:
        raise DeviceError(
            f"console {spec}: expected tcp=IP:PORT or tcp=[IPv6]:PORT, PORT below 65536"
        )
    return match[1] or match[2], int(match[3])


class TcpBackend(Backend):
    """Listens, and connects the port to the client that comes first."""

    def __init__(self, loop: EventLoop, spec: str) -> None:
        self._loop = loop
        self._port: Port | None = None
        self._client: socket.socket | None = None
        self._stream: Stream | None = None
        self._acceptor: Handle | None = None
        host, port = parse_address(spec)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((host, port))
            self._listener.listen(1)
            self._listener.setblocking(False)
        except OSError as error:
            self._listener.close()
            raise DeviceError(f"console {spec}") from error

    @property
    def address(self) -> tuple[str, int]:
        """Host and port listened on."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def start(self, port: Port) -> None:
        """Begin to accept clients."""
        self._port = port
        self._acceptor = self._loop.add_read(self._listener.fileno(), self._accept)

    def halt(self) -> None:
        """Disconnect and stop to listen."""
        if self._acceptor is not None:
            self._loop.delete(self._acceptor)
            self._acceptor = None
        if self._stream is not None:
            self._stream.flush()
        self._hang_up()
        self._listener.close()

    def write(self, byte: int) -> bool:
        """As Backend.write."""
        stream = self._stream
        return stream is None or stream.write(byte)

    def resume_input(self) -> None:
        """As Backend.resume_input."""
        stream = self._stream
        if stream is not None:
            stream.resume_input()

    def _accept(self) -> None:
        try:
            client, _address = self._listener.accept()
        except OSError:  # the client gave up, or there are no descriptors left
            return
        client.setblocking(False)
        if self._client is not None or self._port is None:
            with client, contextlib.suppress(OSError):
                client.send(REFUSAL)
            return
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client = client
        self._stream = Stream(
            self._loop, self._port, client.fileno(), client.fileno(), self._hang_up
        )

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._client is not None:
            self._client.close()
            self._client = None
