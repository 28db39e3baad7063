"""A CD drive at a port: ATAPI and MMC commands."""

from __future__ import annotations

import struct

import pytest

from pybhyve.pci.ahci import ahcireg as reg
from tests.guestside.ahci import h2d, h2d28

BLOCKS = (4 << 20) // 2048
LUN_OUT_OF_RANGE = 0x21
GOOD = b""


def be16(data: bytes, at: int = 0) -> int:
    return int.from_bytes(data[at : at + 2], "big")


def be32(data: bytes, at: int = 0) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def sense(cd) -> tuple[int, int, int]:
    data = cd.packet(0x03, 0, 0, 0, 18, length=18)
    assert data[0] == 0xF0
    return data[2], data[12], data[13]


def test_signature(cd):
    assert cd.get("SIG") == 0xEB140101
    assert cd.get("TFD") == 0x0100


def test_identify(cd):
    data = cd.read28(0xA1, 512)
    word = struct.unpack("<256H", data)

    assert sum(data) & 0xFF == 0
    assert word[0] == 0x85C0
    assert word[49] & 0x0300 == 0x0300
    model = b"".join(data[i : i + 2][::-1] for i in range(54, 94, 2))
    assert model.decode().rstrip() == "BHYVE SATA DVD ROM"
    assert cd.get("IS") == reg.IS_PSS


@pytest.mark.parametrize("opcode", [0xEC, 0x20], ids=hex)
def test_it_is_not_a_disk(cd, opcode):
    assert cd.run(h2d28(opcode), [(cd.buffer(0), 512)]) == 0x0451
    fis = cd.fis(reg.RFIS_RFIS)
    assert (fis[12], fis[4:7]) == (1, b"\x01\x14\xeb")


def test_packet_ends_with_a_register_fis(cd):
    assert cd.packet(0x00) == GOOD
    fis = cd.fis(reg.RFIS_RFIS)

    assert fis[:4] == bytes((reg.FIS_D2H, reg.FIS_I, 0x50, 0))
    assert fis[12] == 3  # interrupt reason: status
    assert cd.fis(reg.RFIS_PSFIS)[0] == reg.FIS_PIO_SETUP


def test_inquiry(cd):
    data = cd.packet(0x12, 0, 0, 0, 36, length=36)

    assert data[:5] == b"\x05\x80\x00\x21\x1f"
    assert data[8:36] == b"BHYVE   BHYVE DVD-ROM   001 "
    assert cd.packet(0x12, 0, 0, 0, 5, length=6) == data[:5]
    assert cd.packet(0x12, 1, 0, 0, 255, length=256) == b"\x05\0\0\1\0"
    assert cd.packet(0x12, 1, 0x80, 0, 255, length=256) is None
    assert sense(cd) == (5, 0x24, 0)


def test_sense_is_read_once(cd):
    assert cd.packet(0xFF) is None
    assert cd.get("TFD") == 0x5051
    assert sense(cd) == (5, 0x20, 0)
    assert sense(cd) == (0, 0, 0)


def test_capacity(cd):
    data = cd.packet(0x25, length=8)

    assert (be32(data), be32(data, 4)) == (BLOCKS - 1, 2048)


def read_10(cd, lba: int, count: int) -> bytes | None:
    return cd.packet(
        0x28,
        0,
        *lba.to_bytes(4, "big"),
        0,
        *count.to_bytes(2, "big"),
        length=max(count, 1) * 2048,
    )


def read_12(cd, lba: int, count: int) -> bytes | None:
    return cd.packet(
        0xA8,
        0,
        *lba.to_bytes(4, "big"),
        *count.to_bytes(4, "big"),
        length=max(count, 1) * 2048,
    )


@pytest.mark.parametrize("read", [read_10, read_12])
def test_read(cd, image, read):
    assert read(cd, BLOCKS - 2, 2) == image.read_bytes()[-4096:]
    assert read(cd, 0, 0) == GOOD
    assert read(cd, BLOCKS - 1, 2) is None
    assert sense(cd) == (5, 0x21, 0)
    assert read(cd, 0xFFFFFFFF, 1) is None


