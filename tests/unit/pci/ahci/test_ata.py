"""A disk at a port: ATA commands."""

from __future__ import annotations

import struct

import pytest

from pybhyve.pci.ahci import ahcireg as reg
from pybhyve.pci.ahci.identify import chs, default_serial
from tests.guestside.ahci import ATA_ABORTED, AhciDriver, h2d, h2d28, queued

SECTORS = (4 << 20) // 512
READ_FPDMA, WRITE_FPDMA = 0x60, 0x61
IDNF = 0x1051
UNC = 0x4051


def words(data: bytes) -> tuple[int, ...]:
    return struct.unpack("<256H", data)


def ata_text(data: bytes, word: int, length: int) -> str:
    raw = data[2 * word : 2 * word + length]
    return b"".join(raw[i : i + 2][::-1] for i in range(0, length, 2)).decode()


def numbers(data: bytes) -> list[int]:
    """The number each sector begins with."""
    return [
        int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 512)
    ]


# -- IDENTIFY DEVICE -----------------------------------------------------------------


def test_identify(disk, image):
    data = disk.read(0xEC, 512)
    word = words(data)

    assert sum(data) & 0xFF == 0
    assert data[510] == 0xA5
    assert ata_text(data, 27, 40).rstrip() == "BHYVE SATA DISK"
    assert ata_text(data, 23, 8).rstrip() == "001"
    assert ata_text(data, 10, 20) == default_serial(str(image))
    assert word[60] | word[61] << 16 == SECTORS
    assert word[100] | word[101] << 16 | word[102] << 32 == SECTORS
    assert word[1] * word[3] * word[6] <= SECTORS
    assert word[75] == 31
    assert word[76] & 0x100  # queuing
    assert word[83] & 0x0400  # 48 bits
    assert word[106] & 0xC000 == 0x4000
    assert word[169] == 1  # trim
    assert word[217] == 0


def test_identify_is_a_pio_command(disk):
    disk.read(0xEC, 512)
    setup = disk.fis(reg.RFIS_PSFIS)

    assert disk.get("IS") == reg.IS_PSS
    assert setup[:4] == bytes((reg.FIS_PIO_SETUP, reg.FIS_I | reg.FIS_D, 0x58, 0))
    assert setup[15] == 0x50  # status at the end
    assert setup[16:18] == (512).to_bytes(2, "little")


def test_names_and_rotation_rate(driver):
    port = driver(
        port__0__type="hd",
        port__0__ser="SN-1",
        port__0__rev="9.5",
        port__0__model="A disk of a very long name, cut after forty characters",
        port__0__nmrr="7200",
    ).port(0)
    port.start()
    data = port.read(0xEC, 512)

    assert ata_text(data, 10, 20) == "SN-1".ljust(20)
    assert ata_text(data, 23, 8) == "9.5".ljust(8)
    assert ata_text(data, 27, 40) == "A disk of a very long name, cut after fo"
    assert words(data)[217] == 7200


def test_sector_sizes(driver):
    port = driver(port__0__type="hd", port__0__sectorsize="4096").port(0)
    port.start()
    word = words(port.read(0xEC, 512))

    assert word[100] == SECTORS // 8
    assert word[106] & 0x1000
    assert word[117] | word[118] << 16 == 2048
    assert numbers(port.read(0x25, 8192, lba=3, count=2))[0] == 24


def test_physical_sectors(driver):
    port = driver(port__0__type="hd", port__0__sectorsize="512/4096").port(0)
    port.start()

    assert words(port.read(0xEC, 512))[106] == 0x6003


def test_no_trim_with_nodelete(driver):
    port = driver(port__0__type="hd", port__0__nodelete="true").port(0)
    port.start()
    word = words(port.read(0xEC, 512))

    assert (word[69], word[105], word[169], word[77] & 0x40) == (0, 0, 0, 0)
    assert port.run(h2d(0x06, features=1, count=1), [(port.buffer(0), 512)]) == (
        ATA_ABORTED
    )


