"""fw_cfg: items that the machine has for its firmware, and QEMU's way to read them.

QEMU docs/specs/fw_cfg.  An item has a number; files are items with a name, listed in
the directory.  The ports are there with ``lpc.fwcfg=qemu`` only, the items always.
bhyve: qemu_fwcfg.c, which has no DMA.
"""

from __future__ import annotations

import logging
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pybhyve.amd64.acpi import Aml
from pybhyve.amd64.acpi.aml import string
from pybhyve.amd64.acpi.resources import io, template
from pybhyve.amd64.fwctl import Fwctl
from pybhyve.device import Device
from pybhyve.errors import DeviceError, OptionError
from pybhyve.variables import FwcfgOptions
from pybhyve.vmmapi import VmCtx, VmmError, map_iov, release_iov

if TYPE_CHECKING:
    from pybhyve.amd64.inout import InoutTable
    from pybhyve.bhyverun.machine import Machine

log = logging.getLogger(__name__)

SELECTOR_PORT: Final = 0x510
DATA_PORT: Final = 0x511
DMA_PORT: Final = 0x514  # 8 bytes, big-endian; the second half starts the transfer
PORTS: Final = DMA_PORT + 8 - SELECTOR_PORT

SELECTOR_WRITE: Final = 1 << 14
"""Asks for write mode, which no longer exists; not part of an item's number."""

SIGNATURE: Final = 0x00
ID: Final = 0x01
NB_CPUS: Final = 0x05
KERNEL_SIZE: Final = 0x08
INITRD_SIZE: Final = 0x0B
MAX_CPUS: Final = 0x0F
KERNEL_DATA: Final = 0x11
INITRD_DATA: Final = 0x12
CMDLINE_SIZE: Final = 0x14
CMDLINE_DATA: Final = 0x15
FILE_DIR: Final = 0x19
FILE_FIRST: Final = 0x20
FILE_LAST: Final = 0x3FFF

ID_TRADITIONAL: Final = 1 << 0
ID_DMA: Final = 1 << 1

DIR_ENTRY: Final = struct.Struct(">IHxx56s")  # size, selector, name
FILE_NAME_MAX: Final = 56
"""Bytes of a name, with the NUL behind it."""

FILE_SIZE_MAX: Final = 256 << 20
"""Bytes of a user's file; all of them are read when the machine is set up."""

DMA_ACCESS: Final = struct.Struct(">IIQ")  # control, length, address
DMA_ERROR: Final = 1 << 0
DMA_READ: Final = 1 << 1
DMA_SKIP: Final = 1 << 2
DMA_SELECT: Final = 1 << 3
DMA_WRITE: Final = 1 << 4
DMA_SIGNATURE: Final = b"QEMU CFG"
DMA_CHUNK: Final = 1 << 20
"""A guest may ask for 4 GiB, most of it zeros; this much is made at a time."""


