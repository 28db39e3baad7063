"""bhyve's command line.

Options are taken from left to right, and each only sets configuration variables, so a
later one, or a variable of ``-o`` or of a file of ``-k``, overrides an earlier one.
bhyve: bhyverun.c, bhyve_parse_config_option() and amd64/bhyverun_machdep.c.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Final

from pybhyve.bhyverun import lpcdev, slots
from pybhyve.bhyverun.cpuset import parse_pin
from pybhyve.bhyverun.main import run_vm
from pybhyve.bhyverun.topology import parse_numa, parse_topology
from pybhyve.config import Config
from pybhyve.errors import ConfigError, OptionError, UsageError
from pybhyve.program import run_program
from pybhyve.variables import GlobalOptions

FWCFG_NAME_MAX: Final = 56  # bytes in QEMU's directory entry, with the NUL


@dataclass(slots=True, frozen=True)
class Flag:
    """An option without argument: the variable it sets, if any."""

    letter: str
    variable: str
    value: str
    doc: str


@dataclass(slots=True, frozen=True)
class Argument:
    """An option with an argument: how it is written, and what puts it in the tree."""

    letter: str
    grammar: str
    parse: Callable[[Config, str], None]
    doc: str


def _variable(name: str) -> Callable[[Config, str], None]:
    return lambda config, text: config.set(name, text)


def _config_file(config: Config, text: str) -> None:
    config.load(text)


def _config_variable(config: Config, text: str) -> None:
    try:
        config.assign(text)
    except ValueError:
        raise OptionError(
            f"invalid configuration option '{text}': expected variable=value"
        ) from None


def _gdb(config: Config, text: str) -> None:
    if text.startswith("w"):
        config.set("gdb.wait", "true")
        text = text[1:]
    address, colon, port = text.rpartition(":")
    if colon:
        config.set("gdb.address", address)
    config.set("gdb.port", port)


def _fwcfg(config: Config, text: str) -> None:
    """An item of firmware configuration.

    Unlike in bhyve it has a variable, so that ``config.dump`` shows it.
    """
    name, comma, data = text.removeprefix("name=").partition(",")
    kind, equals, _ = data.partition("=")
    if not comma or not name or not equals or kind not in ("string", "file"):
        raise OptionError(
            f"invalid fwcfg item '{text}': expected [name=]NAME,string=TEXT "
            "or [name=]NAME,file=PATH"
        )
    if len(name.encode(errors="surrogateescape")) >= FWCFG_NAME_MAX:
        raise OptionError(
            f"invalid fwcfg item '{text}': the name has {FWCFG_NAME_MAX} bytes or more"
        )
    number = sum(1 for _ in config.create("fwcfg").children())
    config.set(f"fwcfg.{number}.name", name)
    config.set(f"fwcfg.{number}.{kind}", data.removeprefix(f"{kind}="))


FLAGS: Final = (
    Flag("a", "x86.x2apic", "false", "local APIC is an xAPIC (the default)"),
    Flag("A", "", "", "no effect: ACPI tables are there by default"),
    Flag("C", "memory.guest_in_core", "true", "guest memory is in core files"),
    Flag("D", "destroy_on_poweroff", "true", "destroy the VM when it powers off"),
    Flag("e", "x86.strictio", "true", "end the VM at a port that no device has"),
    Flag("H", "x86.vmexit_on_hlt", "true", "HLT gives the host CPU away"),
    Flag("h", "", "", "this help"),
    Flag("I", "", "", "no effect: the IOAPIC is always there"),
    Flag("P", "x86.vmexit_on_pause", "true", "PAUSE gives the host CPU away"),
    Flag("S", "memory.wired", "true", "guest memory is locked in host memory"),
    Flag("u", "rtc.use_localtime", "false", "RTC has UTC, not local time"),
    Flag("W", "virtio_msix", "false", "virtio devices have MSI, not MSI-X"),
    Flag("w", "x86.strictmsr", "false", "unknown MSRs read 0 and ignore writes"),
    Flag("x", "x86.x2apic", "true", "local APIC is an x2APIC"),
    Flag("Y", "x86.mptable", "false", "no MP table"),
)
ARGUMENTS: Final = (
    Argument(
        "c",
        "[[cpus=]N][,sockets=N][,cores=N][,threads=N]",
        parse_topology,
        "number of vCPUs, CPU topology",
    ),
    Argument(
        "f", "[name=]NAME,(string=TEXT|file=PATH)", _fwcfg, "item for the firmware"
    ),
    Argument("G", "[w][address:]port", _gdb, "debug server; w waits for a debugger"),
    Argument("K", "layout", _variable("keyboard.layout"), "key map"),
    Argument("k", "file", _config_file, "file of variables"),
    Argument("l", "help|device[,config]", lpcdev.parse_lpc_device, "LPC device"),
    Argument("m", "size[K|M|G|T]", _variable("memory.size"), "guest memory, 256M"),
    Argument("n", "id=N,size=S,cpus=LIST[,domain_policy=P]", parse_numa, "NUMA domain"),
    Argument("o", "variable=value", _config_variable, "set a variable"),
    Argument("p", "vcpu:hostcpu", parse_pin, "run a vCPU on a host CPU"),
    Argument("r", "file", _variable("restore"), "go on from a checkpoint"),
    Argument("s", "help|[bus:]slot[:func],device[,config]", slots.parse, "PCI device"),
    Argument("U", "uuid", _variable("uuid"), "UUID of the VM"),
)

OPTIONS: Final[tuple[Flag | Argument, ...]] = (*FLAGS, *ARGUMENTS)

_BY_LETTER: Final = {option.letter: option for option in OPTIONS}


def usage() -> str:
    """The text of ``-h``."""
    letters = "".join(flag.letter for flag in FLAGS if flag.letter not in "AI")
    lines = [f"Usage: bhyve [-{letters}]"]
    lines += [
        f"             [-{option.letter} {option.grammar}]" for option in ARGUMENTS
    ]
    lines += ["             vmname"]
    lines += [
        f"       -{option.letter}: {option.doc}"
        for option in sorted(OPTIONS, key=lambda o: o.letter.swapcase())
    ]
    return "\n".join(lines) + "\n"


def getopt(
    argv: Sequence[str],
) -> Generator[tuple[Flag | Argument, str], None, list[str]]:
    """The options of a command line, each with its argument, in their order.

    The generator's value is the list of what follows them.  Raises UsageError at an
    unknown option or a missing argument, after what comes before has been given.
    """
    rest = list(argv)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            option = _BY_LETTER.get(letter)
            if option is None:
                raise UsageError(f"illegal option -- {letter}")
            argument = ""
            if isinstance(option, Argument):
                if letters:
                    argument, letters = letters, ""
                elif rest:
                    argument = rest.pop(0)
                else:
                    raise UsageError(f"option requires an argument -- {letter}")
            yield option, argument
    return rest


def parse_args(argv: Sequence[str], config: Config) -> int | None:
    """Put a command line into the tree.

    Returns an exit status where the command line asks for a text, which has been
    printed; else None.  Raises UsageError, OptionError or ConfigError.
    """
    options = getopt(argv)
    while True:
        try:
            option, argument = next(options)
        except StopIteration as end:
            words = end.value
            break
        match option:
            case Flag(letter="h"):
                sys.stderr.write(usage())
                return 0
            case Flag(variable=variable, value=value):
                if variable:
                    config.set(variable, value)
            # Any beginning of the word, as bhyve's strncmp(): "", "h", "he", ...
            case Argument(letter="s") if "help".startswith(argument):
                sys.stdout.write("".join(f"{name}\n" for name in slots.names()))
                return 0
            case Argument(letter="l") if "help".startswith(argument):
                sys.stdout.write("".join(f"{name}\n" for name in lpcdev.NAMES))
                return 0
            case Argument(parse=parse):
                _parse(option, parse, config, argument)
    if len(words) > 1:
        raise UsageError(f"unexpected argument '{words[1]}'")
    if words:
        config.set("name", words[0])
    if config.get("name") is None:
        raise UsageError("no VM name")
    return None


def _parse(
    option: Argument,
    parse: Callable[[Config, str], None],
    config: Config,
    argument: str,
) -> None:
    try:
        parse(config, argument)
    except ConfigError as error:
        if option.letter in "klos":  # their messages say where
            raise
        raise ConfigError(f"-{option.letter} {argument}") from error


def new_config() -> Config:
    """The tree before any option: what is set by default and shown by the dump."""
    config = Config()
    for name, value in GlobalOptions.presets():
        config.set(name, value)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """The program; its exit status."""
    return run_program("bhyve", _main, argv, usage())


def _main(argv: Sequence[str]) -> int:
    config = new_config()
    status = parse_args(argv, config)
    if status is not None:
        return status
    if config.get_bool("config.dump", False):
        sys.stdout.write(config.dump())
        return 1
    return run_vm(config)


if __name__ == "__main__":
    sys.exit(main())
