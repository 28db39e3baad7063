"""The command line of bhyveload(8)."""

from __future__ import annotations

import contextlib
import getopt
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pybhyve.bhyveload.formats import make_plan
from pybhyve.bhyveload.loader import apply
from pybhyve.errors import (
    NotAvailableError,
    OptionError,
    UsageError,
    VmExistsError,
)
from pybhyve.program import run_program
from pybhyve.vmmapi import LOWMEM_LIMIT, MB, VmCtx, parse_memsize

USAGE: Final = """\
usage: bhyveload [-CS] [-a cmdline] [-c console] [-e name=value] [-i initrd]
                 [-m memsize[K|k|M|m|G|g|T|t]] -k kernel vmname
"""
OPTSTRING: Final = "CSa:c:d:e:h:i:k:l:m:"
EXIT_FAILURE: Final = 1  # of everything but EX_USAGE, as in bhyve's bhyveload

USERBOOT: Final = {
    "-d": "a disk for a user boot loader",
    "-h": "a host directory for a user boot loader",
    "-l": "a user boot loader",
}


@dataclass(slots=True)
class Arguments:
    """What the command line asks for."""

    vmname: str = ""
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str | None = None
    env: list[str] = field(default_factory=list)
    memory: int = 256 * MB


def parse(argv: Sequence[str]) -> Arguments:
    """Read a command line.  Raises UsageError, OptionError and NotAvailableError."""
    try:
        options, rest = getopt.getopt(list(argv), OPTSTRING)
    except getopt.GetoptError as error:
        raise UsageError(error.msg) from None
    arguments = Arguments()
    for option, value in options:
        match option:
            case "-C" | "-S":
                pass  # how bhyve maps the memory; it outlives this process as files
            case "-a":
                arguments.cmdline = value
            case "-c":
                _check_console(value)
            case "-e":
                if "=" not in value:
                    raise OptionError(f"-e '{value}' is not of the form name=value")
                arguments.env.append(value)
            case "-i":
                arguments.initrd = Path(value)
            case "-k":
                arguments.kernel = Path(value)
            case "-m":
                try:
                    arguments.memory = parse_memsize(value)
                except ValueError as error:
                    raise OptionError(f"Invalid memsize '{value}'") from error
            case _:
                raise NotAvailableError(f"{USERBOOT[option]} ({option})")
    if len(rest) != 1:
        raise UsageError("exactly one VM name is needed")
    if arguments.kernel is None:
        raise UsageError("a kernel is needed (-k)")
    arguments.vmname = rest[0]
    return arguments


def _check_console(path: str) -> None:
    # This loader asks nothing, so its console stays silent; a wrong one is still told.
    if path == "stdio":
        return
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise OptionError(f"Could not open '{path}'") from error
    is_device = stat.S_ISCHR(os.fstat(fd).st_mode)
    os.close(fd)
    if not is_device:
        raise OptionError(f"Could not open '{path}': not a terminal device")


def run(arguments: Arguments) -> None:
    """Make or reinitialise the VM and load it.  Raises BhyveError."""
    assert arguments.kernel is not None  # noqa: S101  # parse() has seen to it
    # deviation: the plan comes first, so that a bad kernel leaves no VM behind, and an
    # old one as it was.
    low = min(arguments.memory, LOWMEM_LIMIT)
    plan, state = make_plan(
        arguments.kernel,
        arguments.initrd,
        arguments.cmdline,
        arguments.env,
        low,
        arguments.memory - low,
    )
    try:
        ctx = VmCtx.create(arguments.vmname)
        created = True
    except VmExistsError:
        ctx = VmCtx.open(arguments.vmname, maxcpus=1, reinit=True)
        created = False
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(ctx.destroy if created else ctx.close)
        ctx.setup_memory(arguments.memory)
        apply(ctx, plan, state)
        ctx.save_loaded()
        on_failure.pop_all()
    ctx.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run bhyveload; its exit status."""
    return run_program("bhyveload", _main, argv, USAGE, EXIT_FAILURE)


def _main(argv: Sequence[str]) -> int:
    run(parse(argv))
    return 0
