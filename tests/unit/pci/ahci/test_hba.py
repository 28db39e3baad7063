"""The adapter: options, registers, interrupts, resets, state."""

from __future__ import annotations

import threading

import pytest

from pybhyve.bhyverun import slots
from pybhyve.config import Config
from pybhyve.errors import ConfigError, DeviceError, one_line
from pybhyve.pci.ahci import ahcireg as reg
from pybhyve.pci.bus import pci_host
from tests.guestside.ahci import h2d, h2d28, queued

VECTOR = 0x40


def keys(text: str) -> dict[str, str]:
    config = Config()
    slots.parse(config, text)
    return dict(config.walk())


# -- options -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3,ahci", {}),
        ("3,ahci-hd,/a", {"port.0.type": "hd", "port.0.path": "/a"}),
        (
            "3,ahci-cd,/a,ro,nmrr=1",
            {
                "port.0.type": "cd",
                "port.0.path": "/a",
                "port.0.ro": "true",
                "port.0.nmrr": "1",
            },
        ),
        (
            "3,ahci,hd:/a,ser=x,cd:/b:c,hd:,hd:/d,ro",
            {
                "port.0.type": "hd",
                "port.0.path": "/a",
                "port.0.ser": "x",
                "port.1.type": "cd",
                "port.1.path": "/b:c",
                "port.3.type": "hd",
                "port.3.path": "/d",
                "port.3.ro": "true",
            },
        ),
        ("3,ahci,,cd:/b", {"port.1.type": "cd", "port.1.path": "/b"}),
        (
            "3,ahci," + ",".join(["hd:"] * 31 + ["cd:/z"]),
            {"port.31.type": "cd", "port.31.path": "/z"},
        ),
    ],
)
def test_the_string_form(text, expected):
    assert keys(text) == {"pci.0.3.0.device": "ahci"} | {
        f"pci.0.3.0.{name}": value for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/a", 'Missing or invalid type for port 0: "/a"'),
        ("hd/a,cd:/b", 'Missing or invalid type for port 0: "hd/a"'),
        (",".join(["hd:/a"] * 33), 'more than 32 ports: "hd:/a"'),
    ],
)
def test_string_forms_that_are_wrong(text, message):
    with pytest.raises(ConfigError) as raised:
        keys(f"3:1,ahci,{text}")

    assert one_line(raised.value) == f"pci slot 0:3:1: ahci: {message}"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"port__0__type": "fd"}, "port.0.type: expected hd or cd"),
        ({"port__0__path": "/a"}, "pci.0.3.0.port.0.type is not set"),
        ({"port__0__type": "hd", "port__0__nmrr": "70000"}, "expected 0 to 65535"),
        ({"port__0__type": "hd", "port__0__path": "/no"}, "/no: No such file"),
        ({"port__0__type": "hd", "port__32__type": "hd"}, "ports are 0 to 31"),
    ],
)
def test_wrong_variables(driver, variables, message):
    with pytest.raises((ConfigError, DeviceError)) as raised:
        driver(**variables)

    assert message in one_line(raised.value)


def test_an_image_is_one_disk(driver, image):
    with pytest.raises(DeviceError) as raised:
        driver(port__0__type="hd", port__1__type="hd", port__1__path=str(image))

    assert "in use" in one_line(raised.value)


def test_boot_order(driver):
    hba = driver(port__0__type="hd", port__0__bootindex="1")

    assert pci_host(hba.machine).boot_order() == b"/pci@i0cf8/pci@3,0\0"


# -- registers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("port", "ports", "bar", "messages"),
    [(0, 6, 0x400, 8), (5, 6, 0x400, 8), (6, 7, 0x800, 8), (31, 32, 0x2000, 16)],
)
def test_as_many_ports_as_it_takes(driver, port, ports, bar, messages):
    hba = driver(**{f"port__{port}__type": "hd"})

    assert hba.get("CAP") == 0xFF30FF20 | ports - 1
    assert hba.get("PI") == 1 << port
    assert hba.bar.size == bar
    ctrl = hba.function.read(hba.function.capability(5) + 2, 2)
    assert 1 << (ctrl >> 1 & 7) == messages
    assert hba.port(port).get("SIG") == 0x101


