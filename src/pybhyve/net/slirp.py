"""User networking: libslirp, a TCP/IP stack that needs no privilege.

bhyve: net_backend_slirp.c and its helper.  The guest is on 10.0.2.0/24, where DHCP
gives it 10.0.2.15; 10.0.2.2 is the host, 10.0.2.3 its name server.  The library is
loaded when it is asked for; its interface is that of libslirp.h, version 4.

libslirp is for one thread, and here that is the event loop's.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pybhyve.errors import DeviceError
from pybhyve.mevent import EventLoop, Handle
from pybhyve.net.backend import Backend
from pybhyve.net.header import HEADER_LEGACY, VnetHeader

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

LIBRARY: Final = "libslirp.so.0"
CONFIG_VERSION: Final = 4

NETWORK: Final = "10.0.2.0"
NETMASK: Final = "255.255.255.0"
HOST: Final = "10.0.2.2"
NAME_SERVER: Final = "10.0.2.3"
DHCP_START: Final = "10.0.2.15"
ANY: Final = str(ipaddress.IPv4Address(0))  # what the user means by no address

ETHER_HEADER: Final = 14
QUEUE_MAX: Final = 1 << 20
"""Bytes of frames kept for a guest that does not take them, as bhyve; then a frame is
lost, and TCP repeats it."""
NO_TIMEOUT: Final = 0xFFFFFFFF

# SlirpAddPollCb's bits by epoll's; IN, PRI, OUT, ERR, HUP.
_POLL_BITS: Final = ((1, 1), (4, 2), (2, 4), (8, 8), (16, 16))
_TO_EPOLL: Final = [sum(e for s, e in _POLL_BITS if n & s) for n in range(32)]
_TO_SLIRP: Final = [sum(s for s, e in _POLL_BITS if n & e) for n in range(32)]

_WRITE_CB: Final = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
)
_GUEST_ERROR_CB: Final = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)
_CLOCK_CB: Final = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_FD_CB: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)
_NOTIFY_CB: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_ADD_POLL_CB: Final = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p
)
_REVENTS_CB: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


class _SlirpCb(ctypes.Structure):
    # Timers are for IPv6's router advertisements alone, which are off.
    _fields_ = (
        ("send_packet", _WRITE_CB),
        ("guest_error", _GUEST_ERROR_CB),
        ("clock_get_ns", _CLOCK_CB),
        ("timer_new", ctypes.c_void_p),
        ("timer_free", ctypes.c_void_p),
        ("timer_mod", ctypes.c_void_p),
        ("register_poll_fd", _FD_CB),
        ("unregister_poll_fd", _FD_CB),
        ("notify", _NOTIFY_CB),
        ("init_completed", ctypes.c_void_p),
        ("timer_new_opaque", ctypes.c_void_p),
    )


class _SlirpConfig(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32),
        ("restricted", ctypes.c_int),
        ("in_enabled", ctypes.c_bool),
        ("vnetwork", ctypes.c_uint32),
        ("vnetmask", ctypes.c_uint32),
        ("vhost", ctypes.c_uint32),
        ("in6_enabled", ctypes.c_bool),
        ("vprefix_addr6", ctypes.c_uint8 * 16),
        ("vprefix_len", ctypes.c_uint8),
        ("vhost6", ctypes.c_uint8 * 16),
        ("vhostname", ctypes.c_char_p),
        ("tftp_server_name", ctypes.c_char_p),
        ("tftp_path", ctypes.c_char_p),
        ("bootfile", ctypes.c_char_p),
        ("vdhcp_start", ctypes.c_uint32),
        ("vnameserver", ctypes.c_uint32),
        ("vnameserver6", ctypes.c_uint8 * 16),
        ("vdnssearch", ctypes.c_void_p),
        ("vdomainname", ctypes.c_char_p),
        ("if_mtu", ctypes.c_size_t),
        ("if_mru", ctypes.c_size_t),
        ("disable_host_loopback", ctypes.c_bool),
        ("enable_emu", ctypes.c_bool),
        ("outbound_addr", ctypes.c_void_p),
        ("outbound_addr6", ctypes.c_void_p),
        ("disable_dns", ctypes.c_bool),
        ("disable_dhcp", ctypes.c_bool),
    )


class Forward(NamedTuple):
    """A port of the host that leads to one of the guest.

    ``0.0.0.0`` is any address of the host, and the first that DHCP gives the guest.
    """

    is_udp: bool
    host: str
    host_port: int
    guest: str
    guest_port: int


def parse_hostfwd(text: str) -> list[Forward]:
    """The rules of ``hostfwd``: ``PROTO:ADDR:PORT-GUESTADDR:PORT``, semicolons between.

    DeviceError: one is none.
    """
    forwards = []
    for rule in filter(None, text.split(";")):
        try:
            forwards.append(_parse_rule(rule))
        except ValueError:
            raise DeviceError(
                f'hostfwd "{rule}": expected PROTO:ADDR:PORT-GUESTADDR:PORT, '
                "such as tcp:127.0.0.1:2222-10.0.2.15:22"
            ) from None
    return forwards


def _parse_rule(rule: str) -> Forward:
    proto, _, rest = rule.partition(":")
    host, dash, guest = rest.partition("-")
    if proto not in ("tcp", "udp") or not dash:
        raise ValueError(rule)
    return Forward(proto == "udp", *_parse_end(host), *_parse_end(guest))


def _parse_end(text: str) -> tuple[str, int]:
    address, colon, port = text.partition(":")
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not colon or not digits or not 0 < int(port) <= 0xFFFF:
        raise ValueError(text)
    return str(ipaddress.IPv4Address(address or ANY)), int(port)


class SlirpBackend(Backend):
    """A network of the guest's own, behind it the host's sockets."""

    link_up = True

    def __init__(
        self,
        loop: EventLoop,
        clock: Callable[[], int],
        mtu: int,
        *,
        is_open: bool = False,
        hostfwd: str | None = None,
    ) -> None:
        """``is_open``: the guest may connect to anywhere, not only be connected to.

        DeviceError: there is no libslirp, or a port of ``hostfwd`` cannot be had.
        """
        forwards = parse_hostfwd(hostfwd or "")
        self._loop = loop
        self._library = _load()
        self._header = HEADER_LEGACY
        self._receive: Callable[[], object] = lambda: None
        self._enabled = False
        self._frames: deque[bytes] = deque()
        self._queued = 0  # bytes of them
        self._delivering = False  # _deliver is about to be called
        self._refilling = False  # _refill is about to be called
        self._timer: Handle | None = None
        self._timer_due = 0.0
        # What slirp wants polled, and what the epoll has; by descriptor.
        self._wanted: dict[int, int] = {}
        self._polled: dict[int, int] = {}
        self._ready: dict[int, int] = {}
        self._epoll = select.epoll()
        self._handle: Handle | None = None
        self._add_poll_cb = _ADD_POLL_CB(self._add_poll)
        self._revents_cb = _REVENTS_CB(self._revents)
        # The library keeps the address of this, so this object must keep it too.
        self._callbacks = _SlirpCb(
            send_packet=_WRITE_CB(self._send_packet),
            guest_error=_GUEST_ERROR_CB(_guest_error),
            clock_get_ns=_CLOCK_CB(lambda _opaque: clock()),
            register_poll_fd=_FD_CB(lambda _fd, _opaque: None),
            unregister_poll_fd=_FD_CB(self._forget),
            notify=_NOTIFY_CB(lambda _opaque: self._schedule_refill()),
        )
        config = _SlirpConfig(
            version=CONFIG_VERSION,
            restricted=not is_open,
            in_enabled=True,
            vnetwork=_in_addr(NETWORK),
            vnetmask=_in_addr(NETMASK),
            vhost=_in_addr(HOST),
            vdhcp_start=_in_addr(DHCP_START),
            vnameserver=_in_addr(NAME_SERVER),
            # deviation: bhyve's 2048 is more than a guest's interface takes.
            if_mtu=mtu,
            if_mru=mtu,
        )
        self._slirp = self._library.slirp_new(
            ctypes.byref(config), ctypes.byref(self._callbacks), None
        )
        if not self._slirp:
            self._epoll.close()
            raise DeviceError("libslirp cannot be set up")
        try:
            for forward in forwards:
                self._add_forward(forward)
        except DeviceError:
            self.close()
            raise

    def start(
        self, receive: Callable[[], object], link_changed: Callable[[], object]
    ) -> None:
        """As Backend.start."""
        self._receive = receive
        self._handle = self._loop.add_read(self._epoll.fileno(), self._poll)
        self._schedule_refill()

    def close(self) -> None:
        """As Backend.close."""
        for handle in (self._handle, self._timer):
            if handle is not None:
                self._loop.delete(handle)
        self._library.slirp_cleanup(self._slirp)
        self._slirp = None
        self._epoll.close()

    def set_header(self, length: int) -> None:
        """As Backend.set_header."""
        self._header = length

    def send(self, iov: Sequence[Buffer]) -> None:
        """As Backend.send."""
        # A segmentation's input is one frame to slirp as well: only IP's limit, which
        # is the same, counts there.
        frame = b"".join(iov)
        length = len(frame) - self._header
        if length < ETHER_HEADER:
            return
        finished = VnetHeader.unpack(frame).finish(frame[self._header :])
        if finished is not None:
            self._library.slirp_input(self._slirp, finished, length)
            self._schedule_refill()

    def receive(self, buffer: memoryview) -> int:
        """As Backend.receive."""
        if not self._frames:
            return 0
        frame = self._frames.popleft()
        self._queued -= len(frame)
        header = self._header
        end = header + len(frame)
        buffer[:header] = bytes(header)
        buffer[header:end] = frame
        return end

    def enable_receive(self) -> None:
        """As Backend.enable_receive."""
        self._enabled = True
        self._loop.call_soon_threadsafe(self._deliver)

    def disable_receive(self) -> None:
        """As Backend.disable_receive."""
        self._enabled = False

    # -- frames to the guest ---------------------------------------------------------

    def _send_packet(self, data: int, length: int, _opaque: object) -> int:
        if self._queued + length <= QUEUE_MAX:
            self._frames.append(ctypes.string_at(data, length))
            self._queued += length
            if self._enabled and not self._delivering:
                self._delivering = True
                self._loop.call_soon_threadsafe(self._deliver)
        return length

    def _deliver(self) -> None:
        self._delivering = False
        if self._frames and self._enabled and self._slirp is not None:
            self._receive()
            if self._frames and self._enabled and not self._delivering:
                self._delivering = True
                self._loop.call_soon_threadsafe(self._deliver)

    # -- slirp's descriptors and timers ----------------------------------------------

    def _schedule_refill(self) -> None:
        if not self._refilling:
            self._refilling = True
            self._loop.call_soon_threadsafe(self._refill)

    def _refill(self) -> None:
        """Ask slirp what it waits for, and wait for that."""
        self._refilling = False
        if self._slirp is None:
            return
        timeout = ctypes.c_uint32(NO_TIMEOUT)
        self._wanted = {}
        self._library.slirp_pollfds_fill(
            self._slirp, ctypes.byref(timeout), self._add_poll_cb, None
        )
        self._update_epoll()
        if timeout.value != NO_TIMEOUT:
            self._start_timer(timeout.value / 1000)

    def _poll(self) -> None:
        """Something slirp waits for has happened, or it is time."""
        if self._slirp is None:
            return
        self._ready = dict(self._epoll.poll(0))
        self._library.slirp_pollfds_poll(self._slirp, 0, self._revents_cb, None)
        self._refill()

    def _add_poll(self, fd: int, events: int, _opaque: object) -> int:
        self._wanted[fd] = _TO_EPOLL[events & 31]
        return fd  # the index that _revents is asked for

    def _revents(self, fd: int, _opaque: object) -> int:
        return _TO_SLIRP[self._ready.get(fd, 0) & 31]

    def _update_epoll(self) -> None:
        wanted, polled = self._wanted, self._polled
        if wanted == polled:
            return
        for fd in polled.keys() - wanted.keys():
            with contextlib.suppress(OSError):  # closed meanwhile
                self._epoll.unregister(fd)
        for fd, events in wanted.items():
            if fd not in polled:
                self._epoll.register(fd, events)
            elif polled[fd] != events:
                self._epoll.modify(fd, events)
        self._polled = wanted

    def _forget(self, fd: int, _opaque: object) -> None:
        # It is about to be closed, and its number may soon be another's.
        self._wanted.pop(fd, None)
        if self._polled.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def _start_timer(self, seconds: float) -> None:
        now = time.monotonic()
        if self._timer is not None:
            if self._timer.enabled and self._timer_due <= now + seconds:
                return
            self._loop.delete(self._timer)
        self._timer_due = now + seconds
        self._timer = self._loop.add_timer(seconds, self._poll)

    def _add_forward(self, forward: Forward) -> None:
        failed = self._library.slirp_add_hostfwd(
            self._slirp,
            forward.is_udp,
            _in_addr(forward.host),
            forward.host_port,
            _in_addr(forward.guest),
            forward.guest_port,
        )
        if failed:
            number = ctypes.get_errno()
            kind = "UDP" if forward.is_udp else "TCP"
            raise DeviceError(
                f"hostfwd: {kind} port {forward.host_port} of {forward.host} "
                "cannot be had"
            ) from OSError(number, os.strerror(number))


def _load() -> Any:
    try:
        # PyDLL keeps the interpreter's lock: nothing in there waits, and most calls
        # come back to us.
        library = ctypes.PyDLL(LIBRARY, use_errno=True)
        pointer, int_ = ctypes.c_void_p, ctypes.c_int
        for name, result, arguments in (
            ("slirp_new", pointer, [pointer, pointer, pointer]),
            ("slirp_cleanup", None, [pointer]),
            ("slirp_input", None, [pointer, ctypes.c_char_p, int_]),
            ("slirp_pollfds_fill", None, [pointer, pointer, _ADD_POLL_CB, pointer]),
            ("slirp_pollfds_poll", None, [pointer, int_, _REVENTS_CB, pointer]),
            (
                "slirp_add_hostfwd",
                int_,
                [pointer, int_, ctypes.c_uint32, int_, ctypes.c_uint32, int_],
            ),
        ):
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
    except OSError as error:
        raise DeviceError(
            f"slirp needs {LIBRARY}, which is not here: apt-get install libslirp0"
        ) from error
    except AttributeError as error:
        raise DeviceError(f"{LIBRARY} is too old: {error}") from None
    return library


def _in_addr(address: str) -> int:
    """An IPv4 address as it is in memory."""
    return int.from_bytes(ipaddress.IPv4Address(address).packed, "little")


def _guest_error(message: bytes, _opaque: object) -> None:
    log.debug("slirp: %s", message.decode(errors="replace"))
