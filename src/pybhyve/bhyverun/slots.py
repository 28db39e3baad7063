"""``-s``: which PCI device is where.  bhyve: pci_parse_slot() in pci_emul.c."""

from __future__ import annotations

import re
from typing import Final

from pybhyve.config import Config
from pybhyve.errors import ConfigError, NotAvailableError
from pybhyve.pci import registry

BUS_MAX: Final = 255
SLOT_MAX: Final = 31
FUNC_MAX: Final = 7

# One to three numbers; as with bhyve's sscanf(), what follows them does not matter.
_PLACE = re.compile(r"\s*(\d{1,9})(?::\s*(\d{1,9}))?(?::\s*(\d{1,9}))?", re.ASCII)


def names() -> list[str]:
    """What ``-s help`` lists."""
    return registry.names()


def parse(config: Config, text: str) -> None:
    """``[bus:]slot[:func],device[,conf]``: the device's node and its variables.

    Raises ConfigError for a place that does not exist or is taken, an unknown device or
    a wrong ``conf``; NotAvailableError for a device that this version has not.
    """
    place, comma, rest = text.partition(",")
    found = _PLACE.match(place)
    if not comma or found is None:
        raise ConfigError(
            f'Invalid PCI slot info field "{text}": expected '
            "[bus:]slot[:func],device[,config]"
        )
    bus = func = 0
    match [int(number) for number in found.groups() if number is not None]:
        case [slot]:
            pass
        case [slot, func]:
            pass
        case [bus, slot, func]:
            pass
    if bus > BUS_MAX or slot > SLOT_MAX or func > FUNC_MAX:
        raise ConfigError(
            f'Invalid PCI slot info field "{text}": bus 0-{BUS_MAX}, '
            f"slot 0-{SLOT_MAX}, function 0-{FUNC_MAX}"
        )
    where = f"pci slot {bus}:{slot}:{func}"
    name, _, conf = rest.partition(",")
    path = f"pci.{bus}.{slot}.{func}"
    if config.node(path) is not None:
        raise ConfigError(f"{where} already occupied!")
    try:
        emulation = registry.lookup(name)
    except NotAvailableError:
        raise NotAvailableError(f'{where}: device "{name}"') from None
    if emulation is None:
        raise ConfigError(f'{where}: unknown device "{name}"')
    node = config.create(path)
    node.set("device", emulation.name)
    try:
        emulation.legacy_config(node, conf)
    except ConfigError as error:
        raise ConfigError(f"{where}: {name}") from error


def declares(config: Config, path: str) -> bool:
    """Whether the device at its place declares a variable below ``pci``."""
    _, *place = path.split(".")
    if len(place) < 4:
        return False
    node = config.node(".".join(["pci", *place[:3]]))
    if node is None:
        return False
    if place[3:] == ["device"]:
        return True
    try:
        emulation = registry.lookup(node.get("device") or "")
    except NotAvailableError:
        return True  # nobody can say
    return emulation is not None and path not in emulation.options.unknown(node)