def test_identification(driver):
    hba = driver()

    assert hba.function.read(0) == 0x28218086
    assert hba.function.read(8) == 0x01060100
    assert (hba.get("VS"), hba.get("CAP2"), hba.get("GHC")) == (0x10300, 4, 1 << 31)
    assert hba.get("PI") == 0


def test_a_port_without_a_device(driver):
    port = driver(port__0__type="hd").port(1)
    port.start()
    port.set("CI", 1)

    assert (port.get("SSTS"), port.get("TFD")) == (0, 0x7F)
    assert port.get("SIG") == 0xFFFFFFFF
    assert not port.get("CMD") & reg.CMD_CPS
    assert port.get("CI") == 1
    port.stop()
    assert port.get("CI") == 0


def test_a_port_with_a_disk(driver):
    port = driver(port__0__type="hd").port(0)

    assert port.get("SSTS") == 0x133
    assert port.get("TFD") == 0x0150
    assert port.get("CMD") == reg.CMD_SUD | reg.CMD_POD | reg.CMD_CPS


def test_addresses_are_aligned(driver):
    port = driver(port__0__type="hd").port(0)
    port.set("CLB", 0xFFFFFFFF)
    port.set("FB", 0xFFFFFFFF)
    port.set("IE", 0xFFFFFFFF)

    assert port.get("CLB") == 0xFFFFFC00
    assert port.get("FB") == 0xFFFFFF00
    assert port.get("IE") == reg.IE_MASK


def test_accesses_of_every_size(driver):
    hba = driver(port__0__type="hd")
    at = reg.PORT_BASE + reg.PortRegs.CLB.offset
    hba.bar.write(at, 8, 0x1_23456400)

    assert hba.bar.read(at, 8) == 0x1_23456400
    assert hba.bar.read(at + 1, 1) == 0x64
    assert hba.bar.read(at + 2, 4) == 0x00012345
    hba.bar.write(at + 3, 1, 0xAB)
    assert hba.bar.read(at) == 0xAB456400
    assert hba.bar.read(0x3FC) == 0


def test_command_bits_that_are_orders(driver):
    port = driver(port__0__type="hd").port(0)
    port.start()
    assert port.get("CMD") & 0xC011 == 0xC011

    port.set("CMD", port.get("CMD") | reg.CMD_CLO | 6 << 28)
    assert not port.get("CMD") & (reg.CMD_CLO | 0xF << 28)

    # FISes are received for as long as the list runs.
    port.set("CMD", port.get("CMD") & ~reg.CMD_FRE)
    assert port.get("CMD") & reg.CMD_FR
    port.stop()
    port.set("CMD", port.get("CMD") & ~reg.CMD_FRE)
    assert not port.get("CMD") & (reg.CMD_FR | reg.CMD_CR)


def test_nothing_is_done_while_the_list_does_not_run(disk):
    disk.stop()
    disk.prepare(0, h2d28(0xE7))
    disk.issue(0, active=True)

    assert (disk.get("CI"), disk.get("SACT")) == (0, 0)


def test_slots_go_round(disk):
    """5.3.2: the next slot after the last, not always the lowest."""
    order = []
    device = disk.machine.devices["pci.0.3.0"].ports[0].device
    execute = device.execute
    device.execute = lambda command: (order.append(command.slot), execute(command))
    for slot in range(32):
        disk.prepare(slot, h2d28(0xE5))
    disk.issue(30)
    disk.issue(3, 31, 0)

    assert order == [30, 31, 0, 3]
    assert disk.get("CMD") >> 8 & 31 == 3