def test_a_larger_image_is_a_larger_disk(disk, image):
    device = disk.machine.devices["pci.0.3.0"]
    with image.open("ab") as file:
        file.truncate(8 << 20)
    device.ports[0].device.blk._resize(8 << 20)

    # Not under a driver that knows it.
    assert words(disk.read(0xEC, 512))[100] == SECTORS
    disk.stop()
    disk.comreset()
    disk.start()
    assert words(disk.read(0xEC, 512))[100] == SECTORS

    AhciDriver(disk.machine).reset()
    disk.start()
    assert words(disk.read(0xEC, 512))[100] == 2 * SECTORS
    assert disk.read(0x25, 512, lba=2 * SECTORS - 1, count=1) == bytes(512)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, (0, 4, 17)),
        (4 << 20, (120, 4, 17)),
        (1 << 30, (2080, 16, 63)),
        (1 << 50, (65535, 16, 255)),
    ],
)
def test_geometry(size, expected):
    assert chs(size) == expected


# -- reading and writing -------------------------------------------------------------


@pytest.mark.parametrize("opcode", [0x24, 0x25, 0x29], ids=hex)
def test_read_with_48_bits(disk, opcode):
    data = disk.read(opcode, 3 * 512, lba=SECTORS - 3, count=3)

    assert numbers(data) == [SECTORS - 3, SECTORS - 2, SECTORS - 1]


@pytest.mark.parametrize("opcode", [0x20, 0xC4, 0xC8], ids=hex)
def test_read_with_28_bits(disk, opcode):
    assert numbers(disk.read28(opcode, 1024, lba=7, count=2)) == [7, 8]


@pytest.mark.parametrize("opcode", [0x34, 0x35, 0x39, 0x3D, 0xCE], ids=hex)
def test_write_with_48_bits(disk, image, opcode):
    disk.write(h2d(opcode, lba=5, count=2), b"\xab" * 1024)

    with image.open("rb") as file:
        file.seek(4 * 512)
        assert file.read(2048) == (
            (4).to_bytes(8, "little") * 64
            + b"\xab" * 1024
            + (7).to_bytes(8, "little") * 64
        )


@pytest.mark.parametrize("opcode", [0x30, 0xC5, 0xCA], ids=hex)
def test_write_with_28_bits(disk, opcode):
    disk.write(h2d28(opcode, lba=9, count=1), b"\xcd" * 512)

    assert disk.read28(0xC8, 512, lba=9, count=1) == b"\xcd" * 512


def test_count_zero_is_the_largest(disk):
    prds = [(disk.buffer(0), 256 * 512)]

    assert disk.run(h2d28(0xC8, lba=0, count=0), prds) == 0x50
    assert disk.prdbc(0) == 256 * 512
    # 65536 sectors are more than there are.
    assert disk.run(h2d(0x25, lba=0, count=0), prds) == IDNF


def test_dma_ends_with_a_register_fis(disk):
    disk.read(0x25, 512, lba=0x1234, count=1)
    fis = disk.fis(reg.RFIS_RFIS)

    assert disk.get("IS") == reg.IS_DHRS
    assert fis[:4] == bytes((reg.FIS_D2H, reg.FIS_I, 0x50, 0))
    assert fis[4:7] == b"\x34\x12\x00"


def test_data_are_scattered_as_the_prds_say(disk):
    base = disk.buffer(0)
    prds = [(base + 0x9000, 514), (base + 0x11002, 2), (base + 0x3000, 4000)]

    assert disk.run(h2d(0x25, lba=100, count=8), prds) == 0x50
    read = disk.machine.ctx.read
    data = b"".join(read(address, length) for address, length in prds)
    assert numbers(data[:4096]) == list(range(100, 108))
    assert disk.prdbc(0) == 4096


def test_a_prd_with_its_interrupt_bit(disk):
    disk.prepare(0, h2d(0x25, count=1), [(disk.buffer(0), 512)])
    at = disk.table(0) + reg.TABLE_PRDT + 12
    disk.machine.ctx.write(at, (511 | reg.PRD_I).to_bytes(4, "little"))
    disk.issue(0)
    disk.wait(lambda: not disk.get("CI"))

    assert disk.get("IS") == reg.IS_DHRS | reg.IS_DPS


