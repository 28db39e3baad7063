"""The boot ROM's place, the flash's commands, and when its file changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.amd64.bootrom import BOOTROM_BASE, BootVars, Firmware
from pybhyve.bhyverun.machine import Machine
from pybhyve.config import Config
from pybhyve.errors import DeviceError, one_line
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import VmmError

ROM = bytes(range(256)) * 32  # 8 KiB
VARS = b"variables".ljust(0x3000, b"\xee")
ROM_BASE = (1 << 32) - len(ROM)
BASE = ROM_BASE - len(VARS)


class Rig:
    """A guest that knows flash, and the file behind it."""

    def __init__(self, machine: Machine, file: Path) -> None:
        self.machine = machine
        self.file = file
        flash = machine.devices["bootvars"]
        assert isinstance(flash, BootVars)
        self.flash = flash

    def write(self, at: int, value: int, size: int = 1) -> None:
        """As the engine does: the memory cannot be written, so a device gets it."""
        self.machine.mem.write(0, BASE + at, size, value)

    def read(self, at: int, size: int = 1) -> int:
        """As the engine does: memory where there is some, else a device."""
        try:
            data = self.machine.vm.read_mem(BASE + at, size)
        except VmmError:
            return self.machine.mem.read(0, BASE + at, size)
        return int.from_bytes(data, "little")

    def program(self, at: int, data: bytes) -> None:
        """As edk2's QemuFlashWrite()."""
        for offset, byte in enumerate(data):
            self.write(at + offset, 0x10)
            self.write(at + offset, byte)
        self.write(at, 0xFF)


@pytest.fixture
def rom(tmp_path: Path) -> Path:
    path = tmp_path / "ROM.fd"
    path.write_bytes(ROM)
    return path


@pytest.fixture
def variables(tmp_path: Path) -> Path:
    path = tmp_path / "VARS.fd"
    path.write_bytes(VARS)
    return path


@pytest.fixture
def rig(build, rom, variables) -> Rig:
    return Rig(build(bootrom=str(rom), bootvars=str(variables)), variables)


@pytest.fixture
def running(rig) -> Iterator[Rig]:
    rig.flash.start()
    yield rig
    rig.flash.halt()


def firmware(**names: object) -> Firmware | None:
    config = Config()
    for name, path in names.items():
        config.set(name, str(path))
    return Firmware.open(GlobalOptions.parse(config))


