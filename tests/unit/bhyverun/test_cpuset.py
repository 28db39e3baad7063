"""-p and vcpu.N.cpuset."""

from __future__ import annotations

import os

import pytest

from pybhyve.bhyverun.cpuset import build_vcpumaps, parse_cpuset, parse_pin
from pybhyve.config import Config
from pybhyve.errors import BhyveError, OptionError
from pybhyve.variables import GlobalOptions


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0", {0}),
        ("1,3-5", {1, 3, 4, 5}),
        ("0x10,2-2,2", {2, 16}),
        ("1023", {1023}),
    ],
)
def test_cpuset(text, cpus):
    assert parse_cpuset(text, "vcpu 0") == cpus


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid cpuset for vcpu 3: ''"),
        ("1,", "invalid cpuset for vcpu 3: '1,'"),
        ("a", "invalid cpuset for vcpu 3: 'a'"),
        ("1-", "invalid cpuset for vcpu 3: '1-'"),
        ("1-2-3", "invalid cpuset for vcpu 3"),
        ("1;2", "invalid cpuset for vcpu 3"),
        ("3-1", "Invalid hostcpu range 3-1"),
        ("1024", "hostcpu '1024' outside valid range from 0 to 1023"),
        ("0-99999999999999999999", "outside valid range"),
        ("-1", "hostcpu '-1' outside valid range"),
    ],
)
def test_cpuset_that_cannot_be(text, message):
    with pytest.raises(BhyveError, match=message) as failure:
        parse_cpuset(text, "vcpu 3")

    assert failure.value.status == 4


def test_pins_of_a_vcpu_add_up():
    config = Config()

    for text in ("0:1", "1:0", "0:3junk"):
        parse_pin(config, text)

    assert config.dump() == "vcpu.0.cpuset=1,3\nvcpu.1.cpuset=0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid format: $"),
        ("1", "invalid format: 1"),
        ("a:1", "invalid format: a:1"),
        ("-1:0", "invalid vcpu '-1'"),
        ("0:-1", "hostcpu '-1' outside valid range from 0 to 1023"),
        ("0:1024", "hostcpu '1024' outside valid range from 0 to 1023"),
    ],
)
def test_pins_that_cannot_be(text, message):
    with pytest.raises(OptionError, match=message) as failure:
        parse_pin(Config(), text)

    assert "invalid vcpu pinning configuration" in str(failure.value)


def test_maps_of_pinned_vcpus_only():
    host = min(os.sched_getaffinity(0))
    config = Config()
    parse_pin(config, f"1:{host}")
    parse_pin(config, f"7:{host}")

    assert build_vcpumaps(GlobalOptions.parse(config), 2) == {1: {host}}


def test_a_host_cpu_that_we_have_not_is_refused():
    missing = next(n for n in range(1023, -1, -1) if n not in os.sched_getaffinity(0))
    config = Config()
    parse_pin(config, f"0:{missing}")

    with pytest.raises(BhyveError, match=f"vcpu 0 cannot run on host CPUs {missing}"):
        build_vcpumaps(GlobalOptions.parse(config), 1)
