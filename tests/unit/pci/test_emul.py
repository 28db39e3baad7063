"""One function: BARs, capabilities, messages; a device of ours shows them."""

from __future__ import annotations

from typing import Any

import pytest

from pybhyve.options import Options
from pybhyve.pci.bus import pci_host
from pybhyve.pci.emul import (
    BAR_IO,
    BAR_MEM64,
    PciAddress,
    PciDevice,
)
from pybhyve.pci.msix import MsixTable

ONES = 0xFFFFFFFF
MIB = 1 << 20
MSI_ADDRESS = 0xFEE00000


class Probe(PciDevice[Options]):
    """A device with one BAR of each kind, MSI, MSI-X and INTx."""

    NAME = "probe"

    def __init__(self, machine, host, address) -> None:
        super().__init__(machine, host, address, Options())
        self.set_ids(0x1234, 0x5678, class_=2, subclass=0, subvendor=0x9ABC)
        self.add_bar(0, BAR_IO, 0x18)
        self.add_bar(1, BAR_MEM64, 256 * MIB)
        self.add_bar(3, BAR_MEM64, 64 * 1024)
        self.add_msi(4)
        self.add_msix(3, 5)
        self.add_pcie(0)
        self.add_intx()
        self.accesses: list[tuple[Any, ...]] = []
        self.moves: list[tuple[int, int | None]] = []

    def bar_read(self, index, offset, size):
        self.accesses.append(("read", index, offset, size))
        return offset & 0xFF

    def bar_write(self, index, offset, size, value):
        self.accesses.append(("write", index, offset, size, value))

    def bar_moved(self, bar, addr):
        self.moves.append((bar.index, addr))


class Rig:
    def __init__(self, build, *addresses) -> None:
        self.machine = build("31,lpc")
        self.host = pci_host(self.machine)
        self.probes = [
            Probe(self.machine, self.host, address)
            for address in addresses or [PciAddress(0, 5, 0)]
        ]
        for probe in self.probes:
            self.host.add(probe)
        self.host.finish_setup()
        self.probe = self.probes[0]
        self.wires = self.machine.vm.take
        self.wires()

    def get(self, reg, size=4):
        return self.host.config_read(0, 5, 0, reg, size)

    def set(self, reg, size, value):
        self.host.config_write(0, 5, 0, reg, size, value)

    def capability(self, cap_id):
        at = self.get(0x34, 1)
        while self.get(at, 1) != cap_id:
            at = self.get(at + 1, 1)
        return at


@pytest.fixture
def rig(build) -> Rig:
    return Rig(build)


def test_bar_sizes_and_types(rig):
    sizes = []
    for reg in range(0x10, 0x28, 4):
        before = rig.get(reg)
        rig.set(reg, 4, ONES)
        sizes.append(rig.get(reg))
        rig.set(reg, 4, before)

    assert sizes == [
        0xFFFFFFE1,
        0xF000000C,
        0xFFFFFFFF,
        0xFFFF0004,
        0xFFFFFFFF,
        0xFFFFE000,
    ]


def test_addresses_by_kind_and_size(rig):
    bars = rig.probe.bars

    assert bars[0].addr == 0x2000
    assert bars[1].addr == 32 << 30  # more than 128 MiB
    assert bars[3].addr == 0xC0000000
    assert bars[5].addr == 0xC0010000


def test_io_bar_passes_offsets_and_cuts_what_is_outside(rig):
    inout = rig.machine.inout

    assert inout.read(0x2003, 1) == 3
    assert inout.read(0x201E, 4) == 0xFFFF1F1E

    rig.probe.accesses.clear()
    inout.write(0x201F, 4, 0x11223344)

    assert rig.probe.accesses == [("write", 0, 0x1F, 1, 0x44)]


def test_memory_bar_passes_whole_accesses(rig):
    rig.machine.mem.write(0, 0xC0000008, 8, 0x1122334455667788)

    assert rig.probe.accesses == [("write", 3, 8, 8, 0x1122334455667788)]


def test_moving_a_bar(rig):
    rig.set(0x1C, 4, 0xD0000000)

    assert rig.probe.moves[-2:] == [(3, None), (3, 0xD0000000)]
    assert rig.machine.mem.read(0, 0xD0000010, 1) == 0x10
    assert rig.machine.mem.read(0, 0xC0000010, 1) == 0xFF


