"""virtio: what is independent of the bus, the rings.  `pybhyve.pci.virtio` has PCI."""

from __future__ import annotations

from pybhyve.virtio.poller import Poller
from pybhyve.virtio.virtqueue import (
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_F_NOTIFY_ON_EMPTY,
    VIRTIO_F_VERSION_1,
    VIRTIO_MSI_NO_VECTOR,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    Chain,
    Ring,
    Segments,
    VirtQueue,
    split,
    total,
)

__all__ = [
    "VIRTIO_F_ANY_LAYOUT",
    "VIRTIO_F_NOTIFY_ON_EMPTY",
    "VIRTIO_F_VERSION_1",
    "VIRTIO_MSI_NO_VECTOR",
    "VIRTIO_RING_F_EVENT_IDX",
    "VIRTIO_RING_F_INDIRECT_DESC",
    "Chain",
    "Poller",
    "Ring",
    "Segments",
    "VirtQueue",
    "split",
    "total",
]