@pytest.mark.parametrize(
    "fis",
    [
        h2d(0x25, lba=SECTORS, count=1),
        h2d(0x35, lba=SECTORS - 1, count=2),
        h2d(0x25, lba=(1 << 48) - 1, count=1),
        h2d28(0xC8, lba=0xFFFFFFF, count=1),
        h2d28(0x40, lba=SECTORS, count=1),
        h2d(0x42, lba=SECTORS - 1, count=2),
    ],
    ids=lambda fis: fis.hex(),
)
def test_beyond_the_end(disk, fis):
    assert disk.run(fis, [(disk.buffer(0), 1024)]) == IDNF
    assert disk.get("CI") == 1  # for the driver to find out which
    assert disk.get("IS") & reg.IS_TFES


def test_verify(disk):
    assert disk.run(h2d28(0x40, lba=SECTORS - 1, count=1)) == 0x50
    assert disk.run(h2d(0x42, lba=0, count=SECTORS)) == 0x50


def test_read_of_a_truncated_image_fails_and_the_rest_works(disk, image):
    with image.open("r+b") as file:
        file.truncate(1 << 20)
    disk.machine.devices["pci.0.3.0"].ports[0].device.blk._resize(1 << 20)

    assert disk.run(h2d(0x25, lba=4096, count=8), [(disk.buffer(0), 4096)]) == UNC
    disk.restart()
    assert numbers(disk.read(0x25, 512, lba=3, count=1)) == [3]


def test_write_to_a_truncated_image(disk, image):
    with image.open("r+b") as file:
        file.truncate(1 << 20)

    prds = [(disk.buffer(0), 4096)]
    assert disk.run(h2d(0x35, lba=4096, count=8), prds, write=True) == ATA_ABORTED
    assert image.stat().st_size == 1 << 20


def test_write_to_a_read_only_image(driver):
    port = driver(port__0__type="hd", port__0__ro="true").port(0)
    port.start()

    prds = [(port.buffer(0), 512)]
    assert port.run(h2d(0x35, lba=0, count=1), prds, write=True) == ATA_ABORTED
    port.restart()
    assert numbers(port.read(0x25, 512, count=1)) == [0]


# -- the queue -----------------------------------------------------------------------


def test_queued_commands(disk):
    for slot in range(32):
        fis = queued(READ_FPDMA, slot, lba=slot * 8, count=8)
        disk.prepare(slot, fis, [(disk.buffer(slot), 4096)])
    disk.issue(*range(32), active=True)
    disk.wait(lambda: not disk.get("SACT"))

    assert disk.get("CI") == 0
    assert disk.get("TFD") == 0x50
    assert disk.get("IS") == reg.IS_SDBS
    assert disk.fis(reg.RFIS_SDBFIS)[:4] == bytes((reg.FIS_SDB, reg.FIS_I, 0x50, 0))
    for slot in range(32):
        data = disk.machine.ctx.read(disk.buffer(slot), 4096)
        assert numbers(data) == list(range(slot * 8, slot * 8 + 8))


def test_queued_writes_that_reach_the_disk(disk, image):
    for slot in range(8):
        disk.machine.ctx.write(disk.buffer(slot), bytes((slot,)) * 512)
        fis = queued(WRITE_FPDMA, slot, lba=slot, fua=True)
        disk.prepare(slot, fis, [(disk.buffer(slot), 512)], write=True)
    disk.issue(*range(8), active=True)
    disk.wait(lambda: not disk.get("SACT"))

    assert image.read_bytes()[:4096] == b"".join(
        bytes((slot,)) * 512 for slot in range(8)
    )


def test_an_error_in_the_queue_is_in_the_log(disk):
    fis = queued(READ_FPDMA, 5, lba=SECTORS, count=2)
    disk.prepare(5, fis, [(disk.buffer(5), 1024)])
    disk.issue(5, active=True)
    disk.wait(lambda: bool(disk.get("IS") & reg.IS_TFES))

    assert disk.get("TFD") == IDNF
    assert disk.get("SACT") == 1 << 5

    disk.restart()
    assert disk.get("SACT") == disk.get("CI") == 0
    # Nothing else until the log was read.
    assert disk.run(h2d(0x25, count=1), [(disk.buffer(0), 512)]) == ATA_ABORTED
    disk.restart()
    log = disk.read(0x2F, 512, lba=0x10, count=1)
    assert log[0] == 0x80  # the last one that failed was not queued
    assert sum(log) & 0xFF == 0
    assert numbers(disk.read(0x25, 512, lba=1, count=1)) == [1]


