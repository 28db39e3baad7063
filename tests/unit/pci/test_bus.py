"""Configuration accesses, address allocation and interrupt routing of a machine."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from pybhyve.errors import DeviceError, NotAvailableError
from pybhyve.pci import registry
from pybhyve.pci.bus import ECAM_BASE, Window, pci_host
from pybhyve.pci.emul import PciDevice
from pybhyve.pci.pcireg import CONFIG_SIZE

ONES = 0xFFFFFFFF


def cfg_read(machine, slot, reg, size=4, func=0, bus=0):
    address = 1 << 31 | bus << 16 | slot << 11 | func << 8 | reg & 0xFC
    machine.inout.write(0xCF8, 4, address)
    return machine.inout.read(0xCFC + (reg & 3), size)


def cfg_write(machine, slot, reg, size, value, func=0, bus=0):
    address = 1 << 31 | bus << 16 | slot << 11 | func << 8 | reg & 0xFC
    machine.inout.write(0xCF8, 4, address)
    machine.inout.write(0xCFC + (reg & 3), size, value)


def device_at(machine, slot, func=0, bus=0) -> PciDevice[Any]:
    return pci_host(machine).buses[bus].functions[slot, func]


def test_mechanism_1_finds_the_functions(build):
    machine = build("0,hostbridge", "31,lpc", "4:1,dummy", "4,uart")

    assert cfg_read(machine, 0, 0) == 0x12751275
    assert cfg_read(machine, 31, 0) == 0x70008086
    assert cfg_read(machine, 4, 0) == 0x2000131F
    assert cfg_read(machine, 4, 0, func=1) == 0x000110DD
    assert cfg_read(machine, 4, 2, size=2, func=1) == 0x0001
    assert cfg_read(machine, 4, 0x0B, size=1) == 0x07
    assert cfg_read(machine, 5, 0) == ONES
    assert cfg_read(machine, 0, 0, bus=7) == ONES


def test_ecam_shows_the_same_and_no_extended_capabilities(build):
    machine = build("0,hostbridge", "4:1,dummy")

    def ecam(slot, func, reg, size=4):
        return machine.mem.read(0, ECAM_BASE | slot << 15 | func << 12 | reg, size)

    assert ecam(0, 0, 0) == 0x12751275
    assert ecam(4, 1, 0) == 0x000110DD
    assert ecam(4, 0, 0) == ONES
    assert ecam(0, 0, 0x100) == 0
    assert ecam(0, 0, 0x104) == ONES
    assert ecam(0, 0, 0, 8) == (1 << 64) - 1

    machine.mem.write(0, ECAM_BASE | 4 << 15 | 1 << 12 | 0x3C, 1, 0x5A)

    assert cfg_read(machine, 4, 0x3C, size=1, func=1) == 0x5A


def test_address_register_needs_four_bytes_and_its_enable_bit(build):
    machine = build("0,hostbridge")
    machine.inout.write(0xCF8, 4, 0x80000000)
    machine.inout.write(0xCF8, 2, 0x1234)

    assert machine.inout.read(0xCF8, 4) == 0x80000000
    assert machine.inout.read(0xCF8, 2) == 0xFFFF
    assert machine.inout.read(0xCFC, 4) == 0x12751275

    machine.inout.write(0xCF8, 4, 0)

    assert machine.inout.read(0xCFC, 4) == ONES


def test_misaligned_access(build):
    machine = build("0,hostbridge")
    machine.inout.write(0xCF8, 4, 0x80000000)

    assert machine.inout.read(0xCFD, 4) == ONES
    assert machine.inout.read(0xCFD, 2) == 0xFFFF


def test_header_type_shows_several_functions(build):
    machine = build("3,dummy", "4,dummy", "4:1,dummy")

    assert cfg_read(machine, 3, 0x0E, size=1) == 0
    assert cfg_read(machine, 4, 0x0E, size=1) == 0x80
    assert cfg_read(machine, 4, 0x0C, func=1) == 0x00800000


def test_bars_are_placed_largest_first_and_live_at_reset(build):
    machine = build("3,dummy", "4,uart")

    assert cfg_read(machine, 3, 0x10) == 0x2001
    assert cfg_read(machine, 4, 0x10) == 0x2009
    assert cfg_read(machine, 3, 0x14) == 0xC0000000
    assert cfg_read(machine, 3, 0x18) == 0xC0001000
    assert cfg_read(machine, 3, 0x04, size=2) == 0x0007

    machine.mem.write(0, 0xC0000010, 4, 0xDEADBEEF)

    assert machine.mem.read(0, 0xC0000012, 2) == 0xDEAD
    assert machine.inout.owner(0x2000) == "dummy 0:3:0 BAR0"


def test_testdev_takes_the_first_ports_of_the_window(build):
    machine = build("3,dummy", "31,lpc", **{"lpc__pc-testdev": "1"})

    assert machine.inout.owner(0x2000) == "pc-testdev irq"
    assert cfg_read(machine, 3, 0x10) == 0x2021


def test_windows_of_several_buses(build):
    machine = build("3,dummy", "2:3:0,dummy")
    buses = pci_host(machine).buses

    assert buses[0].io == (0x2000, 0x2040)
    assert buses[0].mem32 == (0xC0000000, 0xC0200000)
    assert buses[2].io == (0x2040, 0x2080)
    assert buses[2].mem32[0] == 0xC0200000
    assert buses[0].mem64 == (32 << 30, (32 << 30) + (512 << 20))
    assert cfg_read(machine, 3, 0x14, bus=2) == 0xC0200000


def test_a_full_window_is_an_error():
    window = Window("I/O", 0xFF00, 0x10000)
    assert window.take(0x80, 0x80) == 0xFF00
    window.take(0x80, 0x80)

    with pytest.raises(DeviceError, match="no room for 0x80 more of PCI I/O"):
        window.take(0x80, 0x80)


def test_intx_routes_round_robin_and_pins_by_use(build):
    machine = build("3,uart", "4,uart", "4:1,uart", "5,dummy", "31,lpc")

    routes = list(pci_host(machine).buses[0].routes())
    assert [(slot, r.pin, r.ioapic_pin, r.pirq) for slot, r in routes] == [
        (3, 1, 16, 0),
        (4, 1, 17, 1),
        (4, 2, 18, 2),
    ]
    assert cfg_read(machine, 4, 0x3D, size=1) == 1
    assert cfg_read(machine, 4, 0x3D, size=1, func=1) == 2
    assert cfg_read(machine, 5, 0x3D, size=1) == 0
    assert cfg_read(machine, 5, 0x3C, size=1) == 0xFF
    line = cfg_read(machine, 3, 0x3C, size=1)
    assert cfg_read(machine, 31, 0x60, size=1) == line
    assert ("isa_set_irq_trigger", line, True) in machine.vm.wires


def test_a_boot_rom_knows_the_routes_by_slot_and_pin(build, tmp_path):
    rom = tmp_path / "rom"
    rom.write_bytes(bytes(4096))
    slots = ("6,uart", "7,uart", "7:1,uart", "14,uart", "31,lpc")
    machine = build(*slots, bootrom=str(rom))

    routes = list(pci_host(machine).buses[0].routes())
    assert [(slot, r.pin, r.ioapic_pin, r.pirq) for slot, r in routes] == [
        (6, 1, 19, 3),
        (7, 1, 20, 4),
        (7, 2, 21, 5),
        (14, 1, 19, 3),  # the same line as slot 6
    ]
    lines = [cfg_read(machine, slot, 0x3C, size=1) for slot in (6, 7, 14)]
    assert lines[0] == lines[2] != lines[1]


def test_intx_reaches_ioapic_and_pic(build):
    machine = build("3,uart", "31,lpc")
    uart = device_at(machine, 3)
    line = cfg_read(machine, 3, 0x3C, size=1)
    machine.vm.take()
    uart.intx_assert()
    uart.intx_assert()

    assert cfg_read(machine, 3, 0x06, size=2) & 8
    uart.intx_deassert()

    assert machine.vm.take() == [
        ("ioapic_assert_irq", 16),
        ("isa_assert_irq", line, -1),
        ("ioapic_deassert_irq", 16),
        ("isa_deassert_irq", line, -1),
    ]
    assert not cfg_read(machine, 3, 0x06, size=2) & 8


def test_intx_disable_holds_the_line_and_enable_lets_it_through(build):
    machine = build("3,uart", "31,lpc")
    uart = device_at(machine, 3)
    machine.vm.take()
    cfg_write(machine, 3, 0x04, 2, 0x0407)
    uart.intx_assert()

    assert machine.vm.take() == []
    assert cfg_read(machine, 3, 0x06, size=2) & 8

    cfg_write(machine, 3, 0x04, 2, 0x0007)
    assert machine.vm.take()[0] == ("ioapic_assert_irq", 16)

    cfg_write(machine, 3, 0x04, 2, 0x0407)
    assert machine.vm.take()[0] == ("ioapic_deassert_irq", 16)


def test_changing_a_pirq_moves_a_held_line(build):
    machine = build("3,uart", "31,lpc")
    uart = device_at(machine, 3)
    line = cfg_read(machine, 3, 0x3C, size=1)
    uart.intx_assert()
    machine.vm.take()
    cfg_write(machine, 31, 0x60, 1, 11)

    assert machine.vm.take() == [
        ("isa_deassert_irq", line, -1),
        ("isa_assert_irq", 11, -1),
    ]

    cfg_write(machine, 31, 0x60, 1, 0x02)  # not permitted: routes nowhere

    assert machine.vm.take() == [("isa_deassert_irq", 11, -1)]
    assert cfg_read(machine, 31, 0x60, size=1) == 0x82


def test_pirq_registers_in_wide_accesses(build):
    machine = build("31,lpc")

    assert cfg_read(machine, 31, 0x60) == 0x80808080
    assert cfg_read(machine, 31, 0x68) == 0x80808080
    assert cfg_read(machine, 31, 0x64) == 0

    cfg_write(machine, 31, 0x68, 4, 0x0B0A0905)

    assert cfg_read(machine, 31, 0x68) == 0x0B0A0905


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (["1:3:0,lpc"], "only on bus 0"),
        (["3,lpc", "4,lpc"], "Only one LPC"),
        (["3,nosuch"], 'pci slot 0:3:0: unknown device "nosuch"'),
        (["3,amd_hostbridge"], 'legacy device "amd_hostbridge", use "hostbridge"'),
        (["32,dummy"], "SLOT 0-31"),
        (["x,dummy"], "SLOT 0-31"),
        (["3,dummy", "03,dummy"], "pci slot 0:3:0 already occupied!"),
    ],
)
def test_slots_that_cannot_be(build, slots, message):
    with pytest.raises(DeviceError) as raised:
        build(*slots)

    chain = f"{raised.value} {raised.value.__cause__}"
    assert message in chain


def test_known_but_not_written(build):
    with pytest.raises(NotAvailableError, match="passthru"):
        build("3,passthru")


def test_names_are_bhyves():
    listed = (
        "ahci ahci-cd ahci-hd amd_hostbridge dummy e1000 fbuf hda hostbridge lpc nvme "
        "passthru uart virtio-9p virtio-blk virtio-console virtio-input virtio-net "
        "virtio-rnd virtio-scsi xhci"
    )
    assert " ".join(registry.names()) == listed


def test_amd_hostbridge_is_an_alias(build):
    emulation = registry.lookup("amd_hostbridge")
    assert emulation is not None
    assert emulation.name == "hostbridge"

    machine = build("0,hostbridge", pci__0__0__0__pcireg__vendor="0x1022")

    assert cfg_read(machine, 0, 0) == 0x12751022


@pytest.mark.parametrize("index", range(0, CONFIG_SIZE, 4))
def test_no_configuration_write_raises_or_changes_identity(build, index):
    machine = build("0,hostbridge", "3,dummy", "4,uart", "31,lpc")
    rng = random.Random(index)
    for slot in (0, 3, 4, 31):
        before = cfg_read(machine, slot, 0), cfg_read(machine, slot, 8)
        for size in (1, 2, 4):
            for reg in range(index, index + 4, size):
                for value in (0, ONES, 0x55555555, rng.getrandbits(32)):
                    value &= (1 << 8 * size) - 1
                    cfg_write(machine, slot, reg, size, value)
                    assert 0 <= cfg_read(machine, slot, reg, size) < 1 << 8 * size
        assert before == (cfg_read(machine, slot, 0), cfg_read(machine, slot, 8))


def test_every_byte_value_at_every_offset(build):
    machine = build("0,hostbridge", "3,dummy", "4,uart", "31,lpc")
    host = pci_host(machine)
    for slot in (0, 3, 4, 31):
        for offset in range(CONFIG_SIZE):
            for value in range(256):
                host.config_write(0, slot, 0, offset, 1, value)
            assert 0 <= host.config_read(0, slot, 0, offset, 1) < 256


def test_vcpus_use_bars_while_another_moves_them(build):
    """A BAR that goes away under an access is no error, whoever wins."""
    machine = build("3,dummy", "4,dummy", cpus=2)
    host = pci_host(machine)
    failures = []
    stop = threading.Event()

    def use() -> None:
        rng = random.Random(5)
        try:
            while not stop.is_set():
                machine.inout.read(0x2000 + rng.randrange(0x40), 4)
                machine.inout.write(0x2000 + rng.randrange(0x40), 4, 1)
                machine.mem.read(1, 0xC0000000 + rng.randrange(0x4000), 4)
                machine.mem.write(1, 0xC0000000 + rng.randrange(0x4000), 4, 1)
        except Exception as error:
            failures.append(error)

    users = [threading.Thread(target=use) for _ in range(2)]
    for user in users:
        user.start()
    rng = random.Random(6)
    for _ in range(3000):
        slot = rng.choice([3, 4])
        host.config_write(0, slot, 0, 0x10, 4, 0x2000 + 8 * rng.randrange(8))
        host.config_write(0, slot, 0, 0x14, 4, 0xC0000000 + 0x1000 * rng.randrange(4))
        host.config_write(0, slot, 0, 0x04, 2, rng.choice([3, 7, 0]))
    stop.set()
    for user in users:
        user.join()

    assert failures == []


def test_random_configuration_then_round_trip(build):
    """Any state the guest can reach is saved, and comes back in another machine."""
    slots = "0,hostbridge", "3,dummy", "4,uart", "5,dummy", "31,lpc"
    rng = random.Random(1)
    for _ in range(5):
        first, second = build(*slots), build(*slots)
        for machine in (first, second):
            for _ in range(300):
                size = rng.choice([1, 2, 4])
                cfg_write(
                    machine,
                    rng.choice([0, 3, 4, 5, 31]),
                    rng.randrange(0, CONFIG_SIZE, size),
                    size,
                    rng.getrandbits(8 * size),
                )
        state = {name: device.save() for name, device in first.devices.items()}
        for name, device in second.devices.items():
            device.restore(state[name])

        assert state == {n: device.save() for n, device in second.devices.items()}
        assert [(r.name, r.base) for r in first.mem.ranges()] == [
            (r.name, r.base) for r in second.mem.ranges()
        ]
        ports = range(0x10000)
        assert [first.inout.owner(port) for port in ports] == [
            second.inout.owner(port) for port in ports
        ]


def test_random_ports_never_raise(build):
    machine = build("0,hostbridge", "3,dummy", "4,uart", "31,lpc")
    rng = random.Random(2)
    known = [p for p in range(0x10000) if machine.inout.owner(p) is not None]
    for _ in range(20000):
        port = rng.choice(known)
        size = rng.choice([1, 2, 4])
        if rng.random() < 0.5:
            machine.inout.write(port, size, rng.getrandbits(8 * size))
        else:
            assert 0 <= machine.inout.read(port, size) < 1 << 8 * size


def test_random_memory_never_raises(build):
    machine = build("0,hostbridge", "3,dummy", "31,lpc", **{"lpc__pc-testdev": "1"})
    rng = random.Random(3)
    for _ in range(20000):
        found = rng.choice(machine.mem.ranges())
        gpa = found.base + rng.randrange(-8, found.size + 8)
        size = rng.choice([1, 2, 4, 8])
        if rng.random() < 0.5 and not found.name.startswith("kern"):
            machine.mem.write(0, gpa, size, rng.getrandbits(8 * size))
        else:
            assert 0 <= machine.mem.read(0, gpa, size) < 1 << 8 * size


def test_reset_brings_everything_back(build):
    machine = build("0,hostbridge", "3,dummy", "4,uart", "31,lpc")
    before = {name: device.save() for name, device in machine.devices.items()}
    ranges = [(r.name, r.base) for r in machine.mem.ranges()]
    rng = random.Random(4)
    for _ in range(500):
        cfg_write(
            machine,
            rng.choice([0, 3, 4, 31]),
            rng.randrange(0, CONFIG_SIZE, 4),
            4,
            rng.getrandbits(32),
        )
    for device in machine.devices.values():
        device.reset()

    assert before == {name: device.save() for name, device in machine.devices.items()}
    assert ranges == [(r.name, r.base) for r in machine.mem.ranges()]
