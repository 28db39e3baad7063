"""-c and -n: topology, NUMA domains, and what is refused (bhyve(8))."""

from __future__ import annotations

import pytest

from pybhyve.bhyverun.topology import (
    Domain,
    Topology,
    calc_domains,
    calc_topology,
    parse_numa,
    parse_topology,
)
from pybhyve.config import Config
from pybhyve.errors import BhyveError, OptionError
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import GB, MB


def options_of(*arguments: str, parse=parse_topology) -> GlobalOptions:
    config = Config()
    for argument in arguments:
        parse(config, argument)
    return GlobalOptions.parse(config)


@pytest.mark.parametrize(
    ("argument", "topology"),
    [
        ("4", (4, 1, 1)),
        ("", (1, 1, 1)),
        ("cpus=4", (4, 1, 1)),
        ("sockets=2,cores=2", (2, 2, 1)),
        ("cores=2", (1, 2, 1)),
        ("threads=2,cores=3", (1, 3, 2)),
        ("4,sockets=1,cores=4", (1, 4, 1)),
        ("4,sockets=2,cores=1,threads=2", (2, 1, 2)),
        ("0x2", (2, 1, 1)),
        ("cpus=1,cpus=3", (3, 1, 1)),
        ("65535", (65535, 1, 1)),
    ],
)
def test_topology(argument, topology):
    assert calc_topology(options_of(argument)) == Topology(*topology)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "4,cores=2",
            r"Topology \(4 sockets, 2 cores, 1 threads\) does not match 4 vCPUs",
        ),
        ("0", "Invalid value for cpus: '0'"),
        ("65536", "Invalid value for cpus: '65536'"),
        ("2x", "Invalid value for cpus: '2x'"),
        (",", "Invalid value for cpus: ''"),
        ("cores=-1", "Invalid value for cores: '-1'"),
        ("threads=", "Invalid value for threads: ''"),
        ("sockets=1000,cores=1000", "Computed number of vCPUs too high: 1000000"),
    ],
)
def test_topology_that_cannot_be(argument, message):
    with pytest.raises(BhyveError, match=message) as failure:
        calc_topology(options_of(argument))

    assert failure.value.status == 4


@pytest.mark.parametrize("argument", ["core=2", "2,x=1", "=", "maxcpus=4"])
def test_other_names_are_malformed(argument):
    with pytest.raises(OptionError, match="invalid cpu topology") as failure:
        options_of(argument)

    assert failure.value.status == 64


def test_domains_are_only_there_if_asked_for():
    assert calc_domains(options_of(), 2, GB) == []


def test_domains_with_sizes():
    options = options_of(
        "id=0,size=256M,cpus=0-1", "cpus=2,3,id=1,size=1G", parse=parse_numa
    )

    assert calc_domains(options, 4, GB) == [
        Domain(256 * MB, frozenset({0, 1})),
        Domain(GB, frozenset({2, 3})),
    ]


def test_domains_share_memory_where_one_has_no_size(caplog):
    options = options_of("id=0,size=1G,cpus=0", "id=1,cpus=1", parse=parse_numa)

    domains = calc_domains(options, 2, 5 * MB + 4096)

    assert [domain.size for domain in domains] == [640 * 4096, 641 * 4096]
    assert "divided evenly" in caplog.text


def test_domains_count_from_0_without_a_gap():
    options = options_of("id=0,cpus=0", "id=2,cpus=1", parse=parse_numa)

    assert len(calc_domains(options, 2, GB)) == 1


@pytest.mark.parametrize(
    ("argument", "message", "status"),
    [
        ("size=1G,cpus=0", "Missing NUMA domain ID in 'size=1G,cpus=0'", 64),
        ("id=256,cpus=0", "invalid NUMA configuration", 64),
        ("id=x,cpus=0", "invalid NUMA configuration", 64),
        ("id=0,size=1G", "Missing CPU set for domain 0", 4),
        ("id=0,size=x,cpus=0", "invalid memsize for domain 0: 'x'", 64),
        ("id=0,cpus=0,domain_policy=x", "failed to parse domain policy 'x'", 64),
        ("id=0,cpus=0,domain_policy=prefer", "failed to parse domain policy", 64),
        ("id=0,cpus=x", "invalid cpuset for domain 0: 'x'", 4),
        ("id=0,cpus=0-1", "domain 0: there is no vCPU 1", 4),
    ],
)
def test_domains_that_cannot_be(argument, message, status):
    with pytest.raises(BhyveError, match=message) as failure:
        calc_domains(options_of(argument, parse=parse_numa), 1, GB)

    assert failure.value.status == status


def test_domains_need_acpi():
    config = Config()
    parse_numa(config, "id=0,cpus=0")
    config.set("acpi_tables", "false")

    with pytest.raises(BhyveError, match="NUMA emulation requires ACPI"):
        calc_domains(GlobalOptions.parse(config), 1, GB)