@pytest.mark.parametrize(
    "address",
    [0x50000000, 0xC0000000 - 0x10000, 0xF0000000, 1 << 32, 0x1234 << 32],
    ids=hex,
)
def test_a_bar_decodes_outside_of_its_window(rig, address):
    rig.set(0x1C, 4, address & ONES)
    rig.set(0x20, 4, address >> 32)

    assert rig.probe.bars[3].addr == address
    assert rig.machine.mem.read(0, address + 0x10, 1) == 0x10
    assert rig.machine.mem.read(0, 0xC0000010, 1) == 0xFF


def test_sizing_while_a_bar_decodes_leaves_it_where_it_was(rig):
    for reg in range(0x10, 0x28, 4):
        before = rig.get(reg)
        rig.set(reg, 4, ONES)
        rig.set(reg, 4, before)

    assert rig.machine.inout.owner(0x2000) == "probe 0:5:0 BAR0"
    assert rig.machine.mem.read(0, (32 << 30) + 0x10, 1) == 0x10
    assert rig.machine.mem.read(0, 0xC0000010, 1) == 0x10


def test_command_register_switches_decoding(rig):
    rig.set(0x04, 2, 0)

    assert rig.machine.inout.owner(0x2000) is None
    assert rig.machine.mem.read(0, 0xC0000010, 1) == 0xFF

    rig.set(0x1C, 4, 0xD0000000)
    rig.set(0x04, 2, 2)

    assert rig.machine.inout.owner(0x2000) is None
    assert rig.machine.mem.read(0, 0xD0000010, 1) == 0x10


def test_command_register_writable_bits(rig):
    rig.set(0x04, 4, ONES)

    assert rig.get(0x04, 2) == 0x077F
    assert rig.get(0x06, 2) == 0x0010


def test_of_two_bars_at_an_address_the_lower_function_decodes(build):
    rig = Rig(build, PciAddress(0, 5, 0), PciAddress(0, 6, 0))
    owner = rig.machine.inout.owner
    mine, other = (probe.bars[0].addr for probe in rig.probes)
    rig.host.config_write(0, 6, 0, 0x10, 4, mine)

    assert owner(mine) == "probe 0:5:0 BAR0"
    assert rig.probes[1].bars[0].live is None

    rig.set(0x10, 4, 0x8000)

    assert owner(mine) == "probe 0:6:0 BAR0"
    assert owner(0x8000) == "probe 0:5:0 BAR0"

    rig.set(0x10, 4, mine)

    assert owner(mine) == "probe 0:5:0 BAR0"

    rig.host.config_write(0, 6, 0, 0x10, 4, other)

    assert owner(other) == "probe 0:6:0 BAR0"


def test_a_bar_that_gives_way_lets_a_third_one_up(build):
    rig = Rig(build, *(PciAddress(0, slot, 0) for slot in (5, 6, 7)))
    owner = rig.machine.inout.owner
    rig.host.config_write(0, 7, 0, 0x10, 4, 0x9000)
    rig.host.config_write(0, 6, 0, 0x10, 4, 0x9000)

    assert owner(0x9000) == "probe 0:6:0 BAR0"

    rig.set(0x10, 4, 0x9000)
    rig.host.config_write(0, 6, 0, 0x10, 4, 0xA000)

    assert owner(0x9000) == "probe 0:5:0 BAR0"
    assert owner(0xA000) == "probe 0:6:0 BAR0"

    rig.set(0x10, 4, 0)

    assert owner(0x9000) == "probe 0:7:0 BAR0"


def test_a_bar_over_something_else_leaves_the_others_alone(rig):
    # 256 MiB that hold both another of its BARs and the ECAM, or the local APIC.
    for address in (0xE0000000, 0xF0000000):
        rig.set(0x14, 4, address)
        rig.set(0x18, 4, 0)

        assert rig.probe.bars[1].live is None
        assert rig.machine.mem.read(0, 0xC0000010, 1) == 0x10


@pytest.mark.parametrize("value", [0, 0xFFFFFFFF, 0xE0000000, 0xFEE00000, 0x60])
def test_bars_anywhere(rig, value):
    for reg in range(0x10, 0x28, 4):
        rig.set(reg, 4, value)

    assert rig.machine.inout.owner(0x60) == "atkbdc"


def test_capability_list(rig):
    at = rig.get(0x34, 1)
    found = []
    while at:
        found.append((at, rig.get(at, 1)))
        at = rig.get(at + 1, 1)

    assert found == [(0x40, 5), (0x50, 0x11), (0x5C, 0x10)]
    assert rig.get(0x5E, 2) == 0x0092  # root complex integrated endpoint, version 2


def enable_msi(rig, count_log2):
    cap = rig.capability(5)
    rig.set(cap + 4, 4, MSI_ADDRESS | 0x1000)
    rig.set(cap + 12, 2, 0x4041)
    rig.set(cap + 2, 2, 1 | count_log2 << 4)
    return cap


