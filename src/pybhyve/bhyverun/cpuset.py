"""Sets of CPUs as users write them, and which host CPUs each vCPU may run on.

bhyve: parse_cpuset(), pincpu_parse() and build_vcpumaps() in bhyverun.c.
"""

from __future__ import annotations

import os
import re
from typing import Final

from pybhyve.config import Config, strtol
from pybhyve.errors import BhyveError, OptionError
from pybhyve.variables import GlobalOptions

CPU_SETSIZE: Final = 1024

_PIN = re.compile(r"\s*([+-]?[0-9]{1,9}):\s*([+-]?[0-9]{1,9})")


def parse_cpuset(text: str, whose: str) -> frozenset[int]:
    """A list of CPU numbers of base 0 and ranges between commas: ``1,3-5``.

    ``whose`` says in messages whom the set is for.  Raises BhyveError.
    """
    cpus: set[int] = set()
    for item in text.split(","):
        try:
            first, rest = strtol(item)
            last = first
            if rest.startswith("-"):
                last, rest = strtol(rest[1:])
        except ValueError:
            first, last, rest = 0, 0, "?"
        if rest:
            raise BhyveError(f"invalid cpuset for {whose}: '{text}'")
        for cpu in (first, last):
            if not 0 <= cpu < CPU_SETSIZE:
                raise BhyveError(
                    f"hostcpu '{cpu}' outside valid range from 0 to {CPU_SETSIZE - 1}"
                )
        if last < first:
            raise BhyveError(f"Invalid hostcpu range {first}-{last}")
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def parse_pin(config: Config, text: str) -> None:
    """``-p vcpu:hostcpu``: one more host CPU for a vCPU.

    Raises OptionError for any other text, or numbers out of range.
    """
    wrong = f"invalid vcpu pinning configuration '{text}'"
    match = _PIN.match(text)
    if match is None:
        raise OptionError(f"{wrong}: invalid format: {text}")
    vcpu, hostcpu = int(match[1]), int(match[2])
    if vcpu < 0:
        raise OptionError(f"{wrong}: invalid vcpu '{vcpu}'")
    if not 0 <= hostcpu < CPU_SETSIZE:
        raise OptionError(
            f"{wrong}: hostcpu '{hostcpu}' outside valid range "
            f"from 0 to {CPU_SETSIZE - 1}"
        )
    variable = f"vcpu.{vcpu}.cpuset"
    before = config.get(variable)
    config.set(variable, str(hostcpu) if before is None else f"{before},{hostcpu}")


def build_vcpumaps(options: GlobalOptions, ncpu: int) -> dict[int, frozenset[int]]:
    """The host CPUs of each vCPU that is pinned.

    Raises BhyveError where a set is malformed, or has no CPU that this process may use.
    """
    allowed = os.sched_getaffinity(0)
    maps: dict[int, frozenset[int]] = {}
    for index in range(ncpu):
        vcpu = options.vcpu.get(index)
        if vcpu is None or vcpu.cpuset is None:
            continue
        cpus = parse_cpuset(vcpu.cpuset, f"vcpu {index}")
        if not cpus & allowed:
            raise BhyveError(
                f"vcpu {index} cannot run on host CPUs {vcpu.cpuset}: "
                f"this process has {','.join(map(str, sorted(allowed)))}"
            )
        maps[index] = cpus
    return maps
