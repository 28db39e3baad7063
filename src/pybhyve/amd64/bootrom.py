"""The boot ROM, which ends at 4 GiB, and below it the flash with its variables.

The ROM is plain memory that the guest cannot write.  The flash obeys the basic commands
of Intel's (StrataFlash J3 datasheet, "Command Bus Operations"), with QEMU's values of
the status, for which firmware probes.  bhyve: bootrom.c.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pybhyve.amd64.mem import MemRange
from pybhyve.amd64.varsfile import VarsFile
from pybhyve.device import Device
from pybhyve.errors import DeviceError, one_line
from pybhyve.vmmapi import MB, PAGE_SIZE, VM_BOOTROM

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.variables import GlobalOptions

log = logging.getLogger(__name__)

BOOTROM_SIZE: Final = 16 * MB
"""Bytes that ROM and variables may have together; I/O APIC and others are below."""
BOOTROM_END: Final = 1 << 32
BOOTROM_BASE: Final = BOOTROM_END - BOOTROM_SIZE

ROM_PROT: Final = 5  # read, execute

PROGRAM: Final = 0x40
PROGRAM_ALT: Final = 0x10
BLOCK_ERASE: Final = 0x20
ERASE_CONFIRM: Final = 0xD0
CLEAR_STATUS: Final = 0x50
READ_STATUS: Final = 0x70
READ_ARRAY: Final = 0xFF

COMMANDS: Final = (READ_ARRAY, PROGRAM, BLOCK_ERASE)
"""What a second write may be due for; READ_ARRAY: none is."""

SR_READY: Final = 1 << 7
SR_ERASE: Final = 1 << 5
SR_PROGRAM: Final = 1 << 4

ERASE_BLOCK: Final = 4096
"""What one command erases; firmware is built for the size of QEMU's flash."""

SETTLE_SECONDS: Final = 0.05
"""How long changes gather before they are written: firmware changes byte by byte."""


@dataclass(slots=True, frozen=True)
class Firmware:
    """What ``bootrom`` and ``bootvars`` name, found good."""

    rom: bytes
    vars: VarsFile | None

    @classmethod
    def open(cls, options: GlobalOptions) -> Firmware | None:
        """Read the ROM and lock the variables; None without a boot ROM.

        The ROM has 1 to 4096 pages of 4 KiB, and so have ROM and variables together.
        DeviceError: a file cannot be had, or has another size.
        """
        if options.bootrom is None:
            return None
        rom = _read_rom(options.bootrom)
        if options.bootvars is None:
            return cls(rom, None)
        variables = VarsFile(options.bootvars)
        try:
            _check_size("bootrom variable", options.bootvars, variables.size)
            _check_aggregate_size(len(rom) + variables.size)
        except DeviceError:
            variables.close()
            raise
        return cls(rom, variables)

    def close(self) -> None:
        """Let others have the variables."""
        if self.vars is not None:
            self.vars.close()


