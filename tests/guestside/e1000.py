"""The driver's half of an 82545EM: rings, EEPROM and PHY (Intel 317453-006)."""

from __future__ import annotations

import struct

from tests.guestside.pci import PciFunction

CTRL, STATUS, EECD, EERD, MDIC, VET = 0x00, 0x08, 0x10, 0x14, 0x20, 0x38
ICR, ITR, ICS, IMS, IMC = 0xC0, 0xC4, 0xC8, 0xD0, 0xD8
RCTL, TCTL = 0x100, 0x400
RDBAL, RDBAH, RDLEN, RDH, RDT = 0x2800, 0x2804, 0x2808, 0x2810, 0x2818
TDBAL, TDBAH, TDLEN, TDH, TDT = 0x3800, 0x3804, 0x3808, 0x3810, 0x3818
MTA, RA, VFTA, STATS = 0x5200, 0x5400, 0x5600, 0x4000
TXDW, TXQE, LSC, RXDMT0, RXT0 = 1, 2, 4, 0x10, 0x80
EOP, IFCS, IC, TSE, RS, DEXT, VLE = (1 << bit for bit in (24, 25, 26, 26, 27, 29, 30))
DATA = DEXT | 1 << 20
EN, UPE, MPE, LPE, BAM, VFE, SECRC = (1 << n for n in (1, 3, 4, 5, 15, 18, 26))
RX_RING, TX_RING, BUFFERS = 0x100000, 0x110000, 0x200000
BUFFER_STEP = 0x4000


class E1000Driver:
    """Rings of ``size`` descriptors, and buffers of one size."""

    def __init__(self, function: PciFunction, size: int = 16) -> None:
        function.enable()
        self.function = function
        self.vm = function.machine.ctx.vm
        self.regs = function.bar(0)
        self.ports = function.bar(2)
        self.size = size
        self.rx_next = 0
        self.tx_next = 0
        self.heap = 0x800000

    def get(self, reg: int) -> int:
        return self.regs.read(reg, 4)

    def set(self, reg: int, value: int) -> None:
        self.regs.write(reg, 4, value)

    def start(self, rctl: int = BAM | SECRC, tctl: int = 0, itr: int = 0) -> None:
        """Reset the chip, set the rings up, and give it all buffers but one."""
        self.ports.write(0, 4, CTRL)
        self.ports.write(4, 4, self.get(CTRL) | 1 << 26)
        self.rx_next = self.tx_next = 0
        self.vm.write_mem(RX_RING, bytes(16 * self.size))
        self.vm.write_mem(TX_RING, bytes(16 * self.size))
        for at in range(self.size):
            address = BUFFERS + at * BUFFER_STEP
            self.vm.write_mem(RX_RING + 16 * at, struct.pack("<QQ", address, 0))
        self.set(ITR, itr)
        self.set(IMS, 0xFFFFFFFF)
        for base, length, ring in ((RDBAL, RDLEN, RX_RING), (TDBAL, TDLEN, TX_RING)):
            self.set(base, ring)
            self.set(length, 16 * self.size)
        self.set(RDT, self.size - 1)
        self.set(RCTL, rctl | EN)
        self.set(TCTL, tctl | EN)
        self.get(ICR)

    # -- transmission ----------------------------------------------------------------

    def put(self, address: int, lower: int, upper: int = 0) -> int:
        """Fill a descriptor; its index.  `kick` makes it the chip's."""
        at = self.tx_next
        desc = struct.pack("<QII", address, lower, upper)
        self.vm.write_mem(TX_RING + 16 * at, desc)
        self.tx_next = (at + 1) % self.size
        return at

    def data(self, data: bytes, lower: int, upper: int = 0) -> int:
        """A descriptor with contents."""
        address = self.heap
        self.heap += -(-len(data) // 16) * 16
        self.vm.write_mem(address, data)
        return self.put(address, lower | len(data), upper)

    def context(self, *, ip=(14, 24, 33), tu=(34, 50, 0), command=0, hdr=0, mss=0):
        """A context descriptor: start, offset and end of two checksums."""
        low = struct.pack("<BBHBBH", *ip, *tu)
        word = DEXT | command
        return self.put(int.from_bytes(low, "little"), word, hdr << 8 | mss << 16)

    def kick(self) -> None:
        self.set(TDT, self.tx_next)

    def status(self, index: int) -> int:
        """The status byte of a transmit descriptor."""
        return self.vm.read_mem(TX_RING + 16 * index + 12, 1)[0]

    # -- reception -------------------------------------------------------------------

    def take(self) -> tuple[bytes, int, int] | None:
        """The next frame with the status and tag of its last descriptor, if any."""
        frame = b""
        while True:
            at = self.rx_next
            place = RX_RING + 16 * at
            address, length, _, status, errors, tag = struct.unpack(
                "<QHHBBH", self.vm.read_mem(place, 16)
            )
            if not status & 1:
                assert not frame, "a frame without an end"
                return None
            assert errors == 0
            frame += self.vm.read_mem(address, length)
            self.vm.write_mem(place + 8, bytes(8))
            self.rx_next = (at + 1) % self.size
            if status & 2:
                return frame, status, tag

    def give_back(self) -> None:
        """Let the chip have all buffers that were read again."""
        self.set(RDT, (self.rx_next - 1) % self.size)

    # -- EEPROM and PHY --------------------------------------------------------------

    def _eecd(self, value: int) -> int:
        self.set(EECD, value)
        return self.get(EECD)

    def microwire(self, opcode: int, address: int, data: int | None = None) -> int:
        """A command of nine bits, bit by bit; then 16 bits to or from the EEPROM."""
        cs, sk, di, do = 2, 1, 4, 8
        assert self._eecd(0x40) & 0x80, "no grant"
        command = opcode << 6 | address
        bits = [command >> n & 1 for n in reversed(range(9))]
        if data is not None:
            bits += [data >> n & 1 for n in reversed(range(16))]
        for bit in bits:
            level = 0x40 | cs | (di if bit else 0)
            self._eecd(level)
            self._eecd(level | sk)
            self._eecd(level)
        value = 0
        for _ in range(16 if data is None else 0):
            value = value << 1 | bool(self._eecd(0x40 | cs | sk) & do)
            self._eecd(0x40 | cs)
        self._eecd(0)
        return value

    def eeprom(self, word: int) -> int:
        return self.microwire(0b110, word)

    def phy(self, reg: int, value: int | None = None, phy: int = 1) -> int:
        """Read or write a register of the PHY; all of MDIC."""
        command = 2 << 26 if value is None else 1 << 26 | value
        self.set(MDIC, command | phy << 21 | reg << 16)
        assert self.get(MDIC) & 1 << 28
        return self.get(MDIC)
