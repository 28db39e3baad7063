"""fwctl: edk2's BhyveFwCtlLib and less polite guests."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ONES = 0xFFFFFFFF
ENOENT = 2
E2BIG = 7


class Rig:
    """What firmware does."""

    def __init__(self, machine) -> None:
        self.device = machine.devices["fwctl"]
        self.read = machine.inout.read
        self.write = machine.inout.write

    def identify(self) -> bytes:
        self.write(0x510, 2, 0)
        return bytes(self.read(0x511, 1) for _ in range(4))

    def send(self, words: list[int]) -> None:
        for word in words:
            self.write(0x510, 4, word)

    def request(self, op: int, name: bytes, txid: int = 0xA5) -> list[int]:
        data = name + bytes(-len(name) % 4)
        self.send([12 + len(name), op, txid])
        self.send([word for (word,) in struct.iter_unpack("<I", data)])
        return self.reply()

    def reply(self) -> list[int]:
        length = self.read(0x510, 4)  # edk2 reads at 0x510
        words = [length] + [self.read(0x511, 4) for _ in range(length // 4 - 1)]
        assert self.read(0x511, 4) == ONES
        return words


@pytest.fixture
def rig(build, tmp_path: Path) -> Rig:
    (tmp_path / "rom").write_bytes(bytes(4096))
    return Rig(build(bootrom=str(tmp_path / "rom"), cpus=3))


def test_only_with_a_boot_rom(build):
    assert build().inout.owner(0x510) is None


def test_signature(rig):
    assert rig.identify() == b"BHYV"
    assert rig.read(0x511, 1) == 0xFF
    assert rig.identify() == b"BHYV"


def test_number_of_cpus(rig):
    rig.identify()

    assert rig.request(4, b"hw.ncpu\0") == [24, 4, 0xA5, 0, 4, 0]
    assert rig.request(3, b"hw.ncpu\0", 0xA6) == [28, 3, 0xA6, 0, 4, 0, 3]
    assert rig.request(3, b"hw.ncpu") == [28, 3, 0xA5, 0, 4, 0, 3]


@pytest.mark.parametrize(
    ("op", "name", "error"),
    [
        (1, b"hw.ncpu\0", ENOENT),
        (2, b"", ENOENT),
        (5, b"hw.ncpu\0", ENOENT),
        (0xFFFFFFFF, b"", ENOENT),
        (3, b"hw\0", ENOENT),
        (3, b"", ENOENT),
        (3, b"a" * 80, ENOENT),
        (3, b"a" * 81, E2BIG),
        (4, b"a" * 5000, E2BIG),
    ],
)
def test_refusals(rig, op, name, error):
    rig.identify()

    assert rig.request(op, name) == [16, op, 0xA5, error]


@pytest.mark.parametrize("length", [0, 11, 12])
def test_a_request_is_at_least_its_header(rig, length):
    rig.identify()
    rig.send([length, 3, 7])

    assert rig.reply() == [16, 3, 7, ENOENT]


def test_a_new_request_drops_the_reply(rig):
    rig.identify()
    rig.send([12, 1, 1])
    rig.read(0x511, 4)

    assert rig.request(3, b"hw.ncpu\0") == [28, 3, 0xA5, 0, 4, 0, 3]


def test_other_sizes(rig):
    rig.identify()
    rig.write(0x510, 1, 0)
    rig.write(0x510, 2, 1)

    assert rig.read(0x511, 2) == 0xFFFF
    assert rig.request(3, b"hw.ncpu\0")[-1] == 3


@pytest.mark.parametrize("at", range(8))
def test_round_trip(rig, at):
    words = [20, 3, 9, *struct.unpack("<II", b"hw.ncpu\0")]
    rig.write(0x510, 2, 0)
    signature = bytes(rig.read(0x511, 1) for _ in range(min(at, 4)))
    if at >= 4:
        rig.send(words[: at - 4])
    state = rig.device.save()

    rig.device.reset()
    rig.device.restore(state)

    signature += bytes(rig.read(0x511, 1) for _ in range(4 - len(signature)))
    assert signature == b"BHYV"
    rig.send(words[max(at - 4, 0) :])
    assert rig.reply() == [28, 3, 9, 0, 4, 0, 3]


def test_a_state_of_another_version(rig):
    with pytest.raises(ValueError, match="version 0"):
        rig.device.restore(rig.device.save() | {"version": 0})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.none() | st.integers(0, ONES)),
        max_size=40,
    )
)
def test_no_access_fails(rig, accesses):
    for size, value in accesses:
        if value is None:
            assert 0 <= rig.read(0x511, size) < 1 << 8 * size
        else:
            rig.write(0x510, size, value & ((1 << 8 * size) - 1))
    assert rig.identify() == b"BHYV"
    assert rig.request(3, b"hw.ncpu\0")[-1] == 3
