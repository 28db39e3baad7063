"""One PCI function: configuration space, BARs, capabilities and interrupts.

PCI Local Bus 3.0, chapter 6.  bhyve: pci_emul.c.  Subclasses of :class:`PciDevice` are
the devices; each is registered with :func:`pybhyve.pci.registry.pci_device`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, NamedTuple, TypeVar

from pybhyve.amd64.inout import PORTS
from pybhyve.amd64.mem import MemRange
from pybhyve.amd64.pci_irq import IntxRoute
from pybhyve.device import Device
from pybhyve.errors import DeviceError
from pybhyve.options import Options
from pybhyve.pci.msix import MsixTable
from pybhyve.pci.pcireg import (
    BAR_MAX,
    CONFIG_SIZE,
    MSI_MAX,
    PCIEM_TYPE_ENDPOINT,
    PCIEM_TYPE_ROOT_INT_EP,
    PCIM_BAR_IO_BASE,
    PCIM_BAR_IO_SPACE,
    PCIM_BAR_MEM_64,
    PCIM_BAR_MEM_BASE,
    PCIM_BAR_MEM_PREFETCH,
    PCIM_BIOS_ADDR,
    PCIM_BIOS_ENABLE,
    PCIM_CMD_BUSMASTEREN,
    PCIM_CMD_INTXDIS,
    PCIM_CMD_MEMEN,
    PCIM_CMD_PORTEN,
    PCIM_CMD_WRITABLE,
    PCIM_MSICTRL_64BIT,
    PCIM_MSICTRL_MME,
    PCIM_MSICTRL_MSI_ENABLE,
    PCIM_MSIXCTRL_FUNCTION_MASK,
    PCIM_MSIXCTRL_MSIX_ENABLE,
    PCIM_STATUS_CAPPRESENT,
    PCIM_STATUS_INTX,
    PCIR_BARS,
    PCIR_BIOS,
    PCIR_CACHELNSZ,
    PCIR_CAP_PTR,
    PCIR_CLASS,
    PCIR_COMMAND,
    PCIR_DEVICE,
    PCIR_HEADER_END,
    PCIR_INTLINE,
    PCIR_INTPIN,
    PCIR_LATTIMER,
    PCIR_MSI_ADDR,
    PCIR_MSI_ADDR_HIGH,
    PCIR_MSI_CTRL,
    PCIR_MSI_DATA,
    PCIR_MSIX_CTRL,
    PCIR_PROGIF,
    PCIR_REVID,
    PCIR_STATUS,
    PCIR_SUBCLASS,
    PCIR_SUBDEV,
    PCIR_SUBVEND,
    PCIR_VENDOR,
    PCIY_EXPRESS,
    PCIY_MSI,
    PCIY_MSIX,
    ROM_INDEX,
    ROM_MAX,
    ROM_SIGNATURE,
)
from pybhyve.vmmapi import PAGE_SIZE, VmmError

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.pci.bus import PciHost

MSI_ADDRESS: Final = 0xFEE  # bits 31:20 of a message address; others reach no APIC

# Kinds of BAR.
BAR_IO: Final = "io"
BAR_MEM32: Final = "mem32"
BAR_MEM64: Final = "mem64"
BAR_ROM: Final = "rom"
# 6.2.5.2 has ROMs of 2 KiB up; ours is mapped, by pages.
_BAR_MIN_SIZE: Final = {
    BAR_IO: 4,
    BAR_MEM32: 16,
    BAR_MEM64: 16,
    BAR_ROM: PAGE_SIZE,
}

OptionsT = TypeVar("OptionsT", bound=Options)


class PciAddress(NamedTuple):
    """Bus, slot and function."""

    bus: int
    slot: int
    func: int

    def __str__(self) -> str:
        return f"{self.bus}:{self.slot}:{self.func}"

    @property
    def path(self) -> str:
        """The configuration node of the function, its name among the devices too."""
        return f"pci.{self.bus}.{self.slot}.{self.func}"


class BarMemory(NamedTuple):
    """A piece of a memory segment, from ``offset`` on, to map where a BAR decodes.

    A guest that reads it, or writes it where ``prot`` has PROT_WRITE, makes no exit.
    Both the segment's piece and the BAR are whole pages.
    """

    segid: int
    offset: int
    prot: int


@dataclass(slots=True, eq=False)
class Bar:
    """One base address register; ``size`` is a power of two, ``addr`` 0 unassigned."""

    device: PciDevice[Any]
    index: int
    kind: str
    size: int
    memory: BarMemory | None = None
    """What is behind it; None: the device's ``bar_read`` and ``bar_write``."""
    addr: int = 0
    live: BarMapping | None = None
    """What is registered for it; None: nothing, or something else is in the way."""

    @property
    def name(self) -> str:
        """For messages: whose BAR."""
        which = "ROM" if self.kind == BAR_ROM else f"BAR{self.index}"
        return f"{self.device.NAME} {self.device.address} {which}"

    @property
    def reg(self) -> int:
        """The offset of its register, the first of two, in configuration space."""
        return PCIR_BIOS if self.kind == BAR_ROM else PCIR_BARS + 4 * self.index

    @property
    def order(self) -> tuple[PciAddress, int]:
        """Of several at one address, the one with the lowest decodes."""
        return self.device.address, self.index

    def overlaps(self, other: Bar) -> bool:
        """Whether both want some address of the same space."""
        return (
            (self.kind == BAR_IO) == (other.kind == BAR_IO)
            and self.addr < other.addr + other.size
            and other.addr < self.addr + self.size
        )


