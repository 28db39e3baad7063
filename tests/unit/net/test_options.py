"""What a user may write about a network device."""

from __future__ import annotations

import pytest

from pybhyve.config import Config
from pybhyve.errors import ConfigError, DeviceError
from pybhyve.net import NetOptions, generate_mac
from pybhyve.net.options import parse_mac
from pybhyve.net.slirp import ANY, Forward, parse_hostfwd


def test_mac_addresses():
    assert parse_mac("00:a0:98:01:02:03") == bytes.fromhex("00a098010203")
    assert parse_mac("2:0:0:0:A:ff") == bytes.fromhex("020000000aff")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00:a0:98:01:02",
        "00:a0:98:01:02:03:04",
        "00-a0-98-01-02-03",
        "00:a0:98:01:02:100",
        "00:00:00:00:00:00",
        "01:00:5e:00:00:01",
        "ff:ff:ff:ff:ff:ff",
        "00:a0:98:01:02:0x",
        "00:a0:98:01:02:٣",
    ],
)
def test_invalid_mac(text):
    with pytest.raises(ValueError, match="Invalid MAC"):
        parse_mac(text)


def test_a_generated_mac_is_bhyves():
    # md5 -s 2-0-vm0, the first three bytes behind NetApp's
    assert generate_mac(2, 0, "vm0") == bytes.fromhex("00a098" + MD5_2_0_VM0)
    assert generate_mac(2, 1, "vm0") != generate_mac(2, 0, "vm0")


MD5_2_0_VM0 = "f05505"


def test_the_string_form():
    config = Config()
    node = config.create("pci.0.2.0")
    NetOptions.legacy_config(node, "tap0,mac=00:a0:98:1:2:3,bridge=br0")
    options = NetOptions.parse(node)

    assert (options.backend, options.bridge) == ("tap0", "br0")
    assert options.mac == bytes.fromhex("00a098010203")

    node.set("mac", "1:2:3")
    with pytest.raises(ConfigError, match=r"pci\.0\.2\.0\.mac: Invalid MAC 1:2:3"):
        NetOptions.parse(node)


def test_hostfwd():
    rules = parse_hostfwd("tcp:127.0.0.1:2222-10.0.2.15:22;udp::53-:5353")

    assert rules == [
        Forward(False, "127.0.0.1", 2222, "10.0.2.15", 22),
        Forward(True, ANY, 53, ANY, 5353),
    ]


@pytest.mark.parametrize(
    "rule",
    [
        "tcp",
        "sctp::1-:2",
        "tcp:127.0.0.1:2222",
        "tcp:127.0.0.1-10.0.2.15:22",
        "tcp:localhost:1-:2",
        "tcp::0-:2",
        "tcp::65536-:2",
        "tcp::1-:x",
        "tcp:::1:2-:2",
    ],
)
def test_hostfwd_that_is_none(rule):
    with pytest.raises(DeviceError, match="expected PROTO:ADDR:PORT-GUESTADDR:PORT"):
        parse_hostfwd(f"tcp::7-:7;{rule}")
