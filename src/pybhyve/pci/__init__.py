"""PCI: buses, and one file per device.

Importing this package registers every device: the list below is the list of them.
"""

from __future__ import annotations

from pybhyve.pci import (
    ahci,
    dummy,
    e1000,
    hostbridge,
    lpc,
    nvme,
    uart,
    virtio_block,
    virtio_net,
    virtio_rnd,
)
from pybhyve.pci.bus import PciHost, init_pci

__all__ = [
    "PciHost",
    "ahci",
    "dummy",
    "e1000",
    "hostbridge",
    "init_pci",
    "lpc",
    "nvme",
    "uart",
    "virtio_block",
    "virtio_net",
    "virtio_rnd",
]
