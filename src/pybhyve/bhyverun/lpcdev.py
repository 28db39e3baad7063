"""``-l``: the devices behind the LPC bridge.  bhyve: lpc_device_parse()."""

from __future__ import annotations

from typing import Final

from pybhyve.config import Config
from pybhyve.errors import ConfigError, OptionError
from pybhyve.options import parse_legacy_config

COM_PORTS: Final = ("com1", "com2", "com3", "com4")
NAMES: Final = ("bootrom", *COM_PORTS, "tpm", "pc-testdev")
"""What ``-l help`` lists."""


def parse_lpc_device(config: Config, text: str) -> None:
    """Put a device and its options into the tree; its name is of any case.

    Raises OptionError for an unknown device or one without what it needs, ConfigError
    for a boot ROM or TPM without a file.
    """
    name, comma, rest = text.partition(",")
    match name.lower():
        case "bootrom":
            _bootrom(config, text, rest)
        case "tpm":
            _tpm(config, text, rest)
        case "pc-testdev":
            config.set("lpc.pc-testdev", "true")
        case com if com in COM_PORTS and comma and rest:
            config.set(f"lpc.{com}.path", rest)
        case com if com in COM_PORTS:
            raise OptionError(
                f"invalid lpc device configuration '{text}': {com} needs a backend, "
                f"as in {com},stdio"
            )
        case _:
            raise OptionError(
                f"invalid lpc device configuration '{text}': "
                f"expected one of {', '.join(NAMES)}"
            )


def _bootrom(config: Config, text: str, rest: str) -> None:
    rom, _, rest = rest.partition(",")
    if not rom:
        raise ConfigError(f'invalid bootrom option "{text}"')
    config.set("bootrom", rom)
    if not rest:
        return
    variables, _, options = rest.partition(",")
    if "=" in variables:
        options = rest
    elif variables:
        config.set("bootvars", variables)
    if options:
        parse_legacy_config(config.create("lpc"), options)


def _tpm(config: Config, text: str, rest: str) -> None:
    kind, _, rest = rest.partition(",")
    if not kind:
        raise ConfigError(f'invalid tpm type "{text}"')
    path, _, options = rest.partition(",")
    if not path:
        raise ConfigError(f'invalid tpm path "{text}"')
    tpm = config.create("tpm")
    tpm.set("type", kind)
    tpm.set("path", path)
    if options:
        parse_legacy_config(tpm, options)
    tpm.set_default("version", "2.0")
