"""PCI as a kernel's own PCI core finds it: many functions, slots and buses."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.functional.machine import BOOT_TIMEOUT, Machine, Starter
from tools import fetch, guests

IDS = {
    "hostbridge": (0x1275, 0x1275, 0x060000),
    "lpc": (0x8086, 0x7000, 0x060100),
    "dummy": (0x10DD, 0x0001, 0x020000),
    "uart": (0x131F, 0x2000, 0x070002),
    "virtio-rnd": (0x1AF4, 0x1005, 0x100000),
    "virtio-net": (0x1AF4, 0x1000, 0x020000),
}
ROM = (0, 7, 0)  # the function with an option ROM
# All slots of bus 0, all functions of one slot, and two buses more.
PLACES = {
    (0, 0, 0): "hostbridge",
    **{(0, slot, 0): "dummy" for slot in range(1, 31) if slot not in (5, 6, 7)},
    **{(0, 5, func): "dummy" if func & 1 else "virtio-rnd" for func in range(8)},
    (0, 6, 0): "uart",
    ROM: "virtio-net",
    (0, 31, 0): "lpc",
    (1, 0, 0): "dummy",
    (1, 3, 1): "virtio-rnd",
    (1, 3, 0): "uart",
    (200, 31, 7): "dummy",
    (200, 31, 0): "uart",
}
# What the kernel says of resources that it does not like.
COMPLAINTS = re.compile(
    r"no compatible bridge window|can't claim|conflict|failed to assign|disabling BAR|"
    r"BIOS bug|invalid|can't derive routing|unable to|not ECAM|no IRQ|disabl.*MMCONFIG",
    re.IGNORECASE,
)


class Function(NamedTuple):
    """What sysfs has of one function."""

    ids: tuple[int, int, int]
    config: bytes
    resources: list[tuple[int, int, int]]  # first and last address, flags
    irq: int


def option_rom() -> Path:
    """iPXE, as Debian has it for QEMU's virtio-net."""
    return fetch.package("ipxe-qemu").file("usr/lib/ipxe/qemu/efi-virtio.rom")


@pytest.fixture(scope="module")
def machine(start_for_module: Starter) -> Machine:
    """At its prompt, with everything in PLACES."""
    guest = guests.find("debian12-cloud")
    image = [
        *guest.image().options(),
        "-Y",  # an MP table describes one bus
        *("-o", f"cmdline={guest.cmdline} quiet 8250.nr_uarts=8"),
    ]
    for (bus, slot, func), device in PLACES.items():
        if device not in ("hostbridge", "lpc"):
            image += ["-s", f"{bus}:{slot}:{func},{device}"]
    image += ["-o", f"pci.0.7.0.rom={option_rom()}"]
    machine = start_for_module("pci", image, guest=guest, ncpus=2)
    machine.console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)
    machine.console.run("echo 1 > /proc/sys/kernel/printk")
    return machine


def functions(machine: Machine) -> dict[tuple[int, int, int], Function]:
    """Everything below /sys/bus/pci/devices."""
    text = machine.console.run(
        "cd /sys/bus/pci/devices; for d in *; do echo == $d; "
        "cat $d/vendor $d/device $d/class $d/irq $d/resource; "
        "hexdump -v -e '1/1 \"%02x\"' -n 256 $d/config; echo; done; cd /",
        timeout=240,
    )
    return dict(_parse(text))


def _parse(text: str) -> Iterator[tuple[tuple[int, int, int], Function]]:
    for part in text.split("== ")[1:]:
        lines = part.split()
        _domain, bus, slot, func = re.split("[:.]", lines[0])
        vendor, device, class_ = (int(line, 16) for line in lines[1:4])
        numbers = [int(line, 16) for line in lines[5:-1]]
        resources = [
            (numbers[at], numbers[at + 1], numbers[at + 2])
            for at in range(0, len(numbers), 3)
        ]
        yield (
            (int(bus, 16), int(slot, 16), int(func)),
            Function(
                (vendor, device, class_),
                bytes.fromhex(lines[-1]),
                resources,
                int(lines[4]),
            ),
        )


@pytest.fixture(scope="module")
def found(machine: Machine) -> dict[tuple[int, int, int], Function]:
    """The functions after boot."""
    return functions(machine)


def test_every_function_is_found_and_no_other(found) -> None:
    assert {place: function.ids for place, function in found.items()} == {
        place: IDS[device] for place, device in PLACES.items()
    }


def test_multifunction_bit(found) -> None:
    for (bus, slot, func), function in found.items():
        several = sum(place[:2] == (bus, slot) for place in PLACES) > 1
        assert function.config[0x0E] == (0x80 if several else 0), (bus, slot, func)