def test_msi(rig):
    rig.probe.generate_msi(0)
    cap = enable_msi(rig, 2)

    assert rig.get(cap + 2, 2) == 0x00A5
    for index in range(5):
        rig.probe.generate_msi(index)

    assert rig.wires() == [
        ("lapic_msi", MSI_ADDRESS | 0x1000, 0x4040 + index) for index in range(4)
    ]


def test_msi_grants_no_more_than_was_asked_for(rig):
    enable_msi(rig, 7)

    assert rig.probe.msi_count() == 4


def test_msi_without_bus_mastering_or_to_elsewhere_is_lost(rig):
    cap = enable_msi(rig, 0)
    rig.set(0x04, 2, 3)
    rig.probe.generate_msi(0)
    rig.set(0x04, 2, 7)
    rig.set(cap + 8, 4, 1)
    rig.probe.generate_msi(0)
    rig.set(cap + 8, 4, 0)
    rig.set(cap + 4, 4, 0x12340000)
    rig.probe.generate_msi(0)

    assert rig.wires() == []


def test_msi_replaces_intx(rig):
    rig.probe.intx_assert()
    assert rig.wires()

    enable_msi(rig, 0)

    assert rig.wires()[0][0] == "ioapic_deassert_irq"


def set_vector(rig, index, data, masked):
    base = rig.probe.bars[5].addr + 16 * index
    rig.machine.mem.write(0, base, 8, MSI_ADDRESS)
    rig.machine.mem.write(0, base + 8, 4, data)
    rig.machine.mem.write(0, base + 12, 4, masked)


def pending(rig):
    return rig.machine.mem.read(0, rig.probe.bars[5].addr + 0x1000, 8)


def test_msix_sends(rig):
    cap = rig.capability(0x11)

    assert rig.get(cap + 2, 2) == 2
    assert rig.get(cap + 4) == 5
    assert rig.get(cap + 8) == 0x1005

    rig.set(cap + 2, 2, 0x8000)
    set_vector(rig, 1, 0x61, masked=0)
    rig.probe.generate_msix(1)

    assert rig.wires() == [("lapic_msi", MSI_ADDRESS, 0x61)]


def test_msix_vectors_start_masked_and_masked_ones_become_pending(rig):
    rig.set(rig.capability(0x11) + 2, 2, 0x8000)
    rig.probe.generate_msix(2)

    assert rig.wires() == []
    assert pending(rig) == 4

    set_vector(rig, 2, 0x62, masked=0)

    assert rig.wires() == [("lapic_msi", MSI_ADDRESS, 0x62)]
    assert pending(rig) == 0


def test_msix_function_mask(rig):
    cap = rig.capability(0x11)
    rig.set(cap + 2, 2, 0xC000)
    set_vector(rig, 0, 0x60, masked=0)
    rig.probe.generate_msix(0)
    rig.probe.generate_msix(0)

    assert rig.wires() == []
    assert pending(rig) == 1

    rig.set(cap + 3, 1, 0x80)

    assert rig.wires() == [("lapic_msi", MSI_ADDRESS, 0x60)]


def test_msix_pending_bits_are_read_only_and_survive_a_round_trip(rig):
    cap = rig.capability(0x11)
    rig.set(cap + 2, 2, 0x8000)
    rig.probe.generate_msix(0)
    rig.machine.mem.write(0, rig.probe.bars[5].addr + 0x1000, 8, 0)

    assert pending(rig) == 1

    state = rig.probe.save()
    set_vector(rig, 0, 0x60, masked=0)
    rig.wires()
    rig.probe.restore(state)

    assert pending(rig) == 1
    assert rig.wires() == []
    set_vector(rig, 0, 0x60, masked=0)
    assert rig.wires() == [("lapic_msi", MSI_ADDRESS, 0x60)]


def test_generate_msix_falls_back_to_msi(rig):
    enable_msi(rig, 1)
    rig.probe.generate_msix(1)

    assert rig.wires() == [("lapic_msi", MSI_ADDRESS | 0x1000, 0x4041)]


def test_msix_table_of_several_pages():
    table = MsixTable(2048, lambda _address, _data: None)

    assert table.pba_offset == 0x8000
    assert table.size == 0x8000 + 256
    with pytest.raises(ValueError, match="2049"):
        MsixTable(2049, lambda _address, _data: None)


def test_restore_refuses_another_version(rig):
    state = rig.probe.save() | {"version": 9}

    with pytest.raises(ValueError, match="version 9"):
        rig.probe.restore(state)
