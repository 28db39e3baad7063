"""Registers, resets, interrupts, queues, state."""

from __future__ import annotations

import struct

import pytest

from pybhyve.pci.bus import pci_host
from pybhyve.pci.pcireg import PCIY_EXPRESS, PCIY_MSIX
from tests.guestside.nvme import (
    ABORT,
    ACQ,
    AQA,
    ASQ,
    ASYNC,
    CAP,
    CC,
    CC_EN,
    CC_SHN_NORMAL,
    CC_SIZES,
    CFS,
    CREATE_CQ,
    CREATE_SQ,
    CSTS,
    DELETE_CQ,
    DELETE_SQ,
    DOORBELLS,
    FLUSH,
    GET_FEATURES,
    IDENTIFY,
    INTMC,
    INTMS,
    RDY,
    READ,
    SET_FEATURES,
    SHST_COMPLETE,
    VECTOR,
    VS,
    WRITE,
)
from tests.unit.pci.nvme.conftest import SIZE, SLOT

DNR = 1 << 14


def test_identity(attach):
    driver = attach()
    function = driver.function

    assert function.read(0) == 0x0A0AFB5D
    assert function.read(8) >> 8 == 0x010802
    assert sorted(cap for cap, _ in function.capabilities()) == [
        PCIY_EXPRESS,
        PCIY_MSIX,
    ]
    bars = function.bars()
    assert sorted(bars) == [0, 4]
    assert (bars[0].wide, bars[0].size) == (True, 0x4000)
    assert function.enable_msix() == 17
    assert driver.read(VS) == 0x00010400


def test_capabilities_say_what_the_options_say(attach):
    driver = attach(qsz="100", maxq="3")

    assert driver.read(CAP, 8) == 99 | 1 << 16 | 60 << 24 | 1 << 37
    assert driver.function.enable_msix() == 4


def test_registers_by_halves_and_bytes(attach):
    driver = attach()
    driver.write(ASQ, 4, 0x12345FFF)
    driver.write(ASQ + 4, 4, 0xABCD)
    driver.write(AQA, 1, 0xFF)
    driver.write(AQA + 2, 2, 0xF00F)

    assert driver.read(ASQ, 8) == 0xABCD_12345000
    assert driver.read(AQA) == 0x000F00FF
    assert [driver.read(VS + at, 1) for at in range(4)] == [0, 4, 1, 0]
    assert driver.read(DOORBELLS, 8) == 0
    driver.write(VS, 4, 0)
    driver.write(CSTS, 4, 0xFFFFFFFF)
    assert (driver.read(VS), driver.read(CSTS)) == (0x00010400, 0)


def test_reset_by_enable(driver):
    driver.create_queues(1)
    asq = driver.read(ASQ, 8)
    driver.write(CC, 4, 0)

    assert driver.read(CSTS) == 0
    assert driver.read(ASQ, 8) == asq
    driver.enable()
    # The queue is gone, so that it can be created anew.
    driver.create_queues(1)


@pytest.mark.parametrize(
    ("cc", "aqa"),
    [
        (CC_SIZES | CC_EN | 1 << 7, 0x1F001F),  # pages of 8 KiB
        (CC_SIZES | CC_EN | 1 << 4, 0x1F001F),  # another command set
        (CC_SIZES | CC_EN | 1 << 11, 0x1F001F),  # weighted round robin
        (CC_SIZES | CC_EN, 0x1F0000),  # a queue of one entry
        (CC_SIZES | CC_EN, 0x00001F),
    ],
)
def test_values_that_are_not_offered_are_fatal(attach, cc, aqa):
    driver = attach()
    driver.write(AQA, 4, aqa)
    driver.write(CC, 4, cc)

    assert driver.read(CSTS) == CFS
    driver.enable()
    assert driver.read(CSTS) == RDY


