"""The host bridge: what it says it is, and what OVMF looks for beside it."""

from __future__ import annotations

import pytest

from pybhyve.errors import DeviceError
from tests.guestside.pci import PciFunction

ID = 0x00
CLASS = 0x08
EXPRESS = 0x10
PMBA = 0x40
PMREGMISC = 0x80
PM_TIMER_OFFSET = 8
PMCNTRL = 0xB004


@pytest.mark.parametrize(
    ("variables", "ids"),
    [
        ({}, 0x12751275),
        ({"lpc__fwcfg": "qemu"}, 0x12378086),
        (
            {
                "lpc__fwcfg": "qemu",
                "pci__0__0__0__pcireg__vendor": "1275",
                "pci__0__0__0__pcireg__device": "0x1275",
            },
            0x12751275,
        ),
        ({"pci__0__0__0__pcireg__device": "7432"}, 0x74321275),
    ],
)
def test_ids(build, variables, ids):
    bridge = PciFunction(build("0,hostbridge", **variables), 0)

    assert bridge.read(ID) == ids
    assert bridge.read(CLASS) == 0x06000000


def test_i440fx_is_no_express_bridge(build):
    bridge = PciFunction(build("0,hostbridge", lpc__fwcfg="qemu"), 0)

    assert not [*bridge.capabilities()]
    assert PciFunction(build("0,hostbridge"), 0).capability(EXPRESS)


def test_ovmf_finds_the_pm_timer(build):
    machine = build("0,hostbridge", "31,lpc", lpc__fwcfg="qemu")
    power = PciFunction(machine, 1, 3)

    assert power.read(ID) == 0x71138086
    assert power.read(PMREGMISC, 1) & 1
    power.write(PMBA, 4, 0xB001)
    assert power.read(PMBA) & ~1 == 0x400
    # Nobody who does not know it is there finds it.
    assert PciFunction(machine, 1, 0).read(ID) == 0xFFFFFFFF


def test_only_beside_an_i440fx(build):
    assert PciFunction(build("0,hostbridge"), 1, 3).read(ID) == 0xFFFFFFFF


def test_ovmf_switches_the_machine_off(build):
    machine = build("0,hostbridge", lpc__fwcfg="qemu")
    ended: list[str] = []
    machine.request_poweroff = lambda: ended.append("off")
    inout = machine.inout

    inout.write(PMCNTRL, 2, inout.read(PMCNTRL, 2) & ~(0xF << 10))
    inout.write(PMCNTRL, 1, 0x20)
    inout.write(PMCNTRL + 1, 1, 0x20)
    inout.write(PMCNTRL, 2, 1 << 13 | 1 << 10)
    assert not ended
    inout.write(PMCNTRL, 2, inout.read(PMCNTRL, 2) | 1 << 13)

    assert ended == ["off"]


def test_its_place_is_taken(build):
    with pytest.raises(DeviceError) as error:
        build("0,hostbridge", "1:3,dummy", lpc__fwcfg="qemu")

    assert "slot 0:1:3 is that of its power management" in str(error.value.__cause__)
