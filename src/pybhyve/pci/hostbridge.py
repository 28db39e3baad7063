"""The host bridge, a function that only identifies itself.  bhyve: pci_hostbridge.c."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pybhyve.options import Options, key, parse_legacy_config
from pybhyve.pci.emul import PciAddress, PciDevice
from pybhyve.pci.pcireg import PCIC_BRIDGE, PCIEM_TYPE_ROOT_PORT, PCIS_BRIDGE_HOST
from pybhyve.pci.registry import pci_device

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.config import Node
    from pybhyve.pci.bus import PciHost


def parse_id(text: str) -> int:
    """A 16-bit PCI id in hexadecimal."""
    try:
        value = int(text, 16)
    except ValueError:
        value = -1
    if not 0 <= value <= 0xFFFF:
        raise ValueError("expected a hexadecimal number up to ffff")
    return value


parse_id.kind = "hexadecimal"  # type: ignore[attr-defined]  # read by key()


class HostbridgeOptions(Options):
    """``pcireg.…``: what it says it is."""

    vendor: int = key(0x1275, parse=parse_id, name="pcireg.vendor", doc="Vendor id.")
    device: int = key(0x1275, parse=parse_id, name="pcireg.device", doc="Device id.")


def _amd_config(node: Node, text: str) -> None:
    node.set("pcireg.vendor", "0x1022")
    node.set("pcireg.device", "0x7432")
    if text:
        parse_legacy_config(node, text)


@pci_device(
    "hostbridge", options=HostbridgeOptions, aliases={"amd_hostbridge": _amd_config}
)
class PciHostbridge(PciDevice[HostbridgeOptions]):
    """No registers of its own.

    deviation: the header is of type 0, as it is for host bridges; bhyve's newest says 1
    and then has none of a bridge's registers.
    """

    def __init__(
        self,
        machine: Machine,
        host: PciHost,
        address: PciAddress,
        options: HostbridgeOptions,
    ) -> None:
        super().__init__(machine, host, address, options)
        self.set_ids(
            options.vendor,
            options.device,
            class_=PCIC_BRIDGE,
            subclass=PCIS_BRIDGE_HOST,
        )
        self.add_pcie(PCIEM_TYPE_ROOT_PORT)