def test_read_of_a_truncated_image(cd, image):
    with image.open("r+b") as file:
        file.truncate(1 << 20)

    assert read_10(cd, 1024, 1) is None
    assert sense(cd) == (3, 0x11, 0)
    assert read_10(cd, 0, 1) == image.read_bytes()[:2048]


def test_seek(cd):
    assert cd.packet(0x2B, 0, *(BLOCKS - 1).to_bytes(4, "big")) == GOOD
    assert cd.packet(0x2B, 0, *BLOCKS.to_bytes(4, "big")) is None


def test_toc_of_tracks(cd):
    toc = cd.packet(0x43, 0, 0, 0, 0, 0, 0, 0x03, 0x24, length=804)

    assert be16(toc) == len(toc) - 2 == 18
    assert toc[2:4] == b"\1\1"
    assert toc[4:12] == b"\0\x14\1\0" + bytes(4)
    assert toc[12:] == b"\0\x14\xaa\0" + BLOCKS.to_bytes(4, "big")


def test_toc_in_minutes(cd):
    toc = cd.packet(0x43, 2, 0, 0, 0, 0, 1, 0, 20, length=20)
    seconds, frames = divmod(BLOCKS + 150, 75)

    assert toc[8:12] == b"\0\0\2\0"
    assert toc[16:20] == bytes((0, seconds // 60, seconds % 60, frames))


def test_toc_of_the_lead_out(cd):
    toc = cd.packet(0x43, 0, 0, 0, 0, 0, 0xAA, 0, 20, length=20)

    assert (len(toc), toc[6]) == (12, 0xAA)
    assert cd.packet(0x43, 0, 0, 0, 0, 0, 2, 0, 20, length=20) is None
    assert sense(cd) == (5, 0x24, 0)


@pytest.mark.parametrize("where", [2, 9])
def test_toc_of_sessions_and_raw(cd, where):
    def toc(form: int) -> bytes:
        cdb = bytearray(12)
        cdb[0], cdb[8] = 0x43, 48
        cdb[where] = form if where == 2 else form << 6
        return cd.packet(*cdb, length=48)

    assert toc(1) == b"\0\x0a\1\1\0\x14\1\0" + bytes(4)
    raw = toc(2)
    assert be16(raw) == len(raw) - 2 == 46
    assert [raw[at] for at in range(7, 48, 11)] == [0xA0, 0xA1, 0xA2, 1]
    assert be32(raw, 4 + 22 + 7) == BLOCKS


def test_mode_sense(cd):
    page = cd.packet(0x5A, 0, 0x2A, 0, 0, 0, 0, 0, 128, length=128)
    both = cd.packet(0x5A, 0, 0x3F, 0, 0, 0, 0, 0, 128, length=128)

    assert be16(page) == len(page) - 2
    assert page[2:8] == b"\x70\0\0\0\0\0"
    assert page[8:10] == b"\x2a\x14"
    assert len(both) == 8 + 8 + 22
    assert cd.packet(0x5A, 0, 1, 0, 0, 0, 0, 0, 16, length=16)[8:] == (
        b"\x01\x06\0\x05\0\0\0\0"
    )


@pytest.mark.parametrize(("page", "asc"), [(0x02, 0x24), (0x6A, 0x24), (0xEA, 0x39)])
def test_mode_sense_of_what_is_not_there(cd, page, asc):
    assert cd.packet(0x5A, 0, page, 0, 0, 0, 0, 0, 128, length=128) is None
    assert sense(cd) == (5, asc, 0)


def test_configuration(cd):
    data = cd.packet(0x46, 0, 0, 0, 0, 0, 0, 0, 255, length=256)
    features = {}
    at = 8
    while at < len(data):
        features[be16(data, at)] = data[at + 2]
        at += 4 + data[at + 3]

    assert be32(data) == len(data) - 4
    assert be16(data, 6) == 0x0008  # a CD-ROM by its size
    assert set(features) == {0, 1, 3, 0x10, 0x1E, 0x1F}
    assert (features[0x1E] & 1, features[0x1F] & 1) == (1, 0)
    one = cd.packet(0x46, 2, 0, 3, 0, 0, 0, 0, 255, length=256)
    assert one[8:] == b"\0\x03\x03\x04\x20\0\0\0"
    current = cd.packet(0x46, 1, 0, 0x10, 0, 0, 0, 0, 255, length=256)
    assert be16(current, 8) == 0x10
    assert len(current) == 8 + 12 + 8
    assert cd.packet(0x46, 3, 0, 0, 0, 0, 0, 0, 255, length=256) is None


def test_events(cd):
    def event() -> bytes | None:
        return cd.packet(0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8, length=8)

    assert event() == b"\0\6\4\x10\0\2\0\0"
    assert cd.packet(0x4A, 0, 0, 0, 0x10, 0, 0, 0, 8, length=8) is None
    assert cd.packet(0x4A, 1, 0, 0, 0x02, 0, 0, 0, 8, length=8) == b"\0\2\x80\x10"


def test_a_changed_image_is_a_new_disc(cd, image):
    blk = cd.machine.devices["pci.0.3.0"].ports[0].device.blk
    with image.open("ab") as file:
        file.truncate(8 << 20)
    blk._resize(8 << 20)

    assert cd.packet(0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8, length=8)[4] == 2
    assert cd.packet(0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8, length=8)[4] == 0
    assert cd.packet(0x12, 0, 0, 0, 36, length=36) is not None
    assert cd.packet(0x00) is None
    assert sense(cd) == (6, 0x28, 0)
    assert cd.packet(0x00) == GOOD
    assert be32(cd.packet(0x25, length=8)) == 2 * BLOCKS - 1


@pytest.mark.parametrize(
    "cdb",
    [(0x1E, 0, 0, 0, 1), (0x1B, 0, 0, 0, 1), (0x1B, 0, 0, 0, 3), (0xBB,)],
    ids=str,
)
def test_nothing_to_do(cd, cdb):
    assert cd.packet(*cdb) == GOOD


def test_eject(cd):
    assert cd.packet(0x1B, 0, 0, 0, 2) is None
    assert sense(cd) == (5, 0x53, 0)


def test_disc_information(cd):
    data = cd.packet(0x51, 0, 0, 0, 0, 0, 0, 0, 34, length=34)

    assert be16(data) == 32
    assert data[2] == 0x0E
    assert cd.packet(0x51, 1, 0, 0, 0, 0, 0, 0, 34, length=34) is None


def test_luns(cd):
    cdb = (0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 16)

    assert cd.packet(*cdb, length=16) == b"\0\0\0\x08" + bytes(12)


@pytest.mark.parametrize("opcode", [0xE0, 0xE1, 0xE6, 0xE7], ids=hex)
def test_power_commands(cd, opcode):
    assert cd.run(h2d28(opcode)) == 0x50


def test_ata_commands(cd):
    assert cd.run(h2d28(0xE5)) == 0x50
    assert cd.fis(reg.RFIS_RFIS)[12] == 0xFF
    assert cd.run(h2d28(0xEF, features=3, count=0x45)) == 0x50
    assert struct.unpack("<256H", cd.read28(0xA1, 512))[88] == 0x207F
    assert cd.run(h2d28(0xEF, features=2)) == 0x0451
    cd.restart()
    for opcode in (0x08, 0x90):
        assert cd.run(h2d28(opcode)) == 0x0150
        assert cd.fis(reg.RFIS_RFIS)[4:7] == b"\x01\x14\xeb"
    assert cd.run(h2d(0x60, features=1), [(cd.buffer(0), 512)]) == 0x0451


def test_an_answer_that_does_not_fit(cd):
    assert cd.packet(0x12, 0, 0, 0, 36, length=20) is None
    assert sense(cd) == (0xB, 0, 0)