def test_queues_that_are_not_in_memory_are_fatal(attach):
    driver = attach()
    driver.enable()
    for register in (ASQ, ACQ):
        driver.disable()
        driver.enable()
        driver.disable()
        driver.write(register, 8, 1 << 40)
        driver.write(CC, 4, CC_SIZES | CC_EN)
        assert driver.read(CSTS) == RDY
        driver.admin.tail = 0
        driver.admin.submit(IDENTIFY, cdw10=1)
        assert driver.read(CSTS) == RDY | CFS
        driver.admin.ring()
    driver.enable()
    assert driver.identify(1)[24:34] == b"bhyve-NVMe"


def test_shutdown_flushes(driver):
    driver.write(CC, 4, CC_SIZES | CC_EN | CC_SHN_NORMAL)

    driver.wait_status(3 << 2, SHST_COMPLETE)
    driver.enable()
    assert driver.read(CSTS) == RDY


# -- interrupts ----------------------------------------------------------------------


def test_a_vector_for_each_queue(driver):
    driver.function.enable_msix({n: VECTOR + n for n in range(17)})
    first = driver.create_queues(1, vector=1)
    second = driver.create_queues(2, vector=5)
    driver.vm.take()

    driver.admin.do(GET_FEATURES, cdw10=7)
    first.do(READ, nsid=1, prp1=driver.alloc(4096))
    second.do(READ, nsid=1, prp1=driver.alloc(4096))

    sent = [wire for wire in driver.vm.take() if wire[0] == "lapic_msi"]
    assert [wire[2] for wire in sent] == [VECTOR, VECTOR + 1, VECTOR + 5]


def test_one_message_for_what_ends_together(driver):
    driver.function.enable_msix({1: VECTOR})
    queue = driver.create_queues(1, vector=1)
    driver.vm.take()
    for _ in range(5):
        queue.put(READ, nsid=1, prp1=HEAP_PAGE)
    queue.ring()

    sent = [wire for wire in driver.vm.take() if wire[0] == "lapic_msi"]
    assert len(sent) == 1
    assert [queue.wait().status for _ in range(5)] == [0] * 5


HEAP_PAGE = 0x80000


def test_no_message_without_interrupts(driver):
    driver.function.enable_msix({1: VECTOR})
    queue = driver.create_queues(1)
    driver.vm.take()
    queue.do(READ, nsid=1, prp1=HEAP_PAGE)

    assert not [wire for wire in driver.vm.take() if wire[0] == "lapic_msi"]


def test_the_line_is_up_while_there_is_something_to_read(driver):
    lines: list[str] = []

    def line() -> str:
        lines.extend(
            name.split("_")[1]
            for name, *_ in driver.vm.take()
            if name in ("ioapic_assert_irq", "ioapic_deassert_irq")
        )
        return lines[-1] if lines else ""

    driver.admin.submit(GET_FEATURES, cdw10=7)
    driver.admin.submit(GET_FEATURES, cdw10=7)
    assert line() == "assert"
    driver.admin.wait()
    assert line() == "assert"
    driver.write(INTMS, 4, 1)
    assert line() == "deassert"
    assert driver.read(INTMS) == driver.read(INTMC) == 1
    driver.write(INTMC, 4, 1)
    assert line() == "assert"
    driver.admin.wait()
    assert line() == "deassert"


