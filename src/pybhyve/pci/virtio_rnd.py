"""virtio-rnd: the guest's hwrng (virtio 1.2, 5.4).  bhyve: pci_virtio_rnd.c."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pybhyve.options import Options
from pybhyve.pci.emul import PciAddress
from pybhyve.pci.pcireg import PCIC_CRYPTO
from pybhyve.pci.registry import pci_device
from pybhyve.pci.virtio import VIRTIO_VENDOR, VirtioPci
from pybhyve.virtio import VirtQueue, total

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.pci.bus import PciHost

VIRTIO_DEV_RANDOM: Final = 0x1005
VIRTIO_ID_ENTROPY: Final = 4
RINGSZ: Final = 64
MAX_BYTES: Final = 4096  # for one chain, which may ask for gigabytes


@pci_device("virtio-rnd")
class PciVirtioRnd(VirtioPci[Options]):
    """One queue; each chain is filled with random bytes."""

    def __init__(
        self, machine: Machine, host: PciHost, address: PciAddress, options: Options
    ) -> None:
        super().__init__(
            machine, host, address, options, queues=(RINGSZ,), config_size=0
        )
        self.set_ids(
            VIRTIO_VENDOR,
            VIRTIO_DEV_RANDOM,
            class_=PCIC_CRYPTO,
            subclass=0,
            subvendor=VIRTIO_VENDOR,
            subdevice=VIRTIO_ID_ENTROPY,
        )

    def notify(self, vq: VirtQueue) -> None:
        """Fill what there is; the source does not wait."""
        while (chain := vq.getchain()) is not None:
            wanted = min(total(chain.writable), MAX_BYTES)
            data = self.machine.random_bytes(wanted)
            vq.relchain(chain, vq.write(chain.writable, data))
        vq.endchains(used_all_avail=True)
