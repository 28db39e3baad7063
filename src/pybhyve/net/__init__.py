"""Network backends: what is behind a network device's connector.

bhyve: net_backends.c.  `open_backend` knows the forms that a user writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pybhyve.errors import DeviceError, NotAvailableError
from pybhyve.mevent import EventLoop
from pybhyve.net.backend import (
    FRAME_MAX,
    OFFLOAD_CSUM,
    OFFLOAD_ECN,
    OFFLOAD_TSO4,
    OFFLOAD_TSO6,
    Backend,
)
from pybhyve.net.header import HEADER_LEGACY, HEADER_MRG, VnetHeader, internet_sum
from pybhyve.net.options import NetOptions, generate_mac
from pybhyve.net.slirp import SlirpBackend
from pybhyve.net.tap import TapBackend

__all__ = [
    "FRAME_MAX",
    "HEADER_LEGACY",
    "HEADER_MRG",
    "OFFLOAD_CSUM",
    "OFFLOAD_ECN",
    "OFFLOAD_TSO4",
    "OFFLOAD_TSO6",
    "Backend",
    "NetOptions",
    "VnetHeader",
    "generate_mac",
    "internet_sum",
    "open_backend",
]

# bhyve's other ways into a FreeBSD kernel.
_FREEBSD_ONLY: Final = ("netgraph", "netmap", "vale")


def open_backend(
    options: NetOptions, loop: EventLoop, clock: Callable[[], int], mtu: int
) -> Backend:
    """The backend that the variables of a device name, open but not yet started.

    ``clock`` gives the nanoseconds of the machine's time; ``mtu`` is the largest packet
    of the guest, in bytes.  Without the variable ``backend`` nothing is connected.

    DeviceError: it cannot be opened, or there is no such kind.
    """
    name = options.backend
    if name is None:
        return Backend()
    kind = options.type or name
    if kind.startswith(("tap", "vmnet")):
        return TapBackend(loop, name, options.bridge)
    if kind.startswith("slirp"):
        return SlirpBackend(
            loop, clock, mtu, is_open=options.open, hostfwd=options.hostfwd
        )
    for other in _FREEBSD_ONLY:
        if kind.startswith(other):
            raise NotAvailableError(f"the network backend {other}")
    where = f"type={options.type}" if options.type else f'"{name}"'
    raise DeviceError(
        f"unknown network backend {where}: expected tapN, vmnetN or slirp"
    )