def wait_for(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    while not condition():  # pytest's own timeout ends this
        pause.wait(0.01)


# -- where it is ---------------------------------------------------------------------


def test_the_rom_ends_at_4_gib(build, rom):
    machine = build(bootrom=str(rom))

    assert machine.ctx.read(ROM_BASE, len(ROM)) == ROM
    assert machine.vm.memmap()[-1] == (ROM_BASE, 8, (16 << 20) - len(ROM), len(ROM), 5)
    assert (8, "bootrom", 16 << 20) in machine.vm.memsegs()
    assert "bootvars" not in machine.devices


def test_the_variables_are_below_the_rom(rig):
    memory = rig.machine.ctx.read(BASE, len(VARS) + len(ROM))

    assert memory == VARS + ROM


def test_the_guest_cannot_write_the_rom(build, rom):
    machine = build(bootrom=str(rom))

    machine.mem.write(0, ROM_BASE, 4, 0)

    assert machine.ctx.read(ROM_BASE, len(ROM)) == ROM


def test_rom_and_variables_may_fill_the_segment(build, tmp_path):
    rom, variables = tmp_path / "rom", tmp_path / "vars"
    rom.write_bytes(b"r" * (15 << 20))
    variables.write_bytes(b"v" * (1 << 20))

    # With ACPI a page is for the VM generation counter.
    machine = build(bootrom=str(rom), bootvars=str(variables), acpi_tables="false")

    assert machine.ctx.read(BOOTROM_BASE, 1) == b"v"
    assert machine.ctx.read((1 << 32) - 1, 1) == b"r"


def test_without_a_boot_rom_there_is_none():
    assert firmware() is None
    assert firmware(bootvars="/nonexistent") is None


@pytest.mark.parametrize("size", [0, 100, 4095, 4097, (16 << 20) + 4096])
def test_sizes_of_the_rom(rom, size):
    with rom.open("wb") as file:
        file.truncate(size)

    with pytest.raises(DeviceError, match=f"Invalid bootrom size {size} of "):
        firmware(bootrom=rom)


@pytest.mark.parametrize("size", [0, 100, 4097, (16 << 20) + 4096])
def test_sizes_of_the_variables(rom, variables, size):
    with variables.open("wb") as file:
        file.truncate(size)

    with pytest.raises(DeviceError, match=f"Invalid bootrom variable size {size} of "):
        firmware(bootrom=rom, bootvars=variables)


def test_size_of_both(rom, variables):
    with variables.open("wb") as file:
        file.truncate(16 << 20)

    with pytest.raises(DeviceError, match="aggregate size 16785408: at most 16777216"):
        firmware(bootrom=rom, bootvars=variables)


def test_files_that_are_not_there(rom, tmp_path):
    for names in ({"bootrom": "no"}, {"bootrom": rom, "bootvars": tmp_path / "no"}):
        with pytest.raises(DeviceError) as error:
            firmware(**names)
        assert one_line(error.value).endswith('no": No such file or directory')


def test_a_rom_that_is_no_file(tmp_path):
    with pytest.raises(DeviceError, match="not a regular file"):
        firmware(bootrom="/dev/zero")
    with pytest.raises(DeviceError) as error:
        firmware(bootrom=tmp_path)
    assert one_line(error.value).endswith(": Is a directory")


def test_a_refused_firmware_gives_the_variables_back(rom, variables):
    good = variables.read_bytes()
    variables.write_bytes(b"")
    with pytest.raises(DeviceError):
        firmware(bootrom=rom, bootvars=variables)
    variables.write_bytes(good)

    opened = firmware(bootrom=rom, bootvars=variables)

    assert opened is not None
    opened.close()


# -- commands ------------------------------------------------------------------------


def test_edk2_finds_flash(rig):
    # QemuFlashDetected() of OvmfPkg/QemuFlashFvbServicesRuntimeDxe.
    original = rig.read(5)
    rig.write(5, 0x50)
    assert rig.read(5) != 0x50, "RAM"
    rig.write(5, 0x70)
    assert rig.read(5) != original, "ROM"
    assert rig.read(5) == 0
    rig.write(5, 0xFF)
    assert rig.read(5) == original


@pytest.mark.parametrize("command", [0x10, 0x40])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_program(rig, command, size):
    value = int.from_bytes(b"12345678"[:size], "little")

    rig.write(0x1000, command)
    rig.write(0x1000, value, size)

    assert rig.read(0x1000, size) == value
    assert rig.read(0x1000 + size) == 0xEE


def test_a_command_byte_can_be_programmed(rig):
    rig.program(0, b"\x10\x20\x40\x50\x70\xd0\xff\x00")

    assert rig.machine.ctx.read(BASE, 9) == b"\x10\x20\x40\x50\x70\xd0\xff\x00s"


def test_erase(rig):
    rig.write(0x1234, 0x20)
    rig.write(0x1234, 0xD0)

    assert rig.machine.ctx.read(BASE + 0xFFF, 0x1002) == (
        b"\xee" + b"\xff" * 0x1000 + b"\xee"
    )


def test_an_erase_has_to_be_confirmed(rig):
    rig.write(0, 0x20)
    rig.write(0, 0xFF)
    rig.write(0, 0x70)

    assert rig.read(0) == 0xB0  # ready; both error bits: improper sequence
    rig.write(0, 0x50)
    assert rig.read(0) == 0
    rig.write(0, 0xFF)
    assert rig.machine.ctx.read(BASE, len(VARS)) == VARS


def test_status_until_another_command(rig):
    rig.write(0, 0x70)
    assert [rig.read(at) for at in (0, 0x1000, 0x2FFF)] == [0x80] * 3
    assert rig.read(0, 4) == 0x80808080

    rig.write(0, 0x98)  # unknown here

    assert rig.machine.ctx.read(BASE, len(VARS)) == VARS


def test_programming_ends_the_status(rig):
    rig.write(0, 0x70)
    rig.program(0, b"V")

    assert rig.machine.ctx.read(BASE, 9) == b"Variables"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    accesses=st.lists(
        st.tuples(
            st.integers(0, len(VARS) - 1),
            st.sampled_from([1, 2, 4, 8]),
            st.sampled_from([None, 0x10, 0x20, 0x40, 0x50, 0x70, 0xD0, 0xFF])
            | st.integers(0, (1 << 64) - 1),
        )
    )
)
def test_no_access_fails(rig, accesses):
    for at, size, value in accesses:
        at = min(at, len(VARS) - size)
        if value is None:
            assert 0 <= rig.read(at, size) < 1 << 8 * size
        else:
            rig.write(at, value & ((1 << 8 * size) - 1), size)
    rig.flash.restore(rig.flash.save())
    rig.flash.reset()
    assert rig.machine.ctx.read(ROM_BASE, len(ROM)) == ROM