# -- queues --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opcode", "cdw10", "cdw11", "prp1", "status"),
    [
        (CREATE_CQ, 0x1F0000, 1, 0x80000, 0x101),  # queue 0
        (CREATE_CQ, 0x1F0011, 1, 0x80000, 0x101),  # beyond maxq
        (CREATE_CQ, 0x1F0001, 1, 0x80000, 0x101),  # there already
        (CREATE_CQ, 0x000002, 1, 0x80000, 0x102),  # one entry
        (CREATE_CQ, 0xFFFF0002, 1, 0x80000, 0x102),  # beyond qsz
        (CREATE_CQ, 0x1F0002, 0, 0x80000, 0x002),  # scattered
        (CREATE_CQ, 0x1F0002, 0x110003, 0x80000, 0x108),  # vector
        (CREATE_CQ, 0x1F0002, 1, 0x80004, 0x013),
        (CREATE_CQ, 0x1F0002, 1, 1 << 40, 0x002),
        (CREATE_SQ, 0x1F0000, 0x10001, 0x80000, 0x101),
        (CREATE_SQ, 0x1F0001, 0x10001, 0x80000, 0x101),
        (CREATE_SQ, 0x1F0002, 0x00001, 0x80000, 0x101),  # completion queue 0
        (CREATE_SQ, 0x1F0002, 0x30001, 0x80000, 0x100),  # one that is not there
        (CREATE_SQ, 0x1F0002, 0x110001, 0x80000, 0x101),
        (CREATE_SQ, 0x000002, 0x10001, 0x80000, 0x102),
        (CREATE_SQ, 0x1F0002, 0x10000, 0x80000, 0x002),
        (CREATE_SQ, 0x1F0002, 0x10001, 0x80010, 0x013),
        (DELETE_SQ, 0, 0, 0, 0x101),
        (DELETE_SQ, 9, 0, 0, 0x101),
        (DELETE_CQ, 0, 0, 0, 0x101),
        (DELETE_CQ, 9, 0, 0, 0x101),
        (DELETE_CQ, 1, 0, 0, 0x10C),  # in use
    ],
)
def test_refusals(driver, opcode, cdw10, cdw11, prp1, status):
    driver.create_queues(1)
    done = driver.admin.do(opcode, cdw10=cdw10, cdw11=cdw11, prp1=prp1)

    assert done.status == DNR | status


def test_sizes_of_entries_are_checked(driver):
    driver.write(CC, 4, CC_EN)
    done = driver.admin.do(CREATE_CQ, cdw10=0x1F0001, cdw11=1, prp1=0x80000)

    assert done.status == DNR | 2


def test_deleted_queues_can_be_created_again(driver):
    for _ in range(3):
        queue = driver.create_queues(1)
        assert queue.do(FLUSH, nsid=1).status == 0
        assert driver.admin.do(DELETE_SQ, cdw10=1).status == 0
        assert driver.admin.do(DELETE_CQ, cdw10=1).status == 0


def test_two_submission_queues_share_a_completion_queue(driver):
    first = driver.create_queues(1)
    sq = driver.alloc(4096)
    done = driver.admin.do(CREATE_SQ, cdw10=0x1F0002, cdw11=0x10001, prp1=sq)
    assert done.status == 0
    entry = struct.pack("<BBHI56x", FLUSH, 0, 77, 1)
    driver.vm.write_mem(sq, entry)
    driver.write(DOORBELLS + 16, 4, 1)

    done = first.wait()
    assert (done.sqid, done.cid, done.status, done.sqhd) == (2, 77, 0, 1)


def test_queues_wrap_around(driver):
    queue = driver.create_queues(1, size=4)
    for _ in range(50):
        assert queue.do(READ, nsid=1, prp1=HEAP_PAGE).status == 0


def test_a_full_completion_queue_holds_commands_back(driver):
    queue = driver.create_queues(1, size=32, cq_size=4)
    for _ in range(20):
        queue.put(READ, nsid=1, prp1=HEAP_PAGE)
    queue.ring()
    done = [queue.wait() for _ in range(20)]

    assert [each.status for each in done] == [0] * 20
    assert [each.cid for each in done] == list(range(20))
    assert queue.poll() is None


def test_more_commands_than_are_done_in_one_go(driver):
    queue = driver.create_queues(1, size=1000)
    for _ in range(900):
        queue.put(READ, nsid=1, prp1=HEAP_PAGE)
    queue.ring()

    assert [queue.wait().status for _ in range(900)] == [0] * 900


