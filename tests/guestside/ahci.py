"""The driver's half of AHCI: command lists, FISes and PRDs in a machine's memory.

    port = AhciDriver(machine, 3).port(0)
    port.start()
    data = port.read(0x25, lba=0, count=8, length=4096)

The machine's vCPUs do not run; its devices' threads do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from pybhyve.bhyverun.machine import Machine
from pybhyve.pci.ahci import ahcireg as reg
from tests.guestside.pci import BarView, PciFunction

MEMORY: Final = 1 << 20  # of the first port
PORT_MEMORY: Final = 64 << 10
LIST: Final = 0  # in a port's memory
RFIS: Final = 0x400
TABLES: Final = 0x1000
TABLE_SIZE: Final = 0x400
BUFFERS: Final = 4 << 20  # data of slot 0
BUFFER_SIZE: Final = 256 << 10
TIMEOUT: Final = 10.0

ATA_ABORTED: Final = 0x0451  # PxTFD: ABRT, DRDY, DSC, ERR


def h2d(
    opcode: int,
    *,
    lba: int = 0,
    count: int = 0,
    features: int = 0,
    device: int = 0x40,
    auxiliary: int = 0,
) -> bytes:
    """A register FIS that carries a command."""
    low, high = lba & 0xFFFFFF, lba >> 24 & 0xFFFFFF
    return (
        bytes((reg.FIS_H2D, reg.FIS_C, opcode, features & 0xFF))
        + low.to_bytes(3, "little")
        + bytes((device,))
        + high.to_bytes(3, "little")
        + bytes((features >> 8,))
        + count.to_bytes(2, "little")
        + bytes(2)
        + auxiliary.to_bytes(4, "little")
    )


def h2d28(opcode: int, *, lba: int = 0, count: int = 0, features: int = 0) -> bytes:
    """The same with an address of 28 bits."""
    device = 0x40 | lba >> 24 & 0xF
    return h2d(
        opcode, lba=lba & 0xFFFFFF, count=count, features=features, device=device
    )


def queued(
    opcode: int, slot: int, *, lba: int = 0, count: int = 1, fua: bool = False
) -> bytes:
    """READ or WRITE FPDMA QUEUED."""
    device = 0xC0 if fua else 0x40
    return h2d(opcode, lba=lba, features=count, count=slot << 3, device=device)


@dataclass(slots=True, frozen=True)
class AhciPort:
    """A port's registers and memory."""

    machine: Machine
    bar: BarView
    number: int

    # -- registers -------------------------------------------------------------------

    def get(self, register: str) -> int:
        """A register of `PortRegs` by its name."""
        return self.bar.read(self._offset(register))

    def set(self, register: str, value: int) -> None:
        """A register of `PortRegs` by its name."""
        self.bar.write(self._offset(register), 4, value)

    def _offset(self, register: str) -> int:
        base = reg.PORT_BASE + reg.PORT_STEP * self.number
        return base + int(getattr(reg.PortRegs, register).offset)

    def wait(self, done: Callable[[], bool], what: str = "the port") -> None:
        """Poll, as a driver without interrupts does."""
        end = time.monotonic() + TIMEOUT
        while not done():
            assert time.monotonic() < end, f"timeout: {what} {self.state()}"
            time.sleep(0.0005)

    def state(self) -> str:
        """The registers, for messages."""
        names = ["IS", "IE", "CMD", "TFD", "SIG", "SSTS", "SCTL", "SERR", "SACT", "CI"]
        return " ".join(f"{name}={self.get(name):#x}" for name in names)

    # -- life ------------------------------------------------------------------------

    @property
    def memory(self) -> int:
        """Where the port's structures are."""
        return MEMORY + PORT_MEMORY * self.number

    def start(self) -> None:
        """Give the port its memory, and have it work."""
        self.machine.ctx.write(self.memory, bytes(PORT_MEMORY))
        self.set("CLB", self.memory + LIST)
        self.set("CLBU", 0)
        self.set("FB", self.memory + RFIS)
        self.set("FBU", 0)
        self.set("SERR", 0xFFFFFFFF)
        self.set("IS", 0xFFFFFFFF)
        self.set("IE", reg.IE_MASK)
        self.set("CMD", self.get("CMD") | reg.CMD_FRE)
        self.set("CMD", self.get("CMD") | reg.CMD_ST)

    def stop(self) -> None:
        """Stop the command list, and wait until that is so."""
        self.set("CMD", self.get("CMD") & ~reg.CMD_ST)
        self.wait(lambda: not self.get("CMD") & reg.CMD_CR, "CR")

    def restart(self) -> None:
        """What a driver does after an error."""
        self.stop()
        self.set("SERR", 0xFFFFFFFF)
        self.set("IS", 0xFFFFFFFF)
        self.set("CMD", self.get("CMD") | reg.CMD_ST)

    def comreset(self) -> None:
        """Reset the link; the list must not run."""
        self.set("SCTL", reg.DET_COMRESET)
        self.set("SCTL", 0)
        self.wait(lambda: self.get("SSTS") & 0xF == 3, "DET")

    # -- commands --------------------------------------------------------------------

    def table(self, slot: int) -> int:
        """Where a slot's command table is."""
        return self.memory + TABLES + TABLE_SIZE * slot

    def buffer(self, slot: int) -> int:
        """Where a slot's data are."""
        return BUFFERS + BUFFER_SIZE * slot

    def prepare(
        self,
        slot: int,
        fis: bytes,
        prds: Sequence[tuple[int, int]] = (),
        *,
        acmd: bytes = b"",
        write: bool = False,
        cfl: int = 5,
    ) -> None:
        """Fill a slot; ``prds`` are addresses and lengths."""
        write_mem = self.machine.ctx.write
        table = fis.ljust(reg.TABLE_ACMD, b"\0") + acmd.ljust(0x40, b"\0")
        for address, length in prds:
            table += reg.PRD.pack(address, 0, length - 1)
        write_mem(self.table(slot), table)
        flags = cfl | (0x20 if acmd else 0) | (0x40 if write else 0)
        header = reg.HEADER.pack(flags, len(prds), 0, self.table(slot))
        write_mem(self.memory + LIST + reg.HEADER_SIZE * slot, header.ljust(32, b"\0"))

    def issue(self, *slots: int, active: bool = False) -> None:
        """Have slots done; ``active``: they are queued commands."""
        bits = sum(1 << slot for slot in slots)
        if active:
            self.set("SACT", bits)
        self.set("CI", bits)

    def run(
        self,
        fis: bytes,
        prds: Sequence[tuple[int, int]] = (),
        *,
        acmd: bytes = b"",
        write: bool = False,
        slot: int = 0,
    ) -> int:
        """Do a command to its end; PxTFD."""
        self.set("IS", 0xFFFFFFFF)
        self.prepare(slot, fis, prds, acmd=acmd, write=write)
        self.issue(slot)
        errors = reg.IS_TFES | reg.IS_HBFS | reg.IS_IFS
        self.wait(
            lambda: not self.get("CI") >> slot & 1 or self.get("IS") & errors != 0,
            f"command {fis[2]:#x}",
        )
        return self.get("TFD")

    def read(self, opcode: int, length: int, **fields: int) -> bytes:
        """A command with data to the driver, which must succeed."""
        return self._read(h2d(opcode, **fields), length)

    def read28(self, opcode: int, length: int, **fields: int) -> bytes:
        """The same with an address of 28 bits."""
        return self._read(h2d28(opcode, **fields), length)

    def _read(self, fis: bytes, length: int) -> bytes:
        tfd = self.run(fis, [(self.buffer(0), length)])
        assert not tfd & 0x89, f"TFD {tfd:#x}"
        assert self.prdbc(0) == length
        return self.machine.ctx.read(self.buffer(0), length)

    def write(self, fis: bytes, data: bytes) -> None:
        """A command with data from the driver, which must succeed."""
        self.machine.ctx.write(self.buffer(0), data)
        tfd = self.run(fis, [(self.buffer(0), len(data))], write=True)
        assert not tfd & 0x89, f"TFD {tfd:#x}"

    def packet(self, *cdb: int, length: int = 0) -> bytes | None:
        """A PACKET command; None: it ended in CHECK CONDITION."""
        acmd = bytes(cdb).ljust(12, b"\0")
        prds = [(self.buffer(0), length)] if length else []
        fis = h2d(0xA0, features=1 if length else 0)
        tfd = self.run(fis, prds, acmd=acmd)
        if tfd & reg.STS_ERR:
            self.restart()
            return None
        return self.machine.ctx.read(self.buffer(0), self.prdbc(0) if length else 0)

    def prdbc(self, slot: int) -> int:
        """How many bytes a command has transferred, as its header says."""
        at = self.memory + LIST + reg.HEADER_SIZE * slot + reg.PRDBC
        return int.from_bytes(self.machine.ctx.read(at, 4), "little")

    def fis(self, offset: int) -> bytes:
        """A received FIS by its place in the area."""
        return self.machine.ctx.read(self.memory + RFIS + offset, 20)


class AhciDriver:
    """The adapter in a slot of bus 0."""

    def __init__(self, machine: Machine, slot: int = 3) -> None:
        self.machine = machine
        self.function = PciFunction(machine, slot)
        self.function.enable()
        self.bar = self.function.bar(5)

    def get(self, register: str) -> int:
        """A register of `HbaRegs` by its name."""
        return self.bar.read(int(getattr(reg.HbaRegs, register).offset))

    def set(self, register: str, value: int) -> None:
        """A register of `HbaRegs` by its name."""
        self.bar.write(int(getattr(reg.HbaRegs, register).offset), 4, value)

    def port(self, number: int) -> AhciPort:
        """A port."""
        return AhciPort(self.machine, self.bar, number)

    def reset(self) -> None:
        """Reset the adapter, and wait until that is done."""
        self.set("GHC", reg.GHC_HR | reg.GHC_AE)
        end = time.monotonic() + TIMEOUT
        while self.get("GHC") & reg.GHC_HR:
            assert time.monotonic() < end, "timeout: HR"
