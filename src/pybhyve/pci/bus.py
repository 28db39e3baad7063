"""The PCI host: configuration accesses, address windows, BARs and interrupt routing.

PCI Local Bus 3.0, 3.2.2.3.2 (mechanism 1); PCI Express Base 3.0, 7.2.2 (ECAM).
bhyve: init_pci() of pci_emul.c.
"""

from __future__ import annotations

import logging
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
    Bar,
    BarMapping,
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
FOUR_GIB: Final = 1 << 32
MEM64_ALIGN: Final = 32 << 30
MEM64_SIZE: Final = 32 << 30
# A BAR_MEM64 is only worth an address above 4 GiB when it is larger than this.
MEM64_MIN_BAR: Final = 128 << 20

# Room behind the BARs of a bus, for a guest that moves them.
IO_PADDING: Final = 32
MEM32_PADDING: Final = 1 << 20
MEM64_PADDING: Final = 512 << 20


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


@dataclass(slots=True)
class PciBus:
    """One bus: its functions and the address ranges its bridge passes on."""

    number: int
    functions: dict[tuple[int, int], PciDevice[Any]] = field(default_factory=dict)
    io: tuple[int, int] = (0, 0)  # [base, end)
    mem32: tuple[int, int] = (0, 0)
    mem64: tuple[int, int] = (0, 0)

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
        self._blocked: list[Bar] = []  # where something else is in the way
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

    def take_pin(self, address: PciAddress) -> int:
        """An interrupt pin, 1 to 4: the one that its slot has used least."""
        uses = self._pins.setdefault((address.bus, address.slot), [0] * 4)
        least = uses.index(min(uses))
        uses[least] += 1
        return least + 1

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

    @staticmethod
    def _assign(bar: Bar, io: Window, mem32: Window, mem64: Window) -> None:
        if bar.kind == BAR_IO:
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
        """Make a BAR decode at its address.

        Where something else is already, it does not, until that has gone away.
        """
        mapping = BarMapping(bar)
        try:
            if mapping.memory is not None:
                self.machine.mem.register(mapping.memory)
            else:
                self.machine.inout.register(
                    bar.name,
                    bar.addr,
                    bar.size,
                    mapping.read_port,
                    mapping.write_port,
                )
        except DeviceError as error:
            log.debug("bar blocked bar=%s addr=%#x: %s", bar.name, bar.addr, error)
            self._blocked.append(bar)
            return
        bar.live = mapping
        bar.device.bar_moved(bar, bar.addr)

    def unregister(self, bar: Bar) -> None:
        """Make a BAR decode nothing; others that it blocked come to life."""
        if bar in self._blocked:
            self._blocked.remove(bar)
        mapping = bar.live
        if mapping is None:
            return
        if mapping.memory is not None:
            self.machine.mem.unregister(mapping.memory)
        else:
            self.machine.inout.unregister(mapping.base, bar.size)
        bar.live = None
        bar.device.bar_moved(bar, None)
        blocked, self._blocked = self._blocked, []
        for other in blocked:
            self.register(other)

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
    for make, (base, end) in (
        (io_range, bus.io),
        (memory32_range, bus.mem32),
        (memory64_range, bus.mem64),
    ):
        if end > base:
            yield make(base, end - 1)


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
