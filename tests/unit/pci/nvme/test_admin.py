"""Identification, features, log pages, events, abort, format."""

from __future__ import annotations

import os
import struct

import pytest

from pybhyve.block import blockif
from tests.guestside.nvme import (
    ABORT,
    ASYNC,
    CREATE_CQ,
    DOORBELLS,
    FORMAT,
    GET_FEATURES,
    GET_LOG,
    IDENTIFY,
    PAGE,
    READ,
    SET_FEATURES,
    WRITE,
    NvmeDriver,
)
from tests.unit.pci.nvme.conftest import SIZE

DNR = 1 << 14


# -- identify ------------------------------------------------------------------------


def test_controller(driver):
    data = driver.identify(1)

    assert struct.unpack_from("<HH", data) == (0xFB5D, 0)
    assert data[4:24] == b"NVME-4-0".ljust(20)
    assert data[24:64] == b"bhyve-NVMe".ljust(40)
    assert data[64:72] == b"1.0     "
    assert data[73:76] == bytes.fromhex("fc9c58")
    assert (data[77], data[258], data[259]) == (9, 2, 4)
    assert struct.unpack_from("<I", data, 80) == (0x00010400,)
    assert struct.unpack_from("<HH", data, 266) == (0x157, 0x157)
    assert (data[512], data[513]) == (0x66, 0x44)
    assert struct.unpack_from("<I", data, 516) == (1,)
    assert data[520] == 0x0C  # trim, write zeroes
    assert data[525] & 1
    nqn = data[768:1024].rstrip(b"\0").decode()
    assert nqn.startswith("nqn.2014-08.org.nvmexpress:uuid:")


@pytest.mark.parametrize(
    ("options", "trim"),
    [
        ({"dsm": "disable"}, False),
        ({"dsm": "enable", "ro": "true"}, True),
        ({"ro": "true"}, False),
        ({"nodelete": "true"}, False),
        ({}, True),
    ],
)
def test_trim_is_offered_as_asked(attach, options, trim):
    driver = attach(**options)
    driver.enable()

    assert bool(driver.identify(1)[520] & 4) == trim


def test_names_as_asked(attach):
    driver = attach(ser="A serial number of more than 20", eui64="0x0102030405060708")
    driver.enable()

    assert driver.identify(1)[4:24] == b"A serial number of m"
    assert driver.identify(0, 1)[120:128] == bytes(range(1, 9))
    assert driver.identify(3, 1)[:16] == b"\1\10\0\0" + bytes(range(1, 9)) + bytes(4)


def test_a_made_up_identifier_is_freebsds(driver):
    eui64 = driver.identify(0, 1)[120:128]

    assert eui64[:4] == bytes.fromhex("589cfc20")
    assert eui64[6:] == b"\0\1"
    assert driver.identify(3, 1)[4:12] == eui64