class FwCfg(Device):
    """The items, and the registers through which a guest reads them.

    Files are added while the machine is set up; no item changes while it runs.
    """

    def __init__(self, ctx: VmCtx, ncpu: int) -> None:
        self._ctx = ctx
        self._lock = threading.Lock()
        self._items: dict[int, bytes] = {}
        self._files: dict[str, int] = {}  # selectors by name
        self._selector = 0
        self._offset = 0
        self._dma_high = 0
        self.add_item(SIGNATURE, b"QEMU")
        self.add_item(ID, struct.pack("<I", ID_TRADITIONAL | ID_DMA))
        self.add_item(NB_CPUS, struct.pack("<H", ncpu))
        self.add_item(MAX_CPUS, struct.pack("<H", ncpu))
        self._update_directory()

    # -- what the machine tells ------------------------------------------------------

    def add_item(self, selector: int, data: bytes) -> None:
        """Add an item with a number of its own; DeviceError where it is taken."""
        if selector in self._items:
            raise DeviceError(f"fw_cfg item {selector:#x} is there already")
        self._items[selector] = data

    def add_file(self, name: str, data: bytes) -> None:
        """Add a file: an item with a name of up to 55 bytes and the next free number.

        DeviceError: the name is taken, empty or too long, or there are too many files.
        """
        encoded = name.encode(errors="surrogateescape")
        if not 0 < len(encoded) < FILE_NAME_MAX:
            raise DeviceError(f"fw_cfg file '{name}': a name has 1 to 55 bytes")
        if name in self._files:
            raise DeviceError(f"fw_cfg file '{name}' is there already")
        selector = FILE_FIRST + len(self._files)
        if selector > FILE_LAST:
            raise DeviceError(f"fw_cfg file '{name}': there are too many files")
        self._files[name] = selector
        self._items[selector] = data
        self._update_directory()

    def add_kernel(self, kernel: bytes, initrd: bytes, cmdline: bytes) -> None:
        """Have firmware start a kernel, or any other program for EFI."""
        for size, item, data in (
            (KERNEL_SIZE, KERNEL_DATA, kernel),
            (INITRD_SIZE, INITRD_DATA, initrd),
            (CMDLINE_SIZE, CMDLINE_DATA, cmdline + b"\0"),
        ):
            self.add_item(size, struct.pack("<I", len(data)))
            self.add_item(item, data)

    def file(self, name: str) -> bytes:
        """The contents of a file; KeyError: there is none of that name."""
        return self._items[self._files[name]]

    def _update_directory(self) -> None:
        entries = [
            DIR_ENTRY.pack(
                len(self._items[selector]),
                selector,
                name.encode(errors="surrogateescape"),
            )
            for name, selector in sorted(self._files.items())
        ]
        self._items[FILE_DIR] = struct.pack(">I", len(entries)) + b"".join(entries)

    # -- ports -----------------------------------------------------------------------

    def attach(self, inout: InoutTable) -> None:
        """Take the ports."""
        inout.register(
            "qemu_fwcfg_selector", SELECTOR_PORT, 1, self._read_selector, self._select
        )
        inout.register("qemu_fwcfg_data", DATA_PORT, 1, self._read_data, None)
        inout.register("qemu_fwcfg_dma", DMA_PORT, 8, self._read_dma, self._write_dma)

    def _read_selector(self, _port: int, _size: int) -> int:
        return self._selector

    def _select(self, _port: int, size: int, value: int) -> None:
        if size == 2:
            with self._lock:
                self._selector = value
                self._offset = 0

    def _item(self) -> bytes:
        return self._items.get(self._selector & ~SELECTOR_WRITE, b"")

    def _read_data(self, _port: int, size: int) -> int:
        """The next byte; 0 behind the end of an item, or where there is none."""
        if size != 1:
            return (1 << 8 * size) - 1
        with self._lock:
            item, offset = self._item(), self._offset
            if offset >= len(item):
                return 0
            self._offset = offset + 1
            return item[offset]

    def _read_dma(self, port: int, size: int) -> int:
        at = port - DMA_PORT
        return int.from_bytes(DMA_SIGNATURE[at : at + size], "little")

    def _write_dma(self, port: int, size: int, value: int) -> None:
        """Only whole halves of the address register, as on x86."""
        if size != 4:
            return
        half = int.from_bytes(value.to_bytes(4, "little"), "big")
        with self._lock:
            if port == DMA_PORT:
                self._dma_high = half
            elif port == DMA_PORT + 4:
                high, self._dma_high = self._dma_high, 0
                self._transfer(high << 32 | half)

    def _transfer(self, access: int) -> None:
        """Do what the structure at ``access`` asks for, and put the result there."""
        try:
            control, length, address = DMA_ACCESS.unpack(
                self._ctx.read(access, DMA_ACCESS.size)
            )
        except VmmError:
            return  # there is no place for the result either
        if control & DMA_SELECT:
            self._selector = control >> 16
            self._offset = 0
        result = 0
        if control & DMA_READ:
            try:
                self._copy(address, length)
            except VmmError:
                result = DMA_ERROR
        elif control & DMA_SKIP:
            self._offset = min(self._offset + length, len(self._item()))
        elif control & DMA_WRITE:
            result = DMA_ERROR  # no item can be written
        self._put(access, struct.pack(">I", result))

    def _copy(self, address: int, length: int) -> None:
        """The next ``length`` bytes of the item to memory, zeros behind its end."""
        data = self._item()[self._offset : self._offset + length]
        self._put(address, data)
        self._offset += len(data)
        address += len(data)
        length -= len(data)
        zeros = bytes(min(length, DMA_CHUNK))
        while length:
            part = min(length, DMA_CHUNK)
            self._put(address, zeros[:part])
            address += part
            length -= part

    def _put(self, address: int, data: bytes) -> None:
        iov = map_iov(self._ctx, [(address, len(data))], writable=True)
        done = 0
        for buffer in iov:
            buffer[:] = data[done : done + len(buffer)]
            done += len(buffer)
        release_iov(iov)

    # -- life ------------------------------------------------------------------------

    def reset(self) -> None:
        """Nothing is selected."""
        self._selector = self._offset = self._dma_high = 0

    def save(self) -> dict[str, Any]:
        """What is selected; the items are the machine's configuration."""
        with self._lock:
            return {
                "version": 1,
                "selector": self._selector,
                "offset": self._offset,
                "dma_high": self._dma_high,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        if state["version"] != 1:
            raise ValueError(f"fw_cfg: unknown state version {state['version']}")
        if (
            not 0 <= state["selector"] <= 0xFFFF
            or state["offset"] < 0
            or not 0 <= state["dma_high"] <= 0xFFFFFFFF
        ):
            raise ValueError("fw_cfg: damaged state")
        with self._lock:
            self._selector = state["selector"]
            self._offset = state["offset"]
            self._dma_high = state["dma_high"]

    def dsdt(self, aml: Aml) -> None:
        """``FWCF``; the ports' range has the one for DMA, bhyve's has two ports."""
        with aml.device("FWCF"):
            aml.name("_HID", string("QEMU0002"))
            aml.name("_STA", 0x0B)
            aml.name("_CRS", template(io(SELECTOR_PORT, PORTS)))


def init_fwcfg(machine: Machine) -> None:
    """Add the user's files and the number of vCPUs, and the ports of ``lpc.fwcfg``.

    OptionError, DeviceError or HostError: an item of ``-f`` is not possible.
    """
    fwcfg = machine.fwcfg
    fwcfg.add_file("opt/bhyve/hw.ncpu", struct.pack("<I", machine.ncpu))
    for number, item in machine.options.fwcfg.items():
        fwcfg.add_file(item.name, _user_data(number, item))
    if machine.options.lpc_fwcfg == "qemu":
        fwcfg.attach(machine.inout)
        machine.add_device("fwcfg", fwcfg)
    elif machine.options.fwcfg:
        log.warning("the guest cannot see the items of -f without lpc.fwcfg=qemu")
    elif machine.firmware is not None:
        machine.add_device("fwctl", Fwctl(machine))


def _user_data(number: int, item: FwcfgOptions) -> bytes:
    if item.string is not None and item.file is None:
        return item.string.encode(errors="surrogateescape") + b"\0"
    if item.file is None or item.string is not None:
        raise OptionError(f"fwcfg.{number} needs either string or file")
    path = Path(item.file)
    try:
        size = path.stat().st_size
        if path.is_file() and size <= FILE_SIZE_MAX:
            return path.read_bytes()
    except (OSError, ValueError) as error:
        raise OptionError(f"fw_cfg file '{item.name}': {path}") from error
    raise OptionError(
        f"fw_cfg file '{item.name}': {path} is not a regular file of at most "
        f"{FILE_SIZE_MAX} bytes"
    )