def test_the_kernel_keeps_our_addresses(found) -> None:
    for place, function in found.items():
        for index, (first, last, flags) in enumerate(function.resources[:6]):
            at = 0x10 + 4 * index
            register = int.from_bytes(function.config[at : at + 4], "little")
            if not flags:
                continue
            assert register & (~3 if register & 1 else ~0xF) == first, place
            assert last > first


def test_the_kernel_does_not_complain(machine: Machine) -> None:
    text = machine.console.run("dmesg")
    about_pci = [line for line in text.splitlines() if re.search("pci|PCI|ACPI", line)]

    assert [line for line in about_pci if COMPLAINTS.search(line)] == []
    for bus in (0, 1, 200):
        assert re.search(rf"PCI host bridge to bus 0000:{bus:02x}", text)
    assert "Using ACPI for IRQ routing" in text


def test_each_resource_is_in_a_window_of_its_bus(machine: Machine, found) -> None:
    """The kernel files what a bridge passes on under the bus."""
    tree = machine.console.run("cat /proc/iomem /proc/ioports")
    for (bus, slot, func), function in found.items():
        for first, last, flags in function.resources[:6]:
            if flags:
                line = f"  {first:08x}-{last:08x} : 0000:{bus:02x}:{slot:02x}.{func}"
                short = f"  {first:04x}-{last:04x} : 0000:{bus:02x}:{slot:02x}.{func}"
                assert line in tree or short in tree, (line, tree)


def test_interrupt_lines_arrive_on_every_bus(machine: Machine, found) -> None:
    console = machine.console
    ports = console.run("ls -d /sys/bus/pci/devices/*/tty/ttyS*").split()

    assert len(ports) == 3
    for port in ports:
        bus, slot, func = re.findall(r"0000:(..):(..)\.(.)", port)[0]
        place = int(bus, 16), int(slot, 16), int(func)
        irq = found[place].irq
        before = count(console.run("cat /proc/interrupts"), irq)
        console.run(f"echo to nobody > /dev/{port.rpartition('/')[2]}")

        assert irq >= 16  # of the IOAPIC's PCI pins
        assert count(console.run("cat /proc/interrupts"), irq) > before


def count(interrupts: str, irq: int) -> int:
    line = re.search(rf"^ *{irq}:((?: +\d+)+)", interrupts, re.MULTILINE)
    return sum(map(int, line[1].split())) if line is not None else 0


def test_ecam_is_what_the_ports_show(machine: Machine, found) -> None:
    """The extended space is only reached through it, and has no capabilities."""
    console = machine.console

    assert "MMCONFIG" in console.run("dmesg | grep -i mmconfig")
    size = console.run("stat -c %s /sys/bus/pci/devices/0000:00:00.0/config")
    assert size == "4096\n"
    text = console.run(
        "hexdump -v -e '1/4 \"%08x\"' -s 256 -n 4 "
        "/sys/bus/pci/devices/0000:00:00.0/config; echo"
    )
    assert text == "00000000\n"


def test_option_rom(machine: Machine, found) -> None:
    """Placed by the kernel, switched on, and read to its end."""
    console = machine.console
    image = option_rom().read_bytes()
    bus, slot, func = ROM
    file = f"/sys/bus/pci/devices/0000:{bus:02x}:{slot:02x}.{func}/rom"

    assert found[ROM].config[0x30] & 1 == 0

    console.run(f"echo 1 > {file}")
    console.run(f"cat {file} > /tmp/rom")
    size = int(console.run("stat -c %s /tmp/rom"))
    digest = console.run(f"head -c {len(image)} /tmp/rom | sha256sum").split()[0]

    # The kernel reads as far as the ROM's own headers say.
    assert 0 < size <= len(image)
    assert digest == hashlib.sha256(image[:size]).hexdigest()


def test_removed_and_found_again_with_bars_of_the_kernels_choice(
    machine: Machine, found
) -> None:
    """Sized anew, placed anew, switched on."""
    console = machine.console
    # Of bus 0: to Linux, ports with bits 8 or 9, as the last bus has, are ISA cards'.
    place = "0000:00:01.0"
    before = found[0, 1, 0]
    console.run(f"echo 1 > /sys/bus/pci/devices/{place}/remove")

    assert (0, 1, 0) not in functions(machine)

    console.run("echo 1 > /sys/bus/pci/rescan", timeout=120)
    after = functions(machine)[0, 1, 0]

    assert after.ids == before.ids
    assert [last - first for first, last, _flags in after.resources] == [
        last - first for first, last, _flags in before.resources
    ]
    console.run(f"echo 1 > /sys/bus/pci/devices/{place}/enable")
    registers = after.resources[1][0]

    assert console.run(f"devmem {registers + 8:#x} 32") == "0x00000000\n"
    console.run(f"devmem {registers + 8:#x} 32 0x12345678")
    assert console.run(f"devmem {registers + 10:#x} 16") == "0x1234\n"
