"""A tap interface of the host.  bhyve: tap_init() in net_backends.c.

Linux Documentation/networking/tuntap.rst.  The kernel takes and gives virtio headers
(IFF_VNET_HDR), so checksums and segmentation are done by whoever gets the frame, if at
all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pybhyve.errors import DeviceError
from pybhyve.mevent import EventLoop, Handle
from pybhyve.net.backend import Backend
from pybhyve.net.header import HEADER_LEGACY

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

TUN_DEVICE: Final = "/dev/net/tun"
NAME_MAX: Final = 15  # IFNAMSIZ with its NUL

# linux/if_tun.h
TUNSETIFF: Final = 0x400454CA
TUNSETOFFLOAD: Final = 0x400454D0
TUNGETIFF: Final = 0x800454D2
TUNSETVNETHDRSZ: Final = 0x400454D8
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000

# linux/sockios.h, linux/if.h
SIOCGIFFLAGS: Final = 0x8913
SIOCSIFFLAGS: Final = 0x8914
SIOCGIFINDEX: Final = 0x8933
SIOCBRADDIF: Final = 0x89A2
IFF_UP: Final = 0x0001
IFF_RUNNING: Final = 0x0040  # the carrier is there

# linux/rtnetlink.h
RTMGRP_LINK: Final = 1
NOTICE_MAX: Final = 65536  # bytes of notices read at a time

_IFREQ: Final = struct.Struct("16s24x")
_IFREQ_FLAGS: Final = struct.Struct("16sH22x")
_IFREQ_INT: Final = struct.Struct("16si20x")
_INT: Final = struct.Struct("i")


class TapBackend(Backend):
    """The tap of that name: one that is there, or a new one that goes with us."""

    def __init__(self, loop: EventLoop, name: str, bridge: str | None = None) -> None:
        """Open it, bring it up, and put it into ``bridge`` if one is given.

        DeviceError: one of these cannot be done.
        """
        self._loop = loop
        self._receive: Handle | None = None
        self._watch: Handle | None = None
        self._link_changed: Callable[[], object] = lambda: None
        self._gone = False
        _check_name(name)
        with contextlib.ExitStack() as undo:
            self._fd = _open_tun(name)
            undo.callback(os.close, self._fd)
            # The notices of what happens to interfaces; also what ioctls are asked of.
            self._netlink = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
                socket.NETLINK_ROUTE,
            )
            undo.callback(self._netlink.close)
            self._netlink.bind((0, RTMGRP_LINK))
            self._control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            undo.callback(self._control.close)
            self.set_header(HEADER_LEGACY)
            self.set_offloads(0)
            _bring_up(self._control, name)
            if bridge is not None:
                _add_to_bridge(self._control, bridge, name)
            undo.pop_all()
        self.link_up = self._is_link_up()

    def start(
        self, receive: Callable[[], object], link_changed: Callable[[], object]
    ) -> None:
        """As Backend.start."""
        self._link_changed = link_changed
        self._receive = self._loop.add_read(self._fd, receive)
        self._loop.disable(self._receive)
        self._watch = self._loop.add_read(self._netlink.fileno(), self._notice)

    def close(self) -> None:
        """As Backend.close."""
        for handle in (self._receive, self._watch):
            if handle is not None:
                self._loop.delete(handle)
        self._netlink.close()
        self._control.close()
        os.close(self._fd)

    def set_header(self, length: int) -> None:
        """As Backend.set_header."""
        fcntl.ioctl(self._fd, TUNSETVNETHDRSZ, _INT.pack(length))

    def set_offloads(self, offloads: int) -> None:
        """As Backend.set_offloads."""
        fcntl.ioctl(self._fd, TUNSETOFFLOAD, offloads)

    def send(self, iov: Sequence[Buffer]) -> None:
        """As Backend.send."""
        # An error: the interface is down, its queue is full, the frame is malformed.
        with contextlib.suppress(OSError):
            os.writev(self._fd, iov)

    def receive(self, buffer: memoryview) -> int:
        """As Backend.receive."""
        try:
            return os.readv(self._fd, (buffer,))
        except BlockingIOError:
            return 0
        except OSError as error:
            # The interface was removed: its descriptor would be ready for good.
            log.warning("tap: %s; the interface is gone", error.strerror)
            self._gone = True
            self.disable_receive()
            return 0

    def enable_receive(self) -> None:
        """As Backend.enable_receive."""
        if self._receive is not None and not self._gone:
            self._loop.enable(self._receive)

    def disable_receive(self) -> None:
        """As Backend.disable_receive."""
        if self._receive is not None:
            self._loop.disable(self._receive)

    def _notice(self) -> None:
        # What it says does not matter, nor that some may have been lost: ask.
        with contextlib.suppress(OSError):
            while self._netlink.recv(NOTICE_MAX):
                pass
        up = self._is_link_up()
        if up != self.link_up:
            self.link_up = up
            self._link_changed()

    def _is_link_up(self) -> bool:
        try:
            # It may have another name by now.
            request = fcntl.ioctl(self._fd, TUNGETIFF, _IFREQ.pack(b""))
        except OSError:
            return False  # removed
        name = _IFREQ.unpack(request)[0]
        try:
            flags = _flags(self._control, name)
        except OSError:
            return True  # in another network namespace, where we cannot look
        return flags & (IFF_UP | IFF_RUNNING) == IFF_UP | IFF_RUNNING


def _check_name(name: str) -> None:
    encoded = os.fsencode(name)
    bad = not 0 < len(encoded) <= NAME_MAX or name in (".", "..")
    if bad or any(char in "/:%" or char.isspace() for char in name):
        raise DeviceError(
            f'"{name}" cannot be the name of an interface: at most {NAME_MAX} bytes, '
            "without blanks and / : %"
        )


def _open_tun(name: str) -> int:
    """A descriptor for the tap ``name``, which is made if there is none."""
    try:
        fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise DeviceError(
            f"{name}: there is no {TUN_DEVICE}; load its module: modprobe tun"
        ) from error
    except PermissionError as error:
        raise DeviceError(f"{name}: {TUN_DEVICE} may not be opened") from error
    except OSError as error:
        raise DeviceError(f"{name}: {TUN_DEVICE}") from error
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    try:
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ_FLAGS.pack(os.fsencode(name), flags))
    except OSError as error:
        os.close(fd)
        match error.errno:
            case errno.EBUSY:
                what = "another program has it"
            case errno.EPERM:
                what = (
                    "may neither be created nor used; have root do "
                    f"ip tuntap add {name} mode tap user NAME"
                )
            case errno.EINVAL:
                what = "there is such an interface, and it is not a tap of one queue"
            case _:
                what = "cannot be opened"
        raise DeviceError(f"{name}: {what}") from error
    return fd


def _flags(control: socket.socket, name: bytes) -> int:
    request = fcntl.ioctl(control, SIOCGIFFLAGS, _IFREQ_FLAGS.pack(name, 0))
    return int(_IFREQ_FLAGS.unpack(request)[1])


def _bring_up(control: socket.socket, name: str) -> None:
    encoded = os.fsencode(name)
    try:
        flags = _flags(control, encoded)
        if not flags & IFF_UP:
            request = _IFREQ_FLAGS.pack(encoded, flags | IFF_UP)
            fcntl.ioctl(control, SIOCSIFFLAGS, request)
    except PermissionError as error:
        raise DeviceError(
            f"{name} is down; have root do ip link set {name} up"
        ) from error
    except OSError as error:
        raise DeviceError(f"{name} cannot be brought up") from error


def _add_to_bridge(control: socket.socket, bridge: str, name: str) -> None:
    _check_name(bridge)
    port = _IFREQ_INT.pack(os.fsencode(name), 0)
    index = _IFREQ_INT.unpack(fcntl.ioctl(control, SIOCGIFINDEX, port))[1]
    try:
        request = _IFREQ_INT.pack(os.fsencode(bridge), index)
        fcntl.ioctl(control, SIOCBRADDIF, request)
    except OSError as error:
        match error.errno:
            case errno.EBUSY if _bridge_of(name) == bridge:
                return
            case errno.EBUSY:
                what = f"{name} is in a bridge already; leave bridge={bridge} out"
            case errno.ENODEV:
                what = f"there is no bridge {bridge}; ip link add {bridge} type bridge"
            case errno.EOPNOTSUPP:
                what = f"{bridge} is not a bridge"
            case errno.EPERM:
                what = (
                    f"{name} may not be put into {bridge}; have root do "
                    f"ip link set {name} master {bridge}"
                )
            case _:
                what = f"{name} cannot be put into the bridge {bridge}"
        raise DeviceError(what) from error


def _bridge_of(name: str) -> str:
    return Path("/sys/class/net", name, "brport/bridge").resolve().name
