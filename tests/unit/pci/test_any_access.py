"""Whatever a guest does to configuration space and BARs of any device: no exception.

Each device of the registry is a case, with as few variables as it needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.bhyverun.machine import Machine
from pybhyve.pci import registry
from pybhyve.pci.bus import pci_host
from pybhyve.pci.emul import PciDevice
from pybhyve.pci.pcireg import BAR_MAX, CONFIG_SIZE
from tests.guestside.pci import BarView, PciFunction

SLOT: Final = 3
DISK: Final = "DISK"  # a file of 1 MiB
NEEDS: Final[dict[str, dict[str, str]]] = {
    "ahci": {"port.0.type": "hd", "port.0.path": DISK},
    "nvme": {"path": DISK},
    "virtio-blk": {"path": DISK},
    "virtio-net": {"backend": "slirp"},
    "e1000": {"backend": "slirp"},
}
DEVICES: Final = [
    name
    for name in registry.names()
    if name not in registry.NOT_AVAILABLE
    and (found := registry.lookup(name)) is not None
    and found.name == name
]
ANY_ACCESS = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

sizes = st.sampled_from([1, 2, 4])
values = st.one_of(
    st.integers(0, 0xFFFFFFFF),
    st.sampled_from([0, 1, 0xFFFFFFFF, 0xFEE00000, 0xE0000000, 0xC0000001, 0x60]),
    st.integers(0, 31).map(lambda bit: 1 << bit),
)
config_writes = st.builds(
    lambda at, size, value: (at & -size, size, value & (1 << 8 * size) - 1),
    st.integers(0, CONFIG_SIZE - 1),
    sizes,
    values,
)
bar_accesses = st.tuples(
    st.integers(0, BAR_MAX - 1),
    st.one_of(st.integers(0, 0x200), st.integers(0, 1 << 20)),
    st.sampled_from([1, 2, 4, 8]),
    st.one_of(st.none(), values, st.integers(0, (1 << 64) - 1)),
)


@pytest.fixture(params=DEVICES)
def machine(request, build, tmp_path: Path) -> Machine:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    variables = {
        f"pci.0.{SLOT}.0.{name}".replace(".", "__"): str(disk)
        if value == DISK
        else value
        for name, value in NEEDS.get(request.param, {}).items()
    }
    return build(f"{SLOT},{request.param}", cpus=2, **variables)


@pytest.fixture
def device(machine) -> PciDevice[Any]:
    return pci_host(machine).buses[0].functions[SLOT, 0]


def everything(function: PciFunction) -> list[int]:
    return [function.read(reg) for reg in range(0, CONFIG_SIZE, 4)]


def decoding(device: PciDevice[Any]) -> dict[int, int | None]:
    return {
        index: bar.addr if bar.live is not None else None
        for index, bar in device.bars.items()
    }


def test_every_bit_of_every_register(machine, device):
    function = PciFunction(machine, SLOT)
    for size in (1, 2, 4):
        ones = (1 << 8 * size) - 1
        for at in range(0, CONFIG_SIZE, size):
            before = function.read(at, size)
            for value in (0, ones, *(1 << bit for bit in range(8 * size)), before):
                function.write(at, size, value)
                function.read(at, size)
    device.reset()


@ANY_ACCESS
@given(writes=st.lists(config_writes, max_size=40))
def test_ports_and_ecam_agree(machine, device, writes):
    ports, ecam = PciFunction(machine, SLOT), PciFunction(machine, SLOT, ecam=True)
    device.reset()
    for turn, (at, size, value) in enumerate(writes):
        (ecam if turn & 1 else ports).write(at, size, value)

    whole = everything(ports)

    assert everything(ecam) == whole
    for size in (1, 2):
        for at in range(0, CONFIG_SIZE, size):
            part = whole[at // 4] >> 8 * (at & 3) & (1 << 8 * size) - 1
            assert ports.read(at, size) == ecam.read(at, size) == part, hex(at)


@ANY_ACCESS
@given(
    steps=st.lists(st.one_of(config_writes, bar_accesses), max_size=40),
)
def test_any_accesses_and_a_round_trip_of_the_state(machine, device, steps):
    function = PciFunction(machine, SLOT)
    device.reset()
    bars = list(device.bars)
    for step in steps:
        if len(step) == 3:
            function.write(*step)
        elif bars:
            access(machine, device, bars[step[0] % len(bars)], *step[1:])
    device.pause()
    text = as_text(device.save())
    registers, places = everything(function), decoding(device)

    device.reset()
    device.restore(from_text(text))

    assert as_text(device.save()) == text
    assert everything(function) == registers
    assert decoding(device) == places
    device.resume()


def as_text(state: dict[str, Any]) -> str:
    """A state as a file would have it: numbers as keys, for one, come back as text."""
    return json.dumps(state, default=lambda value: {"hex": bytes.hex(value)})


def from_text(text: str) -> dict[str, Any]:
    def revive(value: dict[str, Any]) -> Any:
        return bytes.fromhex(value["hex"]) if value.keys() == {"hex"} else value

    state: dict[str, Any] = json.loads(text, object_hook=revive)
    return state


def access(machine, device, index, offset, size, value):
    """One access to a BAR, if it decodes."""
    bar = device.bars[index]
    if bar.live is None:
        return
    size = min(size, 4) if bar.kind == "io" else size
    offset %= bar.size
    view = BarView(machine, index, bar.kind == "io", False, False, bar.addr, bar.size)
    if value is None:
        assert 0 <= view.read(offset, size) < 1 << 8 * size
    else:
        view.write(offset, size, value & (1 << 8 * size) - 1)
