"""A port: its registers, its command list, and the FISes its device sends.

Serial ATA AHCI 1.3.1, 3.3 (registers), 5 (data transfer), 6 (errors), 10 (software).
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pybhyve.pci.ahci.ahcireg import (
    CMD_CCS,
    CMD_CCS_SHIFT,
    CMD_CLO,
    CMD_CPS,
    CMD_CR,
    CMD_FR,
    CMD_FRE,
    CMD_ST,
    CMD_STORED,
    CONTROL_SRST,
    DET_COMRESET,
    DET_NONE,
    DET_OFFLINE,
    FIS_D,
    FIS_D2H,
    FIS_I,
    FIS_PIO_SETUP,
    FIS_SDB,
    IE_MASK,
    IS_DHRS,
    IS_HBFS,
    IS_IFS,
    IS_OFS,
    IS_PSS,
    IS_SDBS,
    IS_TFES,
    RFIS_PSFIS,
    RFIS_RFIS,
    RFIS_SDBFIS,
    SCTL_DET,
    SCTL_MASK,
    SERR_DIAG_T,
    SERR_P,
    SIG_NONE,
    SLOTS,
    SPD_GEN3,
    SPD_MASK,
    SPD_SHIFT,
    SSTS_OFFLINE,
    SSTS_PRESENT,
    STS_BSY,
    STS_DRDY,
    STS_DRQ,
    STS_DSC,
    STS_ERR,
    STS_OF_SDB,
    TFD_NONE,
    PortRegs,
)
from pybhyve.pci.ahci.command import (
    BadFisError,
    Command,
    PrdtOverflowError,
)
from pybhyve.pci.ahci.device import DIAGNOSTIC_PASSED, SataDevice
from pybhyve.vmmapi import Vm, VmmError

if TYPE_CHECKING:
    from pybhyve.block import BlockReq

log = logging.getLogger(__name__)

READY: Final = STS_DRDY | STS_DSC
_SDB: Final = struct.Struct("<BBBBI")

Submit = Callable[..., "BlockReq"]
Then = Callable[[Command, int], None]


class Port:
    """One port, and the device at it, if any.

    ``notify`` is called, with the lock held, when an interrupt of the port's that the
    driver wants has come up.  The device's methods are called with the lock held; it
    answers each command by one of `complete`, `complete_queued`, `complete_pio_in` or
    `fail`, now or at the end of `block_io`.
    """

    def __init__(
        self, vm: Vm, device: SataDevice | None, notify: Callable[[], None]
    ) -> None:
        self.lock = threading.RLock()
        self.device = device
        self._vm = vm
        self._notify = notify
        self.regs = PortRegs(self)
        self._outstanding: dict[int, Command] = {}  # queued commands, by their slot
        self._in_io: set[Command] = set()  # with block I/O under way, aborted ones too
        self._slot = SLOTS - 1  # the last one fetched
        self._error = False  # the list waits until its driver has cleared PxCMD.ST
        self._srst = False  # a software reset has begun
        # What comes when aborted I/O is done, so that none of it meets what follows.
        self._link_due = False  # the link is up
        self._soft_due = False  # a software reset is over
        self._paused = False
        if device is not None:
            device.attach(self)
        self.reset()

    # -- registers -------------------------------------------------------------------

    def write(self, offset: int, size: int, value: int) -> None:
        """A driver's write to the port's registers."""
        with self.lock:
            self.regs.write(offset, size, value)

    @property
    def pending(self) -> bool:
        """Whether an interrupt is up that the driver wants."""
        return bool(self.regs.IS & self.regs.IE)

    @property
    def resetting(self) -> bool:
        """Whether a reset waits for block I/O that it could not take back."""
        return self._link_due

    @PortRegs.IS.write
    def _acknowledge(self, value: int) -> None:
        self.regs.IS &= ~value

    @PortRegs.IE.write
    def _enable(self, value: int) -> None:
        self.regs.IE = value & IE_MASK
        if self.pending:
            self._notify()

    @PortRegs.CMD.write
    def _command(self, value: int) -> None:
        regs = self.regs
        old = regs.CMD
        cmd = old & ~(CMD_STORED | CMD_ST | CMD_FRE) | value & CMD_STORED
        if value & CMD_CLO:
            regs.TFD &= ~(STS_BSY | STS_DRQ)
        # 10.3.2: FISes are received as long as the command list runs.
        if value & CMD_FRE or (old & CMD_FR and (value & CMD_ST)):
            cmd |= CMD_FRE | CMD_FR
        else:
            cmd &= ~CMD_FR
        if value & CMD_ST:
            cmd |= CMD_ST | CMD_CR
        regs.CMD = cmd
        if old & CMD_ST and not value & CMD_ST:
            self._stop()
        elif not old & CMD_ST and value & CMD_ST:
            self._error = False
            self._slot = SLOTS - 1
        self._run()

    @PortRegs.SCTL.write
    def _control(self, value: int) -> None:
        regs = self.regs
        old = regs.SCTL & SCTL_DET
        det = value & SCTL_DET
        if det not in (DET_NONE, DET_COMRESET, DET_OFFLINE) or regs.CMD & CMD_ST:
            # 3.3.11: only defined while the command list does not run.
            det = old
        regs.SCTL = value & SCTL_MASK & ~SCTL_DET | det
        if det == old:
            return
        if det == DET_NONE:
            self._link_up()
        else:
            self._link_down(SSTS_OFFLINE if det == DET_OFFLINE else 0)

    @PortRegs.SACT.write
    def _activate(self, value: int) -> None:
        if self.regs.CMD & CMD_ST:
            self.regs.SACT |= value

    @PortRegs.CI.write
    def _issue(self, value: int) -> None:
        if self.regs.CMD & CMD_ST:
            self.regs.CI |= value
            self._run()

    # -- resets ----------------------------------------------------------------------

    def reset(self) -> None:
        """As after power-on, or after a reset of the adapter (10.4.3)."""
        with self.lock:
            regs = self.regs
            kept = regs.CLB, regs.CLBU, regs.FB, regs.FBU
            self._abort()
            regs.reset()
            regs.CLB, regs.CLBU, regs.FB, regs.FBU = kept
            self._error = False
            self._slot = SLOTS - 1
            if self.device is not None:
                regs.CMD |= CMD_CPS
                self.device.power_on()
                self._link_up()

    def power_on(self) -> None:
        """As after power-on, addresses too."""
        with self.lock:
            self.regs.reset()
            self.reset()

    def _link_down(self, status: int) -> None:
        regs = self.regs
        self._abort()
        self._link_due = self._soft_due = False
        regs.SSTS = status
        regs.SIG = SIG_NONE
        regs.TFD = TFD_NONE
        regs.SACT = 0

    def _link_up(self) -> None:
        """Have the device send its signature, when nothing of the past is under way."""
        regs = self.regs
        self._link_due = self.device is not None and bool(self._in_io)
        if self.device is None or self._link_due:
            return
        limit = (regs.SCTL & SPD_MASK) >> SPD_SHIFT
        speed = min(limit or SPD_GEN3, SPD_GEN3)
        regs.SSTS = SSTS_PRESENT | speed << SPD_SHIFT
        self._srst = self._soft_due = False
        self.device.reset()
        self._send_signature(self.device)

    def _send_signature(self, device: SataDevice) -> None:
        """The FIS after a reset: which kind of device this is, and that it is well."""
        regs = self.regs
        regs.SIG = device.SIGNATURE
        regs.TFD = DIAGNOSTIC_PASSED << 8 | device.STATUS_AT_RESET
        count, lba = regs.SIG & 0xFF, regs.SIG >> 8
        fis = bytearray(20)
        fis[0] = FIS_D2H
        fis[2:4] = device.STATUS_AT_RESET, DIAGNOSTIC_PASSED
        fis[4:7] = lba.to_bytes(3, "little")
        fis[12] = count
        self._post(RFIS_RFIS, fis)

    def _stop(self) -> None:
        """PxCMD.ST was cleared (10.3.1)."""
        self._abort()
        self.regs.CI = 0
        self.regs.SACT = 0
        self._settle()

    def _abort(self) -> None:
        """No command under way has a result any more."""
        self._outstanding.clear()
        for command in [*self._in_io]:
            command.alive = False
            request, device = command.request, self.device
            if (
                request is not None
                and device is not None
                and device.blk.cancel(request)
            ):
                command.unmap()
                self._in_io.discard(command)

    def _settle(self) -> None:
        """Do what had to wait until the aborted I/O was done."""
        if self._in_io:
            return
        if not self.regs.CMD & CMD_ST:
            self.regs.CMD &= ~(CMD_CR | CMD_CCS)
        if self._link_due:
            self._link_up()
        if self._soft_due and self.device is not None:
            self._soft_due = False
            self.device.soft_reset()
            self._send_signature(self.device)

    # -- the command list ------------------------------------------------------------

    def _run(self) -> None:
        """Fetch commands for as long as the device takes them (5.3)."""
        regs = self.regs
        while (
            regs.CI
            and regs.CMD & CMD_ST
            and not (self._error or self._paused or self._link_due)
            and not regs.TFD & (STS_BSY | STS_DRQ)
            and self.device is not None
        ):
            issued = regs.CI
            # The next one after the last, round and round.
            later = issued >> self._slot + 1 << self._slot + 1
            candidates = later or issued
            self._slot = slot = (candidates & -candidates).bit_length() - 1
            regs.CMD = regs.CMD & ~CMD_CCS | slot << CMD_CCS_SHIFT
            try:
                command = Command(self._vm, regs.CLBU << 32 | regs.CLB, slot)
            except VmmError:
                self._fatal(IS_HBFS)
                return
            except BadFisError:
                # The device refuses it, as often as it is sent.
                regs.SERR |= SERR_P | SERR_DIAG_T
                self._fatal(IS_IFS)
                return
            if command.control:
                self._device_control(command)
            else:
                regs.TFD |= STS_BSY
                self._do(command, self.device.execute, command)

    def _device_control(self, command: Command) -> None:
        """A FIS without a command: software reset begins and ends by two of them."""
        self.regs.CI &= ~(1 << command.slot)
        if command.fis[15] & CONTROL_SRST:
            self._srst = True
            self._abort()
            self.regs.SACT = 0
        elif self._srst:
            self._srst = False
            self.regs.TFD |= STS_BSY
            self._soft_due = True
            self._settle()

    def _do(self, command: Command, what: Callable[..., None], *args: Any) -> None:
        """Have the device go on with a command, whose memory may be none."""
        try:
            what(*args)
        except VmmError:
            command.unmap()
            self._fatal(IS_HBFS)
        except PrdtOverflowError:
            # 6.1.5 has the transfer hang here, until a reset.
            self._raise(IS_OFS)
            if self.device is not None:
                self.device.abort(command)

    def _fatal(self, bits: int) -> None:
        """The list stops in error, and its driver gets to know (6.2.2)."""
        self._error = True
        self._raise(bits)

    def block_io(
        self, command: Command, submit: Submit, *args: Any, then: Then
    ) -> None:
        """Begin ``submit(*args, done)``; ``then(command, errno)`` when that is done.

        The command's buffers are given back before; an aborted command ends there.
        """
        self._in_io.add(command)
        command.request = submit(*args, partial(self._io_done, command, then))

    def _io_done(self, command: Command, then: Then, error: int) -> None:
        command.unmap()
        with self.lock:
            command.request = None
            self._in_io.discard(command)
            if command.alive:
                self._do(command, then, command, error)
            self._settle()
            self._run()

    # -- how a device answers --------------------------------------------------------

    @property
    def outstanding(self) -> bool:
        """Whether queued commands are under way."""
        return bool(self._outstanding)

    def accept(self, command: Command) -> None:
        """Queue a command: the device is ready for the next."""
        command.queued = True
        self._outstanding[command.slot] = command
        self._send_registers(command, READY, 0, 0)
        self.regs.CI &= ~(1 << command.slot)

    def complete(self, command: Command, error: int = 0) -> None:
        """The end of a command that was not queued.

        ``error`` is the error register, which need not be an error.
        """
        self._send_registers(command, READY, error, FIS_I)
        self.regs.CI &= ~(1 << command.slot)
        self._raise(IS_DHRS | command.descriptor)

    def complete_pio_in(self, command: Command, length: int) -> None:
        """The end of a PIO command whose data went to the driver: no register FIS."""
        self._send_pio_setup(command, FIS_D | FIS_I, READY, length)
        self.regs.TFD = READY
        self.regs.CI &= ~(1 << command.slot)
        self._raise(IS_PSS | command.descriptor)

    def begin_pio_out(self, command: Command, length: int) -> None:
        """The device asks for the data of a PIO command, or for a packet."""
        self._send_pio_setup(command, 0, STS_BSY | READY, length)

    def complete_queued(self, command: Command) -> None:
        """The end of a queued command."""
        bit = 1 << command.slot
        del self._outstanding[command.slot]
        self._send_device_bits(READY, 0, bit)
        self.regs.SACT &= ~bit
        self._raise(IS_SDBS | command.descriptor)

    def fail(self, command: Command, error: int, status: int = READY) -> None:
        """The end, in error, of any command: of the whole queue, where there is one.

        ``error`` is the error register; ERR is added to ``status``.  The bit of the
        command stays, and the list waits until its driver has looked at it (6.2.2.1).
        """
        self._error = True
        queue, self._outstanding = self._outstanding, {}
        for other in queue.values():
            other.alive = False
        if command.queued:
            self._send_device_bits(status | STS_ERR, error, 0)
            self._raise(IS_SDBS | IS_TFES)
        else:
            self._send_registers(command, status | STS_ERR, error, FIS_I)
            self._raise(IS_DHRS | IS_TFES)

    # In the order of a real adapter: a driver may poll any of them, memory as well.

    def _send_registers(
        self, command: Command, status: int, error: int, flags: int
    ) -> None:
        """A device to host register FIS."""
        fis = command.fis
        self.regs.TFD = error << 8 | status
        self._post(
            RFIS_RFIS,
            bytes((FIS_D2H, flags, status, error))
            + fis[4:11]
            + b"\0"
            + fis[12:14]
            + bytes(6),
        )

    def _send_pio_setup(
        self, command: Command, flags: int, status: int, length: int
    ) -> None:
        fis = command.fis
        self._post(
            RFIS_PSFIS,
            bytes((FIS_PIO_SETUP, flags, READY | STS_DRQ, 0))
            + fis[4:11]
            + b"\0"
            + fis[12:14]
            + bytes((0, status))
            + (length & 0xFFFF).to_bytes(2, "little")
            + bytes(2),
        )

    def _send_device_bits(self, status: int, error: int, done: int) -> None:
        """A set device bits FIS."""
        status &= STS_OF_SDB
        self.regs.TFD = error << 8 | self.regs.TFD & 0xFF & ~STS_OF_SDB | status
        self._post(RFIS_SDBFIS, _SDB.pack(FIS_SDB, FIS_I, status, error, done))

    def _post(self, offset: int, fis: bytes | bytearray) -> None:
        """Put a FIS where the driver wants to have them."""
        regs = self.regs
        if not regs.CMD & CMD_FR:
            return
        try:
            self._vm.write_mem(regs.FBU << 32 | regs.FB + offset, fis)
        except VmmError:
            self._fatal(IS_HBFS)

    def _raise(self, bits: int) -> None:
        """Note what has happened; the driver is told what it does not know already."""
        regs = self.regs
        new = bits & ~regs.IS
        regs.IS |= bits
        if new & regs.IE:
            self._notify()

    # -- life ------------------------------------------------------------------------

    def pause(self) -> None:
        """Finish what is under way, and begin nothing."""
        with self.lock:
            self._paused = True
        if self.device is not None:
            self.device.blk.pause()

    def resume(self) -> None:
        """Go on with the commands that have been issued."""
        if self.device is not None:
            self.device.blk.resume()
        with self.lock:
            self._paused = False
            self._run()

    def save(self) -> dict[str, Any]:
        """Registers and device; paused, so no command is under way."""
        with self.lock:
            return {
                "regs": self.regs.save(),
                "slot": self._slot,
                "error": self._error,
                "srst": self._srst,
                "device": self.device.save() if self.device is not None else None,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        with self.lock:
            self.regs.restore(state["regs"])
            self._slot = state["slot"]
            self._error = state["error"]
            self._srst = state["srst"]
            if self.device is not None:
                self.device.restore(state["device"])
