"""Console backends: where the bytes of a serial port come from and go to.

bhyve: uart_backend.c.  :func:`open_backend` knows the forms a user writes.
"""

from __future__ import annotations

from collections.abc import Callable

from pybhyve.console.backend import Backend, Port
from pybhyve.console.stdio import StdioBackend
from pybhyve.console.tcp import TcpBackend
from pybhyve.console.tty import PtyBackend, TtyBackend
from pybhyve.mevent import EventLoop

__all__ = ["Backend", "Port", "open_backend"]


def open_backend(
    spec: str | None, loop: EventLoop, quit_vm: Callable[[], None]
) -> Backend:
    """The backend that ``spec`` names, opened but not yet started.

    None: nothing is connected; ``stdio``; ``pty``: a new pseudo terminal, its name is
    printed; ``tcp=IP:PORT``: wait for a client there; else the path of a terminal.
    ``quit_vm`` is called when the person at the terminal asks to leave.

    DeviceError: it cannot be opened, or is not of that kind.
    """
    if spec is None:
        return Backend()
    if spec == "stdio":
        return StdioBackend(loop, quit_vm)
    if spec == "pty":
        return PtyBackend(loop)
    if spec.startswith("tcp"):
        return TcpBackend(loop, spec)
    return TtyBackend(loop, spec)
