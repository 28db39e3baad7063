"""Expansion ROMs, and memory behind a BAR in general."""

from __future__ import annotations

import mmap

import pytest

from pybhyve.errors import DeviceError
from pybhyve.options import Options
from pybhyve.pci.bus import ROM_SEGMENT, pci_host
from pybhyve.pci.emul import BAR_MEM32, BAR_ROM, BarMemory, PciAddress, PciDevice
from pybhyve.vmmapi import (
    REGISTERS,
    VM_FRAMEBUFFER,
    VM_PCIROM,
    SuspendHow,
    VmmError,
)
from tests.guestside.pci import PciFunction

ONES = 0xFFFFFFFF
IMAGE = b"\x55\xaa" + bytes(range(256)) * 20  # 5122 bytes: 8 KiB of ROM
FRAME_BYTES = 1 << 20


class Card(PciDevice[Options]):
    """A ROM, and a BAR with a segment behind it."""

    NAME = "card"

    def __init__(self, machine, address, rom) -> None:
        super().__init__(machine, pci_host(machine), address, Options())
        self.set_ids(0x1234, 0x5678, class_=2, subclass=0)
        machine.vm.create_memseg(VM_FRAMEBUFFER, "framebuffer", FRAME_BYTES)
        memory = BarMemory(VM_FRAMEBUFFER, 0, mmap.PROT_READ | mmap.PROT_WRITE)
        self.add_bar(0, BAR_MEM32, FRAME_BYTES, memory)
        self.add_rom(str(rom))
        self.rom_moves = 0

    def bar_moved(self, bar, addr):
        self.rom_moves += bar.kind == BAR_ROM


@pytest.fixture
def rom(tmp_path):
    path = tmp_path / "card.rom"
    path.write_bytes(IMAGE)
    return path


@pytest.fixture
def machine(build, rom):
    machine = build()
    host = pci_host(machine)
    host.add(Card(machine, PciAddress(0, 3, 0), rom))
    host.finish_setup()
    return machine


@pytest.fixture
def card(machine):
    return PciFunction(machine, 3)


def mapped(machine, segid):
    return [entry[0] for entry in machine.vm.memmap() if entry[1] == segid]


def test_sizing(card):
    assert card.read(0x30) == 0

    card.write(0x30, 4, ONES)

    assert card.read(0x30) == 0xFFFFE001


def test_it_decodes_with_both_enable_bits(machine, card):
    card.write(0x30, 4, 0xD0000000)

    assert mapped(machine, VM_PCIROM) == []

    card.write(0x30, 4, 0xD0000001)

    assert machine.ctx.read(0xD0000000, len(IMAGE)) == IMAGE
    assert (
        machine.ctx.read(0xD0000000 + len(IMAGE), 8192 - len(IMAGE)).strip(b"\0") == b""
    )

    card.enable(memory=False)

    assert mapped(machine, VM_PCIROM) == []
    with pytest.raises(VmmError):
        machine.ctx.read(0xD0000000, 2)


def test_a_guest_cannot_write_it(machine, card):
    card.write(0x30, 4, 0xD0000001)

    machine.mem.write(0, 0xD0000000, 4, 0)

    assert machine.mem.read(0, 0xD0000000, 4) == int.from_bytes(IMAGE[:4], "little")
    assert machine.ctx.read(0xD0000000, 4) == IMAGE[:4]


@pytest.mark.parametrize("address", [0, 0x100000, 0xFEE00000, 0xE0000000])
def test_a_rom_that_is_put_where_something_is(machine, card, address):
    machine.ctx.write(0x100000, b"RAM")
    card.write(0x30, 4, address | 1)

    assert mapped(machine, VM_PCIROM) == []
    assert machine.ctx.read(0x100000, 3) == b"RAM"

    card.write(0x30, 4, 0xD0000001)

    assert mapped(machine, VM_PCIROM) == [0xD0000000]


