"""The registers, modern and legacy, negotiation, interrupts, reset and state."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.options import Options
from pybhyve.pci.bus import pci_host
from pybhyve.pci.emul import PciAddress
from pybhyve.pci.virtio import VirtioPci
from pybhyve.virtio import (
    VIRTIO_F_NOTIFY_ON_EMPTY,
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from tests.guestside.pci import MSI_BASE, PciFunction
from tests.guestside.virtio import (
    ACKNOWLEDGE,
    COMMON,
    CONFIG_VECTOR,
    DEVICE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    ISR,
    NEEDS_RESET,
    NO_VECTOR,
    NOTIFY,
    QUEUE_VECTOR,
    VirtioDriver,
)

CONFIG = 20


class Echo(VirtioPci[Options]):
    """Copies what is readable to what is writable; two queues."""

    NAME = "virtio-echo"
    FEATURES = 1 << 5 | VIRTIO_F_NOTIFY_ON_EMPTY

    def __init__(self, machine, host, address) -> None:
        super().__init__(
            machine, host, address, Options(), queues=(8, 16), config_size=CONFIG
        )
        self.set_ids(0x1AF4, 0x10FF, class_=0xFF, subclass=0)
        self.config = bytearray(range(CONFIG))
        self.hold = False
        self.held = []
        self.resets = 0

    def notify(self, vq) -> None:
        while (chain := vq.getchain()) is not None:
            if self.hold:
                self.held.append((vq, chain))
            else:
                self.finish(vq, chain)
        vq.endchains(used_all_avail=True)

    def finish(self, vq, chain) -> None:
        data = vq.read(chain.readable, 1 << 16)
        vq.relchain(chain, vq.write(chain.writable, data))

    def release(self) -> None:
        for vq, chain in self.held:
            self.finish(vq, chain)
            vq.endchains()
        self.held.clear()

    def device_config(self) -> bytes:
        return bytes(self.config)

    def device_config_written(self, offset, data) -> None:
        self.config[offset : offset + len(data)] = data

    def reset_state(self) -> None:
        self.resets += 1

    def save_state(self):
        return {"config": bytes(self.config)}

    def restore_state(self, state) -> None:
        self.config[:] = state["config"]


class Rig:
    def __init__(self, build, **variables) -> None:
        self.machine = build("31,lpc", **variables)
        host = pci_host(self.machine)
        self.device = Echo(self.machine, host, PciAddress(0, 5, 0))
        host.add(self.device)
        self.machine.add_device("pci.0.5.0", self.device)
        host.finish_setup()
        self.function = PciFunction(self.machine, 5)
        self.wires = self.machine.vm.take

    def driver(self, **how) -> VirtioDriver:
        driver = VirtioDriver(self.function, **how)
        self.wires()
        return driver


@pytest.fixture
def rig(build) -> Rig:
    return Rig(build)


@pytest.fixture(params=["legacy", "modern"])
def modern(request) -> bool:
    return request.param == "modern"


def echo(queue, data: bytes) -> None:
    head = queue.add([data], [len(data)])
    queue.kick()
    assert queue.wait() == {head: len(data)}
    assert queue.buffer(head, 0) == data


# -- negotiation -----------------------------------------------------------------------


def test_offers_its_features_and_the_transports(rig):
    driver = rig.driver()

    assert driver.offered() == (
        Echo.FEATURES
        | VIRTIO_F_VERSION_1
        | VIRTIO_RING_F_EVENT_IDX
        | VIRTIO_RING_F_INDIRECT_DESC
    )


def test_legacy_sees_the_low_half_and_gets_no_more_than_is_offered(rig):
    driver = rig.driver(modern=False)
    driver.reset()

    assert driver.offered() == (
        Echo.FEATURES | VIRTIO_RING_F_EVENT_IDX | VIRTIO_RING_F_INDIRECT_DESC
    )

    driver.legacy.write(4, 4, 0xFFFFFFFF)

    assert driver.legacy.read(4, 4) == driver.offered()
    assert rig.device.negotiated == driver.offered()


@pytest.mark.parametrize("wanted", [1 << 5, VIRTIO_F_VERSION_1 | 1 << 6])
def test_refuses_features_without_version_1_or_not_offered(rig, wanted):
    driver = rig.driver()
    driver.reset()
    for half in range(2):
        driver.put(COMMON, 8, 4, half)
        driver.put(COMMON, 12, 4, wanted >> 32 * half & 0xFFFFFFFF)

    driver.status = ACKNOWLEDGE | DRIVER | FEATURES_OK

    assert driver.status == ACKNOWLEDGE | DRIVER
    assert rig.device.negotiated == 0


def test_features_stay_once_they_are_accepted(rig):
    driver = rig.driver()
    features = driver.start()

    driver.put(COMMON, 8, 4, 0)
    driver.put(COMMON, 12, 4, 0)

    assert rig.device.negotiated == features
    assert driver.get(COMMON, 12, 4) == features & 0xFFFFFFFF


def test_feature_words_beyond_the_second_are_empty(rig):
    driver = rig.driver()
    for select in (2, 3, 0xFFFFFFFF):
        driver.put(COMMON, 0, 4, select)
        driver.put(COMMON, 8, 4, select)
        driver.put(COMMON, 12, 4, 0xFFFFFFFF)

        assert driver.get(COMMON, 4, 4) == 0
        assert driver.get(COMMON, 12, 4) == 0


# -- queues ----------------------------------------------------------------------------


def test_queue_sizes(rig, modern):
    driver = rig.driver(modern=modern)
    driver.start()

    assert {index: queue.size for index, queue in driver.queues.items()} == {
        0: 8,
        1: 16,
    }


def test_data_goes_around(rig, modern):
    driver = rig.driver(modern=modern)
    driver.start()

    for turn in range(40):
        echo(driver.queue(turn & 1), bytes([turn]) * 100)


def test_smaller_ring_by_the_drivers_choice(rig):
    driver = rig.driver()
    driver.start(queues=False)
    driver.put(COMMON, 22, 2, 1)
    driver.put(COMMON, 24, 2, 4)
    driver.setup(1)
    queue = driver.queue(1)

    assert queue.size == 4
    for _ in range(9):
        echo(queue, b"x")


@pytest.mark.parametrize("size", [0, 3, 32, 0xFFFF])
def test_ring_of_a_wrong_size_does_not_start(rig, size):
    driver = rig.driver()
    driver.start(queues=False)
    driver.put(COMMON, 22, 2, 1)
    driver.put(COMMON, 24, 2, size)
    driver.put(COMMON, 28, 2, 1)

    assert driver.status & NEEDS_RESET


def test_addresses_can_be_read_back_and_not_changed_while_in_use(rig):
    driver = rig.driver()
    driver.start()
    queue = driver.queue(1)
    driver.put(COMMON, 22, 2, 1)
    driver.put(COMMON, 32, 4, 0x1000)
    driver.put(COMMON, 24, 2, 2)

    assert driver.get(COMMON, 32, 4) == queue.desc
    assert driver.get(COMMON, 40, 4) == queue.avail
    assert driver.get(COMMON, 48, 4) == queue.used
    assert driver.get(COMMON, 24, 2) == 16
    assert driver.get(COMMON, 28, 2) == 1
    echo(queue, b"still here")


def test_legacy_page_number_zero_stops_the_queue(rig):
    driver = rig.driver(modern=False)
    driver.start()
    queue = driver.queue(0)
    driver.legacy.write(14, 2, 0)

    assert driver.legacy.read(8, 4) == queue.desc >> 12

    driver.legacy.write(8, 4, 0)
    queue.add([b"x"], [1])
    driver.notify(0)

    assert driver.legacy.read(8, 4) == 0
    assert queue.poll() == {}


def test_registers_of_a_queue_that_is_not_there(rig):
    driver = rig.driver()
    driver.put(COMMON, 22, 2, 2)
    for offset, size, value in ((24, 2, 8), (26, 2, 1), (28, 2, 1), (32, 4, 0x1000)):
        driver.put(COMMON, offset, size, value)

    assert [driver.get(COMMON, at, 2) for at in (24, 28)] == [0, 0]
    driver.notify(7)


def test_notification_past_the_queues_is_ignored(rig):
    driver = rig.driver()
    driver.start()
    bar, base, _ = driver.structures[NOTIFY]
    bar.write(base + 0x100, 2, 0)
    driver.legacy.write(16, 2, 0xFFFF)

    echo(driver.queue(0), b"alive")


# -- suppression -----------------------------------------------------------------------


def msis(wires) -> list[int]:
    return [wire[2] for wire in wires if wire[0] == "lapic_msi"]


def test_event_index_keeps_notifications_and_interrupts_few(rig, modern):
    driver = rig.driver(modern=modern)
    driver.start(VIRTIO_RING_F_EVENT_IDX)
    queue = driver.queue(0)
    rig.wires()

    rig.device.hold = True
    heads = [queue.add([b"1"], [1]) for _ in range(4)]
    assert queue.kick()
    rig.device.release()

    assert msis(rig.wires()) == [QUEUE_VECTOR]
    assert queue.poll() == dict.fromkeys(heads, 1)


def test_avail_flag_suppresses_interrupts(rig):
    driver = rig.driver()
    driver.start(0)
    queue = driver.queue(0)
    queue.put16(queue.avail, 1)
    queue.add([b"1"], [1])
    rig.wires()
    queue.kick()

    assert msis(rig.wires()) == []
    assert len(queue.poll()) == 1


def test_notify_on_empty_interrupts_all_the_same(rig):
    driver = rig.driver(modern=False)
    driver.start(VIRTIO_F_NOTIFY_ON_EMPTY)
    queue = driver.queue(0)
    queue.put16(queue.avail, 1)
    queue.add([b"1"], [1])
    rig.wires()
    queue.kick()

    assert msis(rig.wires()) == [QUEUE_VECTOR]


@pytest.mark.parametrize("features", [0, VIRTIO_RING_F_EVENT_IDX])
def test_device_can_do_without_notifications(rig, features):
    driver = rig.driver()
    driver.start(features)
    queue = driver.queue(0)
    vq = rig.device.queues[0]
    echo(queue, b"first")

    vq.kick_disable()
    if features:  # it had asked for one
        queue.add([b"1"], [1])
        assert queue.kick()
        queue.poll()
    head = queue.add([b"2"], [1])
    assert not queue.kick()
    assert vq.has_descs()
    vq.kick_enable()
    rig.device.run_queue(vq)

    assert not vq.has_descs()
    assert queue.poll() == {head: 1}
    echo(queue, b"last")


# -- interrupts ------------------------------------------------------------------------


def test_a_queue_has_its_vector(rig, modern):
    driver = rig.driver(modern=modern)
    driver.start()
    rig.wires()
    echo(driver.queue(1), b"1")

    assert rig.wires() == [("lapic_msi", MSI_BASE, QUEUE_VECTOR + 1)]
    assert driver.take_isr() == 0


def test_interrupt_line_and_isr_without_msix(rig, modern):
    driver = rig.driver(modern=modern, msix=False)
    driver.start()
    rig.wires()
    echo(driver.queue(1), b"1")

    assert [wire[0] for wire in rig.wires()] == ["ioapic_assert_irq", "isa_assert_irq"]
    assert driver.take_isr() == 1
    assert "ioapic_deassert_irq" in [wire[0] for wire in rig.wires()]
    assert driver.take_isr() == 0


def test_one_msi_where_the_user_wants_no_msix(build):
    rig = Rig(build, virtio_msix="false")
    assert 1 not in rig.function.bars()
    rig.function.enable_msi(0x44)
    driver = rig.driver(msix=False)
    driver.start()
    rig.wires()
    echo(driver.queue(1), b"1")

    assert rig.wires() == [("lapic_msi", MSI_BASE, 0x44)]
    driver.put(COMMON, 16, 2, 0)
    assert driver.get(COMMON, 16, 2) == NO_VECTOR


def test_vector_that_is_not_there(rig, modern):
    driver = rig.driver(modern=modern)
    driver.start()
    if modern:
        driver.put(COMMON, 26, 2, 3)
        assert driver.get(COMMON, 26, 2) == NO_VECTOR
    else:
        driver.legacy.write(20, 2, 3)
        assert driver.legacy.read(20, 2) == NO_VECTOR


# -- configuration ---------------------------------------------------------------------


def test_configuration_moves_with_msix(rig):
    driver = rig.driver(modern=False, msix=False)

    assert driver.legacy.read(20, 4) == 0x03020100
    rig.function.enable_msix()
    assert driver.legacy.read(20, 4) == 0xFFFFFFFF
    assert driver.legacy.read(24, 4) == 0x03020100
    assert driver.legacy.read(22, 4) == 0x0100FFFF


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_configuration_by_any_size(rig, size):
    driver = rig.driver()

    for offset in range(CONFIG):
        expected = int.from_bytes(range(offset, min(offset + size, CONFIG)), "little")
        assert driver.get(DEVICE, offset, size) == expected


def test_configuration_can_be_written(rig, modern):
    driver = rig.driver(modern=modern)
    driver.set_config(4, 2, 0xBEEF)
    driver.set_config(CONFIG - 1, 4, 0x11223344)

    assert driver.config(4, 2) == 0xBEEF
    assert bytes(rig.device.config[-1:]) == b"\x44"
    assert len(rig.device.config) == CONFIG


def test_change_of_configuration(rig, modern):
    driver = rig.driver(modern=modern)
    driver.start()
    generation = driver.get(COMMON, 21, 1)
    rig.wires()
    rig.device.config_changed()

    assert rig.wires() == [("lapic_msi", MSI_BASE, CONFIG_VECTOR)]
    assert driver.get(COMMON, 21, 1) == generation + 1


def test_change_of_configuration_by_the_line(rig):
    driver = rig.driver(msix=False)
    driver.start()
    rig.device.config_changed()

    assert driver.get(ISR, 0, 1) == 2


def test_change_before_the_driver_is_ready_makes_no_interrupt(rig):
    rig.driver()
    rig.device.config_changed()

    assert rig.wires() == []


# -- access through configuration space ------------------------------------------------


def test_structures_through_configuration_space(rig):
    driver = rig.driver()
    driver.start()
    queue = driver.queue(0)
    function, at = rig.function, driver.pci_cfg

    def aim(structure: int, offset: int, length: int) -> None:
        bar, base, _ = driver.structures[structure]
        function.write(at + 4, 1, bar.index)
        function.write(at + 8, 4, base + offset)
        function.write(at + 12, 4, length)

    aim(COMMON, 18, 2)
    assert function.read(at + 16, 2) == 2
    aim(DEVICE, 4, 4)
    function.write(at + 16, 4, 0xCAFEF00D)
    assert function.read(at + 16, 4) == 0xCAFEF00D
    assert rig.device.config[4:8] == b"\x0d\xf0\xfe\xca"
    head = queue.add([b"k"], [1])
    aim(NOTIFY, 0, 2)
    function.write(at + 16, 2, 0)
    assert queue.poll() == {head: 1}


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [(1, 0, 4), (0, 0, 4), (9, 0, 4), (4, 0x4000, 4), (4, 0, 3), (4, 2, 4), (4, 0, 0)],
)
def test_impossible_accesses_through_configuration_space(rig, bar, offset, length):
    at = rig.driver().pci_cfg
    rig.function.write(at + 4, 1, bar)
    rig.function.write(at + 8, 4, offset)
    rig.function.write(at + 12, 4, length)
    rig.function.write(at + 16, 4, 0x12345678)

    assert rig.function.read(at + 16, 4) == 0x12345678


# -- reset -----------------------------------------------------------------------------


def test_reset_forgets_everything(rig, modern):
    driver = rig.driver(modern=modern)
    driver.start()
    queue = driver.queue(0)
    before = rig.device.resets
    driver.reset()
    queue.add([b"x"], [1])
    driver.notify(0)

    assert rig.device.resets == before + 1
    assert queue.poll() == {}
    assert rig.device.negotiated == 0
    driver.start()
    echo(driver.queue(0), b"again")


def test_reset_is_over_when_nobody_writes_to_buffers_any_more(rig):
    driver = rig.driver()
    driver.start()
    queue = driver.queue(0)
    rig.device.hold = True
    queue.add([b"x"], [1])
    queue.kick()

    driver.status = 0

    assert driver.status != 0
    rig.device.release()
    assert driver.status == 0
    assert queue.poll() == {}


def test_chains_of_before_a_reset_do_not_come_back_after_it(rig, modern):
    driver = rig.driver(modern=modern)
    driver.start()
    rig.device.hold = True
    driver.queue(0).add([b"x"], [1])
    driver.queue(0).kick()
    old, rig.device.held = rig.device.held, []
    driver.status = 0
    driver.status = ACKNOWLEDGE

    rig.device.held = old
    rig.device.release()
    rig.device.hold = False
    driver.start()

    echo(driver.queue(0), b"new")


# -- state -----------------------------------------------------------------------------


def test_state_goes_to_another_machine(build, modern):
    rig, other = Rig(build), Rig(build)
    driver = rig.driver(modern=modern)
    driver.start()
    queue = driver.queue(0)
    for _ in range(11):
        echo(queue, b"before")
    waiting = queue.add([b"during"], [6])
    rig.device.pause()
    state = rig.device.save()
    other.device.pause()
    other.machine.ctx.write(0, rig.machine.ctx.read(0, 32 << 20))
    other.device.restore(state)

    assert other.device.save() == state
    driver.function, driver.machine = other.function, other.machine
    driver.vm = queue.vm = other.machine.ctx.vm
    driver.legacy = other.function.bar(0)
    driver._find_structures()
    other.device.resume()

    assert queue.wait() == {waiting: 6}
    assert queue.buffer(waiting, 0) == b"during"
    echo(queue, b"after")
    assert driver.status & DRIVER_OK


def test_pause_has_notifications_wait(rig):
    driver = rig.driver()
    driver.start()
    queue = driver.queue(0)
    rig.device.pause()
    head = queue.add([b"1"], [1])
    queue.kick()
    assert queue.poll() == {}

    rig.device.resume()

    assert queue.wait() == {head: 1}


@pytest.mark.parametrize("change", [{"version": 2}, {"queues": []}])
def test_state_of_something_else_is_refused(rig, change):
    state = rig.device.save_device() | change

    with pytest.raises(ValueError, match="virtio-echo"):
        rig.device.restore_device(state)


# -- hostile drivers -------------------------------------------------------------------


@settings(
    deadline=None,
    max_examples=300,
    # One machine for all: what one left behind must not hurt the next.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    accesses=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 4]),
            st.one_of(st.integers(0, 0x3FFF), st.integers(0, 0x40)),
            st.sampled_from([1, 2, 4, 8]),
            st.one_of(st.none(), st.integers(0, (1 << 64) - 1), st.integers(0, 64)),
        ),
        max_size=40,
    )
)
def test_any_accesses(rig, accesses):
    device = rig.device
    for index, offset, size, value in accesses:
        bar = device.bars[index]
        offset %= bar.size
        if offset + size > bar.size or (index == 0 and size == 8):
            continue
        if value is None:
            got = device.bar_read(index, offset, size)
            assert 0 <= got < 1 << 8 * size
        else:
            device.bar_write(index, offset, size, value & (1 << 8 * size) - 1)
    driver = VirtioDriver(rig.function)
    driver.start()
    echo(driver.queue(0), b"alive")