@pytest.mark.parametrize("opcode", [0x2F, 0x47], ids=hex)
def test_the_log_names_tag_and_address(disk, opcode):
    fis = queued(READ_FPDMA, 5, lba=0x123456789A, count=2)
    disk.prepare(5, fis, [(disk.buffer(5), 1024)])
    disk.issue(5, active=True)
    disk.wait(lambda: bool(disk.get("IS") & reg.IS_TFES))
    disk.restart()
    log = disk.read(opcode, 512, lba=0x10, count=1)

    assert log[:4] == bytes((5, 0, 0x41, 0x10))
    assert log[4:7] + log[8:11] == (0x123456789A).to_bytes(6, "little")


def test_a_command_that_is_not_queued_ends_the_queue(disk):
    """Serial ATA 3.1, 13.6.3.2: the kinds do not mix."""
    device = disk.machine.devices["pci.0.3.0"].ports[0].device
    device.blk._backing.read_now = lambda *_: False
    with device.port.lock:  # no completion between the two
        disk.prepare(0, queued(READ_FPDMA, 0), [(disk.buffer(0), 512)])
        disk.prepare(1, h2d(0x25, count=1), [(disk.buffer(1), 512)])
        disk.issue(0, active=True)
        disk.issue(1)
        assert disk.get("TFD") == ATA_ABORTED
        assert disk.get("IS") & reg.IS_TFES
    disk.restart()
    assert disk.read(0x2F, 512, lba=0x10, count=1)[0] == 0x80


def test_a_tag_is_the_slot(disk):
    disk.prepare(0, queued(READ_FPDMA, 1), [(disk.buffer(0), 512)])
    disk.issue(0, active=True)

    assert disk.get("TFD") == ATA_ABORTED


@pytest.mark.parametrize("opcode", [0x63, 0x65], ids=hex)
def test_queued_commands_that_are_not_there(disk, opcode):
    disk.prepare(0, queued(opcode, 0))
    disk.issue(0, active=True)

    assert disk.get("TFD") == ATA_ABORTED
    assert disk.get("IS") & reg.IS_SDBS


# -- flush, trim ---------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [0xE7, 0xEA, 0xE0, 0xE1, 0xE2, 0xE3, 0xE6], ids=hex)
def test_commands_without_data(disk, opcode):
    assert disk.run(h2d28(opcode)) == 0x50
    assert disk.get("IS") == reg.IS_DHRS


def test_check_power_mode(disk):
    assert disk.run(h2d28(0xE5)) == 0x50
    assert disk.fis(reg.RFIS_RFIS)[12] == 0xFF


def trim_block(*ranges: tuple[int, int]) -> bytes:
    entries = (struct.pack("<Q", count << 48 | lba) for lba, count in ranges)
    return b"".join(entries).ljust(512, b"\0")


def test_trim(disk, image):
    block = trim_block((0, 8), (8, 8), (1000, 24))
    disk.write(h2d(0x06, features=1, count=1), block)
    data = image.read_bytes()

    assert data[: 16 * 512] == bytes(16 * 512)
    assert numbers(data[16 * 512 : 17 * 512]) == [16]
    assert data[1000 * 512 : 1024 * 512] == bytes(24 * 512)
    assert numbers(data[999 * 512 : 1000 * 512]) == [999]


def test_trim_in_the_queue(disk, image):
    disk.machine.ctx.write(disk.buffer(0), trim_block((4, 4)))
    fis = h2d(0x64, features=1, count=0, auxiliary=1)
    disk.prepare(0, fis, [(disk.buffer(0), 512)], write=True)
    disk.issue(0, active=True)
    disk.wait(lambda: not disk.get("SACT"))

    assert image.read_bytes()[4 * 512 : 8 * 512] == bytes(4 * 512)