def test_a_command_identifier_in_use(driver):
    driver.admin.submit(ASYNC, cid=7)
    done = driver.admin.do(GET_FEATURES, cid=7, cdw10=7)

    assert done.status == DNR | 3
    # The first is still there, and can be aborted.
    driver.admin.submit(ABORT, cdw10=7 << 16, cid=8)
    assert [driver.admin.wait()[3:] for _ in range(2)] == [(7, 7), (8, 0)]


def test_commands_in_parallel(attach, image):
    driver = attach(ioslots="3")
    driver.enable()
    queue = driver.create_queues(1, size=64)
    pages = [driver.alloc(4096) for _ in range(60)]
    for number, page in enumerate(pages):
        driver.vm.write_mem(page, bytes([number]) * 4096)
        queue.put(WRITE, nsid=1, prp1=page, cdw10=8 * number, cdw12=7)
    queue.ring()
    done = {each.cid: each.status for each in (queue.wait() for _ in pages)}

    assert done == dict.fromkeys(range(60), 0)
    expected = b"".join(bytes([number]) * 4096 for number in range(60))
    assert image.read_bytes()[: 60 * 4096] == expected


@pytest.mark.parametrize("fields", [{"flags": 0x40}, {"flags": 0x80}, {"flags": 1}])
def test_neither_sgls_nor_fused_commands(driver, fields):
    assert driver.admin.do(GET_FEATURES, cdw10=7, **fields).status == DNR | 2


def test_unknown_commands(driver):
    queue = driver.create_queues(1)

    assert driver.admin.do(0x7F).status == DNR | 1
    assert queue.do(0x7F, nsid=1).status == DNR | 1


# -- state ---------------------------------------------------------------------------


def test_state_goes_to_another_machine(attach, image):
    driver = attach(ram="1")
    driver.enable()
    driver.function.enable_msix({1: VECTOR})
    queue = driver.create_queues(1, vector=1)
    page = driver.alloc(4096)
    driver.vm.write_mem(page, b"kept" * 1024)
    assert queue.do(WRITE, nsid=1, prp1=page, cdw10=5).status == 0
    driver.admin.do(SET_FEATURES, cdw10=0xB, cdw11=0x1FF)
    driver.admin.submit(ASYNC, cid=99)
    device = pci_host(driver.machine).buses[0].functions[SLOT, 0]
    device.pause()
    buffer = driver.alloc(4096)
    queue.submit(READ, nsid=1, prp1=buffer, cdw10=5)
    state = device.save()
    memory = driver.machine.ctx.read(0, 64 << 20)

    other = attach(ram="1")
    other.machine.ctx.write(0, memory)
    device = pci_host(other.machine).buses[0].functions[SLOT, 0]
    device.pause()
    device.restore(state)
    assert device.save() == state
    device.resume()
    other.admin = driver.admin
    for moved in (driver.admin, queue):
        moved.driver = other
    assert queue.wait().status == 0
    assert other.vm.read_mem(buffer, 4096) == b"kept" * 1024
    # The request for events is still known.
    other.admin.submit(ABORT, cdw10=99 << 16)
    assert other.admin.wait()[3:] == (99, 7)


def test_commands_wait_while_it_is_paused(driver):
    queue = driver.create_queues(1)
    device = pci_host(driver.machine).buses[0].functions[SLOT, 0]
    device.pause()
    queue.submit(READ, nsid=1, prp1=HEAP_PAGE)
    state = device.save()

    assert queue.poll() is None
    device.restore(state)
    device.resume()
    assert queue.wait().status == 0


def test_reset_of_the_function(driver, image):
    driver.create_queues(1)
    device = pci_host(driver.machine).buses[0].functions[SLOT, 0]
    device.pause()
    device.reset()
    device.resume()

    assert (driver.read(CC), driver.read(CSTS), driver.read(ASQ, 8)) == (0, 0, 0)
    assert image.stat().st_size == SIZE