# -- interrupts ----------------------------------------------------------------------


def levels(machine) -> list[str]:
    return [wire for wire, *_ in machine.vm.take() if wire.startswith("ioapic")]


def test_intx_is_a_level(driver):
    hba = driver(port__0__type="hd")
    port = hba.port(0)
    port.start()
    levels(hba.machine)
    port.run(h2d28(0xE5))
    assert levels(hba.machine) == []

    hba.set("GHC", reg.GHC_IE)
    assert levels(hba.machine) == ["ioapic_assert_irq"]
    assert hba.get("IS") == 1

    hba.set("IS", 1)  # the port still has it
    assert (hba.get("IS"), levels(hba.machine)) == (1, [])
    port.set("IS", 0xFFFFFFFF)
    assert hba.get("IS") == 1
    hba.set("IS", 1)
    assert (hba.get("IS"), levels(hba.machine)) == (0, ["ioapic_deassert_irq"])


def test_the_line_while_messages_are_on(driver):
    hba = driver(port__0__type="hd")
    hba.set("GHC", reg.GHC_IE)
    port = hba.port(0)
    port.start()
    levels(hba.machine)
    port.run(h2d28(0xE5))
    assert levels(hba.machine) == ["ioapic_assert_irq"]
    hba.function.enable_msi(VECTOR)
    assert levels(hba.machine) == ["ioapic_deassert_irq"]
    port.run(h2d28(0xE5))
    assert levels(hba.machine) == []
    ctrl = hba.function.capability(5) + 2
    hba.function.write(ctrl, 2, 0)
    assert levels(hba.machine) == ["ioapic_assert_irq"]


def messages(machine) -> list[int]:
    return [wire[2] for wire in machine.vm.take() if wire[0] == "lapic_msi"]


@pytest.mark.parametrize(
    ("granted", "port", "vector"),
    [(1, 0, 0), (1, 5, 0), (4, 2, 2), (4, 5, 3), (8, 5, 5)],
)
def test_msi(driver, granted, port, vector):
    hba = driver(**{f"port__{port}__type": "hd"})
    hba.function.enable_msi(VECTOR, granted)
    hba.set("GHC", reg.GHC_IE)
    disk = hba.port(port)
    disk.start()
    messages(hba.machine)
    disk.run(h2d28(0xE5))

    assert messages(hba.machine) == [VECTOR + vector]
    # What has come up before the bit was cleared is a new event.
    hba.set("IS", 1 << port)
    assert messages(hba.machine) == [VECTOR + vector]
    disk.set("IS", 0xFFFFFFFF)
    hba.set("IS", 1 << port)
    assert messages(hba.machine) == []


def test_an_interrupt_that_is_not_enabled(driver):
    hba = driver(port__0__type="hd")
    hba.function.enable_msi(VECTOR)
    hba.set("GHC", reg.GHC_IE)
    port = hba.port(0)
    port.start()
    port.set("IE", reg.IS_SDBS)
    messages(hba.machine)
    port.run(h2d28(0xE5))

    assert (messages(hba.machine), hba.get("IS")) == ([], 0)
    port.set("IE", reg.IS_DHRS)
    assert (messages(hba.machine), hba.get("IS")) == ([VECTOR], 1)


# -- resets --------------------------------------------------------------------------


class Gate:
    """Holds a disk's reads back."""

    def __init__(self, port) -> None:
        self.blk = port.machine.devices["pci.0.3.0"].ports[port.number].device.blk
        self.begun = threading.Event()
        self.open = threading.Event()
        read = self.blk._backing.read
        self.blk._backing.read = lambda iov, offset: (
            self.begun.set() or (self.open.wait(10) and read(iov, offset))
        )
        self.blk._backing.read_now = lambda *_: False


