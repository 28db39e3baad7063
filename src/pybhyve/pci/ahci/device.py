"""What a port asks of the device at its other end."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final

from pybhyve.block import BlockIf
from pybhyve.pci.ahci.command import Command

if TYPE_CHECKING:
    from pybhyve.pci.ahci.port import Port

# ATA8-ACS, 6.2: the error register.
ERR_UNC: Final = 0x40  # uncorrectable data
ERR_IDNF: Final = 0x10  # no such address
ERR_ABRT: Final = 0x04  # aborted

# Commands of disks and CD drives.
EXECUTE_DEVICE_DIAGNOSTIC: Final = 0x90
DIAGNOSTIC_PASSED: Final = 0x01


class SataDevice(ABC):
    """A device; its port calls it with the port's lock held."""

    SIGNATURE: ClassVar[int]
    STATUS_AT_RESET: ClassVar[int]

    def __init__(self, blk: BlockIf) -> None:
        self.blk = blk
        self.port: Port

    def attach(self, port: Port) -> None:
        """Answer through ``port``."""
        self.port = port

    @abstractmethod
    def power_on(self) -> None:
        """Switched on, or its adapter was reset: `reset` follows."""

    @abstractmethod
    def reset(self) -> None:
        """Settings as after power-on."""

    @abstractmethod
    def soft_reset(self) -> None:
        """SRST, or DEVICE RESET: settings stay."""

    @abstractmethod
    def execute(self, command: Command) -> None:
        """Do a command, or begin it.

        VmmError and PrdtOverflowError of its memory are the caller's.
        """

    def abort(self, command: Command) -> None:
        """End a command that cannot be done."""
        self.port.fail(command, ERR_ABRT)

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """The state as plain values."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""

    def set_signature(self, command: Command) -> None:
        """Let the command's registers say which kind of device this is (9.12)."""
        command.fis[12] = self.SIGNATURE & 0xFF
        command.fis[4:7] = (self.SIGNATURE >> 8).to_bytes(3, "little")

    def read_blocks(self, command: Command, offset: int, length: int) -> None:
        """Read from the image into the command's buffers, then `transferred`."""
        iov = command.map(length, True)
        if self.blk.read_now(iov, offset):
            command.unmap()
            self.transferred(command, 0)
        else:
            self.port.block_io(
                command, self.blk.read, iov, offset, then=self.transferred
            )

    @abstractmethod
    def transferred(self, command: Command, error: int) -> None:
        """A transfer has ended, with an errno."""


def ata_error(error: int, write: bool) -> int:
    """The error register for an errno of a read or a write."""
    if not write and error != errno.EOPNOTSUPP:
        return ERR_UNC
    return ERR_ABRT
