"""The SMBIOS tables as Debian's dmidecode reads them; compare tests/golden/smbios.

``pytest tests/golden --update-golden`` writes those files anew.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from pybhyve.amd64.smbios import (
    ANCHOR_FILE,
    SMBIOS_BASE,
    TABLES_FILE,
    build_smbios,
    init_smbios,
)
from pybhyve.bhyverun.machine import Machine
from pybhyve.config import Config
from pybhyve.errors import BhyveError, ConfigError
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import VmCtx

Dmidecode = Callable[..., str]
GOLDEN = Path(__file__).parent / "smbios"
MIB = 1 << 20
GIB = 1 << 30
UUID = "00112233-4455-6677-8899-aabbccddeeff"
TEXTS = [
    key.name
    for key in GlobalOptions.keys.values()
    if key.name.startswith(("bios.", "system.", "board.", "chassis."))
]


@dataclass(frozen=True, slots=True)
class Spec:
    memory: int
    topology: tuple[int, int, int] = (1, 1, 1)
    variables: Mapping[str, str] = field(default_factory=dict)


MACHINES = {
    # Nothing set, a size in KiB.
    "small": Spec(16 * MIB),
    # Every variable, several sockets, memory on both sides of the PCI hole.
    "all": Spec(
        5 * GIB,
        (2, 4, 2),
        {"uuid": UUID} | {name: f"my {name}" for name in TEXTS},
    ),
    # Texts that are not there, or are no ASCII.
    "texts": Spec(
        512 * MIB, variables=dict.fromkeys(TEXTS, "") | {"system.sku": "größer"}
    ),
    # Sizes and addresses that only the extended fields have room for.
    "huge": Spec(6 << 40),
}


@contextlib.contextmanager
def machine_of(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(nodename="host"))
    config = Config()
    config.set("name", "guest")
    for variable, value in spec.variables.items():
        config.set(variable, value)
    sockets, cores, threads = spec.topology
    cpus = sockets * cores * threads
    ctx = VmCtx.create("guest", cpus)
    ctx.vm.set_topology(sockets, cores, threads)
    ctx.setup_memory(2 * MIB)
    machine = Machine(ctx, config, GlobalOptions.parse(config), cpus)
    # What the tables tell of; not all of it has to be there.
    ctx.lowmem_size = min(spec.memory, 3 * GIB)
    ctx.highmem_size = max(spec.memory - 3 * GIB, 0)
    try:
        yield machine
    finally:
        machine.halt()
        ctx.destroy()


@pytest.mark.parametrize("name", MACHINES)
def test_tables_are_as_they_were(name, tmp_path, monkeypatch, request, dmidecode):
    with machine_of(MACHINES[name], tmp_path, monkeypatch) as machine:
        entry_point, structures = build_smbios(machine, 0x20)
    dump = tmp_path / "dump"
    dump.write_bytes(entry_point.ljust(0x20, b"\0") + structures)
    text = dmidecode(tmp_path, "--from-dump", "dump")
    text = re.sub(r"\A# dmidecode.*\n", "", text)
    golden = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)

    assert text == golden.read_text()
    for complaint in ("BAD", "Wrong", "broken", "TRUNCATED", "OUT OF SPEC", "# "):
        assert complaint not in text


def test_in_memory_and_for_firmware(tmp_path, monkeypatch):
    with machine_of(MACHINES["small"], tmp_path, monkeypatch) as machine:
        memory = init_smbios(machine)
        anchor = machine.fwcfg.file(ANCHOR_FILE)
        tables = machine.fwcfg.file(TABLES_FILE)

    assert memory == anchor + tables
    assert anchor.startswith(b"_SM_")
    assert sum(anchor) & 0xFF == sum(anchor[0x10:]) & 0xFF == 0
    assert int.from_bytes(anchor[0x16:0x18], "little") == len(tables)
    assert int.from_bytes(anchor[0x18:0x1C], "little") == SMBIOS_BASE + len(anchor)


def structures_of(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, handle and whole of each structure."""
    while data:
        end = data.index(b"\0\0", data[1]) + 2
        yield data[0], int.from_bytes(data[2:4], "little"), data[:end]
        data = data[end:]


def test_handles_lead_to_what_they_name(tmp_path, monkeypatch):
    with machine_of(MACHINES["all"], tmp_path, monkeypatch) as machine:
        entry_point, data = build_smbios(machine, 0)
    structures = [*structures_of(data)]
    handles = {handle: kind for kind, handle, _ in structures}

    def handle_at(kind: int, offset: int) -> list[int]:
        return [
            handles[int.from_bytes(whole[offset : offset + 2], "little")]
            for each, _, whole in structures
            if each == kind
        ]

    assert len(handles) == len(structures)
    assert int.from_bytes(entry_point[0x1C:0x1E], "little") == len(structures)
    longest = max(len(whole) for _, _, whole in structures)
    assert int.from_bytes(entry_point[8:10], "little") == longest
    assert handle_at(2, 0x0B) == [3]
    assert handle_at(17, 0x04) == [16]
    assert handle_at(19, 0x0C) == [16, 16]


def test_too_much_text(tmp_path, monkeypatch):
    spec = Spec(64 * MIB, variables={"board.location": "x" * 5000})

    with (
        machine_of(spec, tmp_path, monkeypatch) as machine,
        pytest.raises(BhyveError, match="use shorter texts or fewer sockets"),
    ):
        build_smbios(machine, 0)


@pytest.mark.parametrize(
    "text", ["", "x", UUID[:-1], UUID.replace("-", ""), f"{{{UUID}}}", UUID[:-2] + "_0"]
)
def test_no_uuid(text):
    config = Config()
    config.set("uuid", text)

    with pytest.raises(ConfigError, match="expected a UUID like"):
        GlobalOptions.parse(config)