def _read_rom(name: str) -> bytes:
    try:
        # Not to wait for the other end of a named pipe.
        with open(name, "rb", opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DeviceError(f'Error opening bootrom "{name}": not a regular file')
            _check_size("bootrom", name, status.st_size)
            rom = file.read(BOOTROM_SIZE)
    except OSError as error:
        raise DeviceError(f'Error opening bootrom "{name}"') from error
    _check_size("bootrom", name, len(rom))  # it may have changed
    return rom


def _open_nonblocking(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _check_size(what: str, name: str, size: int) -> None:
    if not 0 < size <= BOOTROM_SIZE or size % PAGE_SIZE:
        raise DeviceError(
            f'Invalid {what} size {size} of "{name}": expected a multiple of '
            f"{PAGE_SIZE}, at most {BOOTROM_SIZE}"
        )


def _check_aggregate_size(size: int) -> None:
    if size > BOOTROM_SIZE:
        raise DeviceError(
            f"Invalid bootrom and variable aggregate size {size}: "
            f"at most {BOOTROM_SIZE}"
        )


def init_bootrom(machine: Machine, firmware: Firmware | None) -> None:
    """Make the segment; map the ROM, and add the flash if there are variables."""
    machine.vm.create_memseg(VM_BOOTROM, "bootrom", BOOTROM_SIZE)
    if firmware is None:
        return
    size = len(firmware.rom)
    base = BOOTROM_END - size
    machine.vm.mmap_memseg(base, VM_BOOTROM, BOOTROM_SIZE - size, size, ROM_PROT)
    machine.ctx.write(base, firmware.rom)
    if firmware.vars is not None:
        base -= firmware.vars.size
        machine.add_device("bootvars", BootVars(machine, base, firmware.vars))


class BootVars(Device):
    """The flash and its file.

    Its contents are mapped, so that reading them is as quick as memory, unless the
    guest has asked for the status.

    deviation: a status is shown until a command that ends that; bhyve shows one for a
    single read.  Blocks can be erased; bhyve ignores the command.
    """

    def __init__(self, machine: Machine, base: int, file: VarsFile) -> None:
        """Put the contents of ``file`` at ``base``."""
        self._vm = machine.vm
        self._base = base
        self._file = file
        self._size = file.size
        self._lock = threading.Lock()
        self._command = READ_ARRAY  # that waits for its second write
        self._status = SR_READY
        self._shows_status = True
        self._dirty = False  # changed since the file was written last
        self._failing = False  # to write it
        self._changed = threading.Event()
        self._ending = threading.Event()
        self._storing = threading.Lock()
        self._writer: threading.Thread | None = None
        self._show_status(False)
        machine.ctx.write(base, file.read())
        machine.mem.register(
            MemRange("bootvars", base, self._size, self._read, self._write)
        )

    # -- the chip --------------------------------------------------------------------

    def _show_status(self, shown: bool) -> None:
        if shown == self._shows_status:
            return
        self._shows_status = shown
        if shown:
            self._vm.munmap_memseg(self._base, self._size)
        else:
            offset = self._base - BOOTROM_BASE
            self._vm.mmap_memseg(self._base, VM_BOOTROM, offset, self._size, ROM_PROT)

    def _read(self, gpa: int, size: int) -> int:
        with self._lock:
            if self._shows_status:
                return int.from_bytes(bytes([self._status]) * size, "little")
            # Another vCPU has just changed that.
            return int.from_bytes(self._vm.read_mem(gpa, size), "little")

    def _write(self, gpa: int, size: int, value: int) -> None:
        with self._lock:
            command, self._command = self._command, READ_ARRAY
            if command == PROGRAM:
                # deviation: as in bhyve and QEMU, 0 bits become 1 without an erase.
                self._change(gpa, value.to_bytes(size, "little"))
                return
            if command == BLOCK_ERASE:
                if value & 0xFF == ERASE_CONFIRM:
                    self._change(gpa & -ERASE_BLOCK, b"\xff" * ERASE_BLOCK)
                else:
                    self._status |= SR_ERASE | SR_PROGRAM  # improper sequence
                return
            command = value & 0xFF
            if command == CLEAR_STATUS:
                self._status = 0
                return
            self._show_status(command == READ_STATUS)
            if command in (PROGRAM, PROGRAM_ALT):
                self._command = PROGRAM
            elif command == BLOCK_ERASE:
                self._command = BLOCK_ERASE

    def _change(self, gpa: int, data: bytes) -> None:
        self._vm.write_mem(gpa, data)
        self._status |= SR_READY
        self._dirty = True
        self._changed.set()

    # -- the file --------------------------------------------------------------------

    def start(self) -> None:
        """Begin to write changes to the file, on a thread of its own."""
        self._writer = threading.Thread(target=self._write_changes, name="bootvars")
        self._writer.start()

    def pause(self) -> None:
        """Bring the file up to date."""
        self._store()

    def halt(self) -> None:
        """Bring the file up to date."""
        if self._writer is not None:
            self._ending.set()
            self._changed.set()
            self._writer.join()
            self._writer = None
        self._store()

    def _write_changes(self) -> None:
        while not self._ending.is_set():
            self._changed.wait()
            self._ending.wait(SETTLE_SECONDS)
            self._changed.clear()
            self._store()

    def _store(self) -> None:
        with self._storing:
            with self._lock:
                if not self._dirty:
                    return
                self._dirty = False
                # A moment of the flash: firmware copes with power failures at any.
                data = self._contents()
            try:
                self._file.store(data)
                self._failing = False
            except OSError as error:
                # Tried again with the next change, and at the end.
                self._dirty = True
                self._report(error)

    def _report(self, error: OSError) -> None:
        if not self._failing or self._ending.is_set():
            log.error(
                "the firmware's variables could not be written: %s", one_line(error)
            )
        self._failing = True

    def _contents(self) -> bytes:
        offset = self._base - BOOTROM_BASE
        view = self._vm.view_memseg(VM_BOOTROM, offset, self._size)
        return bytes(memoryview(view))

    # -- state -----------------------------------------------------------------------

    def reset(self) -> None:
        """Show the contents, which stay."""
        self._command = READ_ARRAY
        self._status = SR_READY
        self._show_status(False)

    def save(self) -> dict[str, Any]:
        """Contents, status, and the command under way."""
        return {
            "version": 1,
            "contents": self._contents(),
            "command": self._command,
            "status": self._status,
            "shows_status": self._shows_status,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave; the file follows."""
        if state["version"] != 1:
            raise ValueError(f"bootvars: unknown state version {state['version']}")
        commands = (READ_ARRAY,) if state["shows_status"] else COMMANDS
        if (
            len(state["contents"]) != self._size
            or state["command"] not in commands
            or not 0 <= state["status"] <= 0xFF
        ):
            raise ValueError("bootvars: damaged state")
        self._show_status(False)
        self._change(self._base, state["contents"])
        self._command = state["command"]
        self._status = state["status"]
        self._show_status(state["shows_status"])