class BarMapping:
    """A BAR at an address.  Never changes: a vCPU may still be in it when it moves."""

    __slots__ = ("_bar", "_base", "_index", "_read", "_size", "_write", "memory")

    def __init__(self, bar: Bar) -> None:
        device = bar.device
        self._bar = bar
        self._base = bar.addr
        self._index = bar.index
        self._size = bar.size
        self._read = device.bar_read
        self._write = device.bar_write
        self.memory: MemRange | None = None
        if bar.kind != BAR_IO:
            read, write = self._read_mem, self._write_mem
            if bar.memory is not None:
                read = self._read_segment
            elif device.msix is not None and device.msix_bar == bar.index:
                read, write = self._read_msix, self._write_msix
            self.memory = MemRange(bar.name, bar.addr, bar.size, read, write)

    def connect(self) -> None:
        """Begin to decode.  DeviceError: something is in the way, nothing changed."""
        bar = self._bar
        machine = bar.device.machine
        if self.memory is None:
            machine.inout.register(
                bar.name, self._base, self._size, self.read_port, self.write_port
            )
            return
        machine.mem.register(self.memory)
        if bar.memory is None:
            return
        segid, offset, prot = bar.memory
        try:
            machine.vm.mmap_memseg(self._base, segid, offset, self._size, prot)
        except VmmError as error:
            machine.mem.unregister(self.memory)
            raise DeviceError(f"{bar.name}: memory is in the way") from error

    def disconnect(self) -> None:
        """Decode no more."""
        machine = self._bar.device.machine
        if self.memory is None:
            machine.inout.unregister(self._base, self._size)
            return
        if self._bar.memory is not None:
            machine.vm.munmap_memseg(self._base, self._size)
        machine.mem.unregister(self.memory)

    def read_port(self, port: int, size: int) -> int:
        """An IN; the part of a wide one that is beyond the BAR reads ones."""
        offset = port - self._base
        if offset + size <= self._size:
            return self._read(self._index, offset, size)
        value = (1 << 8 * size) - 1
        for at in range(self._size - offset):
            byte = self._read(self._index, offset + at, 1)
            value = value & ~(0xFF << 8 * at) | byte << 8 * at
        return value

    def write_port(self, port: int, size: int, value: int) -> None:
        """An OUT; the part of a wide one that is beyond the BAR is lost."""
        offset = port - self._base
        if offset + size <= self._size:
            self._write(self._index, offset, size, value)
            return
        for at in range(self._size - offset):
            self._write(self._index, offset + at, 1, value >> 8 * at & 0xFF)

    def _read_mem(self, gpa: int, size: int) -> int:
        return self._read(self._index, gpa - self._base, size)

    def _write_mem(self, gpa: int, size: int, value: int) -> None:
        self._write(self._index, gpa - self._base, size, value)

    def _read_segment(self, gpa: int, size: int) -> int:
        # Rare: the guest reads what is mapped without us.
        if self._bar.memory is None:
            raise TypeError(f"{self._bar.name} has no memory")
        segid, offset, _prot = self._bar.memory
        vm = self._bar.device.machine.vm
        at = offset + gpa - self._base
        with memoryview(vm.view_memseg(segid, at, size)) as view:
            return int.from_bytes(view, "little")

    def _read_msix(self, gpa: int, size: int) -> int:
        device = self._bar.device
        msix, offset = device.msix, gpa - self._base
        if msix is None or offset >= msix.size:
            return self._read(self._index, offset, size)
        with device.irq_lock:
            return msix.read(offset, size)

    def _write_msix(self, gpa: int, size: int, value: int) -> None:
        device = self._bar.device
        msix, offset = device.msix, gpa - self._base
        if msix is None or offset >= msix.size:
            self._write(self._index, offset, size, value)
            return
        with device.irq_lock:
            msix.write(offset, size, value)


