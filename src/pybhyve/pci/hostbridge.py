"""The host bridge, a function that only identifies itself.  bhyve: pci_hostbridge.c."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pybhyve.errors import DeviceError
from pybhyve.options import Options, key, parse_legacy_config, parser
from pybhyve.pci.emul import PciAddress, PciDevice
from pybhyve.pci.pcireg import PCIC_BRIDGE, PCIEM_TYPE_ROOT_PORT, PCIS_BRIDGE_HOST
from pybhyve.pci.piix4pm import PIIX4_PM_ADDRESS, Piix4Pm
from pybhyve.pci.registry import pci_device

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.config import Node
    from pybhyve.pci.bus import PciHost


BHYVE_IDS: Final = (0x1275, 0x1275)
I440FX_IDS: Final = (0x8086, 0x1237)


@parser("hexadecimal")
def parse_id(text: str) -> int:
    """A 16-bit PCI id in hexadecimal."""
    try:
        value = int(text, 16)
    except ValueError:
        value = -1
    if not 0 <= value <= 0xFFFF:
        raise ValueError("expected a hexadecimal number up to ffff")
    return value


class HostbridgeOptions(Options):
    """``pcireg.…``: what it says it is."""

    vendor: int | None = key(
        None,
        parse=parse_id,
        name="pcireg.vendor",
        doc="Vendor id; 0x8086 with lpc.fwcfg=qemu, else 0x1275.",
    )
    device: int | None = key(
        None,
        parse=parse_id,
        name="pcireg.device",
        doc="Device id; 0x1237 with lpc.fwcfg=qemu, else 0x1275.",
    )


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

    deviation: a firmware that finds fw_cfg finds the host bridge of QEMU's i440fx too,
    by which OVMF knows how the machine is laid out; bhyve's firmware takes either.
    """

    def __init__(
        self,
        machine: Machine,
        host: PciHost,
        address: PciAddress,
        options: HostbridgeOptions,
    ) -> None:
        super().__init__(machine, host, address, options)
        ids = BHYVE_IDS
        if machine.options.lpc_fwcfg == "qemu":
            ids = I440FX_IDS
        vendor = ids[0] if options.vendor is None else options.vendor
        device = ids[1] if options.device is None else options.device
        self.set_ids(vendor, device, class_=PCIC_BRIDGE, subclass=PCIS_BRIDGE_HOST)
        if (vendor, device) == I440FX_IDS:
            if machine.config.get(f"{PIIX4_PM_ADDRESS.path}.device") is not None:
                raise DeviceError(
                    f"slot {PIIX4_PM_ADDRESS} is that of its power management: "
                    "put the device there elsewhere"
                )
            piix4pm = Piix4Pm(machine, host)
            host.add(piix4pm)
            machine.add_device(piix4pm.address.path, piix4pm)
        else:
            self.add_pcie(PCIEM_TYPE_ROOT_PORT)
