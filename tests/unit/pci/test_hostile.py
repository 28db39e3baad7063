"""Guests that program a function as no driver would."""

from __future__ import annotations

import random
import threading
import time

import pytest

from pybhyve.pci.bus import pci_host
from pybhyve.pci.emul import PciAddress
from tests.guestside.pci import MSI_BASE, ONES, PciFunction
from tests.unit.pci.test_emul import Probe

SECONDS = 0.5  # of each storm


@pytest.fixture
def machine(build):
    machine = build("31,lpc", cpus=2)
    host = pci_host(machine)
    for slot in (5, 6):
        host.add(Probe(machine, host, PciAddress(0, slot, 0)))
    host.finish_setup()
    machine.vm.take()
    return machine


@pytest.fixture
def function(machine):
    return PciFunction(machine, 5)


@pytest.fixture
def probe(machine):
    return pci_host(machine).buses[0].functions[5, 0]


@pytest.mark.parametrize(
    "address",
    [0, 0x1000, 0xFED00000, 0xFEF00000, 0xFEE00000 | 1 << 32, (1 << 64) - 4],
    ids=hex,
)
def test_messages_to_elsewhere_do_not_touch_memory(machine, function, probe, address):
    machine.ctx.write(0x1000, bytes(16))
    function.enable_msi(0x40)
    cap = function.capability(5)
    function.write(cap + 4, 4, address & ONES)
    function.write(cap + 8, 4, address >> 32)

    probe.generate_msi(0)

    assert machine.vm.take() == []
    assert machine.ctx.read(0x1000, 16) == bytes(16)


def test_any_message_to_the_local_apics(machine, function, probe):
    rng = random.Random(4)
    function.enable_msi(0)
    cap = function.capability(5)
    for _each in range(3000):
        function.write(cap + 4, 4, MSI_BASE | rng.getrandbits(20))
        function.write(cap + 12, 2, rng.getrandbits(16))
        probe.generate_msi(0)

    assert len(machine.vm.take()) == 3000


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_table_writes_of_any_size_and_place(machine, function, probe, size):
    function.enable_msix()
    bar = function.bar(5)
    for offset in range(0x1040):
        bar.write(offset % (bar.size - 8), size, (1 << 8 * size) - 1)
        bar.read(offset % (bar.size - 8), size)
    for entry in range(3):
        probe.generate_msix(entry)

    # All masked by what was written last, and the reserved bits have not changed.
    assert machine.vm.take() == []
    assert [bar.read(16 * entry + 12) for entry in range(3)] == [1, 1, 1]
    assert [bar.read(16 * entry) for entry in range(3)] == [0xFFFFFFFC] * 3
    assert bar.read(0x30, 8) == 0  # behind the last entry
    assert bar.read(0x1000, 8) == 7


def test_an_unaligned_write_can_unmask_two_vectors(machine, function, probe):
    function.enable_msix()
    for entry in range(2):
        function.set_msix_vector(entry, 0x60 + entry, masked=True)
        probe.generate_msix(entry)

    # The last dword of one entry and the first of the next; then byte by byte.
    bar = function.bar(5)
    bar.write(12, 8, MSI_BASE << 32)
    bar.write(28, 1, 0)

    assert machine.vm.take() == [
        ("lapic_msi", MSI_BASE, 0x60),
        ("lapic_msi", MSI_BASE, 0x61),
    ]


def storm(*jobs):
    """Run jobs, each again and again on a thread of its own; what they raised."""
    end = time.monotonic() + SECONDS
    failures = []

    def run(job):
        rng = random.Random(job.__name__)
        try:
            while time.monotonic() < end:
                job(rng)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return failures


def test_switches_change_while_interrupts_fly(machine, function, probe):
    function.enable()
    at_msi, at_msix = function.capability(5), function.capability(0x11)
    host = pci_host(machine)

    def write(reg, value):
        host.config_write(0, 5, 0, reg, 2, value)

    def command(rng):
        write(0x04, rng.getrandbits(16))

    def enables(rng):
        write(at_msi + 2, rng.getrandbits(16))
        write(at_msix + 2, rng.getrandbits(16))

    def lines(rng):
        rng.choice((probe.intx_assert, probe.intx_deassert))()

    def messages(rng):
        probe.generate_msix(rng.randrange(4))
        probe.generate_msi(rng.randrange(40))

    assert storm(command, enables, lines, messages) == []

    # INTx follows the device again: what was asserted is let go of.
    write(at_msi + 2, 0)
    write(at_msix + 2, 0)
    function.enable()
    probe.intx_assert()

    assert host.router.save()["active"][probe.intx.pirq] == 1
    assert function.read(0x06, 2) & 8

    probe.intx_deassert()

    assert not any(host.router.save()["active"])
    assert not function.read(0x06, 2) & 8


def test_bars_move_under_accesses(machine, probe):
    host = pci_host(machine)
    places = [0, 0x1000, 0xC0000000, 0xD0000000, 0xE0000000, 0xFEC00000, 0xFEE00000]

    def mover(slot):
        def move(rng):
            reg = 0x10 + 4 * rng.randrange(6)
            host.config_write(0, slot, 0, reg, 4, rng.choice([*places, ONES, 0x60]))

        return move

    def load(rng):
        machine.mem.read(0, rng.choice(places) + rng.randrange(0x2000), 4)
        machine.inout.read(rng.randrange(0x10000 - 4), 4)

    def store(rng):
        machine.mem.write(1, rng.choice(places[2:4]) + rng.randrange(0x2000), 4, 1)

    assert storm(mover(5), mover(6), load, store) == []

    for slot in (5, 6):
        PciFunction(machine, slot).enable(io=False, memory=False)
    for device in (probe, host.buses[0].functions[6, 0]):
        assert all(bar.live is None for bar in device.bars.values())
