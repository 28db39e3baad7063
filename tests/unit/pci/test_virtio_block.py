"""virtio-blk on real images, driven over both kinds of registers."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.errors import ConfigError, DeviceError
from pybhyve.virtio import VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC
from tests.guestside.pci import PciFunction
from tests.guestside.virtio import NEEDS_RESET, VirtioDriver

MIB = 1 << 20
IN, OUT, FLUSH, FLUSH_OUT, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 5, 8, 11, 13
OK, IOERR, UNSUPP = b"\0", b"\1", b"\2"
F_RO, F_FLUSH, F_WCE = 1 << 5, 1 << 9, 1 << 11
F_DISCARD, F_WRITE_ZEROES = 1 << 13, 1 << 14
ALL = 0xFFFF | VIRTIO_RING_F_EVENT_IDX | VIRTIO_RING_F_INDIRECT_DESC


class Disk:
    """A machine with a disk in slot 3, and its driver."""

    def __init__(
        self, build, image, *, modern=True, msix=True, features=ALL, **options
    ) -> None:
        variables = {f"pci__0__3__0__{key}": value for key, value in options.items()}
        self.image = image
        self.machine = build("3,virtio-blk", pci__0__3__0__path=str(image), **variables)
        self.function = PciFunction(self.machine, 3)
        self.device = self.machine.devices["pci.0.3.0"]
        self.driver = VirtioDriver(self.function, modern=modern, msix=msix)
        self.driver.start(features)
        self.queue = self.driver.queue(0)

    def request(self, kind, sector=0, data=b"", room=0, **how) -> tuple[bytes, bytes]:
        """Status, and what the device wrote."""
        header = struct.pack("<IIQ", kind, 0, sector)
        readable = [header, data] if data else [header]
        writable = [room, 1] if room else [1]
        head = self.queue.add(readable, writable, **how)
        self.queue.kick()
        done = self.queue.wait()
        status = self.queue.buffer(head, len(writable) - 1)
        content = self.queue.buffer(head, 0) if room else b""
        if status == OK:
            assert done == {head: room + 1}
        return status, content

    def read(self, sector, length):
        status, data = self.request(IN, sector, room=length)
        assert status == OK
        return data

    def write(self, sector, data) -> None:
        assert self.request(OUT, sector, data) == (OK, b"")


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(index // 512 & 0xFF for index in range(MIB)))
    return path


@pytest.fixture(params=["legacy", "modern"])
def modern(request) -> bool:
    return request.param == "modern"


@pytest.fixture
def disk(build, image) -> Disk:
    return Disk(build, image)


# -- what it looks like ----------------------------------------------------------------


def test_identity(disk):
    assert disk.function.read(0x00) == 0x1001_1AF4
    assert disk.function.read(0x08) == 0x01000000
    assert disk.function.read(0x2C) == 0x0002_1AF4


def test_configuration(build, image, modern):
    disk = Disk(build, image, modern=modern, sectorsize="512/4096")
    config = bytes(disk.driver.config(at, 1) for at in range(60))

    assert config == struct.pack(
        "<QIIHBBIBBHIBxHIIIIIBxxx",
        *(2048, 0, 126, 0, 0, 0, 512),
        *(3, 0, 0, 0),  # eight logical sectors in a physical one
        *(1, 1),
        *(32768, 1, 1),
        *(32768, 1, 0),
    )


def test_features_follow_the_image(build, image, tmp_path):
    whole = Disk(build, image).driver.features
    assert whole & (F_DISCARD | F_WRITE_ZEROES) == F_DISCARD | F_WRITE_ZEROES
    assert not whole & F_RO

    other = tmp_path / "other.img"
    other.write_bytes(bytes(4096))
    without = Disk(build, other, nodelete="true").driver.features
    assert without & (F_DISCARD | F_WRITE_ZEROES) == F_WRITE_ZEROES


def test_read_only(build, image):
    disk = Disk(build, image, ro="true")

    assert disk.driver.features & (F_RO | F_DISCARD | F_WRITE_ZEROES) == F_RO
    assert disk.request(OUT, 0, bytes(512))[0] == IOERR
    assert disk.request(WRITE_ZEROES, 0, struct.pack("<QII", 0, 1, 0))[0] == IOERR
    assert disk.read(5, 512) == b"\x05" * 512


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ser": "SERIAL"}, b"SERIAL".ljust(20, b"\0")),
        ({"ser": "A" * 30}, b"A" * 20),
        ({}, None),
    ],
)
def test_identification(build, image, options, expected):
    status, name = Disk(build, image, **options).request(GET_ID, room=20)

    assert status == OK
    if expected is None:
        assert name[:6] == b"BHYVE-"
        assert [name[at : at + 1] for at in (10, 15)] == [b"-", b"-"]
        assert len(name.rstrip(b"\0")) == 20
    else:
        assert name == expected


@pytest.mark.parametrize("options", [{}, {"path": "/nonexistent"}])
def test_no_image(build, options):
    variables = {f"pci__0__3__0__{key}": value for key, value in options.items()}

    with pytest.raises(DeviceError, match="virtio-blk"):
        build("3,virtio-blk", **variables)


def test_wrong_sector_size(build, image):
    with pytest.raises(ConfigError, match="sectorsize"):
        Disk(build, image, sectorsize="500")


# -- requests --------------------------------------------------------------------------


@pytest.mark.parametrize("length", [512, 4096, 100 * 1024])
def test_reads(build, image, modern, length):
    disk = Disk(build, image, modern=modern)

    assert disk.read(7, length) == image.read_bytes()[7 * 512 : 7 * 512 + length]


@pytest.mark.parametrize("indirect", [False, True])
def test_writes(build, image, modern, indirect):
    disk = Disk(build, image, modern=modern)
    data = os.urandom(3 * 512)
    before = image.read_bytes()

    assert disk.request(OUT, 9, data, indirect=indirect) == (OK, b"")

    assert image.read_bytes() == before[: 9 * 512] + data + before[12 * 512 :]
    assert disk.read(9, len(data)) == data


def test_many_segments_and_many_requests(disk):
    """The whole ring at once, each request of several pieces."""
    data = os.urandom(40 * 4096)
    headers = [struct.pack("<IIQ", OUT, 0, 8 * index) for index in range(40)]
    pieces = [data[4096 * index : 4096 * (index + 1)] for index in range(40)]
    for index in range(40):
        parts = [headers[index], pieces[index][:512], pieces[index][512:]]
        disk.queue.add(parts, [1], indirect=True)
    disk.queue.kick()
    disk.queue.wait(40)

    assert disk.image.read_bytes()[: len(data)] == data
    heads = []
    for index in range(40):
        header = struct.pack("<IIQ", IN, 0, 8 * index)
        heads.append(disk.queue.add([header], [1024, 3072, 1], indirect=True))
    disk.queue.kick()
    disk.queue.wait(40)
    for index, head in enumerate(heads):
        got = disk.queue.buffer(head, 0) + disk.queue.buffer(head, 1)
        assert got == pieces[index]


def test_any_layout(disk):
    """Header, data and status cut where no driver cuts them (2.7.4)."""
    data = os.urandom(1024)
    header = struct.pack("<IIQ", OUT, 0, 3)
    disk.queue.add([header[:5], header[5:] + data[:100], data[100:]], [1])
    disk.queue.kick()
    disk.queue.wait()
    assert disk.image.read_bytes()[1536:2560] == data

    head = disk.queue.add([struct.pack("<IIQ", IN, 0, 3)], [1000, 25])
    disk.queue.kick()

    assert disk.queue.wait() == {head: 1025}
    got = disk.queue.buffer(head, 0) + disk.queue.buffer(head, 1)
    assert got == data + OK


@pytest.mark.parametrize("kind", [FLUSH, FLUSH_OUT, FLUSH | 1 << 31])
def test_flush(disk, kind):
    assert disk.request(kind) == (OK, b"")


@pytest.mark.parametrize("kind", [2, 3, 14, 16, 0x7FFFFFFF])
def test_unknown_requests(disk, kind):
    assert disk.request(kind, room=512)[0] == UNSUPP


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_ranges_read_as_zeroes_afterwards(disk, kind):
    before = disk.image.read_bytes()

    assert disk.request(kind, 0, struct.pack("<QII", 16, 24, 0)) == (OK, b"")

    assert disk.image.read_bytes() == (
        before[: 16 * 512] + bytes(24 * 512) + before[40 * 512 :]
    )


@pytest.mark.parametrize(
    ("kind", "data", "status"),
    [
        (DISCARD, struct.pack("<QII", 0, 1, 1), UNSUPP),
        (WRITE_ZEROES, struct.pack("<QII", 0, 1, 1), OK),
        (WRITE_ZEROES, struct.pack("<QII", 0, 1, 2), UNSUPP),
        (DISCARD, struct.pack("<QII", 2047, 2, 0), IOERR),
        (WRITE_ZEROES, struct.pack("<QII", 1 << 55, 1, 0), IOERR),
        (WRITE_ZEROES, struct.pack("<QII", 0, 0xFFFFFFFF, 0), IOERR),
        (DISCARD, bytes(32), IOERR),
        (DISCARD, bytes(15), IOERR),
        (WRITE_ZEROES, b"", IOERR),
        (DISCARD, struct.pack("<QII", 5, 0, 0), OK),
    ],
)
def test_ranges_that_cannot_be(disk, kind, data, status):
    before = disk.image.read_bytes()

    assert disk.request(kind, 0, data)[0] == status
    if status != OK:
        assert disk.image.read_bytes() == before


@pytest.mark.parametrize(
    ("sector", "length"),
    [(2048, 512), (2047, 1024), ((1 << 64) - 1, 512), (1 << 55, 512), (0, 100)],
)
def test_what_is_not_on_the_disk(disk, sector, length):
    before = disk.image.read_bytes()

    assert disk.request(IN, sector, room=length)[0] == IOERR
    assert disk.request(OUT, sector, bytes(length))[0] == IOERR
    assert disk.image.read_bytes() == before


def test_requests_are_whole_logical_sectors(build, image):
    disk = Disk(build, image, sectorsize="4096")

    assert disk.request(IN, 8, room=4096)[0] == OK
    assert disk.request(IN, 4, room=4096)[0] == IOERR
    assert disk.request(IN, 8, room=2048)[0] == IOERR


def test_a_request_without_data(disk):
    assert disk.request(IN, 0) == (OK, b"")
    assert disk.request(OUT, 2048) == (OK, b"")


def test_an_image_that_shrank_is_an_error_and_not_longer_again(disk):
    os.truncate(disk.image, 4096)

    assert disk.request(IN, 8, room=512)[0] == IOERR
    assert disk.request(OUT, 8, bytes(512))[0] == IOERR
    assert disk.image.stat().st_size == 4096
    assert disk.read(0, 4096) == bytes(index // 512 for index in range(4096))


@pytest.mark.parametrize(
    ("readable", "writable"), [([bytes(15)], [1]), ([bytes(16)], []), ([], [1])]
)
def test_requests_without_header_or_status(disk, readable, writable):
    disk.queue.add(readable, writable)
    disk.queue.kick()

    assert disk.driver.status & NEEDS_RESET
    disk.driver.start(ALL)
    disk.queue = disk.driver.queue(0)
    assert disk.read(1, 512) == b"\1" * 512


# -- caches ----------------------------------------------------------------------------


@pytest.fixture
def flushes(disk, monkeypatch):
    """How often the image was flushed."""
    calls = []
    flush = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (calls.append(fd), flush(fd)))
    return calls


def test_writes_stay_in_the_cache_of_a_driver_that_flushes(disk, flushes):
    disk.write(0, bytes(512))
    assert not flushes
    disk.request(FLUSH)
    assert len(flushes) == 1


def test_writes_reach_the_disk_of_a_driver_that_does_not(disk, flushes):
    disk.driver.start(ALL & ~(F_FLUSH | F_WCE))
    disk.queue = disk.driver.queue(0)
    disk.write(0, bytes(512))
    assert len(flushes) == 1
    disk.request(WRITE_ZEROES, 0, struct.pack("<QII", 0, 1, 0))
    assert len(flushes) == 2
    disk.read(0, 512)
    assert len(flushes) == 2


def test_the_driver_chooses_the_cache_mode(disk, flushes):
    disk.driver.set_config(32, 1, 0)
    disk.write(0, bytes(512))
    assert disk.driver.config(32, 1) == 0
    assert len(flushes) == 1
    disk.driver.set_config(32, 1, 1)
    disk.write(0, bytes(512))
    assert len(flushes) == 1


def test_a_flush_that_fails_fails_the_write(disk, monkeypatch):
    def fail(fd):
        raise OSError(errno.EIO, "no more")

    monkeypatch.setattr(os, "fdatasync", fail)
    disk.driver.set_config(32, 1, 0)

    assert disk.request(OUT, 0, bytes(512))[0] == IOERR
    assert disk.request(FLUSH)[0] == IOERR


# -- life ------------------------------------------------------------------------------


def test_an_image_that_grows(disk):
    loop = threading.Thread(target=disk.machine.mevent.run)
    loop.start()
    changed = threading.Event()
    disk.device._blk.on_resize(changed.set)
    os.truncate(disk.image, 2 * MIB)

    assert changed.wait(20)
    disk.machine.mevent.stop(0)
    loop.join()
    assert disk.driver.config(0, 8) == 4096
    assert disk.driver.get(1, 21, 1) == 1  # the generation
    assert disk.read(4095, 512) == bytes(512)


def test_pause_finishes_what_is_under_way(disk):
    data = os.urandom(256 * 1024)
    heads = [
        disk.queue.add([struct.pack("<IIQ", OUT, 0, 512 * index), data], [1])
        for index in range(4)
    ]
    disk.queue.kick()
    disk.device.pause()

    assert disk.queue.poll() == dict.fromkeys(heads, 1)
    state = disk.device.save_device()
    disk.device.restore_device(state)
    disk.device.resume()
    assert disk.read(0, len(data)) == data


def test_state_has_the_cache_mode(disk):
    disk.driver.set_config(32, 1, 0)
    disk.device.pause()
    state = disk.device.save_device()
    disk.device.reset_device()
    assert disk.device._writeback
    disk.device.restore_device(state)
    disk.device.resume()

    assert disk.driver.config(32, 1) == 0
    disk.write(1, b"x" * 512)


@settings(
    deadline=None,
    max_examples=200,
    # One disk for all examples: each must leave it usable.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    requests=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 16), st.integers(0, 0xFFFFFFFF)),
            st.one_of(st.integers(0, 2100), st.integers(0, (1 << 64) - 1)),
            st.lists(st.binary(max_size=600), max_size=3),
            st.lists(st.integers(0, 1500), max_size=3),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_requests(disk, requests):
    disk.driver._heap = MIB
    disk.driver.start(ALL)
    disk.queue = disk.driver.queue(0)
    for kind, sector, data, room, indirect in requests:
        header = struct.pack("<IIQ", kind, 0, sector)
        disk.queue.add([header, *data], room, indirect)
    disk.queue.kick()
    done, end = 0, time.monotonic() + 10
    while done < len(requests) and not disk.driver.status & NEEDS_RESET:
        done += len(disk.queue.poll())
        assert time.monotonic() < end
    disk.driver.start(ALL)
    disk.queue = disk.driver.queue(0)
    assert disk.request(GET_ID, room=20)[0] == OK
