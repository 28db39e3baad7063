"""The driver's half of PCI: what an operating system does with one function.

``PciFunction(machine, 3)`` is slot 3 of bus 0, seen through the configuration ports (or
through the ECAM) of a machine whose vCPUs do not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pybhyve.bhyverun.machine import Machine
from pybhyve.pci.bus import CONF1_ADDR_PORT, CONF1_DATA_PORT, CONF1_ENABLE, ECAM_BASE
from pybhyve.pci.pcireg import (
    BAR_MAX,
    MSIX_ENTRY_SIZE,
    PCIM_BAR_IO_SPACE,
    PCIM_BAR_MEM_64,
    PCIM_BAR_MEM_PREFETCH,
    PCIM_CMD_BUSMASTEREN,
    PCIM_CMD_INTXDIS,
    PCIM_CMD_MEMEN,
    PCIM_CMD_PORTEN,
    PCIM_MSICTRL_MSI_ENABLE,
    PCIM_MSIXCTRL_FUNCTION_MASK,
    PCIM_MSIXCTRL_MSIX_ENABLE,
    PCIR_BARS,
    PCIR_CAP_PTR,
    PCIR_COMMAND,
    PCIR_MSI_ADDR,
    PCIR_MSI_ADDR_HIGH,
    PCIR_MSI_CTRL,
    PCIR_MSI_DATA,
    PCIR_MSIX_CTRL,
    PCIR_MSIX_PBA,
    PCIR_MSIX_TABLE,
    PCIY_MSI,
    PCIY_MSIX,
)

MSI_BASE: Final = 0xFEE00000  # to the local APIC with id 0, physical, fixed
ONES: Final = 0xFFFFFFFF


@dataclass(slots=True, frozen=True)
class BarView:
    """A base address register as a driver finds it, and accesses to what it decodes."""

    machine: Machine
    index: int
    io: bool
    wide: bool  # 64 bits: two registers
    prefetch: bool
    addr: int
    size: int

    def read(self, offset: int, size: int = 4) -> int:
        """IN or a load."""
        if self.io:
            return self.machine.inout.read(self.addr + offset, size)
        return self.machine.mem.read(0, self.addr + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """OUT or a store."""
        if self.io:
            self.machine.inout.write(self.addr + offset, size, value)
        else:
            self.machine.mem.write(0, self.addr + offset, size, value)


class PciFunction:
    """One function, by its bus, slot and function number."""

    def __init__(
        self, machine: Machine, slot: int, func: int = 0, bus: int = 0, *, ecam=False
    ) -> None:
        self.machine = machine
        self._ports = CONF1_ENABLE | bus << 16 | slot << 11 | func << 8
        self._ecam = ECAM_BASE | bus << 20 | slot << 15 | func << 12 if ecam else 0

    # -- configuration space ---------------------------------------------------------

    def read(self, reg: int, size: int = 4) -> int:
        """Configuration bytes; ``reg`` is aligned to ``size``."""
        if self._ecam:
            return self.machine.mem.read(0, self._ecam | reg, size)
        inout = self.machine.inout
        inout.write(CONF1_ADDR_PORT, 4, self._ports | reg & 0xFC)
        return inout.read(CONF1_DATA_PORT + (reg & 3), size)

    def write(self, reg: int, size: int, value: int) -> None:
        """Configuration bytes; ``reg`` is aligned to ``size``."""
        if self._ecam:
            self.machine.mem.write(0, self._ecam | reg, size, value)
            return
        inout = self.machine.inout
        inout.write(CONF1_ADDR_PORT, 4, self._ports | reg & 0xFC)
        inout.write(CONF1_DATA_PORT + (reg & 3), size, value)

    def capabilities(self) -> Iterator[tuple[int, int]]:
        """Id and offset of each capability, in the order of the list."""
        at = self.read(PCIR_CAP_PTR, 1)
        seen = set()
        while at:
            assert at not in seen, f"the capability list comes back to {at:#x}"
            assert at >= 0x40, f"a capability in the header, at {at:#x}"
            assert not at & 3, f"a capability at {at:#x}, which is no dword"
            seen.add(at)
            yield self.read(at, 1), at
            at = self.read(at + 1, 1)

    def capability(self, cap_id: int, nth: int = 0) -> int:
        """The offset of the ``nth`` capability with an id; LookupError: there is none.

        Virtio has several of one id.
        """
        found = [at for each, at in self.capabilities() if each == cap_id]
        if nth >= len(found):
            raise LookupError(f"capability {cap_id:#x} number {nth}")
        return found[nth]

    def enable(
        self, *, io: bool = True, memory: bool = True, master: bool = True
    ) -> None:
        """The command register's three switches; INTx is allowed."""
        command = self.read(PCIR_COMMAND, 2)
        for bit, on in (
            (PCIM_CMD_PORTEN, io),
            (PCIM_CMD_MEMEN, memory),
            (PCIM_CMD_BUSMASTEREN, master),
            (PCIM_CMD_INTXDIS, False),
        ):
            command = command | bit if on else command & ~bit
        self.write(PCIR_COMMAND, 2, command)

    # -- base address registers ------------------------------------------------------

    def bars(self) -> dict[int, BarView]:
        """All that exist, sized as Linux does: with decoding off."""
        command = self.read(PCIR_COMMAND, 2)
        self.write(PCIR_COMMAND, 2, command & ~(PCIM_CMD_PORTEN | PCIM_CMD_MEMEN))
        found = {}
        index = 0
        while index < BAR_MAX:
            bar = self._size_bar(index)
            if bar is not None:
                found[index] = bar
            index += 2 if bar is not None and bar.wide else 1
        self.write(PCIR_COMMAND, 2, command)
        return found

    def bar(self, index: int) -> BarView:
        """BAR ``index``, which must exist; KeyError otherwise."""
        return self.bars()[index]

    def move_bar(self, index: int, addr: int) -> BarView:
        """Give BAR ``index`` another address; what it decodes afterwards."""
        bar = self.bars()[index]
        self.write(PCIR_BARS + 4 * index, 4, addr & ONES)
        if bar.wide:
            self.write(PCIR_BARS + 4 * index + 4, 4, addr >> 32)
        return self.bars()[index]

    def _size_bar(self, index: int) -> BarView | None:
        reg = PCIR_BARS + 4 * index
        low, low_mask = self._probe(reg)
        if not low_mask:
            return None
        io = bool(low & PCIM_BAR_IO_SPACE)
        wide = not io and bool(low & PCIM_BAR_MEM_64)
        addr, mask = low, low_mask | ~ONES
        if io:
            mask |= 0xFFFF0000  # 6.2.5.1: the upper half may be hardwired to zero
        if wide:
            high, high_mask = self._probe(reg + 4)
            addr, mask = low | high << 32, low_mask | high_mask << 32 | -1 << 64
        clear = ~(3 if io else 0xF)
        size = -(mask & clear)
        assert size & size - 1 == 0, f"BAR {index} has size {size:#x}"
        prefetch = not io and bool(low & PCIM_BAR_MEM_PREFETCH)
        return BarView(self.machine, index, io, wide, prefetch, addr & clear, size)

    def _probe(self, reg: int) -> tuple[int, int]:
        """What a register holds, and what it reads after ones were written."""
        value = self.read(reg)
        self.write(reg, 4, ONES)
        mask = self.read(reg)
        self.write(reg, 4, value)
        return value, mask

    # -- messages --------------------------------------------------------------------

    def enable_msi(self, vector: int, count: int = 1) -> None:
        """``count`` messages (a power of two) for vectors from ``vector`` on."""
        at = self.capability(PCIY_MSI)
        self.write(at + PCIR_MSI_ADDR, 4, MSI_BASE)
        self.write(at + PCIR_MSI_ADDR_HIGH, 4, 0)
        self.write(at + PCIR_MSI_DATA, 2, vector)
        ctrl = self.read(at + PCIR_MSI_CTRL, 2) & ~0x70
        ctrl |= PCIM_MSICTRL_MSI_ENABLE | (count.bit_length() - 1) << 4
        self.write(at + PCIR_MSI_CTRL, 2, ctrl)

    def enable_msix(self, vectors: dict[int, int] | None = None) -> int:
        """MSI-X on, with an unmasked entry for each ``{entry: vector}``.

        How many entries the table has.
        """
        for entry, vector in (vectors or {}).items():
            self.set_msix_vector(entry, vector)
        at = self.capability(PCIY_MSIX) + PCIR_MSIX_CTRL
        ctrl = self.read(at, 2) & ~PCIM_MSIXCTRL_FUNCTION_MASK
        self.write(at, 2, ctrl | PCIM_MSIXCTRL_MSIX_ENABLE)
        return (ctrl & 0x7FF) + 1

    def set_msix_vector(self, entry: int, vector: int, *, masked: bool = False) -> None:
        """One entry of the table, written as Linux does: masked first."""
        bar, offset = self._msix_place(PCIR_MSIX_TABLE)
        offset += MSIX_ENTRY_SIZE * entry
        bar.write(offset + 12, 4, 1)
        bar.write(offset, 4, MSI_BASE)
        bar.write(offset + 4, 4, 0)
        bar.write(offset + 8, 4, vector)
        bar.write(offset + 12, 4, int(masked))

    def mask_msix_vector(self, entry: int, masked: bool) -> None:
        """Only the mask bit of an entry."""
        bar, offset = self._msix_place(PCIR_MSIX_TABLE)
        bar.write(offset + MSIX_ENTRY_SIZE * entry + 12, 4, int(masked))

    def msix_pending(self, entry: int) -> bool:
        """An entry's bit in the pending bit array."""
        bar, offset = self._msix_place(PCIR_MSIX_PBA)
        return bool(bar.read(offset + entry // 32 * 4, 4) >> entry % 32 & 1)

    def _msix_place(self, reg: int) -> tuple[BarView, int]:
        value = self.read(self.capability(PCIY_MSIX) + reg)
        return self.bar(value & 7), value & ~7
