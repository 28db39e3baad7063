"""The commands that move data: extents, PRPs, errors of the host."""

from __future__ import annotations

import errno
import os
import resource
import struct
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.bhyverun.machine import Machine
from pybhyve.block.backing import Backing
from pybhyve.errors import ConfigError, DeviceError, one_line
from pybhyve.pci.bus import pci_host
from tests.guestside.nvme import (
    ABORT,
    DELETE_SQ,
    DSM,
    FLUSH,
    PAGE,
    READ,
    SET_FEATURES,
    WRITE,
    WRITE_ZEROES,
    NvmeDriver,
    Queue,
)
from tests.unit.pci.nvme.conftest import SIZE, SLOT

DNR = 1 << 14
PATTERN = bytes(range(256)) * (SIZE // 256)
MEMORY = 64 << 20
FUA = 1 << 30


@pytest.fixture
def queue(driver) -> Queue:
    return driver.create_queues(1)


def read(queue: Queue, block: int, blocks: int, offset: int = 0) -> bytes:
    """Read through a buffer that begins ``offset`` bytes into a page."""
    driver = queue.driver
    length = 512 * blocks
    buffer = driver.alloc(offset + length) + offset
    prp1, prp2 = driver.prps(buffer, length)
    done = queue.do(READ, nsid=1, prp1=prp1, prp2=prp2, cdw10=block, cdw12=blocks - 1)
    assert done.status == 0, hex(done.status)
    return driver.vm.read_mem(buffer, length)


def write(
    queue: Queue, block: int, data: bytes, offset: int = 0, flags: int = 0
) -> int:
    driver = queue.driver
    buffer = driver.alloc(offset + len(data)) + offset
    driver.vm.write_mem(buffer, data)
    prp1, prp2 = driver.prps(buffer, len(data))
    cdw12 = flags | len(data) // 512 - 1
    return queue.do(
        WRITE, nsid=1, prp1=prp1, prp2=prp2, cdw10=block, cdw12=cdw12
    ).status


# -- data ----------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4, 512, 4092])
@pytest.mark.parametrize("blocks", [1, 8, 9, 16, 100, 1024])
def test_buffers_of_all_shapes(queue, image, blocks, offset):
    data = os.urandom(512 * blocks)

    assert write(queue, 3, data, offset) == 0

    assert read(queue, 3, blocks, offset) == data
    whole = image.read_bytes()
    assert whole[3 * 512 :].startswith(data)
    assert whole[: 3 * 512] == PATTERN[: 3 * 512]
    assert whole[3 * 512 + len(data) :] == PATTERN[3 * 512 + len(data) :]


def test_the_largest_transfer(attach, image):
    os.truncate(image, 8 << 20)
    driver = attach()
    driver.enable()
    queue = driver.create_queues(1)
    data = os.urandom(2 << 20)

    assert write(queue, 0, data, offset=8) == 0
    assert read(queue, 0, 4096, offset=8) == data
    done = queue.do(READ, nsid=1, prp1=0x80000, prp2=0x81000, cdw12=4096)
    assert done.status == DNR | 2


def test_lists_of_pages_that_continue(driver, queue):
    """A list that begins at the end of its page has its next page's address only."""
    buffer = driver.alloc(4 * PAGE)
    lists = driver.alloc(2 * PAGE)
    driver.vm.write_mem(lists + PAGE - 8, struct.pack("<Q", lists + PAGE))
    entries = [buffer + 2 * PAGE, buffer + PAGE, buffer + 3 * PAGE]
    driver.vm.write_mem(lists + PAGE, struct.pack("<3Q", *entries))
    done = queue.do(READ, nsid=1, prp1=buffer, prp2=lists + PAGE - 8, cdw12=31)

    assert done.status == 0
    got = driver.vm.read_mem(buffer, 4 * PAGE)
    pages = [got[at : at + PAGE] for at in range(0, 4 * PAGE, PAGE)]
    assert pages[0] + pages[2] + pages[1] + pages[3] == PATTERN[: 4 * PAGE]


def test_read_and_write_at_the_ends_of_the_disk(queue):
    last = SIZE // 512 - 1

    assert read(queue, last, 1) == PATTERN[-512:]
    assert write(queue, last, b"e" * 512) == 0
    assert read(queue, last, 1) == b"e" * 512


def test_write_zeroes(queue, image):
    assert queue.do(WRITE_ZEROES, nsid=1, cdw10=2, cdw12=99).status == 0

    expected = PATTERN[:1024] + bytes(51200) + PATTERN[1024 + 51200 :]
    assert image.read_bytes() == expected


def trim(queue: Queue, *ranges: tuple[int, int], attributes: int = 4) -> int:
    """Ranges of first block and blocks."""
    driver = queue.driver
    page = driver.alloc(PAGE)
    data = b"".join(struct.pack("<IIQ", 0, count, first) for first, count in ranges)
    driver.vm.write_mem(page, data)
    return queue.do(
        DSM, nsid=1, prp1=page, cdw10=len(ranges) - 1, cdw11=attributes
    ).status


def test_trim(queue, image):
    before = image.stat().st_blocks

    assert trim(queue, (0, 64), (128, 0), (512, 64)) == 0

    assert image.stat().st_blocks <= before - 128
    expected = bytearray(PATTERN)
    expected[: 64 * 512] = bytes(64 * 512)
    expected[512 * 512 : 576 * 512] = bytes(64 * 512)
    assert image.read_bytes() == expected


def test_trim_of_many_ranges(queue, image):
    assert trim(queue, *((number * 8, 4) for number in range(256))) == 0

    block = bytes(2048) + PATTERN[2048:4096]
    assert image.read_bytes() == block * 256


def test_advice_changes_nothing(queue, image):
    assert trim(queue, (0, 64), attributes=3) == 0
    assert image.read_bytes() == PATTERN


def test_trim_where_it_is_offered_and_cannot_be_done(attach, image):
    driver = attach(dsm="enable", nodelete="true")
    driver.enable()

    assert trim(driver.create_queues(1), (0, 64)) == 0
    assert image.read_bytes() == PATTERN


def test_no_trim(attach):
    driver = attach(dsm="disable")
    driver.enable()

    assert trim(driver.create_queues(1), (0, 1)) == DNR | 1


# -- flushes -------------------------------------------------------------------------


@pytest.fixture
def flushes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each flush of the host's file."""
    seen: list[int] = []
    flush = Backing.flush

    def counted(self: Backing) -> int:
        seen.append(1)
        return flush(self)

    monkeypatch.setattr(Backing, "flush", counted)
    return seen


@pytest.mark.parametrize("nsid", [1, 0xFFFFFFFF])
def test_flush(queue, flushes, nsid):
    assert queue.do(FLUSH, nsid=nsid).status == 0
    assert len(flushes) == 1


def test_writes_wait_for_a_flush_when_they_must(driver, queue, flushes):
    write(queue, 0, bytes(512))
    assert not flushes
    write(queue, 0, bytes(512), flags=FUA)
    assert len(flushes) == 1
    assert driver.admin.do(SET_FEATURES, cdw10=6, cdw11=0).status == 0
    write(queue, 0, bytes(512))
    queue.do(WRITE_ZEROES, nsid=1)
    assert len(flushes) == 3


# -- refusals ------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [READ, WRITE, WRITE_ZEROES, FLUSH, DSM])
@pytest.mark.parametrize("nsid", [0, 2, 0xFFFFFFFE])
def test_namespaces_that_are_not_there(queue, opcode, nsid):
    assert queue.do(opcode, nsid=nsid, prp1=0x80000).status == DNR | 0x0B


@pytest.mark.parametrize("opcode", [READ, WRITE, WRITE_ZEROES])
@pytest.mark.parametrize(
    ("low", "high", "count"),
    [
        (SIZE // 512, 0, 1),
        (SIZE // 512 - 1, 0, 2),
        (0, 1, 1),
        (0xFFFFFFFF, 0xFFFFFFFF, 1),
        (0, 0, 65536),
    ],
)
def test_blocks_beyond_the_end(queue, image, opcode, low, high, count):
    done = queue.do(
        opcode, nsid=1, prp1=0x80000, cdw10=low, cdw11=high, cdw12=count - 1
    )

    assert done.status == DNR | 0x80
    assert image.read_bytes() == PATTERN


def test_trim_beyond_the_end(queue, image):
    assert trim(queue, (0, 64), (SIZE // 512 - 1, 2)) == DNR | 0x80
    assert trim(queue, ((1 << 64) - 1, 0xFFFFFFFF)) == DNR | 0x80
    assert image.read_bytes() == PATTERN


def test_write_protection(attach, image):
    driver = attach(ro="true")
    driver.enable()
    queue = driver.create_queues(1)

    assert driver.identify(0, 1)[99] == 1
    assert write(queue, 0, bytes(512)) == DNR | 0x20
    assert queue.do(WRITE_ZEROES, nsid=1).status == DNR | 0x20
    assert queue.do(FLUSH, nsid=1).status == 0
    assert read(queue, 0, 1) == PATTERN[:512]


@pytest.mark.parametrize("opcode", [READ, WRITE])
@pytest.mark.parametrize(
    ("prp1", "prp2", "blocks", "status"),
    [
        (0x80001, 0, 1, DNR | 0x13),  # no dword
        (0x80002, 0, 1, DNR | 0x13),
        (0x80000, 0x81004, 16, DNR | 0x13),  # a second page that is none
        (0x80000, 0x81004, 32, DNR | 0x13),  # a list that is no qword
        (1 << 40, 0, 1, 0x04),
        (MEMORY - 512, 1 << 40, 8, 0x04),
        (0x80000, 1 << 40, 32, 0x04),  # a list that is nowhere
        (MEMORY - 4, MEMORY, 1, 0x04),
        ((1 << 64) - 512, 0, 2, 0x04),
    ],
)
def test_buffers_that_are_none(queue, image, opcode, prp1, prp2, blocks, status):
    done = queue.do(opcode, nsid=1, prp1=prp1, prp2=prp2, cdw12=blocks - 1)

    assert done.status == status
    assert image.read_bytes() == PATTERN


def test_entries_of_a_list_that_are_no_pages(driver, queue):
    page = driver.alloc(PAGE)
    driver.vm.write_mem(page, struct.pack("<3Q", 0x90000, 0x91008, 0x92000))

    done = queue.do(READ, nsid=1, prp1=0x80000, prp2=page, cdw12=31)

    assert done.status == DNR | 0x13


def test_a_list_that_goes_round_ends(attach, image):
    os.truncate(image, 8 << 20)
    driver = attach()
    driver.enable()
    queue = driver.create_queues(1)
    page = driver.alloc(PAGE)
    # Each entry is the list's own page, and so is the next list.
    driver.vm.write_mem(page, struct.pack("<Q", page) * 512)
    done = queue.do(WRITE, nsid=1, prp1=0x80000, prp2=page, cdw12=4095)

    assert done.status == 0


# -- a host that fails ---------------------------------------------------------------


def test_an_image_that_was_truncated(queue, image):
    os.truncate(image, SIZE // 2)
    block = SIZE // 512 - 8
    done = queue.do(READ, nsid=1, prp1=0x80000, cdw10=block)
    assert done.status == 0x281
    assert write(queue, block, bytes(512)) == 0x280
    assert image.stat().st_size == SIZE // 2


def test_a_host_that_takes_no_more(attach, image):
    os.truncate(image, 0)
    os.truncate(image, SIZE)
    driver = attach()
    driver.enable()
    queue = driver.create_queues(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
    try:
        status = write(queue, SIZE // 512 - 8, bytes(4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert status == 0x280
    assert write(queue, SIZE // 512 - 8, bytes(4096)) == 0


def test_a_full_disk_is_a_capacity_that_is_exceeded(queue, monkeypatch):
    monkeypatch.setattr(Backing, "write", lambda *_: errno.ENOSPC)

    assert write(queue, 0, bytes(512)) == 0x81


# -- under way -----------------------------------------------------------------------


class Gate:
    """Holds the host's writes until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self.entered = threading.Semaphore(0)
        write = Backing.write

        def held(backing: Backing, iov: list[memoryview], offset: int) -> int:
            self.entered.release()
            assert self._open.wait(30)
            return write(backing, iov, offset)

        monkeypatch.setattr(Backing, "write", held)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def start_writes(queue: Queue, count: int) -> list[int]:
    page = queue.driver.alloc(PAGE)
    queue.driver.vm.write_mem(page, b"w" * PAGE)
    return [
        queue.submit(WRITE, nsid=1, prp1=page, cdw10=8 * number, cdw12=7)
        for number in range(count)
    ]


def test_abort(driver, queue, held):
    # The pool is at the first; the others wait for it.
    first, second = start_writes(queue, 2)
    assert held.entered.acquire(timeout=30)
    done = driver.admin.do(ABORT, cdw10=second << 16 | 1)
    assert (done.status, done.result) == (0, 0)
    assert queue.wait()[3:] == (second, 7)
    done = driver.admin.do(ABORT, cdw10=first << 16 | 1)
    assert (done.status, done.result) == (0, 1)
    held.open()
    assert queue.wait()[3:] == (first, 0)


def test_deletion_waits_for_the_queue_s_commands(driver, queue, held):
    first, second = start_writes(queue, 2)
    assert held.entered.acquire(timeout=30)
    cid = driver.admin.submit(DELETE_SQ, cdw10=1)
    assert queue.wait()[3:] == (second, 8)
    assert driver.admin.poll() is None
    held.open()
    assert queue.wait()[3:] == (first, 0)
    done = driver.admin.wait()
    assert (done.cid, done.status) == (cid, 0)


def test_reset_waits_until_the_guest_s_memory_is_free(driver, queue, held, image):
    start_writes(queue, 4)
    assert held.entered.acquire(timeout=30)
    driver.write(0x14, 4, 0)
    assert driver.read(0x1C) & 1
    # A driver that does not wait gets what it asked for, later.
    driver.write(0x14, 4, 6 << 16 | 4 << 20 | 1)
    held.open()
    driver.wait_status(1, 1)
    assert queue.poll() is None
    driver.enable()
    written = image.read_bytes()
    assert written[:PAGE] == b"w" * PAGE
    assert written[PAGE:] == PATTERN[PAGE:]


def test_pause_waits_for_the_disk(driver, queue, held):
    device = pci_host(driver.machine).buses[0].functions[SLOT, 0]
    start_writes(queue, 3)
    assert held.entered.acquire(timeout=30)
    pausing = threading.Thread(target=device.pause)
    pausing.start()
    pausing.join(0.05)
    assert pausing.is_alive()
    held.open()
    pausing.join(30)

    assert not pausing.is_alive()
    assert [queue.wait().status for _ in range(3)] == [0] * 3
    device.resume()


# -- options -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qsz": "1"}, "qsz: expected 2 to 65536"),
        ({"qsz": "x"}, "qsz: 'x' is not a number"),
        ({"ioslots": "0"}, "ioslots: expected 1 to 65536"),
        ({"sectsz": "1024"}, "sectsz: expected 512, 4096 or 8192"),
        ({"dsm": "maybe"}, "dsm: expected auto, enable or disable"),
        ({"ram": "0"}, "ram: expected 1 to"),
        ({"ram": str(1 << 43)}, "ram: expected 1 to"),
        ({"eui64": "-1"}, "eui64: expected a number of 64 bits"),
    ],
)
def test_options_that_are_none(attach, options, message):
    with pytest.raises(ConfigError, match=message):
        attach(**options)


def test_no_disk(build):
    with pytest.raises(DeviceError) as caught:
        build(f"{SLOT},nvme")
    assert one_line(caught.value).endswith(
        'pci slot 0:4:0: nvme: Missing "path" for block device.'
    )


def test_more_memory_than_there_can_be(build):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, hard))
    try:
        with pytest.raises(DeviceError) as caught:
            build(f"{SLOT},nvme", memory=1 << 20, pci__0__4__0__ram="65")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert one_line(caught.value) == "pci slot 0:4:0: nvme: ram=65: File too large"


def test_the_image_is_given_back(build, image):
    variables = {f"pci__0__{SLOT}__0__path": str(image)}
    machine: Machine = build(f"{SLOT},nvme", **variables)
    machine.halt()

    build(f"{SLOT},nvme", **variables)


# -- anything a driver can write -----------------------------------------------------

WORDS = st.one_of(
    st.integers(0, 40),
    st.integers(0, 0xFFFFFFFF),
    st.sampled_from([0x10001, 0x1F0001, 0x1F0002, 0x50003, 0xFFFFFFFF, 0x7F0002]),
)
ADDRESSES = st.one_of(
    st.sampled_from([0x80000, 0x81000, 0x81FF8, MEMORY - PAGE, MEMORY, 0]),
    st.integers(0, MEMORY),
    st.integers(0, (1 << 64) - 1),
)
COMMANDS = st.fixed_dictionaries(
    {
        "opcode": st.one_of(st.integers(0, 13), st.integers(0, 255)),
        "flags": st.sampled_from([0, 0, 0, 0x40, 1]),
        "nsid": st.sampled_from([1, 1, 1, 0, 2, 0xFFFFFFFF]),
        "prp1": ADDRESSES,
        "prp2": ADDRESSES,
        "cid": st.integers(0, 5),
        "cdw10": WORDS,
        "cdw11": WORDS,
        "cdw12": WORDS,
        "cdw13": st.sampled_from([0, 0, 1, 0xFFFFFFFF]),
    }
)
ACCESSES = st.tuples(
    st.one_of(
        st.sampled_from([0x0C, 0x10, 0x14, 0x24, 0x28, 0x2C, 0x30, 0x34]),
        st.integers(0, 0x40),
        st.integers(0xFF0, 0x10A0),
        st.integers(0, 0x3FFF),
    ),
    st.sampled_from([1, 2, 4, 8]),
    st.one_of(st.integers(0, 40), st.integers(0, (1 << 64) - 1)),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([0, 1]), COMMANDS),
        st.tuples(st.just(2), ACCESSES),
    ),
    max_size=25,
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS, lists=st.lists(ADDRESSES, max_size=8))
def test_hostile_drivers(attach, request, steps, lists) -> None:
    """Whatever a driver does: no exception, and after a reset it works."""
    if not hasattr(request.node, "driver"):
        request.node.driver = attach()
    driver: NvmeDriver = request.node.driver
    driver._heap = 0x100000
    driver.enable()
    queues = [driver.admin, driver.create_queues(1)]
    driver.vm.write_mem(0x81000, struct.pack(f"<{len(lists)}Q", *lists))
    for target, what in steps:
        if target == 2:
            offset, size, value = what
            driver.write(offset, size, value & (1 << 8 * size) - 1)
            driver.read(offset, size)
        else:
            queues[target].submit(**what)
    driver._heap = 0x100000
    driver.enable()
    assert driver.identify(1)[24:34] == b"bhyve-NVMe"
    queue = driver.create_queues(1)
    assert queue.do(READ, nsid=1, prp1=0x80000).status == 0
