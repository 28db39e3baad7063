"""The PCI host: configuration accesses, address windows, BARs and interrupt routing.

PCI Local Bus 3.0, 3.2.2.3.2 (mechanism 1); PCI Express Base 3.0, 7.2.2 (ECAM).
bhyve: init_pci() of pci_emul.c.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from pybhyve.amd64.acpi.aml import Term, eisaid, package
from pybhyve.amd64.acpi.resources import (
    bus_range,
    io,
    io_range,
    memory32_fixed,
    memory32_range,
    memory64_range,
    template,
)
from pybhyve.amd64.mem import MEM_F_IMMUTABLE, MEM_F_RW, MemRange
from pybhyve.amd64.pci_irq import IntxRoute, PirqRouter
from pybhyve.config import Node
from pybhyve.device import Device
from pybhyve.errors import DeviceError
from pybhyve.pci import registry
from pybhyve.pci.emul import (
    BAR_IO,
    BAR_MEM64,
    BAR_ROM,
    Bar,
    BarMapping,
    BarMemory,
    PciAddress,
    PciDevice,
)
from pybhyve.pci.pcireg import (
    BUSES,
    CONFIG_SIZE,
    ECAM_SIZE,
    FUNCS,
    PCIM_MFDEV,
    PCIR_HDRTYPE,
    SLOTS,
)
from pybhyve.vmmapi import VM_PCIROM

if TYPE_CHECKING:
    from pybhyve.amd64.acpi.dsdt import Dsdt
    from pybhyve.bhyverun.machine import Machine

log = logging.getLogger(__name__)

CONF1_ADDR_PORT: Final = 0xCF8
CONF1_DATA_PORT: Final = 0xCFC
CONF1_PORTS: Final = 8
CONF1_ENABLE: Final = 0x80000000
# Reserved bits 30:24 and 1:0 read as zero.
CONF1_MASK: Final = 0x80FFFFFC

IO_BASE: Final = 0x2000
IO_LIMIT: Final = 0x10000
TESTDEV_PORTS: Final = 0x20  # pc-testdev has the first ports of the I/O window
MEM32_BASE: Final = 0xC0000000
ECAM_BASE: Final = 0xE0000000
MEM32_LIMIT: Final = ECAM_BASE
# OVMF begins with memory BARs here where that is not RAM.
OVMF_MEM32_BASE: Final = 2 << 30
FOUR_GIB: Final = 1 << 32
MEM64_ALIGN: Final = 32 << 30
MEM64_SIZE: Final = 32 << 30
# A BAR_MEM64 is only worth an address above 4 GiB when it is larger than this.
MEM64_MIN_BAR: Final = 128 << 20

# Room behind the BARs of a bus, for a guest that moves them.
IO_PADDING: Final = 32
MEM32_PADDING: Final = 1 << 20
MEM64_PADDING: Final = 512 << 20

ROM_SEGMENT: Final = 256 << 20  # all option ROMs of a machine


@dataclass(slots=True)
class Window:
    """Addresses given out from ``base`` up, below ``limit``."""

    name: str
    base: int
    limit: int

    def take(self, size: int, align: int) -> int:
        """Addresses for a BAR; DeviceError when there are none left."""
        addr = -(-self.base // align) * align
        if addr + size > self.limit:
            raise DeviceError(
                f"there is no room for {size:#x} more of PCI {self.name} space"
            )
        self.base = addr + size
        return addr


Range = tuple[int, int]  # [base, end)


@dataclass(slots=True)
class Rest:
    """Address ranges that no bus needs for the BARs it has."""

    io: list[Range] = field(default_factory=list)
    mem32: list[Range] = field(default_factory=list)
    mem64: list[Range] = field(default_factory=list)


@dataclass(slots=True)
class PciBus:
    """One bus: its functions and the address ranges its bridge passes on."""

    number: int
    functions: dict[tuple[int, int], PciDevice[Any]] = field(default_factory=dict)
    io: Range = (0, 0)
    mem32: Range = (0, 0)
    mem64: Range = (0, 0)
    rest: Rest = field(default_factory=Rest)
    """What else the bridge passes on."""

    def routes(self) -> Iterator[tuple[int, IntxRoute]]:
        """Slot and route of each interrupt pin in use; functions may share one."""
        seen = set()
        for (slot, _func), device in sorted(self.functions.items()):
            route = device.intx
            if route is not None and (slot, route.pin) not in seen:
                seen.add((slot, route.pin))
                yield slot, route

    def devices(self) -> Iterator[PciDevice[Any]]:
        """Its functions by slot and function number."""
        for _position, device in sorted(self.functions.items()):
            yield device


class PciHost(Device):
    """All buses, and the two ways to their configuration space."""

    acpi_resources = (memory32_fixed(ECAM_BASE, BUSES * SLOTS * FUNCS * ECAM_SIZE),)

    def __init__(self, machine: Machine, router: PirqRouter) -> None:
        self.machine = machine
        self.router = router
        self.buses: dict[int, PciBus] = {}
        self.lock = threading.RLock()
        self.isa_bridge: str | None = None
        """The ACPI path of the bridge with the interrupt link devices, if any."""
        self._address = 0
        self._boot_order: dict[int, PciAddress] = {}
        self._blocked: list[Bar] = []  # where something else is in the way
        self._rom_used = 0  # bytes of the segment for option ROMs
        self._pins: dict[tuple[int, int], list[int]] = {}
        self._routes: dict[tuple[int, int, int], IntxRoute] = {}

    # -- set-up ----------------------------------------------------------------------

    def attach(self) -> None:
        """Take the configuration ports and the ECAM range."""
        inout = self.machine.inout
        inout.register(
            "pcicfg-addr", CONF1_ADDR_PORT, 1, self._read_address, self._write_address
        )
        inout.register(
            "pcicfg-data", CONF1_DATA_PORT, 4, self._read_data, self._write_data
        )
        lowmem = self.machine.ctx.lowmem_size
        self.machine.mem.register_fallback(
            MemRange(
                "PCI hole",
                lowmem,
                FOUR_GIB - lowmem,
                lambda _gpa, size: (1 << 8 * size) - 1,
                lambda _gpa, _size, _value: None,
                MEM_F_RW | MEM_F_IMMUTABLE,
            )
        )
        self.machine.mem.register(
            MemRange(
                "PCI ECFG",
                ECAM_BASE,
                BUSES * SLOTS * FUNCS * ECAM_SIZE,
                self._read_ecam,
                self._write_ecam,
                MEM_F_RW | MEM_F_IMMUTABLE,
            )
        )

    def add(self, device: PciDevice[Any]) -> None:
        """Put a function on its bus."""
        address = device.address
        bus = self.buses.setdefault(address.bus, PciBus(address.bus))
        bus.functions[address.slot, address.func] = device

    def alloc_rom(self, image: bytes, size: int) -> BarMemory:
        """Room for an option ROM of ``size`` bytes, whole pages, that holds ``image``.

        DeviceError: there is none left.
        """
        vm = self.machine.vm
        if not self._rom_used:
            vm.create_memseg(VM_PCIROM, "pcirom", ROM_SEGMENT)
        offset = self._rom_used
        if offset + size > ROM_SEGMENT:
            raise DeviceError(f"option ROMs have more than {ROM_SEGMENT >> 20} MiB")
        self._rom_used += size
        with memoryview(vm.view_memseg(VM_PCIROM, offset, len(image), True)) as view:
            view[:] = image
        return BarMemory(VM_PCIROM, offset, mmap.PROT_READ | mmap.PROT_EXEC)

    def take_pin(self, address: PciAddress) -> int:
        """An interrupt pin, 1 to 4: the one that its slot has used least."""
        uses = self._pins.setdefault((address.bus, address.slot), [0] * 4)
        least = uses.index(min(uses))
        uses[least] += 1
        return least + 1

    def add_boot_device(self, address: PciAddress, bootindex: int) -> None:
        """Have firmware try a function as the ``bootindex``th of all.

        DeviceError: another has that index.
        """
        other = self._boot_order.setdefault(bootindex, address)
        if other != address:
            raise DeviceError(f"bootindex {bootindex} is that of {other} already")

    def boot_order(self) -> bytes:
        """fw_cfg's ``bootorder``: OpenFirmware paths, one a line; empty: no wishes."""
        # PciRoot(0) is all that such a path can name.
        lines = [
            f"/pci@i0cf8/pci@{address.slot:x},{address.func:x}"
            for _bootindex, address in sorted(self._boot_order.items())
            if address.bus == 0
        ]
        return "\n".join(lines).encode() + b"\0" if lines else b""

    def finish_setup(self) -> None:
        """Give out addresses and interrupts, bus by bus."""
        first_port = IO_BASE
        if self.machine.options.lpc_pc_testdev:
            first_port += TESTDEV_PORTS
        above = FOUR_GIB + self.machine.ctx.highmem_size
        mem64_base = -(-above // MEM64_ALIGN) * MEM64_ALIGN
        io = Window("I/O", first_port, IO_LIMIT)
        mem32 = Window("32-bit memory", MEM32_BASE, MEM32_LIMIT)
        mem64 = Window("64-bit memory", mem64_base, mem64_base + MEM64_SIZE)
        for bus in sorted(self.buses.values(), key=lambda bus: bus.number):
            start = io.base, mem32.base, mem64.base
            # Largest first, so that natural alignment leaves no holes.
            bars = [bar for device in bus.devices() for bar in device.bars.values()]
            for bar in sorted(bars, key=lambda bar: -bar.size):
                self._assign(bar, io, mem32, mem64)
            for window, padding in (
                (io, IO_PADDING),
                (mem32, MEM32_PADDING),
                (mem64, MEM64_PADDING),
            ):
                padded = -(-(window.base + padding) // padding) * padding
                window.base = min(padded, window.limit)
            bus.io = start[0], io.base
            bus.mem32 = start[1], mem32.base
            bus.mem64 = start[2], mem64.base
            for device in bus.devices():
                self._route(device)
        if self.machine.options.lpc_fwcfg == "qemu" and 0 in self.buses:
            # Firmware moves the BARs of bus 0, to wherever no other bus is.
            self.buses[0].rest = Rest(
                io=[(io.base, io.limit)],
                mem32=[(mem32.base, mem32.limit)],
                mem64=[(mem64.base, mem64.limit)],
            )
            if self.machine.ctx.lowmem_size <= OVMF_MEM32_BASE:
                self.buses[0].rest.mem32.append((OVMF_MEM32_BASE, MEM32_BASE))

    @staticmethod
    def _assign(bar: Bar, io: Window, mem32: Window, mem64: Window) -> None:
        if bar.kind == BAR_ROM:
            # Firmware places it; there is room where the others are.
            mem32.take(bar.size, bar.size)
        elif bar.kind == BAR_IO:
            bar.device.assign_bar(bar, io.take(bar.size, bar.size))
        elif bar.kind == BAR_MEM64 and bar.size > MEM64_MIN_BAR:
            bar.device.assign_bar(bar, mem64.take(bar.size, bar.size), prefetch=True)
        else:
            bar.device.assign_bar(bar, mem32.take(bar.size, bar.size))

    def _route(self, device: PciDevice[Any]) -> None:
        if not device.intx_pin:
            device.finish_setup(None, 0)
            return
        bus, slot, _func = device.address
        key = bus, slot, device.intx_pin
        if key not in self._routes:
            self._routes[key] = self.router.route(slot, device.intx_pin)
        route = self._routes[key]
        device.finish_setup(route, self.router.irq(route.pirq))

    # -- BARs; the caller holds the lock, or nothing runs yet ------------------------

    def register(self, bar: Bar) -> None:
        """Have a BAR decode at its address, as far as nothing is in the way.

        Of several BARs at an address that of the lowest function decodes, whichever
        came first: what decodes depends on the registers alone.
        """
        self._settle([bar])

    def unregister(self, bar: Bar) -> None:
        """Have a BAR decode nothing; others to which it was in the way do instead."""
        if bar.live is None:
            if bar in self._blocked:
                self._blocked.remove(bar)
            return
        self._disconnect(bar)
        blocked, self._blocked = self._blocked, []
        self._settle(blocked)

    def _settle(self, waiting: list[Bar]) -> None:
        """Connect what can be, from the lowest function up; the rest is blocked."""
        waiting.sort(key=lambda bar: bar.order)
        while waiting:
            bar = waiting.pop(0)
            if self._connect(bar):
                continue
            rivals = [other for other in self._live_bars() if other.overlaps(bar)]
            connected = False
            if rivals and all(bar.order < other.order for other in rivals):
                for other in rivals:
                    self._disconnect(other)
                waiting += rivals
                connected = self._connect(bar)
            if connected:
                # What the rivals blocked may decode now.
                waiting += self._blocked
                self._blocked.clear()
            else:
                self._blocked.append(bar)
            waiting.sort(key=lambda bar: bar.order)

    def _live_bars(self) -> Iterator[Bar]:
        for bus in self.buses.values():
            for device in bus.functions.values():
                yield from (bar for bar in device.bars.values() if bar.live is not None)

    @staticmethod
    def _connect(bar: Bar) -> bool:
        mapping = BarMapping(bar)
        try:
            mapping.connect()
        except DeviceError as error:
            log.debug("bar blocked bar=%s addr=%#x: %s", bar.name, bar.addr, error)
            return False
        bar.live = mapping
        bar.device.bar_moved(bar, bar.addr)
        return True

    @staticmethod
    def _disconnect(bar: Bar) -> None:
        if bar.live is not None:
            bar.live.disconnect()
            bar.live = None
            bar.device.bar_moved(bar, None)

    # -- configuration accesses ------------------------------------------------------

    def config_read(self, bus: int, slot: int, func: int, reg: int, size: int) -> int:
        """A read of configuration space; ones where there is no such function."""
        ones = (1 << 8 * size) - 1
        device = self._function(bus, slot, func)
        if device is None or reg % size or size > 4:
            return ones
        if reg >= CONFIG_SIZE:
            # The header of the first extended capability: there is none.
            return 0 if reg < CONFIG_SIZE + 4 else ones
        with self.lock:
            value = device.config_read(reg, size)
        if reg <= PCIR_HDRTYPE < reg + size and self._multifunction(bus, slot):
            value |= PCIM_MFDEV << 8 * (PCIR_HDRTYPE - reg)
        return value

    def config_write(
        self, bus: int, slot: int, func: int, reg: int, size: int, value: int
    ) -> None:
        """A write to configuration space; lost where there is no such function."""
        device = self._function(bus, slot, func)
        if device is None or reg % size or size > 4 or reg >= CONFIG_SIZE:
            return
        with self.lock:
            device.config_write(reg, size, value)

    def _function(self, bus: int, slot: int, func: int) -> PciDevice[Any] | None:
        found = self.buses.get(bus)
        return found.functions.get((slot, func)) if found is not None else None

    def _multifunction(self, bus: int, slot: int) -> bool:
        return sum(at[0] == slot for at in self.buses[bus].functions) > 1

    def _read_address(self, _port: int, size: int) -> int:
        return self._address if size == 4 else (1 << 8 * size) - 1

    def _write_address(self, _port: int, size: int, value: int) -> None:
        if size == 4:
            self._address = value & CONF1_MASK

    def _target(self, port: int) -> tuple[int, int, int, int]:
        address = self._address
        return (
            address >> 16 & 0xFF,
            address >> 11 & 0x1F,
            address >> 8 & 0x7,
            address & 0xFC | port - CONF1_DATA_PORT,
        )

    def _read_data(self, port: int, size: int) -> int:
        if not self._address & CONF1_ENABLE:
            return (1 << 8 * size) - 1
        return self.config_read(*self._target(port), size)

    def _write_data(self, port: int, size: int, value: int) -> None:
        if self._address & CONF1_ENABLE:
            self.config_write(*self._target(port), size, value)

    def _read_ecam(self, gpa: int, size: int) -> int:
        at = gpa - ECAM_BASE
        return self.config_read(
            at >> 20, at >> 15 & 0x1F, at >> 12 & 0x7, at & 0xFFF, size
        )

    def _write_ecam(self, gpa: int, size: int, value: int) -> None:
        at = gpa - ECAM_BASE
        self.config_write(
            at >> 20, at >> 15 & 0x1F, at >> 12 & 0x7, at & 0xFFF, size, value
        )

    # -- ACPI ------------------------------------------------------------------------

    def dsdt(self, aml: Dsdt) -> None:
        """``PCxx``, a host bridge for each bus."""
        for bus in sorted(self.buses.values(), key=lambda bus: bus.number):
            with aml.device(f"PC{bus.number:02X}"):
                # deviation: bhyve gives it an _ADR too, which 6.1 forbids beside _HID.
                aml.name("_HID", eisaid("PNP0A03"))
                aml.name("_UID", bus.number)
                aml.name("_BBN", bus.number)
                aml.name("_CRS", template(*_windows(bus)))
                self._write_routes(aml, bus)
                aml.place(f"PC{bus.number:02X}")

    def _write_routes(self, aml: Dsdt, bus: PciBus) -> None:
        """``_PRT`` (ACPI 6.5, 6.2.13): one list for the PIC and one for the IOAPIC."""
        pic: list[Term] = []
        apic: list[Term] = []
        for slot, route in bus.routes():
            where = slot << 16 | 0xFFFF
            if self.isa_bridge is not None:
                link = f"{self.isa_bridge}.LNK{'ABCDEFGH'[route.pirq]}"
                pic.append(package([where, route.pin - 1, link, 0]))
            else:
                irq = self.router.irq(route.pirq)
                pic.append(package([where, route.pin - 1, 0, irq]))
            if route.ioapic_pin >= 0:
                apic.append(package([where, route.pin - 1, 0, route.ioapic_pin]))
        aml.name("PPRT", package(pic))
        aml.name("APRT", package(apic))
        with aml.method("_PRT"):
            with aml.if_("PICM"):
                aml.return_("APRT")
            with aml.else_():
                aml.return_("PPRT")

    # -- life ------------------------------------------------------------------------

    def reset(self) -> None:
        """The address register; the functions are devices of their own."""
        self._address = 0

    def save(self) -> dict[str, Any]:
        """The address register."""
        return {"version": 1, "address": self._address}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        if state["version"] != 1:
            raise ValueError(f"pci: unknown state version {state['version']}")
        self._address = state["address"]


def _windows(bus: PciBus) -> Iterator[bytes]:
    """What the bridge to ``bus`` passes on."""
    yield bus_range(bus.number, bus.number)
    if bus.number == 0:
        yield io(CONF1_ADDR_PORT, CONF1_PORTS)
        yield io_range(0, CONF1_ADDR_PORT - 1)
        yield io_range(CONF1_ADDR_PORT + CONF1_PORTS, IO_BASE - 1)
    for make, ranges in (
        (io_range, [bus.io, *bus.rest.io]),
        (memory32_range, [bus.mem32, *bus.rest.mem32]),
        (memory64_range, [bus.mem64, *bus.rest.mem64]),
    ):
        for base, end in _joined(ranges):
            yield make(base, end - 1)


def _joined(ranges: list[Range]) -> list[Range]:
    """The ranges that have addresses, by rising address, adjacent ones as one."""
    joined: list[Range] = []
    for base, end in sorted(ranges):
        if joined and joined[-1][1] == base:
            joined[-1] = joined[-1][0], end
        elif base < end:
            joined.append((base, end))
    return joined


def pci_host(machine: Machine) -> PciHost:
    """The machine's PCI host."""
    host = machine.devices["pci"]
    if not isinstance(host, PciHost):
        raise TypeError("the device named pci is none")
    return host


def init_pci(machine: Machine) -> PciHost:
    """Build the functions that the ``pci`` variables describe and connect them."""
    host = pci_host(machine)
    for address, node in _slots(machine.config.node("pci")):
        device = _build(machine, host, address, node)
        host.add(device)
        machine.add_device(address.path, device)
    host.finish_setup()
    return host


def _slots(pci: Node | None) -> list[tuple[PciAddress, Node]]:
    """The positions that have a ``device``, by rising address."""
    found = []
    for bus, slots in pci.children() if pci is not None else ():
        for slot, funcs in slots.children():
            for func, node in funcs.children():
                if node.get("device") is None:
                    continue
                numbers = [
                    int(text) if text.isascii() and text.isdigit() else -1
                    for text in (bus, slot, func)
                ]
                address = PciAddress(*numbers)
                if not (
                    0 <= address.bus < BUSES
                    and 0 <= address.slot < SLOTS
                    and 0 <= address.func < FUNCS
                ):
                    raise DeviceError(
                        f"{node.path}: there is no such PCI position; expected "
                        "pci.BUS.SLOT.FUNC with BUS 0-255, SLOT 0-31, FUNC 0-7"
                    )
                found.append((address, node))
    found.sort(key=lambda entry: entry[0])
    for one, other in pairwise(found):
        if one[0] == other[0]:  # 0 and 00
            raise DeviceError(f"pci slot {one[0]} already occupied!")
    return found


def _build(
    machine: Machine, host: PciHost, address: PciAddress, node: Node
) -> PciDevice[Any]:
    name = node.get("device") or ""
    emulation = registry.lookup(name)
    if emulation is None:
        raise DeviceError(f'pci slot {address}: unknown device "{name}"')
    if emulation.name != name:
        raise DeviceError(
            f'pci slot {address}: legacy device "{name}", use "{emulation.name}"'
        )
    try:
        options = emulation.options.parse(node)
        return emulation.device(machine, host, address, options)
    except DeviceError as error:
        raise DeviceError(f"pci slot {address}: {name}") from error
