"""NS16550A UART: a pure register machine with an interrupt line and a serial line.

National Semiconductor PC16550D datasheet, June 1995 (section numbers below).
bhyve: uart_emul.c.  The line is infinitely fast: a byte is on it as soon as it is
written, unless the line itself says that it cannot take more; then the transmitter
stays busy, as a real one does while the other end holds CTS back.

The chip does no locking; :class:`pybhyve.lpc.serial.SerialPort` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from pybhyve.regs import Reg, RegBlock

FIFO_SIZE: Final = 16
DEFAULT_BAUD: Final = 115200
CLOCK: Final = 1843200  # Hz; the divisor counts sixteenths of a bit


class Regs(RegBlock, size=8, fill=0xFF):
    """Byte registers; with LCR.DLAB the first two are the divisor (table II)."""

    DATA = Reg(0, 1)  # 8.0 RBR, THR, DLL
    IER = Reg(1, 1)  # 8.6, DLM
    IIR = Reg(2, 1)  # 8.5, FCR 8.4
    LCR = Reg(3, 1)  # 8.1
    MCR = Reg(4, 1)  # 8.7
    LSR = Reg(5, 1)  # 8.3; writes are for factory tests
    MSR = Reg(6, 1)  # 8.8
    SCR = Reg(7, 1)  # 8.9


IER_ERBFI: Final = 0x01  # received data
IER_ETBEI: Final = 0x02  # transmitter empty
IER_ELSI: Final = 0x04  # line status
IER_EDSSI: Final = 0x08  # modem status
IER_MASK: Final = 0x0F

IIR_NONE: Final = 0x01
IIR_MODEM: Final = 0x00
IIR_THRE: Final = 0x02
IIR_DATA: Final = 0x04
IIR_LINE: Final = 0x06
IIR_TIMEOUT: Final = 0x0C
IIR_FIFO: Final = 0xC0

FCR_ENABLE: Final = 0x01
FCR_RX_RESET: Final = 0x02
FCR_DMA: Final = 0x08
FCR_TRIGGER: Final = 0xC0
TRIGGER_LEVELS: Final = (1, 4, 8, 14)

LCR_DLAB: Final = 0x80

MCR_DTR: Final = 0x01
MCR_RTS: Final = 0x02
MCR_OUT1: Final = 0x04
MCR_OUT2: Final = 0x08
MCR_LOOP: Final = 0x10
MCR_MASK: Final = 0x1F

LSR_DR: Final = 0x01
LSR_OE: Final = 0x02
LSR_THRE: Final = 0x20
LSR_TEMT: Final = 0x40

MSR_TERI: Final = 0x04
MSR_CTS: Final = 0x10
MSR_DSR: Final = 0x20
MSR_RI: Final = 0x40
MSR_DCD: Final = 0x80
MSR_DELTAS: Final = 0x0F

# A carrier, so that opening the terminal does not wait for one, and CTS, so that
# a guest with hardware flow control may send.  deviation: bhyve leaves CTS off.
CABLE: Final = MSR_CTS | MSR_DSR | MSR_DCD


class Line(Protocol):
    """The serial line as the chip sees it."""

    def write(self, byte: int, /) -> bool:
        """Send a byte; False: it was taken, but no more until drained()."""

    def resume_input(self) -> None:
        """The receiver, full until now, has room again."""


class Ns16550:
    """The chip; ``irq(level)`` is called whenever its interrupt output changes.

    A guest's accesses go to ``regs``.
    """

    def __init__(self, irq: Callable[[bool], None], line: Line) -> None:
        self.regs = Regs(self)
        self._irq = irq
        self._line = line
        self._level = False
        self._power_on()

    def _power_on(self) -> None:
        self.regs.reset()
        self._divisor = CLOCK // 16 // DEFAULT_BAUD
        self._fcr = 0
        self._rx = bytearray()
        self._overrun = False
        self._thre_pending = False
        self._tx_busy = False
        self._modem = CABLE
        self._deltas = 0

    # -- the line's side -------------------------------------------------------------

    def room(self) -> int:
        """How many bytes may be received now; none in loopback, the line is cut off."""
        if self.regs.MCR & MCR_LOOP:
            return 0
        return self._capacity() - len(self._rx)

    def receive(self, data: bytes) -> None:
        """Bytes from the line; those beyond :meth:`room` are lost as overruns."""
        for byte in data:
            if len(self._rx) < self._capacity():
                self._rx.append(byte)
                continue
            self._overrun = True
            if not self._fcr & FCR_ENABLE:
                self._rx[0] = byte  # 8.3: the unread character is destroyed
        self._update()

    def drained(self) -> None:
        """The line can take bytes again."""
        if self._tx_busy:
            self._tx_busy = False
            self._thre_pending = True
            self._update()

    # -- registers -------------------------------------------------------------------

    @Regs.DATA.read
    def _read_data(self) -> int:
        if self.regs.LCR & LCR_DLAB:
            return self._divisor & 0xFF
        if not self._rx:
            return 0xFF
        was_full = self.room() == 0
        byte = self._rx.pop(0)
        self._update()
        if was_full and self.room() > 0:
            self._line.resume_input()
        return byte

    @Regs.DATA.write
    def _write_data(self, value: int) -> None:
        if self.regs.LCR & LCR_DLAB:
            self._divisor = self._divisor & 0xFF00 | value
            return
        if self._tx_busy:
            return  # a guest that does not wait overwrites the byte not yet sent
        self._thre_pending = False
        if self._level:
            # The line must fall before it rises, or an edge-triggered input sees none.
            self._update()
        if self.regs.MCR & MCR_LOOP:
            self.receive(bytes((value,)))
        elif not self._line.write(value):
            self._tx_busy = True
            return
        self._thre_pending = True
        if self.regs.IER & IER_ETBEI:
            self._update()

    @Regs.IER.read
    def _read_ier(self) -> int:
        if self.regs.LCR & LCR_DLAB:
            return self._divisor >> 8
        return self.regs.IER

    @Regs.IER.write
    def _write_ier(self, value: int) -> None:
        if self.regs.LCR & LCR_DLAB:
            self._divisor = self._divisor & 0xFF | value << 8
            return
        if value & ~self.regs.IER & IER_ETBEI and not self._tx_busy:
            self._thre_pending = True  # enabling it reports an empty transmitter
        self.regs.IER = value & IER_MASK
        self._update()

    @Regs.IIR.read
    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRE:
            self._thre_pending = False
            self._update()
        return cause | (IIR_FIFO if self._fcr & FCR_ENABLE else 0)

    @Regs.IIR.write
    def _write_fcr(self, value: int) -> None:
        was_full = self.room() == 0
        if (value ^ self._fcr) & FCR_ENABLE or value & FCR_RX_RESET:
            self._rx.clear()
        # 8.4: the other bits are only programmed together with the enable bit.
        self._fcr = (
            value & (FCR_ENABLE | FCR_DMA | FCR_TRIGGER) if value & FCR_ENABLE else 0
        )
        self._update()
        if was_full and self.room() > 0:
            self._line.resume_input()

    @Regs.MCR.write
    def _write_mcr(self, value: int) -> None:
        was_full = self.room() == 0
        self.regs.MCR = value & MCR_MASK
        if value & MCR_LOOP:  # 8.7: the outputs come back as the inputs
            modem = (
                (MSR_CTS if value & MCR_RTS else 0)
                | (MSR_DSR if value & MCR_DTR else 0)
                | (MSR_RI if value & MCR_OUT1 else 0)
                | (MSR_DCD if value & MCR_OUT2 else 0)
            )
        else:
            modem = CABLE
        changed = (modem ^ self._modem) >> 4
        if not self._modem & MSR_RI:
            changed &= ~MSR_TERI  # RI reports its trailing edge only
        self._deltas |= changed
        self._modem = modem
        self._update()
        if was_full and self.room() > 0:
            self._line.resume_input()

    @Regs.LSR.read
    def _read_lsr(self) -> int:
        value = 0 if self._tx_busy else LSR_THRE | LSR_TEMT
        if self._rx:
            value |= LSR_DR
        if self._overrun:
            value |= LSR_OE
            self._overrun = False
            self._update()
        return value

    @Regs.LSR.write
    @Regs.MSR.write
    def _ignore(self, value: int) -> None:
        pass

    @Regs.MSR.read
    def _read_msr(self) -> int:
        value = self._modem | self._deltas
        if self._deltas:
            self._deltas = 0
            self._update()
        return value

    # -- interrupts ------------------------------------------------------------------

    def _capacity(self) -> int:
        return FIFO_SIZE if self._fcr & FCR_ENABLE else 1

    def _cause(self) -> int:
        """The IIR code of the most urgent enabled cause (table V)."""
        ier = self.regs.IER
        if ier & IER_ELSI and self._overrun:
            return IIR_LINE
        if ier & IER_ERBFI and self._rx:
            trigger = TRIGGER_LEVELS[self._fcr >> 6]
            if self._fcr & FCR_ENABLE and len(self._rx) < trigger:
                # The timeout counts four idle characters, and none can come in
                # between: on an infinitely fast line it is over at once.
                return IIR_TIMEOUT
            return IIR_DATA
        if ier & IER_ETBEI and self._thre_pending:
            return IIR_THRE
        if ier & IER_EDSSI and self._deltas:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        level = self._cause() != IIR_NONE
        if level != self._level:
            self._level = level
            self._irq(level)

    # -- state -----------------------------------------------------------------------

    def reset(self) -> None:
        """Master reset: table III.

        ``irq`` is not called: who resets the chip resets what is behind the line too.
        """
        self._power_on()
        self._level = False

    def save(self) -> dict[str, Any]:
        """The whole state; the interrupt line's level is part of it."""
        return {
            "version": 1,
            "regs": self.regs.save(),
            "divisor": self._divisor,
            "fcr": self._fcr,
            "rx": bytes(self._rx),
            "overrun": self._overrun,
            "thre_pending": self._thre_pending,
            "tx_busy": self._tx_busy,
            "modem": self._modem,
            "deltas": self._deltas,
            "level": self._level,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave; ``irq`` is not called."""
        if state.get("version") != 1:
            raise ValueError(f"ns16550: unknown version {state.get('version')!r}")
        self.regs.restore(state["regs"])
        self._divisor = state["divisor"]
        self._fcr = state["fcr"]
        self._rx = bytearray(state["rx"])
        self._overrun = state["overrun"]
        self._thre_pending = state["thre_pending"]
        self._tx_busy = state["tx_busy"]
        self._modem = state["modem"]
        self._deltas = state["deltas"]
        self._level = state["level"]