# -- the file ------------------------------------------------------------------------


def test_changes_reach_the_file(running):
    running.program(0, b"V")

    wait_for(lambda: running.file.read_bytes() == b"V" + VARS[1:])


def test_nothing_changed_nothing_written(running):
    before = running.file.stat()
    running.write(0, 0x70)
    running.write(0, 0xFF)
    running.flash.pause()

    assert running.file.stat() == before


@pytest.mark.parametrize("rest", ["pause", "halt"])
def test_the_file_is_up_to_date_at_rest(running, rest):
    for at in range(100):
        running.program(at, b"x")
    getattr(running.flash, rest)()

    assert running.file.read_bytes() == b"x" * 100 + VARS[100:]


def test_a_file_that_cannot_be_written_is_tried_again(running, caplog):
    obstacle = running.file.with_name(".VARS.fd.new")
    obstacle.mkdir()
    for byte in b"VWXYV":
        running.program(0, bytes([byte]))
        running.flash.pause()
    assert running.file.read_bytes() == VARS
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "the firmware's variables could not be written: "
    )

    obstacle.rmdir()
    running.flash.halt()

    assert running.file.read_bytes() == b"V" + VARS[1:]


# -- state ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("commands", "then", "expected"),
    [
        ([0x10], [0x42], 0x42),
        ([0x20], [0xD0], 0xFF),
        ([0x70], [], 0x80),
        ([0x50, 0x70], [], 0),
    ],
)
def test_round_trip(rig, build, rom, tmp_path, commands, then, expected):
    other_file = tmp_path / "other.fd"
    other_file.write_bytes(bytes(len(VARS)))
    other = Rig(build(bootrom=str(rom), bootvars=str(other_file)), other_file)
    for command in commands:
        rig.write(0, command)

    other.flash.restore(rig.flash.save())

    for command in then:
        other.write(0, command)
    assert other.read(0) == expected
    other.flash.pause()
    assert other_file.read_bytes()[0x1000:] == VARS[0x1000:]


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"contents": b""},
        {"command": 0x55},
        {"status": 256},
        {"command": 0x40, "shows_status": True},
    ],
)
def test_a_damaged_state(rig, damage):
    with pytest.raises(ValueError, match="bootvars: "):
        rig.flash.restore(rig.flash.save() | damage)


def test_reset_keeps_the_contents(rig):
    rig.program(0, b"V")
    rig.write(0, 0x70)

    rig.flash.reset()

    assert rig.machine.ctx.read(BASE, len(VARS)) == b"V" + VARS[1:]
