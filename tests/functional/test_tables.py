"""What a directly loaded kernel finds in the tables, and a crash that it tells of."""

from __future__ import annotations

import re

import pytest

from tests.functional.console import Console
from tests.functional.machine import BOOT_TIMEOUT, Starter
from tools import guests


@pytest.fixture
def boot(start: Starter):
    """A Debian kernel at its prompt."""

    def boot(
        name: str, *options: str, modules: tuple[str, ...] = (), ncpus: int = 1
    ) -> Console:
        guest = guests.find("debian12-cloud")
        image = [
            *guest.image(modules=modules).options(),
            *("-o", f"cmdline={guest.cmdline} quiet"),
            *options,
        ]
        console = start(name, image, guest=guest, ncpus=ncpus).console
        console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)
        return console

    return boot


def test_numa_domains(boot) -> None:
    console = boot(
        "numa",
        *("-n", "id=0,size=384M,cpus=0-1"),
        *("-n", "id=1,size=256M,cpus=2"),
        ncpus=3,
    )
    nodes = "/sys/devices/system/node"

    assert console.run(f"cat {nodes}/online") == "0-1\n"
    assert console.run(f"cat {nodes}/node0/cpulist {nodes}/node1/cpulist") == "0-1\n2\n"
    text = console.run(f"grep -h MemTotal {nodes}/node*/meminfo")
    sizes = [int(size) // 1024 for size in re.findall(r"(\d+) kB", text)]
    assert 300 < sizes[0] <= 384
    assert 200 < sizes[1] <= 256


def test_smbios_without_firmware(boot) -> None:
    console = boot("smbios", "-o", "system.product_name=my product")

    assert console.run("cat /sys/class/dmi/id/product_name") == "my product\n"
    assert console.run("cat /sys/class/dmi/id/chassis_vendor") == "FreeBSD\n"


def test_a_crash_ends_the_machine(boot) -> None:
    console = boot("panic", "-o", "lpc.pvpanic=true", modules=("pvpanic-mmio",))
    console.send("echo c > /proc/sysrq-trigger\n")

    assert console.wait(60) == 2
    assert "bhyve: the guest's kernel has crashed" in console.shown
