"""The header in front of a frame: what is left to do to it.

``struct virtio_net_hdr`` (virtio 1.2, 5.1.6), which Linux's taps understand too.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple, Self

if TYPE_CHECKING:
    from typing_extensions import Buffer


HEADER_LEGACY: Final = 10
HEADER_MRG: Final = 12
"""Bytes of the header, without and with num_buffers behind it, which a device sets."""

VIRTIO_NET_HDR_F_NEEDS_CSUM: Final = 1
VIRTIO_NET_HDR_GSO_NONE: Final = 0
VIRTIO_NET_HDR_GSO_TCPV4: Final = 1
VIRTIO_NET_HDR_GSO_TCPV6: Final = 4
VIRTIO_NET_HDR_GSO_ECN: Final = 0x80

_HEADER: Final = struct.Struct("<BBHHHH")


class VnetHeader(NamedTuple):
    """The fields that every form of the header has; by default nothing is left to do.

    The checksum is to be made over all from ``csum_start`` on and to be put
    ``csum_offset`` bytes from there, where the sum of a pseudo header is already.  A
    frame with a ``gso_type`` is to be cut into segments with ``gso_size`` bytes of
    payload, behind copies of its first ``hdr_len`` bytes.
    """

    flags: int = 0
    gso_type: int = VIRTIO_NET_HDR_GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    @classmethod
    def unpack(cls, header: Buffer) -> Self:
        """The fields of a header of any length."""
        return cls(*_HEADER.unpack_from(header))

    def pack(self) -> bytes:
        """HEADER_LEGACY bytes."""
        return _HEADER.pack(*self)

    def finish(self, frame: bytes) -> bytes | None:
        """The frame with its checksum, if it needs one; None: there is no place for it.

        It is not cut.
        """
        if not self.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
            return frame
        at = self.csum_start + self.csum_offset
        if at + 2 > len(frame):
            return None
        checksum = internet_sum(frame[self.csum_start :]) ^ 0xFFFF
        return b"".join((frame[:at], checksum.to_bytes(2, "big"), frame[at + 2 :]))


def internet_sum(data: bytes | bytearray) -> int:
    """The ones' complement sum of 16-bit words (RFC 1071), 0 for 0xFFFF."""
    if len(data) % 2:
        data = data + b"\0"
    return int.from_bytes(data, "big") % 0xFFFF
