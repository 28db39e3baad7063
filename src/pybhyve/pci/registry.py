"""The emulations that ``-s`` and ``pci.B.S.F.device`` may name.

A device registers itself::

    @pci_device("virtio-rnd", options=RndOptions)
    class PciVirtioRnd(PciDevice[RndOptions]): ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pybhyve.errors import NotAvailableError
from pybhyve.options import Options

if TYPE_CHECKING:
    from pybhyve.config import Node
    from pybhyve.pci.emul import PciDevice

LegacyConfig = Callable[["Node", str], None]
"""Puts the CONF text of ``-s``, empty where there is none, into the device's node."""

# In bhyve's manual and not written yet.
NOT_AVAILABLE: Final = frozenset(
    {
        "fbuf",
        "hda",
        "passthru",
        "virtio-9p",
        "virtio-console",
        "virtio-input",
        "virtio-scsi",
        "xhci",
    }
)


@dataclass(slots=True, frozen=True)
class Emulation:
    """A name, and what it stands for.

    ``name`` is the variable ``device``'s value; that of an alias is another's.
    """

    name: str
    device: type[PciDevice[Any]]
    options: type[Options]
    legacy_config: LegacyConfig


_EMULATIONS: dict[str, Emulation] = {}

DeviceT = TypeVar("DeviceT", bound="type[PciDevice[Any]]")


def pci_device(
    name: str,
    *,
    options: type[Options] = Options,
    aliases: Mapping[str, LegacyConfig] | None = None,
) -> Callable[[DeviceT], DeviceT]:
    """Register a class under a name, and under aliases with a CONF form of their own.

    Without options of its own a device takes any ``name=value`` and ignores it.
    """

    def register(device: DeviceT) -> DeviceT:
        device.NAME = name
        forms = {name: _legacy_config(options), **(aliases or {})}
        for alias, legacy_config in forms.items():
            if alias in _EMULATIONS:
                raise ValueError(f"{alias} is registered already")
            _EMULATIONS[alias] = Emulation(name, device, options, legacy_config)
        return device

    return register


def _legacy_config(options: type[Options]) -> LegacyConfig:
    def parse(node: Node, text: str) -> None:
        if text:
            options.legacy_config(node, text)

    return parse


def names() -> list[str]:
    """Every name that ``-s help`` lists: aliases too, and those not written yet."""
    return sorted(NOT_AVAILABLE | _EMULATIONS.keys())


def lookup(name: str) -> Emulation | None:
    """What a name stands for; None: bhyve does not know it either.

    NotAvailableError: bhyve knows it.
    """
    if name in NOT_AVAILABLE and name not in _EMULATIONS:
        raise NotAvailableError(f"the PCI device {name}")
    return _EMULATIONS.get(name)