def test_reset_of_the_adapter(driver):
    hba = driver(port__0__type="hd")
    port = hba.port(0)
    hba.set("GHC", reg.GHC_IE)
    port.start()
    port.run(h2d28(0xC6, count=0))
    hba.reset()

    assert (hba.get("GHC"), hba.get("IS")) == (1 << 31, 0)
    assert port.get("CMD") == reg.CMD_SUD | reg.CMD_POD | reg.CMD_CPS
    assert (port.get("IE"), port.get("IS"), port.get("CI")) == (0, 0, 0)
    assert (port.get("SSTS"), port.get("SIG"), port.get("TFD")) == (0x133, 0x101, 0x150)
    assert port.get("CLB") == port.memory
    port.start()
    assert port.read28(0xC4, 512, lba=1, count=1)[:1] == b"\1"  # multiple mode is back


def test_a_reset_lasts_until_nothing_is_under_way(driver):
    hba = driver(port__0__type="hd")
    port = hba.port(0)
    port.start()
    gate = Gate(port)
    port.prepare(0, h2d(0x25, count=1), [(port.buffer(0), 512)])
    port.issue(0)
    gate.begun.wait(10)
    hba.set("GHC", reg.GHC_HR)

    assert hba.get("GHC") & reg.GHC_HR
    assert port.get("SSTS") == 0

    gate.open.set()
    port.wait(lambda: not hba.get("GHC") & reg.GHC_HR)
    assert (port.get("SSTS"), port.get("TFD"), port.get("IS")) == (0x133, 0x150, 0)


def test_stopping_waits_for_what_is_under_way(disk):
    gate = Gate(disk)
    for slot in range(32):
        disk.prepare(slot, queued(0x60, slot), [(disk.buffer(slot), 512)])
    disk.issue(*range(32), active=True)
    gate.begun.wait(10)
    disk.set("CMD", disk.get("CMD") & ~reg.CMD_ST)

    assert disk.get("CMD") & reg.CMD_CR
    assert (disk.get("CI"), disk.get("SACT")) == (0, 0)

    gate.open.set()
    disk.wait(lambda: not disk.get("CMD") & reg.CMD_CR)
    assert not disk.get("IS") & reg.IS_SDBS


def test_link_reset(disk):
    disk.run(h2d28(0xFF))
    assert disk.get("TFD") == 0x451
    disk.set("SCTL", 0x301)  # not while the list runs
    assert disk.get("SSTS") == 0x133
    disk.stop()
    disk.set("SCTL", 0x301)
    assert (disk.get("SSTS"), disk.get("SIG"), disk.get("TFD")) == (0, 0xFFFFFFFF, 0x7F)
    disk.set("SCTL", 0x300)
    assert (disk.get("SSTS"), disk.get("SIG"), disk.get("TFD")) == (0x133, 0x101, 0x150)
    disk.start()
    assert disk.fis(reg.RFIS_RFIS)[0] == 0  # this memory is new
    disk.stop()
    disk.comreset()
    assert disk.fis(reg.RFIS_RFIS)[:8] == b"\x34\0\x50\x01\x01\0\0\0"


@pytest.mark.parametrize(("limit", "status"), [(1, 0x113), (2, 0x123), (3, 0x133)])
def test_speed_limit(disk, limit, status):
    disk.stop()
    disk.set("SCTL", limit << 4 | 1)
    disk.set("SCTL", limit << 4)

    assert disk.get("SSTS") == status
    disk.start()
    assert disk.read(0xEC, 512)[154] & 0xE == limit << 1


def test_a_link_that_is_off(disk):
    disk.stop()
    disk.set("SCTL", 4)
    assert disk.get("SSTS") == 4
    disk.set("SCTL", 0)
    assert disk.get("SSTS") == 0x133


