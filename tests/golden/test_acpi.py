"""The ACPI tables as Debian's iasl reads them, compared with tests/golden/acpi.

``pytest tests/golden --update-golden`` writes those files anew.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pybhyve.amd64 import platform
from pybhyve.amd64.acpi.build import ACPI_BASE, build_acpi, place_acpi
from pybhyve.bhyverun.machine import Machine
from pybhyve.config import Config
from pybhyve.errors import BhyveError
from pybhyve.pci import init_pci
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import VmCtx
from tests.guestside.loader import run_script

Iasl = Callable[..., str]
GOLDEN = Path(__file__).parent / "acpi"

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Spec:
    slots: tuple[str, ...]
    cpus: int = 1
    memory: tuple[int, ...] = (64 * MIB,)  # of each NUMA domain
    domains: tuple[frozenset[int], ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


NO_MPTABLE = {"x86.mptable": "false"}  # which is for one bus
BUSY = ("0.0.0=hostbridge", "0.3.0=uart", "0.3.1=uart", "0.31.0=lpc", "1.2.0=uart")
FWCFG = {"lpc.fwcfg": "qemu"}

MACHINES = {
    # What a directly loaded kernel usually gets.
    "plain": Spec(("0.0.0=hostbridge", "0.31.0=lpc"), 2),
    # Interrupts, several functions in a slot, a second bus.
    "busy": Spec(BUSY, variables=NO_MPTABLE),
    # No bridge: ISA devices stand alone, routes name interrupts.
    "no-lpc": Spec(("0.3.0=uart",)),
    # OVMF's: fw_cfg, and windows for BARs that firmware moves.
    "fwcfg": Spec(("0.0.0=hostbridge", "0.3.0=uart", "0.31.0=lpc"), variables=FWCFG),
    # The same where other buses are in between, and RAM up to 3 GiB.
    "fwcfg-busy": Spec(BUSY, memory=(3 * GIB,), variables=FWCFG | NO_MPTABLE),
    "pvpanic": Spec(
        ("0.0.0=hostbridge", "0.31.0=lpc"), variables={"lpc.pvpanic": "true"}
    ),
    "numa": Spec(
        ("0.0.0=hostbridge", "0.31.0=lpc"),
        4,
        (2 * GIB, 2 * GIB),
        (frozenset({0, 1}), frozenset({2, 3})),
    ),
}


@contextlib.contextmanager
def machine_of(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    spec = MACHINES[name]
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    config = Config()
    for slot in spec.slots:
        place, _, device = slot.partition("=")
        config.set(f"pci.{place}.device", device)
    for variable, value in spec.variables.items():
        config.set(variable, value)
    ctx = VmCtx.create(name, spec.cpus)
    ctx.setup_memory(0, spec.memory)
    options = GlobalOptions.parse(config)
    machine = Machine(ctx, config, options, spec.cpus, spec.domains)
    try:
        platform.init_platform(machine)
        init_pci(machine)
        yield machine
    finally:
        machine.halt()
        ctx.destroy()


def disassemble(iasl: Iasl, directory: Path, name: str, table: bytes) -> str:
    """What iasl makes of a table, without its preamble, which has the date."""
    path = directory / f"{name}.dat"
    path.write_bytes(table)
    iasl(directory, "-d", path.name)
    text = path.with_suffix(".dsl").read_text()
    text = re.sub(r"\A/\*.*?\*/\n+", "", text, flags=re.DOTALL)
    return text.partition("Raw Table Data")[0]


@pytest.mark.parametrize("name", MACHINES)
def test_tables_are_as_they_were(name, tmp_path, monkeypatch, request, iasl):
    with machine_of(name, tmp_path, monkeypatch) as machine:
        tables = place_acpi(build_acpi(machine))
    text = ""
    for signature, (address, table) in tables.items():
        if signature == "RSDP":  # which iasl does not read
            continue
        decoded = disassemble(iasl, tmp_path, signature.lower(), table)
        assert "Invalid" not in decoded
        assert "Incorrect checksum" not in decoded
        text += f"======== {signature} at {address:#x}\n{decoded}\n"
    golden = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)

    assert text == golden.read_text()


@pytest.mark.parametrize("name", MACHINES)
def test_iasl_finds_no_fault_when_it_compiles_the_dsdt(
    name, tmp_path, monkeypatch, iasl
):
    with machine_of(name, tmp_path, monkeypatch) as machine:
        table = place_acpi(build_acpi(machine))["DSDT"][1]
    text = disassemble(iasl, tmp_path, "dsdt", table)
    output = iasl(tmp_path, "-oa", "dsdt.dsl")

    assert "0 Errors, 0 Warnings" in output
    compiled = (tmp_path / "dsdt.aml").read_bytes()
    assert disassemble(iasl, tmp_path, "again", compiled) == text


def test_pointers_lead_to_the_tables(tmp_path, monkeypatch):
    with machine_of("plain", tmp_path, monkeypatch) as machine:
        platform.late_init(machine)
        read = machine.ctx.read

        def u32(gpa: int) -> int:
            return int.from_bytes(read(gpa, 4), "little")

        def u64(gpa: int) -> int:
            return int.from_bytes(read(gpa, 8), "little")

        rsdp = read(ACPI_BASE, 36)
        assert sum(rsdp[:20]) & 0xFF == sum(rsdp) & 0xFF == 0
        rsdt, xsdt = u32(ACPI_BASE + 16), u64(ACPI_BASE + 24)
        count = (u32(rsdt + 4) - 36) // 4
        listed = [u32(rsdt + 36 + 4 * index) for index in range(count)]
        assert listed == [u64(xsdt + 36 + 8 * index) for index in range(count)]
        assert [read(at, 4) for at in listed] == [
            b"FACP",
            b"APIC",
            b"HPET",
            b"MCFG",
            b"SPCR",
        ]
        for at in (rsdt, xsdt, *listed, u32(listed[0] + 40)):
            assert sum(read(at, u32(at + 4))) & 0xFF == 0
        facs = u32(listed[0] + 36)
        assert facs % 64 == 0
        assert read(facs, 4) == b"FACS"
        assert read(u64(listed[0] + 140), 4) == b"DSDT"


@pytest.mark.parametrize("name", MACHINES)
def test_firmware_that_follows_the_script_has_the_same_tables(
    name, tmp_path, monkeypatch
):
    end = 0x7E000000

    def allocate(size: int, align: int) -> int:
        nonlocal end
        end = (end - size) & -align
        return end

    with machine_of(name, tmp_path, monkeypatch) as machine:
        platform.late_init(machine)
        tables = build_acpi(machine)
        fwcfg = machine.fwcfg
    found = run_script(fwcfg.file("etc/table-loader"), fwcfg.file, allocate)

    assert list(found) == [f"etc/acpi/{table.name}" for table in tables]
    addresses = {table.name: found[f"etc/acpi/{table.name}"][0] for table in tables}
    for table in tables:
        address, data = found[f"etc/acpi/{table.name}"]
        assert address % table.align == 0
        assert data == table.at(addresses)


def test_too_many_processors_for_the_room(tmp_path, monkeypatch):
    with machine_of("plain", tmp_path, monkeypatch) as machine:
        machine.ncpu = 10000

        with pytest.raises(BhyveError, match="fewer vCPUs"):
            place_acpi(build_acpi(machine))