def test_namespace(attach):
    driver = attach(sectorsize="512/4096")
    driver.enable()
    data = driver.identify(0, 1)

    assert struct.unpack_from("<3Q", data) == (SIZE // 512,) * 3
    assert (data[25], data[26], data[99]) == (0, 0, 0)
    assert data[24] & 1 << 4
    assert struct.unpack_from("<H", data, 64) == (7,)
    assert struct.unpack_from("<I", data, 128) == (9 << 16,)


@pytest.mark.parametrize(
    ("options", "blocks", "shift"),
    [({"sectsz": "4096"}, SIZE // 4096, 12), ({"ram": "3"}, 3 * 256, 12)],
)
def test_size_of_blocks(attach, options, blocks, shift):
    driver = attach(**options)
    driver.enable()
    data = driver.identify(0, 1)

    assert struct.unpack_from("<Q", data) == (blocks,)
    assert data[130] == shift


def test_lists(driver):
    assert driver.identify(2, 0) == struct.pack("<I", 1).ljust(PAGE, b"\0")
    assert driver.identify(2, 1) == bytes(PAGE)
    assert driver.identify(0x13) == struct.pack("<HH", 1, 0).ljust(PAGE, b"\0")


@pytest.mark.parametrize(
    ("cns", "nsid", "status"),
    [
        (0, 0, 0x0B),
        (0, 2, 0x0B),
        (0, 0xFFFFFFFF, 0x0B),
        (2, 0xFFFFFFFE, 0x0B),
        (3, 2, 0x0B),
        (0x7F, 1, 0x02),
    ],
)
def test_what_cannot_be_identified(driver, cns, nsid, status):
    done = driver.admin.do(IDENTIFY, nsid=nsid, cdw10=cns, prp1=0x80000)

    assert done.status == DNR | status


def test_identify_across_two_pages(driver):
    at = driver.alloc(3 * PAGE)
    done = driver.admin.do(IDENTIFY, cdw10=1, prp1=at + 0xFFC, prp2=at + 2 * PAGE)

    assert done.status == 0
    assert driver.vm.read_mem(at + 2 * PAGE, 16) == b"NVME-4-0".ljust(16)
    assert driver.vm.read_mem(at + PAGE, 16) == bytes(16)


# -- features ------------------------------------------------------------------------


def feature(driver: NvmeDriver, number: int, cdw11: int = 0) -> int:
    done = driver.admin.do(GET_FEATURES, cdw10=number, cdw11=cdw11)
    assert done.status == 0
    return done.result


def set_feature(driver: NvmeDriver, number: int, value: int, nsid: int = 0) -> int:
    return driver.admin.do(SET_FEATURES, cdw10=number, cdw11=value, nsid=nsid).status


@pytest.mark.parametrize(
    ("number", "first", "value"),
    [
        (0x01, 0, 0x07),
        (0x02, 0, 0x20),
        (0x04, 0x157, 0x160),
        (0x05, 0, 0x64),
        (0x06, 1, 0),
        (0x08, 0, 0x0102),
        (0x0A, 0, 1),
        (0x0B, 0x1FF, 0x100),
    ],
)
def test_features_keep_what_they_are_set_to(driver, number, first, value):
    assert feature(driver, number) == first
    assert set_feature(driver, number, value) == 0
    assert feature(driver, number) == value
    driver.enable()
    assert feature(driver, number) == first


def test_vectors_have_a_feature_each(driver):
    assert set_feature(driver, 9, 1 << 16 | 3) == 0
    assert feature(driver, 9, 3) == 1 << 16 | 3
    assert feature(driver, 9, 4) == 4


@pytest.mark.parametrize(
    ("cdw10", "cdw11", "nsid", "status"),
    [
        (0x00, 0, 0, 0x002),
        (0x03, 0, 0, 0x002),
        (0x7F, 0, 0, 0x002),
        (0x02, 1, 0, 0x002),  # a power state that is not there
        (0x04, 1 << 16, 0, 0x002),  # nor is this sensor
        (0x05, 1 << 16, 1, 0x002),
        (0x07, 0xFFFF, 0, 0x002),
        (0x09, 17, 0, 0x002),
        (0x01 | 1 << 31, 0, 0, 0x10D),
        (0x01, 0, 1, 0x10F),
    ],
)
def test_features_that_cannot_be_set(driver, cdw10, cdw11, nsid, status):
    done = driver.admin.do(SET_FEATURES, cdw10=cdw10, cdw11=cdw11, nsid=nsid)

    assert done.status == DNR | status


@pytest.mark.parametrize("cdw10", [0x03, 0x7F, 0x107, 0x307])
def test_features_that_cannot_be_read(driver, cdw10):
    assert driver.admin.do(GET_FEATURES, cdw10=cdw10).status == DNR | 2


def test_number_of_queues(driver):
    assert feature(driver, 7) == 15 << 16 | 15
    done = driver.admin.do(SET_FEATURES, cdw10=7, cdw11=1 << 16 | 99)
    assert (done.status, done.result) == (0, 1 << 16 | 15)
    assert feature(driver, 7) == 1 << 16 | 15
    driver.create_queues(2)
    # Two completion queues were asked for.
    done = driver.admin.do(CREATE_CQ, cdw10=0x1F0003, cdw11=1, prp1=0x80000)
    assert done.status == DNR | 0x101
    assert set_feature(driver, 7, 0) == DNR | 0x0C


def test_no_write_cache_to_switch_off(attach):
    driver = attach(sync="true")
    driver.enable()

    assert not driver.identify(1)[525] & 1
    assert driver.admin.do(GET_FEATURES, cdw10=6).status == DNR | 2
    assert set_feature(driver, 6, 0) == DNR | 2


# -- log pages -----------------------------------------------------------------------


def test_health(driver):
    queue = driver.create_queues(1)
    for _ in range(3):
        queue.do(READ, nsid=1, prp1=0x80000, cdw12=7)
    queue.do(WRITE, nsid=1, prp1=0x80000)
    queue.do(READ, nsid=1, prp1=0x80000, cdw10=1 << 30)
    data = driver.log(2, 512)

    assert data[:6] == struct.pack("<BHBBB", 0, 296, 100, 10, 0)

    def counter(offset: int) -> int:
        return int.from_bytes(data[offset : offset + 16], "little")

    assert [counter(at) for at in (32, 48, 64, 80, 112)] == [1, 1, 3, 1, 1]
    assert counter(176) == 1


def test_firmware_slots(driver):
    data = driver.log(3, 512)

    assert data[:16] == b"\1\0\0\0\0\0\0\0" + b"1.0     "
    assert data[16:] == bytes(496)


def test_errors_are_logged(driver):
    assert driver.log(1, 64) == bytes(64)
    queue = driver.create_queues(1)
    done = queue.do(READ, nsid=9, prp1=0x80000, cid=0x1234)
    assert done.status == DNR | 0x0B
    count, sqid, cid, status, _, _, nsid = struct.unpack_from(
        "<QHHHHQI", driver.log(1, 64)
    )

    assert (count, sqid, cid, status, nsid) == (1, 1, 0x1234, (DNR | 0x0B) << 1, 9)


def test_parts_of_a_log_page(driver):
    whole = driver.log(2, 512)

    assert driver.log(2, 16, offset=64) == whole[64:80]
    assert driver.log(2, 8, offset=512) == bytes(8)
    assert driver.log(2, 3 * PAGE) == whole + bytes(3 * PAGE - 512)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"cdw10": 0x7F}, 0x109),
        ({"cdw10": 0x05}, 0x109),
        ({"cdw10": 0x02, "cdw12": 516}, 0x002),
        ({"cdw10": 0x02, "cdw12": 2}, 0x002),
        ({"cdw10": 0x02, "cdw13": 1}, 0x002),
        ({"cdw10": 0xFFFF0002, "cdw11": 0xFFFF}, 0x002),
    ],
)
def test_log_pages_that_are_not_there(driver, fields, status):
    assert driver.admin.do(GET_LOG, prp1=0x80000, **fields).status == DNR | status


