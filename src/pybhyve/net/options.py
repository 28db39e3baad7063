"""The variables that network devices have in common.  bhyve: net_utils.c."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from pybhyve.options import POSITIONAL, Options, key, parser

NETAPP_OUI: Final = bytes((0x00, 0xA0, 0x98))
MULTICAST: Final = 1  # of a MAC address's first byte

_MAC = re.compile(r":".join([r"([0-9a-fA-F]{1,2})"] * 6), re.ASCII)


@parser("MAC address")
def parse_mac(text: str) -> bytes:
    """The six bytes of a unicast MAC address, ``00:a0:98:1:2:3``."""
    match = _MAC.fullmatch(text)
    mac = bytes(int(part, 16) for part in match.groups()) if match else b""
    if not any(mac) or mac[0] & MULTICAST:
        raise ValueError(
            f"Invalid MAC {text}: expected that of one station, "
            "such as 00:a0:98:01:02:03"
        )
    return mac


def generate_mac(slot: int, func: int, vm_name: str) -> bytes:
    """The MAC address of a device that was given none: the same at every start."""
    digest = hashlib.md5(f"{slot}-{func}-{vm_name}".encode(), usedforsecurity=False)
    return NETAPP_OUI + digest.digest()[:3]


class NetOptions(Options):
    """``pci.B.S.F.…`` of any network device."""

    backend: str | None = key(
        None,
        doc="tapN or vmnetN: that tap interface; slirp: user networking. "
        "Without it no cable is plugged in.",
        legacy=POSITIONAL,
    )
    type: str | None = key(
        None,
        doc="tap or slirp, where the name of the backend does not tell: "
        "type=tap,backend=lab0.",
    )
    mac: bytes | None = key(
        None,
        parse=parse_mac,
        doc="Address of the device; made from its place and the machine's name "
        "if not given.",
    )
    rom: str | None = key(
        None, doc="File with an option ROM, which firmware runs to boot from the net."
    )
    bridge: str | None = key(
        None, doc="With a tap: the bridge of the host to put it into."
    )
    open: bool = key(
        False, doc="With slirp: the guest may connect to the outside, and has DNS."
    )
    hostfwd: str | None = key(
        None,
        doc="With slirp: ports of the host that lead to the guest, "
        "PROTO:ADDR:PORT-GUESTADDR:PORT with semicolons between.",
    )
