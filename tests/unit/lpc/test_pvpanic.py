"""pvpanic: which events there are, and what they do to the machine."""

from __future__ import annotations

import pytest

from pybhyve.vmmapi import SuspendHow

PORT = 0x505


@pytest.fixture
def machine(build):
    return build("31,lpc", lpc__pvpanic="true")


def test_events_there_are(machine):
    assert machine.inout.read(PORT, 1) == 3


@pytest.mark.parametrize(
    ("event", "how"),
    [
        (1, SuspendHow.HALT),
        (3, SuspendHow.HALT),
        (2, SuspendHow.NONE),
        (0, SuspendHow.NONE),
        (4, SuspendHow.NONE),
    ],
)
def test_what_an_event_does(machine, event, how):
    machine.inout.write(PORT, 1, event)

    assert machine.vm.suspended() == how


def test_only_if_asked_for(build):
    machine = build("31,lpc")

    assert machine.inout.owner(PORT) is None
    assert "pvpanic" not in machine.devices