@dataclass(slots=True)
class _Config:
    """Configuration space, and which of its bits a plain write changes."""

    data: bytearray = field(default_factory=lambda: bytearray(CONFIG_SIZE))
    writable: bytearray = field(default_factory=lambda: bytearray(CONFIG_SIZE))
    at_reset: bytes = b""

    def get(self, offset: int, size: int) -> int:
        return int.from_bytes(self.data[offset : offset + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        self.data[offset : offset + size] = value.to_bytes(size, "little")


class PciDevice(Device, Generic[OptionsT]):
    """Base of PCI devices.

    A subclass's ``__init__`` calls this one, then :meth:`set_ids`, ``add_bar``,
    ``add_msi`` and so on; addresses and interrupt routes are given when all devices
    exist.  Afterwards it overrides :meth:`bar_read` and :meth:`bar_write`, which any
    vCPU thread calls, several at a time.

    Locks: the host's (configuration) before the device's own before ``irq_lock``.
    """

    NAME: ClassVar[str]
    OPTIONS: ClassVar[type[Options]]

    def __init__(
        self, machine: Machine, host: PciHost, address: PciAddress, options: OptionsT
    ) -> None:
        self.machine = machine
        self.host = host
        self.address = address
        self.options = options
        self.acpi_scope = f"PC{address.bus:02X}"
        self.irq_lock = threading.RLock()
        self.bars: dict[int, Bar] = {}
        self.msix: MsixTable | None = None
        self.msix_bar = -1
        self.intx: IntxRoute | None = None
        """Where INTx goes, known from start on; None: the function has none."""
        self.intx_pin = 0
        self._intx_level = False  # what the device asks for
        self._intx_driven = False  # what is on the line
        # What the command register and the capabilities say, see _read_switches().
        self._bus_master = True
        self._intx_allowed = True
        self._msi_cap = 0
        self._msix_cap = 0
        self._cap_end = PCIR_HEADER_END
        self._cap_last = 0
        self._config = _Config()
        self.set_config(PCIR_COMMAND, 2, PCIM_CMD_BUSMASTEREN, PCIM_CMD_WRITABLE)
        self.set_config(PCIR_CACHELNSZ, 1, 0, 0xFF)
        self.set_config(PCIR_LATTIMER, 1, 0, 0xFF)
        self.set_config(PCIR_INTLINE, 1, 0xFF, 0xFF)

    # -- what a device makes of itself -----------------------------------------------

    def set_ids(
        self,
        vendor: int,
        device: int,
        *,
        class_: int,
        subclass: int,
        progif: int = 0,
        revision: int = 0,
        subvendor: int = 0,
        subdevice: int = 0,
    ) -> None:
        """The identification registers."""
        self.set_config(PCIR_VENDOR, 2, vendor)
        self.set_config(PCIR_DEVICE, 2, device)
        self.set_config(PCIR_REVID, 1, revision)
        self.set_config(PCIR_PROGIF, 1, progif)
        self.set_config(PCIR_SUBCLASS, 1, subclass)
        self.set_config(PCIR_CLASS, 1, class_)
        self.set_config(PCIR_SUBVEND, 2, subvendor)
        self.set_config(PCIR_SUBDEV, 2, subdevice)

    def set_config(self, offset: int, size: int, value: int, writable: int = 0) -> None:
        """Value after reset of configuration bytes, and the bits a guest can change.

        deviation: in bhyve every byte that nothing claims is memory; here it is
        read-only, as it says in the specification.
        """
        self._config.put(offset, size, value)
        mask = writable.to_bytes(size, "little")
        self._config.writable[offset : offset + size] = mask

    def add_bar(
        self, index: int, kind: str, size: int, memory: BarMemory | None = None
    ) -> Bar:
        """Ask for a BAR of at least ``size`` bytes; BAR_MEM64 takes two indexes.

        With ``memory`` behind it the guest's accesses do not come to ``bar_read`` and
        ``bar_write``, except for writes to what it may only read.
        """
        size = max(size, _BAR_MIN_SIZE[kind])
        size = 1 << (size - 1).bit_length()
        last = index + 1 if kind == BAR_MEM64 else index
        if kind == BAR_ROM:
            if index != ROM_INDEX:
                raise ValueError(f"ROM in BAR {index}")
        elif not 0 <= index <= last < BAR_MAX:
            raise ValueError(f"BAR {index}")
        if memory is not None and size % PAGE_SIZE:
            raise ValueError(f"BAR {index}: memory of {size} bytes")
        bar = Bar(self, index, kind, size, memory)
        self.bars[index] = bar
        command = self._config.get(PCIR_COMMAND, 2)
        at = bar.reg
        if kind == BAR_ROM:
            mask = -size & PCIM_BIOS_ADDR | PCIM_BIOS_ENABLE
            self.set_config(at, 4, 0, mask)
        elif kind == BAR_IO:
            # deviation: bhyve's upper half is zero, which 6.2.5.1 allows and
            # SeaBIOS takes for the size of the BAR.
            mask = -size & PCIM_BAR_IO_BASE
            self.set_config(at, 4, PCIM_BAR_IO_SPACE, mask)
            command |= PCIM_CMD_PORTEN
        else:
            self.set_config(at, 4, 0, -size & PCIM_BAR_MEM_BASE)
            command |= PCIM_CMD_MEMEN
        if kind == BAR_MEM64:
            self._config.put(at, 4, PCIM_BAR_MEM_64)
            self.set_config(at + 4, 4, 0, -size >> 32 & 0xFFFFFFFF)
        self._config.put(PCIR_COMMAND, 2, command)
        return bar

    def add_rom(self, path: str | None) -> None:
        """An expansion ROM with the contents of a file (6.3), for firmware to run.

        None: the function has no ROM.  DeviceError: the file cannot be read, or holds
        none.
        """
        if path is None:
            return
        image = read_rom(path)
        size = max(PAGE_SIZE, 1 << (len(image) - 1).bit_length())
        memory = self.host.alloc_rom(image, size)
        self.add_bar(ROM_INDEX, BAR_ROM, size, memory)

    def add_capability(self, cap_id: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability; ``body`` follows its id and next bytes.

        ``writable`` are the bits of ``body`` a guest can change.  Returns its offset.
        """
        offset = self._cap_end
        end = offset + 2 + len(body)
        if end > CONFIG_SIZE:
            raise ValueError(f"no room for capability {cap_id:#x}")
        self._config.data[offset:end] = bytes((cap_id, 0)) + body
        self._config.writable[offset + 2 : offset + 2 + len(writable)] = writable
        if self._cap_last:
            self._config.data[self._cap_last + 1] = offset
        else:
            self._config.data[PCIR_CAP_PTR] = offset
            status = self._config.get(PCIR_STATUS, 2) | PCIM_STATUS_CAPPRESENT
            self._config.put(PCIR_STATUS, 2, status)
        self._cap_last = offset
        self._cap_end = end + 3 & ~3
        return offset

    def add_msi(self, count: int) -> None:
        """Offer ``count`` messages, a power of two up to 32.

        64-bit addresses, no mask bits, as bhyve.
        """
        if count not in (1, 2, 4, 8, 16, MSI_MAX):
            raise ValueError(f"{count} MSI messages")
        ctrl = PCIM_MSICTRL_64BIT | (count.bit_length() - 1) << 1
        body = ctrl.to_bytes(2, "little") + bytes(10)
        mask = (PCIM_MSICTRL_MSI_ENABLE | PCIM_MSICTRL_MME).to_bytes(2, "little")
        mask += b"\xfc\xff\xff\xff" + b"\xff" * 4 + b"\xff\xff"
        self._msi_cap = self.add_capability(PCIY_MSI, body, mask)

    def add_msix(self, count: int, bar: int) -> None:
        """Offer ``count`` vectors, their table at offset 0 of a new MEM32 ``bar``."""
        self.msix = MsixTable(count, self._send_msi)
        self.msix_bar = bar
        body = (count - 1).to_bytes(2, "little")
        body += bar.to_bytes(4, "little")
        body += (self.msix.pba_offset | bar).to_bytes(4, "little")
        ctrl = PCIM_MSIXCTRL_FUNCTION_MASK | PCIM_MSIXCTRL_MSIX_ENABLE
        self._msix_cap = self.add_capability(
            PCIY_MSIX, body, ctrl.to_bytes(2, "little")
        )
        if bar not in self.bars:
            self.add_bar(bar, BAR_MEM32, self.msix.size)

    def add_pcie(self, port_type: int) -> None:
        """A PCI Express capability, version 2 (PCI Express Base 3.0, 7.8)."""
        if port_type == PCIEM_TYPE_ENDPOINT and self.address.bus == 0:
            port_type = PCIEM_TYPE_ROOT_INT_EP
        body = bytearray(0x3C - 2)
        body[0] = port_type << 4 | 2
        if port_type != PCIEM_TYPE_ROOT_INT_EP:
            body[0x0C - 2 : 0x10 - 2] = (0x411).to_bytes(4, "little")  # link: x1, 2.5
            body[0x12 - 2 : 0x14 - 2] = (0x11).to_bytes(2, "little")
        self.add_capability(PCIY_EXPRESS, bytes(body))

    def add_intx(self) -> None:
        """Ask for an interrupt pin: the least used one of the slot."""
        self.intx_pin = self.host.take_pin(self.address)
        self.set_config(PCIR_INTPIN, 1, self.intx_pin)

    def add_boot_device(self, bootindex: int | None) -> None:
        """Have firmware try this function as the ``bootindex``th; None: whenever.

        DeviceError: another has that index.
        """
        if bootindex is not None:
            self.host.add_boot_device(self.address, bootindex)

    # -- what a device overrides -----------------------------------------------------

    def bar_read(self, index: int, offset: int, size: int) -> int:
        """A guest's read of 1, 2, 4 or 8 bytes inside BAR ``index``."""
        return (1 << 8 * size) - 1

    def bar_write(self, index: int, offset: int, size: int, value: int) -> None:
        """A guest's write of 1, 2, 4 or 8 bytes inside BAR ``index``."""

    def config_written(self, offset: int, size: int) -> None:
        """A guest wrote these configuration bytes, all at or above 0x40."""

    def bar_moved(self, bar: Bar, addr: int | None) -> None:
        """The BAR now decodes at ``addr``; None: it decodes nothing.

        For a BAR with memory of its own behind it.
        """

    def reset_device(self) -> None:
        """Everything but configuration space, as after power-on."""

    def save_device(self) -> dict[str, Any]:
        """The device's own state; the base saves configuration and interrupts."""
        return {}

    def restore_device(self, state: dict[str, Any]) -> None:
        """Take back what save_device() gave."""

    # -- configuration accesses; the host holds its lock -----------------------------

    def config_read(self, offset: int, size: int) -> int:
        """An aligned read of 1, 2 or 4 bytes below 256."""
        value = self._config.get(offset, size)
        if offset <= PCIR_STATUS < offset + size and self._intx_level:
            # 6.2.3: it shows the level even while the line is disabled.
            value |= PCIM_STATUS_INTX << 8 * (PCIR_STATUS - offset)
        return value

    def config_write(self, offset: int, size: int, value: int) -> None:
        """An aligned write of 1, 2 or 4 bytes below 256."""
        config = self._config
        end = offset + size
        mask = int.from_bytes(config.writable[offset:end], "little")
        old = config.get(offset, size)
        config.put(offset, size, old & ~mask | value & mask)
        if offset < PCIR_STATUS and end > PCIR_COMMAND:
            self._update_bars()
            self._update_interrupts()
        elif (
            PCIR_BARS <= offset < PCIR_BARS + 4 * BAR_MAX
            or PCIR_BIOS <= offset < PCIR_BIOS + 4
        ):
            self._update_bars()
        elif offset >= PCIR_HEADER_END:
            if (self._msi_cap or self._msix_cap) and config.get(offset, size) != old:
                self._update_interrupts()
            self.config_written(offset, size)

    def assign_bar(self, bar: Bar, addr: int, prefetch: bool = False) -> None:
        """Give a BAR its address at set-up."""
        at = bar.reg
        if prefetch:
            addr |= PCIM_BAR_MEM_PREFETCH
        kind = self._config.get(at, 4) & 0xF
        self._config.put(at, 4, addr & 0xFFFFFFFF | kind)
        if bar.kind == BAR_MEM64:
            self._config.put(at + 4, 4, addr >> 32)

    def finish_setup(self, route: IntxRoute | None, irq: int) -> None:
        """All addresses and routes are known: what is there now is the reset state."""
        self.intx = route
        if route is not None:
            self._config.put(PCIR_INTLINE, 1, irq)
        self._config.at_reset = bytes(self._config.data)
        self._read_switches()
        self._update_bars()

    def _bar_address(self, bar: Bar) -> int:
        at = bar.reg
        low = self._config.get(at, 4)
        if bar.kind == BAR_IO:
            addr = low & PCIM_BAR_IO_BASE
            return addr if addr < PORTS else 0
        if bar.kind == BAR_ROM:
            return low & PCIM_BIOS_ADDR if low & PCIM_BIOS_ENABLE else 0
        low &= PCIM_BAR_MEM_BASE
        if bar.kind == BAR_MEM64:
            low |= self._config.get(at + 4, 4) << 32
        return low

    def _update_bars(self) -> None:
        """Bring the registrations in line with the registers."""
        command = self._config.get(PCIR_COMMAND, 2)
        for bar in self.bars.values():
            enable = PCIM_CMD_PORTEN if bar.kind == BAR_IO else PCIM_CMD_MEMEN
            addr = self._bar_address(bar) if command & enable else 0
            if addr != bar.addr:
                self.host.unregister(bar)
                bar.addr = addr
                if addr:
                    self.host.register(bar)

    # -- interrupts ------------------------------------------------------------------

    def msi_enabled(self) -> bool:
        """Whether the guest has MSI switched on."""
        cap = self._msi_cap
        return bool(cap and self._config.data[cap + 2] & PCIM_MSICTRL_MSI_ENABLE)

    def msix_enabled(self) -> bool:
        """Whether the guest uses MSI-X: it is on, and MSI is not."""
        return self.msix is not None and self.msix.active

    def msi_count(self) -> int:
        """How many messages the guest has granted; 0 while MSI is off."""
        if not self.msi_enabled():
            return 0
        ctrl = self._config.data[self._msi_cap + PCIR_MSI_CTRL]
        return 1 << min(ctrl >> 4 & 7, ctrl >> 1 & 7)

    def generate_msi(self, index: int) -> None:
        """Send MSI message ``index``, if the guest has granted it.  Any thread."""
        with self.irq_lock:
            if not 0 <= index < self.msi_count():
                return
            get, cap = self._config.get, self._msi_cap
            address = get(cap + PCIR_MSI_ADDR, 4)
            address |= get(cap + PCIR_MSI_ADDR_HIGH, 4) << 32
            data = get(cap + PCIR_MSI_DATA, 2)
            # The low bits are the function's to choose (6.8.1.6).
            self._send_msi(address, data & ~(self.msi_count() - 1) | index)

    def generate_msix(self, index: int) -> None:
        """Send MSI-X message ``index``, or have it wait for its mask.  Any thread.

        Where the guest uses MSI instead, the message of that number.
        """
        with self.irq_lock:
            if self.msix is not None and self.msix.active:
                self.msix.trigger(index)
            else:
                self.generate_msi(index)

    def intx_assert(self) -> None:
        """Raise the interrupt line; it may be up already.  Any thread."""
        with self.irq_lock:
            self._intx_level = True
            self._update_intx()

    def intx_deassert(self) -> None:
        """Let the interrupt line go; it may be down already.  Any thread."""
        with self.irq_lock:
            self._intx_level = False
            self._update_intx()

    def _send_msi(self, address: int, data: int) -> None:
        if self._bus_master and address >> 20 == MSI_ADDRESS:
            self.machine.vm.lapic_msi(address, data)

    def _update_interrupts(self) -> None:
        """The command register or a capability changed."""
        with self.irq_lock:
            self._read_switches()
            if self.msix is not None:
                self.msix.deliver_pending()
            self._update_intx()

    def _read_switches(self) -> None:
        command = self._config.get(PCIR_COMMAND, 2)
        self._bus_master = bool(command & PCIM_CMD_BUSMASTEREN)
        msi = self.msi_enabled()
        if self.msix is not None:
            ctrl = self._config.get(self._msix_cap + PCIR_MSIX_CTRL, 2)
            self.msix.active = bool(ctrl & PCIM_MSIXCTRL_MSIX_ENABLE) and not msi
            self.msix.masked = bool(ctrl & PCIM_MSIXCTRL_FUNCTION_MASK)
        self._intx_allowed = not (
            command & PCIM_CMD_INTXDIS or msi or self.msix_enabled()
        )

    def _update_intx(self) -> None:
        level = self._intx_level and self._intx_allowed
        if level != self._intx_driven and self.intx is not None:
            self._intx_driven = level
            self.host.router.set_level(self.intx, level)

    # -- life ------------------------------------------------------------------------

    def reset(self) -> None:
        """Configuration space, interrupts and the device as after power-on."""
        with self.irq_lock:
            self._intx_level = self._intx_driven = False
            self._config.data[:] = self._config.at_reset
            if self.msix is not None:
                self.msix.reset()
            self._read_switches()
        self._update_bars()
        self.reset_device()

    def save(self) -> dict[str, Any]:
        """Configuration, interrupt state, and what the device itself has."""
        with self.irq_lock:
            return {
                "version": 1,
                "config": bytes(self._config.data),
                "msix": self.msix.save() if self.msix is not None else None,
                "intx": [self._intx_level, self._intx_driven],
                "device": self.save_device(),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave; BARs move to where they were."""
        if state["version"] != 1 or len(state["config"]) != CONFIG_SIZE:
            raise ValueError(f"{self.NAME}: unknown state version {state['version']}")
        with self.irq_lock:
            self._config.data[:] = state["config"]
            self._read_switches()
            if self.msix is not None:
                self.msix.restore(state["msix"])
            self._intx_level, self._intx_driven = state["intx"]
        self._update_bars()
        self.restore_device(state["device"])


def read_rom(path: str) -> bytes:
    """An expansion ROM's image; DeviceError where the file is none."""
    try:
        with Path(path).open("rb") as file:
            image = file.read(ROM_MAX + 1)
    except OSError as error:
        raise DeviceError(f"rom={path}: {error.strerror}") from error
    if not image.startswith(ROM_SIGNATURE):
        raise DeviceError(f"rom={path}: this is no option ROM, they begin with 55 aa")
    if len(image) > ROM_MAX:
        raise DeviceError(f"rom={path}: an option ROM has at most {ROM_MAX >> 20} MiB")
    return image
