"""How many vCPUs, in how many packages, cores and threads; and NUMA domains.

bhyve: calc_topology() and calc_mem_affinity() in bhyverun.c, and the parsing of -c, -n.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from pybhyve.bhyverun.cpuset import parse_cpuset
from pybhyve.config import Config, parse_int
from pybhyve.errors import BhyveError, OptionError
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi.memory import parse_memsize

log = logging.getLogger(__name__)

CPUS_MAX: Final = 65535
DOMAINS_MAX: Final = 8
DOMAIN_ID_MAX: Final = 255

TOPOLOGY_VARIABLES: Final = ("cpus", "sockets", "cores", "threads")
POLICIES: Final = ("first-touch", "interleave", "prefer", "round-robin")


@dataclass(slots=True, frozen=True)
class Topology:
    """The guest's packages, cores in a package and threads of a core."""

    sockets: int
    cores: int
    threads: int

    @property
    def cpus(self) -> int:
        """The number of vCPUs."""
        return self.sockets * self.cores * self.threads


@dataclass(slots=True, frozen=True)
class Domain:
    """A NUMA domain of the guest: bytes of memory, and its vCPUs."""

    size: int
    vcpus: frozenset[int]


def parse_topology(config: Config, text: str) -> None:
    """``-c [[cpus=]N][,sockets=N][,cores=N][,threads=N]``.

    Raises OptionError for any other ``name=``; numbers are read later.
    """
    if not text:
        for variable in ("sockets", "cores", "threads", "cpus"):
            config.set(variable, "1")
        return
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not equals:
            config.set("cpus", item)
        elif name in TOPOLOGY_VARIABLES:
            config.set(name, value)
        else:
            raise OptionError(
                f"invalid cpu topology '{text}': expected "
                "[[cpus=]N][,sockets=N][,cores=N][,threads=N]"
            )


def _count(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        value = parse_int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= CPUS_MAX:
        raise BhyveError(f"Invalid value for {name}: '{text}'")
    return value


def calc_topology(options: GlobalOptions) -> Topology:
    """The topology that the variables ask for.

    The product of sockets, cores and threads must be the number of vCPUs if that is
    given, and is it if not.  Sockets that are not given are as many as vCPUs.  Raises
    BhyveError.
    """
    cpus = _count("cpus", options.cpus)
    cores = _count("cores", options.cores) or 1
    threads = _count("threads", options.threads) or 1
    sockets = _count("sockets", options.sockets) or cpus or 1
    topology = Topology(sockets, cores, threads)
    if topology.cpus > CPUS_MAX:
        raise BhyveError(f"Computed number of vCPUs too high: {topology.cpus}")
    if cpus is not None and topology.cpus != cpus:
        raise BhyveError(
            f"Topology ({sockets} sockets, {cores} cores, {threads} threads) "
            f"does not match {cpus} vCPUs"
        )
    return topology


def parse_numa(config: Config, text: str) -> None:
    """``-n id=N,size=S,cpus=LIST[,domain_policy=P]``, in any order.

    Raises OptionError where the id is missing or no number from 0 to 255.
    """
    found: dict[str, str] = {}
    for item in _numa_items(text):
        name, _, value = item.partition("=")
        found[name] = value
    wrong = f"invalid NUMA configuration '{text}'"
    if not found.get("id"):
        raise OptionError(f"{wrong}: Missing NUMA domain ID in '{text}'")
    try:
        domain = parse_int(found["id"])
    except ValueError as error:
        raise OptionError(wrong) from error
    if not 0 <= domain <= DOMAIN_ID_MAX:
        raise OptionError(f"{wrong}: the ID is not from 0 to {DOMAIN_ID_MAX}")
    for name in ("size", "cpus", "domain_policy"):
        if found.get(name):
            config.set(f"domains.{domain}.{name}", found[name])


def _numa_items(text: str) -> list[str]:
    """The items between commas; one without ``=`` goes on the list before it."""
    items: list[str] = []
    for item in text.split(","):
        if "=" in item or not items:
            items.append(item)
        else:
            items[-1] += f",{item}"
    return items


def calc_domains(options: GlobalOptions, ncpu: int, memsize: int) -> list[Domain]:
    """The NUMA domains, if any, of ``ncpu`` vCPUs and ``memsize`` bytes.

    Domains count from 0 on without a gap; others are ignored.  Raises BhyveError.
    """
    count = 0
    while count < DOMAINS_MAX and count in options.domains:
        count += 1
    if not count:
        return []
    if not options.acpi_tables:
        raise BhyveError("NUMA emulation requires ACPI")
    sizes: list[int | None] = []
    vcpus: list[frozenset[int]] = []
    for index in range(count):
        domain = options.domains[index]
        if domain.cpus is None:
            raise BhyveError(f"Missing CPU set for domain {index}")
        vcpus.append(parse_cpuset(domain.cpus, f"domain {index}"))
        if missing := [vcpu for vcpu in sorted(vcpus[-1]) if vcpu >= ncpu]:
            raise BhyveError(f"domain {index}: there is no vCPU {missing[0]}")
        sizes.append(_domain_size(index, domain.size))
        if domain.domain_policy is not None:
            _check_policy(domain.domain_policy)
    if None in sizes:
        log.warning("memory.size is divided evenly: not every NUMA domain has a size")
        sizes = _even(memsize, count)
    return [
        Domain(size, cpus)
        for size, cpus in zip(sizes, vcpus, strict=True)
        if size is not None
    ]


def _domain_size(index: int, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_memsize(text)
    except ValueError as error:
        raise OptionError(f"invalid memsize for domain {index}: '{text}'") from error


def _check_policy(text: str) -> None:
    """Take what cpuset(1) takes; the host has none of it."""
    name, _, hosts = text.partition(":")
    if name not in POLICIES or (name == "prefer" and not hosts):
        raise OptionError(f"failed to parse domain policy '{text}'")
    log.warning("domain_policy %s has no effect on this host", text)


def _even(memsize: int, count: int) -> list[int | None]:
    """Shares of whole pages; the last takes what is left over."""
    share = memsize // count // 4096 * 4096
    return [*[share] * (count - 1), memsize - share * (count - 1)]