@pytest.mark.parametrize(
    "fields", [{"count": 2}, {"features": 2}, {"count": 0}], ids=str
)
def test_trim_that_is_not_offered(disk, fields):
    fis = h2d(0x06, **({"features": 1, "count": 1} | fields))

    assert disk.run(fis, [(disk.buffer(0), 1024)]) == ATA_ABORTED


def test_trim_beyond_the_end_changes_nothing(disk, image):
    before = image.read_bytes()
    disk.machine.ctx.write(disk.buffer(0), trim_block((0, 8), (SECTORS - 1, 2)))

    assert disk.run(h2d(0x06, features=1, count=1), [(disk.buffer(0), 512)]) == IDNF
    assert image.read_bytes() == before


# -- logs and settings ---------------------------------------------------------------


def test_log_directory(disk):
    log = struct.unpack("<256H", disk.read(0x2F, 512, lba=0, count=1))

    assert {index: pages for index, pages in enumerate(log) if pages} == {
        0: 1,
        0x10: 1,
        0x13: 1,
    }
    assert disk.read(0x2F, 512, lba=0x13, count=1)[:8] == b"\1\0\0\0\1\0\0\0"


@pytest.mark.parametrize(
    "fields", [{"lba": 0x11}, {"lba": 0x100}, {"count": 2}, {"lba": 1 << 32}], ids=str
)
def test_logs_that_are_not_there(disk, fields):
    fis = h2d(0x2F, **({"count": 1} | fields))

    assert disk.run(fis, [(disk.buffer(0), 1024)]) == ATA_ABORTED


def test_write_cache_off(disk):
    assert disk.run(h2d28(0xEF, features=0x82)) == 0x50
    assert not words(disk.read(0xEC, 512))[85] & 0x20
    disk.write(h2d(0x35, lba=1, count=1), b"\x11" * 512)
    assert disk.run(h2d28(0xEF, features=0x02)) == 0x50
    assert words(disk.read(0xEC, 512))[85] & 0x20


def test_look_ahead_off(disk):
    assert disk.run(h2d28(0xEF, features=0x55)) == 0x50
    assert not words(disk.read(0xEC, 512))[85] & 0x40


@pytest.mark.parametrize(
    ("mode", "word63", "word88"),
    [(0x46, 0x0007, 0x407F), (0x42, 0x0007, 0x047F), (0x22, 0x0407, 0x007F)],
)
def test_transfer_mode(disk, mode, word63, word88):
    assert disk.run(h2d28(0xEF, features=3, count=mode)) == 0x50
    word = words(disk.read(0xEC, 512))

    assert (word[63], word[88]) == (word63, word88)


@pytest.mark.parametrize(
    ("feature", "count"), [(3, 0x47), (3, 0x23), (0x10, 5), (9, 0)]
)
def test_features_that_are_not_there(disk, feature, count):
    assert disk.run(h2d28(0xEF, features=feature, count=count)) == ATA_ABORTED


def test_multiple_mode(disk):
    assert disk.run(h2d28(0xC6, count=16)) == 0x50
    assert words(disk.read(0xEC, 512))[59] == 0x110
    assert disk.run(h2d28(0xC6, count=0)) == 0x50
    assert words(disk.read(0xEC, 512))[59] == 0
    assert disk.run(h2d28(0xC4, count=1), [(disk.buffer(0), 512)]) == ATA_ABORTED


@pytest.mark.parametrize("count", [3, 129, 255])
def test_multiple_modes_that_are_not_there(disk, count):
    assert disk.run(h2d28(0xC6, count=count)) == ATA_ABORTED


@pytest.mark.parametrize(
    "opcode", [0x00, 0xA0, 0xA1, 0xB0, 0xF1, 0xF5, 0xF8, 0x08, 0xFF], ids=hex
)
def test_commands_a_disk_does_not_have(disk, opcode):
    assert disk.run(h2d28(opcode), [(disk.buffer(0), 512)]) == ATA_ABORTED
    disk.restart()
    assert disk.run(h2d28(0xE7)) == 0x50


def test_diagnostic(disk):
    assert disk.run(h2d28(0x90)) == 0x0150
    assert disk.fis(reg.RFIS_RFIS)[4:7] == b"\1\0\0"
