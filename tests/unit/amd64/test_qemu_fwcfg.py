"""fw_cfg: items, directory, ports and DMA, as a firmware uses them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.amd64 import platform
from pybhyve.amd64.qemu_fwcfg import FILE_LAST, FwCfg
from pybhyve.errors import DeviceError, OptionError
from tests.guestside.fwcfg import (
    ERROR,
    READ,
    SELECT,
    SKIP,
    WRITE,
    FwCfgDriver,
)

MEMORY = 32 << 20


class Rig:
    def __init__(self, build, **variables) -> None:
        self.machine = build(memory=MEMORY, lpc__fwcfg="qemu", **variables)
        self.fwcfg = self.machine.fwcfg
        self.driver = FwCfgDriver(self.machine.inout, self.machine.ctx)


@pytest.fixture
def rig(build) -> Rig:
    return Rig(build, cpus=3)


def test_what_every_machine_tells(rig):
    driver = rig.driver

    assert driver.item(0, 4) == b"QEMU"
    assert driver.item(1, 4) == b"\x03\0\0\0"
    assert driver.item(5, 2) == b"\x03\0"
    assert driver.item(0xF, 2) == b"\x03\0"
    assert driver.file("opt/bhyve/hw.ncpu") == b"\x03\0\0\0"


def test_directory_is_sorted_by_name_and_numbers_stay(rig):
    rig.fwcfg.add_file("z", b"zz")
    first = rig.driver.directory()["z"]
    rig.fwcfg.add_file("etc/a", b"")

    directory = rig.driver.directory()

    assert list(directory) == sorted(directory)
    assert directory["z"] == first
    assert directory["etc/a"].size == 0
    assert rig.driver.file("z") == b"zz"
    assert rig.fwcfg.file("z") == b"zz"


def test_reads_behind_the_end_and_of_no_item_are_zero(rig):
    driver = rig.driver

    assert driver.item(0, 6) == b"QEMU\0\0"
    assert driver.item(0x1234, 2) == b"\0\0"
    assert driver.item(0x8000, 2) == b"\0\0"  # of no architecture


def test_write_mode_selects_the_same_item(rig):
    assert rig.driver.item(0x4000, 4) == b"QEMU"
    assert rig.machine.inout.read(0x510, 2) == 0x4000


@pytest.mark.parametrize(("port", "size"), [(0x511, 2), (0x511, 4)])
def test_wide_reads_of_the_data_port_give_ones_and_move_nothing(rig, port, size):
    rig.driver.select(0)

    assert rig.machine.inout.read(port, size) == (1 << 8 * size) - 1
    assert rig.driver.read(4) == b"QEMU"


def test_selecting_takes_two_bytes(rig):
    rig.driver.select(0)
    rig.machine.inout.write(0x510, 1, 5)
    rig.machine.inout.write(0x510, 4, 5)
    rig.machine.inout.write(0x511, 1, 5)

    assert rig.driver.read(4) == b"QEMU"


def test_dma_signature(rig):
    read = rig.machine.inout.read

    assert struct.pack("<II", read(0x514, 4), read(0x518, 4)) == b"QEMU CFG"
    assert read(0x51B, 1) == ord("G")


def test_dma_reads_from_where_it_is_and_fills_with_zeros(rig):
    rig.fwcfg.add_file("f", b"0123456789")
    selector = rig.driver.directory()["f"].selector
    driver, ctx = rig.driver, rig.machine.ctx
    ctx.write(0x2000, b"\xff" * 32)

    assert driver.dma(SELECT, 0, selector=selector) == 0
    assert driver.dma(SKIP, 4) == 0
    assert driver.dma(READ, 8) == 0
    assert ctx.read(0x2000, 9) == b"456789\0\0\xff"
    assert driver.dma(READ, 2) == 0
    assert ctx.read(0x2000, 3) == bytes(2) + b"6"


def test_dma_of_more_than_a_chunk_of_zeros(rig):
    length = (5 << 20) + 3
    rig.machine.ctx.write(0x100000, b"\xff" * (length + 1))

    assert rig.driver.dma(SELECT | READ, length, address=0x100000, selector=0) == 0
    assert rig.machine.ctx.read(0x100000, 4) == b"QEMU"
    assert not any(rig.machine.ctx.read(0x100004, length - 4))
    assert rig.machine.ctx.read(0x100000 + length, 1) == b"\xff"


@pytest.mark.parametrize(
    ("command", "length", "address"),
    [
        (READ, 4, MEMORY),
        (READ, 4, MEMORY - 2),
        (READ, 0xFFFFFFFF, 0x100000),
        (READ, 1, 0xFFFFFFFFFFFFFFFF),
        (WRITE, 4, 0x2000),
    ],
)
def test_dma_that_cannot_be_done_says_so(rig, command, length, address):
    result = rig.driver.dma(SELECT | command, length, address=address)

    assert result == ERROR
    assert rig.driver.item(0, 4) == b"QEMU"


def test_dma_does_not_write_rom(build, tmp_path):
    rom = tmp_path / "rom"
    rom.write_bytes(bytes(4096))
    rig = Rig(build, bootrom=str(rom))

    assert rig.driver.dma(SELECT | READ, 4, address=(1 << 32) - 16) == ERROR
    assert rig.machine.ctx.read((1 << 32) - 16, 16) == bytes(16)


def test_dma_request_where_no_memory_is_goes_nowhere(rig):
    rig.driver.select(5)
    for access in (MEMORY, 0xF_FFFF_FFF0):
        rig.machine.inout.write(
            0x514, 4, int.from_bytes((access >> 32).to_bytes(4, "big"), "little")
        )
        low = (access & 0xFFFFFFFF).to_bytes(4, "big")
        rig.machine.inout.write(0x518, 4, int.from_bytes(low, "little"))

    assert rig.driver.read(2) == b"\x03\0"


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 31),
            st.integers(0, 0xFFFFFFFF) | st.integers(0, 100),
            st.integers(0, (1 << 64) - 1) | st.integers(MEMORY - 64, MEMORY + 64),
            st.integers(0, 0xFFFF) | st.integers(0, 0x30),
        ),
        max_size=4,
    )
)
def test_no_request_raises(rig, requests):
    for command, length, address, selector in requests:
        result = rig.driver.dma(command, length, address=address, selector=selector)
        # Where the transfer went over the request itself it is anything.
        assert result in (0, ERROR) or address < 0x1010
    rig.driver.select(0)

    assert rig.driver.read(4) == b"QEMU"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(0x510, 0x51B),
            st.sampled_from([1, 2, 4]),
            st.none() | st.integers(0, 0xFFFFFFFF),
        )
    )
)
def test_any_access(rig, accesses):
    inout = rig.machine.inout
    for port, size, value in accesses:
        if value is None:
            assert 0 <= inout.read(port, size) < 1 << 8 * size
        else:
            inout.write(port, size, value & (1 << 8 * size) - 1)
    saved = rig.fwcfg.save()
    rig.fwcfg.restore(saved)

    assert rig.fwcfg.save() == saved


def test_items_that_nobody_sees(build, caplog):
    machine = build(fwcfg__0__name="a", fwcfg__0__string="x")

    assert machine.fwcfg.file("a") == b"x\0"
    assert "cannot see the items of -f without lpc.fwcfg=qemu" in caplog.text


def test_no_ports_with_bhyves_interface_but_the_items(build):
    machine = build(cpus=2)

    assert "fwcfg" not in machine.devices
    assert machine.inout.owner(0x510) != "qemu_fwcfg_selector"
    assert machine.fwcfg.file("opt/bhyve/hw.ncpu") == b"\x02\0\0\0"


def test_files_of_the_user(build, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"\0\1\2")
    rig = Rig(
        build,
        fwcfg__0__name="opt/org.example/text",
        fwcfg__0__string="grüße",
        fwcfg__1__name="opt/org.example/data",
        fwcfg__1__file=str(path),
    )

    assert rig.driver.file("opt/org.example/text") == "grüße\0".encode()
    assert rig.driver.file("opt/org.example/data") == b"\0\1\2"


@pytest.mark.parametrize(
    ("variables", "error", "message"),
    [
        ({"name": "a"}, OptionError, "fwcfg.0 needs either string or file"),
        (
            {"name": "a", "string": "x", "file": "y"},
            OptionError,
            "fwcfg.0 needs either string or file",
        ),
        ({"name": "a", "file": "/nowhere"}, OptionError, "fw_cfg file 'a': /nowhere"),
        ({"name": "a", "file": "/dev/zero"}, OptionError, "is not a regular file"),
        ({"name": "a", "file": "/"}, OptionError, "is not a regular file"),
        ({"name": "a", "file": ""}, OptionError, "is not a regular file"),
        ({"name": "a", "file": "a\0b"}, OptionError, "fw_cfg file 'a'"),
        (
            {"name": "opt/bhyve/hw.ncpu", "string": "x"},
            DeviceError,
            "is there already",
        ),
        ({"name": "", "string": "x"}, DeviceError, "1 to 55 bytes"),
    ],
)
def test_files_that_cannot_be(build, variables, error, message):
    with pytest.raises(error, match=message):
        build(**{f"fwcfg__0__{name}": value for name, value in variables.items()})


def test_limits(build):
    fwcfg = FwCfg(build().ctx, 1)
    fwcfg.add_file("n" * 55, b"")
    with pytest.raises(DeviceError, match="1 to 55"):
        fwcfg.add_file("n" * 56, b"")
    with pytest.raises(DeviceError, match="is there already"):
        fwcfg.add_item(0x20, b"")
    fwcfg._files |= {str(n): n for n in range(FILE_LAST)}
    with pytest.raises(DeviceError, match="too many"):
        fwcfg.add_file("one more", b"")


def test_state_goes_to_another(build):
    one, other = Rig(build), Rig(build)
    one.driver.select(0)
    one.driver.read(2)
    other.fwcfg.restore(one.fwcfg.save())

    assert other.driver.read(2) == b"MU"

    other.fwcfg.reset()

    assert other.driver.read(4) == b"QEMU"
    with pytest.raises(ValueError, match="version"):
        other.fwcfg.restore({"version": 2})
    for key, value in (("selector", 1 << 16), ("offset", -1), ("dma_high", 1 << 32)):
        with pytest.raises(ValueError, match="damaged"):
            other.fwcfg.restore(one.fwcfg.save() | {key: value})


def test_kernel(rig):
    rig.fwcfg.add_kernel(b"kernel", b"", b"console=ttyS0")
    item = rig.driver.item

    assert item(0x08, 4) == b"\6\0\0\0"
    assert item(0x11, 6) == b"kernel"
    assert item(0x0B, 4) == bytes(4)
    assert item(0x14, 4) == b"\x0e\0\0\0"
    assert item(0x15, 14) == b"console=ttyS0\0"


def test_memory_map(build):
    machine = build(memory=MEMORY)
    platform.late_init(machine)

    entries = [*struct.iter_unpack("<QQI", machine.fwcfg.file("etc/e820"))]

    assert entries == [
        (0, 0xA0000, 1),
        (0xA0000, 0x20000, 2),
        (0xC0000, 0x40000, 2),
        (0x100000, MEMORY - 0x100000, 1),
    ]


def test_boot_order(build):
    machine = build("3,dummy", "31,uart", "1:2:0,dummy", x86__mptable="false")
    devices = machine.devices
    devices["pci.0.31.0"].add_boot_device(1)
    devices["pci.0.3.0"].add_boot_device(2)
    devices["pci.0.3.0"].add_boot_device(None)
    devices["pci.1.2.0"].add_boot_device(3)
    host = devices["pci"]

    platform.late_init(machine)

    assert machine.fwcfg.file("bootorder") == host.boot_order()
    assert host.boot_order() == b"/pci@i0cf8/pci@1f,0\n/pci@i0cf8/pci@3,0\0"
    with pytest.raises(DeviceError, match="bootindex 1 is that of 0:31:0 already"):
        devices["pci.0.3.0"].add_boot_device(1)
