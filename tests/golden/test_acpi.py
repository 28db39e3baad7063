"""The ACPI tables as Debian's iasl reads them, compared with tests/golden/acpi.

``pytest tests/golden --update-golden`` writes those files anew.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pybhyve.amd64 import platform
from pybhyve.amd64.acpi.build import ACPI_BASE, build_acpi
from pybhyve.bhyverun.machine import Machine
from pybhyve.config import Config
from pybhyve.errors import BhyveError
from pybhyve.pci import init_pci
from pybhyve.variables import GlobalOptions
from pybhyve.vmmapi import VmCtx

Iasl = Callable[..., str]
GOLDEN = Path(__file__).parent / "acpi"

MACHINES = {
    # What a directly loaded kernel usually gets.
    "plain": (2, ["0.0.0=hostbridge", "0.31.0=lpc"]),
    # Interrupts, several functions in a slot, a second bus.
    "busy": (
        1,
        ["0.0.0=hostbridge", "0.3.0=uart", "0.3.1=uart", "0.31.0=lpc", "1.2.0=uart"],
    ),
    # No bridge: ISA devices stand alone, routes name interrupts.
    "no-lpc": (1, ["0.3.0=uart"]),
}


@contextlib.contextmanager
def machine_of(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    cpus, slots = MACHINES[name]
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    config = Config()
    for slot in slots:
        place, _, device = slot.partition("=")
        config.set(f"pci.{place}.device", device)
    ctx = VmCtx.create(name, cpus)
    ctx.setup_memory(64 << 20)
    machine = Machine(ctx, config, GlobalOptions.parse(config), cpus)
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
        tables = build_acpi(machine)
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
        table = build_acpi(machine)["DSDT"][1]
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


def test_too_many_processors_for_the_room(tmp_path, monkeypatch):
    with machine_of("plain", tmp_path, monkeypatch) as machine:
        machine.ncpu = 10000

        with pytest.raises(BhyveError, match="fewer vCPUs"):
            build_acpi(machine)