def test_software_reset(disk):
    srst = bytearray(20)
    srst[0], srst[15] = reg.FIS_H2D, 4
    disk.run(h2d28(0xFF))
    disk.restart()
    disk.prepare(0, bytes(srst))
    disk.issue(0)
    srst[15] = 0
    disk.prepare(1, bytes(srst))
    disk.issue(1)

    assert disk.get("CI") == 0
    assert (disk.get("TFD"), disk.get("SIG")) == (0x150, 0x101)
    assert disk.fis(reg.RFIS_RFIS)[:4] == b"\x34\0\x50\x01"


def test_a_software_reset_waits_for_what_is_under_way(disk):
    gate = Gate(disk)
    disk.prepare(0, queued(0x60, 0), [(disk.buffer(0), 512)])
    disk.issue(0, active=True)
    gate.begun.wait(10)
    srst = bytearray(20)
    srst[0], srst[15] = reg.FIS_H2D, 4
    disk.prepare(1, bytes(srst))
    disk.issue(1)
    srst[15] = 0
    disk.prepare(2, bytes(srst))
    disk.issue(2)

    assert disk.get("TFD") & reg.STS_BSY

    gate.open.set()
    disk.wait(lambda: not disk.get("TFD") & reg.STS_BSY)
    assert (disk.get("TFD"), disk.get("SACT")) == (0x150, 0)


# -- state ---------------------------------------------------------------------------


def test_reset_of_the_machine(driver):
    hba = driver(port__0__type="hd")
    device = hba.machine.devices["pci.0.3.0"]
    before = device.save()["device"]
    port = hba.port(0)
    hba.set("GHC", reg.GHC_IE)
    port.start()
    port.run(h2d28(0xFF))
    device.pause()
    device.reset()
    device.resume()

    assert device.save()["device"] == before


def test_state_goes_to_another_machine(driver, image, tmp_path):
    hba = driver(port__0__type="hd")
    port = hba.port(0)
    hba.function.enable_msi(VECTOR)
    hba.set("GHC", reg.GHC_IE)
    port.start()
    port.run(h2d28(0xC6, count=4))
    port.prepare(0, h2d28(0xFF))
    port.issue(0)
    device = hba.machine.devices["pci.0.3.0"]
    device.pause()
    port.prepare(3, h2d(0x25, lba=9, count=1), [(port.buffer(3), 512)])
    state = device.save()
    memory = hba.machine.ctx.read(0, 16 << 20)
    device.halt()

    other = driver(port__0__type="hd")
    device = other.machine.devices["pci.0.3.0"]
    device.pause()
    device.restore(state)
    other.machine.ctx.write(0, memory)
    assert device.save() == state
    device.resume()

    port = other.port(0)
    assert port.get("TFD") == 0x451
    port.restart()
    other.set("IS", 1)
    assert port.read(0xEC, 512)[118] == 4
    assert messages(other.machine) == [VECTOR]


def test_what_was_issued_is_done_after_a_pause(disk):
    device = disk.machine.devices["pci.0.3.0"]
    device.pause()
    disk.prepare(3, h2d(0x25, lba=9, count=1), [(disk.buffer(3), 512)])
    disk.issue(3)
    assert disk.get("CI") == 8
    device.resume()
    disk.wait(lambda: not disk.get("CI"))

    assert disk.machine.ctx.read(disk.buffer(3), 1) == b"\x09"


def test_pause_waits_for_what_is_under_way(disk):
    gate = Gate(disk)
    disk.prepare(0, h2d(0x25, lba=9, count=1), [(disk.buffer(0), 512)])
    disk.issue(0)
    gate.begun.wait(10)
    threading.Timer(0.05, gate.open.set).start()
    disk.machine.devices["pci.0.3.0"].pause()

    assert (disk.get("CI"), disk.get("TFD")) == (0, 0x50)


def test_state_of_another_adapter(driver):
    device = driver(port__0__type="hd").machine.devices["pci.0.3.0"]
    state = device.save()
    state["device"]["version"] = 2

    with pytest.raises(ValueError, match="version 2"):
        device.restore(state)
