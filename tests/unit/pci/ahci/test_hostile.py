"""Drivers that do what no driver may: errors as in AHCI 6, and never more than that."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.pci.ahci import PciAhci
from pybhyve.pci.ahci import ahcireg as reg
from pybhyve.pci.ahci.command import Command
from tests.guestside.ahci import AhciDriver, AhciPort, h2d, h2d28, queued

RAM = 32 << 20
HOLE = 0xA0000000  # neither memory nor a device


def works(port: AhciPort) -> None:
    """The port does what it is for, after the recovery that drivers do."""
    port.stop()
    port.comreset()
    port.start()
    assert port.read(0xEC, 512)[510] == 0xA5


# -- one wrong thing each ------------------------------------------------------------


@pytest.mark.parametrize("list_at", [HOLE, RAM, (1 << 64) - 1024], ids=hex)
def test_a_command_list_that_is_no_memory(disk, list_at):
    disk.set("CLB", list_at & 0xFFFFFFFF)
    disk.set("CLBU", list_at >> 32)
    disk.issue(31)

    assert disk.get("IS") == reg.IS_HBFS
    assert disk.get("CI") == 1 << 31
    works(disk)


@pytest.mark.parametrize("fis_at", [HOLE, (1 << 64) - 256], ids=hex)
def test_a_fis_area_that_is_no_memory(disk, fis_at):
    disk.set("FB", fis_at & 0xFFFFFFFF)
    disk.set("FBU", fis_at >> 32)
    disk.prepare(0, h2d28(0xE5))
    disk.issue(0)

    assert disk.get("IS") & reg.IS_HBFS
    works(disk)


@pytest.mark.parametrize("table", [HOLE, RAM - 128, (1 << 64) - 128], ids=hex)
def test_a_command_table_that_is_no_memory(disk, table):
    disk.prepare(0, h2d28(0xE5), [(disk.buffer(0), 512)])
    disk.machine.ctx.write(disk.memory, reg.HEADER.pack(5, 1, 0, table))
    disk.issue(0)

    assert disk.get("IS") == reg.IS_HBFS
    works(disk)


@pytest.mark.parametrize("opcode", [0x25, 0x35, 0x60, 0x61, 0xEC, 0x06], ids=hex)
@pytest.mark.parametrize(
    "prd", [(HOLE, 4096), (RAM - 128, 4096), ((1 << 64) - 128, 4096)], ids=str
)
def test_a_prd_that_is_no_memory(disk, opcode, prd):
    fis = h2d(opcode, count=1 if opcode == 6 else 8, features=1)
    if opcode in (0x60, 0x61):
        fis = queued(opcode, 0, count=8)
    disk.prepare(0, fis, [(disk.buffer(0), 256), prd])
    disk.issue(0, active=opcode in (0x60, 0x61))

    assert disk.get("IS") & reg.IS_HBFS
    works(disk)


@pytest.mark.parametrize("opcode", [0x25, 0x35, 0x60, 0x61, 0xEC], ids=hex)
def test_prds_that_are_too_small(disk, opcode):
    fis = h2d(opcode, count=8)
    if opcode in (0x60, 0x61):
        fis = queued(opcode, 0, count=8)
    disk.prepare(0, fis, [(disk.buffer(0), 256)])
    disk.issue(0, active=opcode in (0x60, 0x61))

    assert disk.get("IS") & (reg.IS_OFS | reg.IS_TFES) == reg.IS_OFS | reg.IS_TFES
    assert disk.machine.ctx.read(disk.buffer(0), 256) == bytes(256)
    works(disk)


@pytest.mark.parametrize("cfl", [0, 1, 2, 4, 17, 31])
def test_a_fis_of_a_wrong_length(disk, cfl):
    disk.prepare(0, h2d28(0xE5), cfl=cfl)
    disk.issue(0)

    assert disk.get("IS") == reg.IS_IFS
    assert disk.get("SERR")
    works(disk)


@pytest.mark.parametrize("kind", [0x00, 0x34, 0x46, 0xA1, 0xFF], ids=hex)
def test_a_fis_that_is_no_command(disk, kind):
    disk.prepare(0, bytes((kind,)) + h2d28(0xE5)[1:])
    disk.issue(0)

    assert disk.get("IS") == reg.IS_IFS
    works(disk)


def test_the_longest_list_of_prds(disk):
    """65535 of them, of two bytes: as many as there can be, and a transfer uses all."""
    count = 256
    prds = b"".join(reg.PRD.pack(0x800000 + 4 * index, 0, 1) for index in range(0xFFFF))
    disk.prepare(0, h2d(0x25, count=count))
    at = 0xA00000
    disk.machine.ctx.write(at, h2d(0x25, count=count).ljust(0x80, b"\0") + prds)
    disk.machine.ctx.write(disk.memory, reg.HEADER.pack(5, 0xFFFF, 0, at))
    disk.issue(0)
    disk.wait(lambda: bool(disk.get("IS")))

    # Two bytes are missing.
    assert disk.get("IS") & reg.IS_OFS

    disk.restart()
    disk.prepare(0, h2d(0x25, count=count - 1))
    fis = h2d(0x25, count=count - 1)
    disk.machine.ctx.write(at, fis)
    disk.machine.ctx.write(disk.memory, reg.HEADER.pack(5, 0xFFFF, 0, at))
    disk.issue(0)
    disk.wait(lambda: not disk.get("CI"))
    assert disk.get("TFD") == 0x50
    assert disk.machine.ctx.read(0x800000 + 4 * 256, 2) == b"\1\0"


def test_data_over_the_command_itself(disk):
    """A transfer may hit the list, the table and the FIS area: it is the driver's."""
    prds = [(disk.memory, 0x8000)]
    disk.prepare(0, h2d(0x25, count=64), prds)
    disk.issue(0)
    disk.wait(lambda: not disk.get("CI") or bool(disk.get("IS")))

    works(disk)


