"""What a network backend is.

Frames carry a `VnetHeader` in front, so that checksums and segmentation are left to
whoever has the least work with them, if anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer


FRAME_MAX: Final = 65536 + 64
"""Bytes of the largest frame with its header, as bhyve: a segmentation's input."""

# What a device can take unfinished; the numbers are those of TUNSETOFFLOAD.
OFFLOAD_CSUM: Final = 0x01
OFFLOAD_TSO4: Final = 0x02
OFFLOAD_TSO6: Final = 0x04
OFFLOAD_ECN: Final = 0x08


class Backend:
    """Nothing is connected: frames are lost, the link is down.

    Base of the others.  ``send``, ``receive``, ``set_header`` and ``set_offloads`` are
    the event loop's, or belong to a machine that is paused; ``enable_receive`` and
    ``disable_receive`` are any thread's; the rest is the main thread's.  Callbacks come
    on the event loop's thread, and never from within a call.
    """

    link_up = False
    """Whether frames go anywhere: a cable is plugged in."""

    def start(
        self, receive: Callable[[], object], link_changed: Callable[[], object]
    ) -> None:
        """Begin to work, with reception disabled.

        ``receive`` is called for as long as frames are waiting and reception is
        enabled; it need not take them all at once.  ``link_changed`` is called after
        ``link_up`` has changed.
        """

    def close(self) -> None:
        """End and give everything back; also without `start`."""

    def set_header(self, length: int) -> None:
        """Frames have HEADER_LEGACY, as at first, or HEADER_MRG bytes in front."""

    def set_offloads(self, offloads: int) -> None:
        """What may come unfinished, OFFLOAD_*; nothing at first.

        The other way, ``send`` takes everything.
        """

    def send(self, iov: Sequence[Buffer]) -> None:
        """Send the frame that is in these buffers; never waits.

        Like any network it may lose frames, and does so with those that are malformed.
        """

    def receive(self, buffer: memoryview) -> int:
        """Put the next frame into a buffer of FRAME_MAX bytes; its length.

        0: none is waiting.
        """
        return 0

    def enable_receive(self) -> None:
        """The guest has room for frames."""

    def disable_receive(self) -> None:
        """The guest has none: keep the frames that come, as far as that goes."""