def test_memory_behind_a_bar_moves_with_it(machine, card):
    assert mapped(machine, VM_FRAMEBUFFER) == [0xC0000000]
    machine.ctx.write(0xC0000010, b"frame")

    card.move_bar(0, 0xC8000000)

    assert mapped(machine, VM_FRAMEBUFFER) == [0xC8000000]
    assert machine.ctx.read(0xC8000010, 5) == b"frame"
    assert machine.mem.read(0, 0xC0000010, 4) == ONES


def test_reset_takes_it_away(machine, card):
    card.write(0x30, 4, 0xD0000001)
    device = pci_host(machine).buses[0].functions[3, 0]

    device.reset()

    assert mapped(machine, VM_PCIROM) == []
    assert mapped(machine, VM_FRAMEBUFFER) == [0xC0000000]


def test_its_place_is_state(machine, card):
    card.write(0x30, 4, 0xD0000001)
    device = pci_host(machine).buses[0].functions[3, 0]
    state = device.save()
    device.reset()

    device.restore(state)

    assert mapped(machine, VM_PCIROM) == [0xD0000000]
    assert device.save() == state


def test_there_is_room_for_it_in_the_bus_window(machine):
    _base, end = pci_host(machine).buses[0].mem32

    assert end >= 0xC0000000 + FRAME_BYTES + 8192


def test_it_comes_and_goes_while_another_vcpu_reads_it(build, rom):
    """Real-mode code: vCPU 0 switches the ROM on and off, vCPU 1 reads it."""
    machine = build(cpus=2)
    host = pci_host(machine)
    device = Card(machine, PciAddress(0, 3, 0), rom)
    host.add(device)
    host.finish_setup()
    machine.inout.register("end", 0xF4, 1, None, lambda *_: machine.request_poweroff())
    times = 500
    switch = (
        "66b8 30180080 baf80c 66ef bafc0c"  # eax = 3:0 register 0x30; out 0xcf8, eax
        f"66b9 {times.to_bytes(4, 'little').hex()}"  # mov ecx, times
        "66b8 010000d0 66ef 66b8 000000d0 66ef"  # on at 0xd0000000; off
        "6649 75ec baf400 ee ebfe"  # dec ecx; jnz; out 0xf4, al
    )
    read = "a00000 a20001 ebf8"  # mov al, [0]; mov [0x100], al; jmp
    for index, (code, ds) in enumerate([(switch, 0), (read, 0xD0000000)]):
        at = 0x1000 * (index + 1)
        machine.ctx.write(at, bytes.fromhex(code))
        vcpu = machine.ctx.vcpu(index)
        vcpu.reset()
        vcpu.set_register(REGISTERS["cs"], 0)
        vcpu.set_desc(REGISTERS["cs"], 0, 0xFFFF, 0x93)
        vcpu.set_desc(REGISTERS["ds"], ds, 0xFFFF, 0x93)
        vcpu.set_register(REGISTERS["rip"], at)
    machine.start()
    machine.vm.resume_cpu(1)

    assert machine.run() == SuspendHow.POWEROFF
    machine.halt()

    assert machine.vm.vcpu(1).get_register(REGISTERS["rax"]) & 0xFF in (0x55, 0xFF)
    assert mapped(machine, VM_PCIROM) == []
    assert device.rom_moves == 2 * times


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "begin with 55 aa"),
        (b"MZ" + bytes(1000), "begin with 55 aa"),
        (b"\x55\xaa" + bytes(16 << 20), "at most 16 MiB"),
    ],
    ids=["missing", "empty", "other", "large"],
)
def test_files_that_are_no_rom(build, tmp_path, content, message):
    path = tmp_path / "file.rom"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(DeviceError, match=f"^rom={path}: .*{message}"):
        Card(build(), PciAddress(0, 3, 0), path)


def test_all_roms_have_a_limit(build):
    host = pci_host(build())
    for _each in range(ROM_SEGMENT // (16 << 20)):
        host.alloc_rom(IMAGE, 16 << 20)

    with pytest.raises(DeviceError, match="more than 256 MiB"):
        host.alloc_rom(IMAGE, 8192)