# -- events --------------------------------------------------------------------------


def test_a_doorbell_that_is_none(driver):
    driver.admin.submit(ASYNC, cid=50)
    driver.write(DOORBELLS + 8 * 9, 4, 1)
    done = driver.admin.wait()

    assert (done.cid, done.status, done.result) == (50, 0, 0x010000)
    driver.admin.submit(ASYNC, cid=51)
    driver.write(DOORBELLS + 8 * 9 + 4, 4, 1)
    assert driver.admin.poll() is None  # masked until the log page is read
    driver.log(1, 64, rae=1)
    driver.write(DOORBELLS + 8 * 9 + 4, 4, 1)
    assert driver.admin.poll() is None
    driver.log(1, 64)
    driver.write(DOORBELLS, 4, 32)  # the queue has no such entry
    done = driver.admin.wait()
    assert (done.cid, done.result) == (51, 0x010100)


def test_an_event_waits_for_its_request(driver):
    driver.write(DOORBELLS + 4, 4, 5)  # more than there is to read
    driver.admin.submit(ASYNC, cid=50)

    assert driver.admin.wait()[:1] == (0x010100,)


def test_too_many_requests(driver):
    for cid in range(5):
        driver.admin.submit(ASYNC, cid=100 + cid)
    done = driver.admin.do(ASYNC, cid=110)

    assert done.status == DNR | 0x105