# -- anything at all -----------------------------------------------------------------


@pytest.fixture
def both(driver, tmp_path) -> AhciDriver:
    """A disk at port 0, a CD drive at port 1; the tests do what they like with it."""
    iso = tmp_path / "cd.iso"
    iso.write_bytes(bytes(1 << 20))
    hba = driver(port__0__type="hd", port__1__type="cd", port__1__path=str(iso))
    hba.function.enable_msi(0x40)
    hba.set("GHC", reg.GHC_IE)
    return hba


EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def settle(hba: AhciDriver) -> None:
    """Let everything end, see that nothing was lost, and that it works again."""
    device = hba.machine.devices["pci.0.3.0"]
    assert isinstance(device, PciAhci)
    device.pause()
    for port in device.ports:
        assert not port._in_io
    state = device.save()
    device.restore(state)
    assert device.save() == state
    device.resume()
    hba.reset()
    works(hba.port(0))
    cd = hba.port(1)
    cd.start()
    assert cd.read28(0xA1, 512)[510] == 0xA5
    cd.stop()
    hba.set("GHC", reg.GHC_IE)


@EXAMPLES
@given(
    writes=st.lists(
        st.tuples(
            st.integers(0, 0x3FF),
            st.sampled_from([1, 2, 4, 8]),
            st.one_of(
                st.integers(0, (1 << 64) - 1),
                st.integers(0, 31).map(lambda bit: 1 << bit),
                st.sampled_from([0x17, 0x11, 0, 0x301, 0x300]),
            ),
        ),
        max_size=40,
    )
)
def test_registers_take_anything(both, writes):
    bar = both.bar
    for offset, size, value in writes:
        offset = min(offset, bar.size - size)
        bar.write(offset, size, value & (1 << 8 * size) - 1)
        assert 0 <= bar.read(offset, size) < 1 << 8 * size
    settle(both)


HEADERS = st.builds(
    lambda flags, prdtl, table: reg.HEADER.pack(flags, prdtl, 0, table),
    st.one_of(st.just(5), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, 4), st.integers(0, 0xFFFF)),
    st.one_of(
        st.integers(0, RAM - 1).map(lambda at: at & ~0x7F),
        st.integers(0, (1 << 64) - 1),
    ),
)
KNOWN = [0x06, 0x20, 0x25, 0x2F, 0x35, 0x60, 0x61, 0x64, 0xA0, 0xA1, 0xC6, 0xEC, 0xEF]
FISES = st.builds(
    lambda c, opcode, rest: bytes((0x27, c, opcode)) + rest,
    st.sampled_from([0x80, 0x80, 0x80, 0]),
    st.one_of(st.sampled_from(KNOWN), st.integers(0, 255)),
    st.binary(min_size=17, max_size=17),
)
PACKETS = st.builds(
    lambda opcode, rest: bytes((opcode,)) + rest,
    st.one_of(
        st.sampled_from([0x12, 0x28, 0x43, 0x46, 0x4A, 0x5A, 0xA8]), st.integers(0, 255)
    ),
    st.binary(min_size=15, max_size=15),
)
PRDS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, RAM - 1), st.integers(0, (1 << 64) - 1)),
        st.integers(0, 0xFFFFFFFF),
    ),
    max_size=6,
)


@EXAMPLES
@given(
    commands=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.integers(0, 31),
            FISES,
            PACKETS,
            PRDS,
            st.one_of(st.none(), HEADERS),
        ),
        max_size=12,
    ),
    active=st.integers(0, 0xFFFFFFFF),
)
def test_command_tables_hold_anything(both, commands, active):
    ctx = both.machine.ctx
    for number in (0, 1):
        both.port(number).start()
    for number, slot, fis, packet, prds, header in commands:
        port = both.port(number)
        table = fis.ljust(0x40, b"\0") + packet.ljust(0x40, b"\0")
        table += b"".join(reg.PRD.pack(at, 0, count) for at, count in prds)
        ctx.write(port.table(slot), table)
        if header is None:
            header = reg.HEADER.pack(5, len(prds), 0, port.table(slot))
        ctx.write(port.memory + reg.HEADER_SIZE * slot, header)
        port.set("SACT", active & 1 << slot)
        port.set("CI", 1 << slot)
        if port.get("IS") & (reg.IS_TFES | reg.IS_HBFS | reg.IS_IFS):
            port.set("CMD", port.get("CMD") & ~reg.CMD_ST)
            port.set("IS", 0xFFFFFFFF)
            port.set("CMD", port.get("CMD") | reg.CMD_CLO | reg.CMD_ST)
    settle(both)


def test_random_memory_is_no_command(disk):
    """A list in random memory: every slot, of which some are commands."""
    noise = random.Random(1)
    for _ in range(50):
        disk.machine.ctx.write(disk.memory, noise.randbytes(32 * 32))
        disk.set("CI", 0xFFFFFFFF)
        disk.restart()
    works(disk)


def test_ranges_stop_at_the_length():
    """However many PRDs there are, only those the transfer needs are looked at."""
    command = Command.__new__(Command)
    command.descriptor = 0
    command._prdt = memoryview(reg.PRD.pack(0x1000, 0, 0x3FFFFF | reg.PRD_I) * 1000)

    assert command.ranges(512) == [(0x1000, 512)]
    assert command.descriptor == reg.IS_DPS
    assert command.ranges(0) == []
