"""Networks: Linux's own drivers over taps of the kernel, and over libslirp.

The taps are in namespaces that a test makes, so nothing needs privilege.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional.console import Console
from tests.functional.efishell import EfiShell
from tests.functional.machine import BOOT_TIMEOUT, Programs, Starter
from tools import fetch, firmware, guests
from tools.network import Network

# What is sent each way; 1 GiB is 1073741824.
STREAM_BYTES = int(os.environ.get("PYBHYVE_STREAM_BYTES", str(16 << 20)))
STREAM_SECONDS = 60 + STREAM_BYTES // (1 << 20)
CONNECTIONS = 200
PORT = "5001"
HOST, GUEST = "192.168.77.1", "192.168.77.10"
UDHCPD_CONF = f"""\
start {GUEST}
end {GUEST}
interface br0
lease_file {{directory}}/leases
pidfile {{directory}}/pid
option subnet 255.255.255.0
option router {HOST}
"""


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    yield network
    network.close()


@pytest.fixture(scope="module")
def stream() -> Path:
    return guests.compile_program("stream")


@pytest.fixture(scope="module")
def busybox() -> str:
    return str(fetch.package("busybox-static").file("bin/busybox"))


def image(name: str, stream: Path, module: str) -> tuple[guests.Guest, list[str]]:
    guest = guests.find(name)
    script = guests.GUESTS_DIR / "src" / "udhcpc.sh"
    modules = [module] if module == "e1000" else [module, "virtio_pci"]
    return guest, guest.image([stream, script], modules=modules).options()


def log_in(console: Console, guest: guests.Guest) -> None:
    console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)
    console.run("echo 1 > /proc/sys/kernel/printk; ip link set lo up")


def get_address(console: Console) -> None:
    console.run("ip link set eth0 up; udhcpc -n -q -t 20 -i eth0 -s /bin/udhcpc.sh")


def power_off(console: Console) -> None:
    console.send("poweroff -f\n")

    assert console.wait(60) == 1


def serve(network: Network, stream: Path) -> None:
    """Have the other end of streams in the network."""
    server = network.start(str(stream), "serve", PORT)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"


DEVICES = [
    pytest.param("debian12-cloud", "virtio-net", "virtio_net", id="virtio-net"),
    pytest.param("debian12-generic", "e1000", "e1000", id="e1000"),
]


@pytest.mark.timeout(BOOT_TIMEOUT + 8 * STREAM_SECONDS)
@pytest.mark.parametrize(("guest_name", "device", "module"), DEVICES)
def test_tap_in_a_bridge(
    start: Starter,
    network: Network,
    stream: Path,
    busybox: str,
    tmp_path: Path,
    guest_name: str,
    device: str,
    module: str,
) -> None:
    """DHCP, ping, streams both ways, many connections, and a cable."""
    network.run("ip", "link", "add", "br0", "type", "bridge")
    network.run("ip", "addr", "add", f"{HOST}/24", "dev", "br0")
    network.run("ip", "link", "set", "br0", "up")
    guest, options = image(guest_name, stream, module)
    slot = ["-s", f"2,{device},tap0,bridge=br0"]
    console = start(device, [*slot, *options], guest=guest, enter=network.enter).console
    log_in(console, guest)
    (tmp_path / "udhcpd.conf").write_text(UDHCPD_CONF.format(directory=tmp_path))
    (tmp_path / "leases").touch()
    network.start(busybox, "udhcpd", "-f", str(tmp_path / "udhcpd.conf"))
    get_address(console)

    assert f"{GUEST}/24" in console.run("ip addr show dev eth0")
    assert "3 packets received" in console.run(f"ping -c 3 {HOST}")
    assert "3 packets received" in network.run(busybox, "ping", "-c", "3", GUEST)

    serve(network, stream)
    size = str(STREAM_BYTES)
    for mode in ("put", "get"):
        shown = console.run(f"stream {mode} {HOST} {PORT} {size}", STREAM_SECONDS)
        assert shown == f"{mode} {size}: ok\n"
    console.run(f"(stream serve {PORT} > /tmp/ready) & sleep 1; cat /tmp/ready")
    for mode in ("put", "get"):
        command = [str(stream), mode, GUEST, PORT, size]
        assert network.run(*command, timeout=STREAM_SECONDS) == f"{mode} {size}: ok\n"

    many = console.run(f"stream many {HOST} {PORT} {CONNECTIONS}", 120)
    assert many == f"many {CONNECTIONS}: ok\n"
    command = [str(stream), "many", GUEST, PORT, str(CONNECTIONS)]
    assert network.run(*command, timeout=120) == f"many {CONNECTIONS}: ok\n"

    carrier = "cat /sys/class/net/eth0/carrier"
    assert console.run(carrier) == "1\n"
    network.run("ip", "link", "set", "tap0", "down")
    console.run(f"while [ $({carrier}) = 1 ]; do sleep 0.2; done", 30)
    network.run("ip", "link", "set", "tap0", "up")
    console.run(f"while [ $({carrier}) = 0 ]; do sleep 0.2; done", 30)
    console.run(f"until ping -c 1 -W 1 {HOST} > /dev/null; do true; done", 30)
    # A bridge's port is beyond the cable: the link stays, and nobody answers.
    network.run("ip", "link", "set", "tap0", "nomaster")
    console.run(f"! ping -c 1 -W 1 {HOST} > /dev/null")
    assert console.run(carrier) == "1\n"
    network.run("ip", "link", "set", "tap0", "master", "br0")
    console.run(f"until ping -c 1 -W 1 {HOST} > /dev/null; do true; done", 30)

    power_off(console)

    assert "tap0" not in network.run("ip", "link")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.mark.timeout(BOOT_TIMEOUT + 8 * STREAM_SECONDS)
@pytest.mark.parametrize(("guest_name", "device", "module"), DEVICES)
def test_slirp(
    start: Starter,
    network: Network,
    stream: Path,
    tmp_path: Path,
    guest_name: str,
    device: str,
    module: str,
) -> None:
    """DHCP, DNS, streams and connections both ways, in a network that only has lo."""
    network.serve_names(tmp_path / "resolv.conf")
    guest, options = image(guest_name, stream, module)
    port = free_port()
    slot = ["-s", f"2,{device},slirp,open,hostfwd=tcp:127.0.0.1:{port}-:{PORT}"]
    console = start(
        f"slirp-{device}", [*slot, *options], guest=guest, enter=network.enter
    ).console
    log_in(console, guest)
    get_address(console)

    assert "10.0.2.15/24" in console.run("ip addr show dev eth0")
    assert "192.0.2.7" in console.run("nslookup anything.example")

    serve(network, stream)
    size = str(STREAM_BYTES)
    for mode in ("put", "get"):
        shown = console.run(f"stream {mode} 10.0.2.2 {PORT} {size}", STREAM_SECONDS)
        assert shown == f"{mode} {size}: ok\n"
    many = console.run(f"stream many 10.0.2.2 {PORT} {CONNECTIONS}", 120)
    assert many == f"many {CONNECTIONS}: ok\n"

    console.run(f"(stream serve {PORT} > /tmp/ready) & sleep 1; cat /tmp/ready")
    for mode in ("put", "get"):
        command = [str(stream), mode, "127.0.0.1", str(port), size]
        assert network.run(*command, timeout=STREAM_SECONDS) == f"{mode} {size}: ok\n"
    command = [str(stream), "many", "127.0.0.1", str(port), str(CONNECTIONS)]
    assert network.run(*command, timeout=120) == f"many {CONNECTIONS}: ok\n"

    power_off(console)


def test_firmware_has_a_network(start: Starter) -> None:
    """edk2's driver: it polls, with rings and headers of its own."""
    rom = ["-l", firmware.bhyve_without_variables().option()]
    machine = start("efi-net", ["-s", "2,virtio-net,slirp", *rom])
    shell = EfiShell(machine.console, BOOT_TIMEOUT)
    shell.run("ifconfig -s eth0 dhcp")
    deadline = time.monotonic() + 60
    while "10.0.2.15" not in shell.run("ifconfig -l eth0"):
        assert time.monotonic() < deadline
        time.sleep(1)

    assert "3 packets transmitted, 3 received" in shell.run("ping -n 3 10.0.2.2")

    shell.type("reset -s")

    assert machine.console.wait(60) == 1


def test_a_tap_that_cannot_be_had(programs: Programs, network: Network) -> None:
    """One line that says what is wrong, and exit status 4."""
    network.run("ip", "link", "add", "tap0", "type", "bridge")
    kernel = guests.compile_kernel("halt")
    console = programs.bhyve(
        *("-s", "2,virtio-net,tap0", "-o", f"kernel={kernel}", "no-tap"),
        enter=network.enter,
    )

    assert console.wait(60) == 4
    assert console.shown.count("\n") == 1
    assert "virtio-net: tap0: there is such an interface, and it is not a tap" in (
        console.shown
    )

    console.close()