def test_requests_leave_a_small_queue_usable(attach):
    driver = attach()
    driver.enable(size=4, cq_size=2)
    for cid in (100, 101, 102):
        driver.admin.submit(ASYNC, cid=cid)

    assert driver.identify(1)[24:34] == b"bhyve-NVMe"
    driver.write(DOORBELLS + 8 * 9, 4, 1)
    assert driver.admin.wait().cid == 100


def test_temperature_beyond_its_threshold(driver):
    driver.admin.submit(ASYNC, cid=50)
    assert set_feature_and_wait(driver, 4, 290) == [50]
    assert driver.log(2, 512)[0] == 2
    # Too cold is a matter of its own.
    assert set_feature(driver, 4, 400) == 0
    assert set_feature(driver, 4, 1 << 20 | 299) == 0
    assert driver.log(2, 512)[0] == 2


def set_feature_and_wait(driver: NvmeDriver, number: int, value: int) -> list[int]:
    """Set a feature; the requests for events that were completed by it."""
    cid = driver.admin.submit(SET_FEATURES, cdw10=number, cdw11=value)
    done = [driver.admin.wait().cid, driver.admin.wait().cid]
    done.remove(cid)
    return done


def test_the_image_grows(attach, image, monkeypatch):
    monkeypatch.setattr(blockif, "RESIZE_SECONDS", 0.02)
    driver = attach()
    driver.enable()
    queue = driver.create_queues(1)
    driver.admin.submit(ASYNC, cid=50)
    assert queue.do(READ, nsid=1, prp1=0x80000, cdw10=SIZE // 512).status == DNR | 0x80

    os.truncate(image, 2 * SIZE)

    done = driver.admin.wait()
    assert (done.cid, done.result) == (50, 0x040002)
    assert driver.log(4, PAGE) == struct.pack("<I", 1).ljust(PAGE, b"\0")
    assert driver.log(4, PAGE) == bytes(PAGE)
    assert struct.unpack_from("<Q", driver.identify(0, 1)) == (2 * SIZE // 512,)
    assert queue.do(READ, nsid=1, prp1=0x80000, cdw10=SIZE // 512).status == 0


# -- abort, format -------------------------------------------------------------------


def test_abort_of_what_is_not_there(driver):
    done = driver.admin.do(ABORT, cdw10=5 << 16 | 1)

    assert (done.status, done.result) == (0, 1)


def test_abort_of_a_request_for_events(driver):
    driver.admin.submit(ASYNC, cid=50)
    driver.admin.submit(ABORT, cdw10=50 << 16, cid=51)
    first, second = driver.admin.wait(), driver.admin.wait()

    assert (first.cid, first.status) == (50, 7)
    assert (second.cid, second.status, second.result) == (51, 0, 0)


@pytest.mark.parametrize("options", [{}, {"nodelete": "true"}, {"ram": "1"}])
def test_format_erases(attach, options):
    driver = attach(**options)
    driver.enable()
    queue = driver.create_queues(1)
    page = driver.alloc(PAGE)
    driver.vm.write_mem(page, b"x" * PAGE)
    assert queue.do(WRITE, nsid=1, prp1=page, cdw10=3).status == 0

    assert driver.admin.do(FORMAT, nsid=1, cdw10=1 << 9).status == 0

    assert queue.do(READ, nsid=1, prp1=page, cdw10=3).status == 0
    assert driver.vm.read_mem(page, 512) == bytes(512)


@pytest.mark.parametrize(
    ("options", "nsid", "cdw10", "status"),
    [
        ({}, 0, 0, 0x0B),
        ({}, 2, 0, 0x0B),
        ({}, 1, 1, 0x10A),
        ({}, 1, 1 << 5, 0x10A),
        ({}, 1, 2 << 9, 0x002),
        ({"ro": "true"}, 1, 0, 0x020),
    ],
)
def test_formats_that_are_refused(attach, image, options, nsid, cdw10, status):
    driver = attach(**options)
    driver.enable()
    before = image.read_bytes()

    assert driver.admin.do(FORMAT, nsid=nsid, cdw10=cdw10).status == DNR | status
    assert image.read_bytes() == before
