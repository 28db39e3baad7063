"""e1000: an Intel 82545EM gigabit Ethernet controller with copper PHY.

Intel "PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual",
317453-006 (the sections named here).  bhyve: pci_e82545.c.

Descriptors are worked off on the event loop's thread.  What the driver leaves to the
chip (checksums, segmentation) goes on to the backend in virtio's header, so that large
segments stay whole as far as they can.
"""

from __future__ import annotations

import struct
import threading
import time
import zlib
from bisect import bisect_left
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pybhyve.net import (
    FRAME_MAX,
    HEADER_LEGACY,
    NetOptions,
    VnetHeader,
    generate_mac,
    internet_sum,
    open_backend,
)
from pybhyve.net.header import (
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
)
from pybhyve.pci.emul import BAR_IO, BAR_MEM32, PciAddress, PciDevice
from pybhyve.pci.pcireg import PCIC_NETWORK
from pybhyve.pci.registry import pci_device
from pybhyve.regs import RO, Reg, RegBlock
from pybhyve.vmmapi import VmmError, map_iov, release_iov

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.mevent import Handle
    from pybhyve.pci.bus import PciHost

VENDOR_INTEL: Final = 0x8086
DEV_ID_82545EM_COPPER: Final = 0x100F
SUBDEV_ID: Final = 0x1008

BAR_REGISTER: Final = 0
BAR_FLASH: Final = 1
BAR_IOSPACE: Final = 2
REGISTER_LEN: Final = 128 << 10
FLASH_LEN: Final = 64 << 10
IO_LEN: Final = 8
IOADDR: Final = 0  # 13.2.1: which register IODATA is
IODATA: Final = 4


class Regs(RegBlock, size=0x5820 + 4):  # 13.4
    """The registers but for tables and statistics."""

    CTRL = Reg(0x0000, 4, reset=0x00140240)
    STATUS = Reg(0x0008, 4, RO)
    EECD = Reg(0x0010, 4)
    EERD = Reg(0x0014, 4)
    CTRL_EXT = Reg(0x0018, 4)
    FLA = Reg(0x001C, 4)
    MDIC = Reg(0x0020, 4)
    FCAL = Reg(0x0028, 4)
    FCAH = Reg(0x002C, 4, mask=0xFFFF)
    FCT = Reg(0x0030, 4, mask=0xFFFF)
    VET = Reg(0x0038, 4, mask=0xFFFF)
    ICR = Reg(0x00C0, 4)
    ITR = Reg(0x00C4, 4, mask=0xFFFF)
    ICS = Reg(0x00C8, 4)
    IMS = Reg(0x00D0, 4)
    IMC = Reg(0x00D8, 4)
    RCTL = Reg(0x0100, 4, mask=0x06DFB3FE)
    FCTTV = Reg(0x0170, 4, mask=0xFFFF)
    TXCW = Reg(0x0178, 4, mask=0xC000FFFF)
    RXCW = Reg(0x0180, 4, RO)
    TCTL = Reg(0x0400, 4, mask=0x017FFFFA)
    TIPG = Reg(0x0410, 4)
    AIFS = Reg(0x0458, 4, mask=0xFFFF)
    LEDCTL = Reg(0x0E00, 4, reset=0x07061302, mask=0xCFCFCFFF)
    PBA = Reg(0x1000, 4, reset=0x00100030, mask=0xFF80)
    FCRTL = Reg(0x2160, 4, mask=0x8000FFF8)
    FCRTH = Reg(0x2168, 4, mask=0xFFF8)
    RDBAL = Reg(0x2800, 4, mask=0xFFFFFFF0)
    RDBAH = Reg(0x2804, 4)
    RDLEN = Reg(0x2808, 4, mask=0xFFF80)
    RDH = Reg(0x2810, 4, mask=0xFFFF)
    RDT = Reg(0x2818, 4, mask=0xFFFF)
    RDTR = Reg(0x2820, 4, mask=0xFFFF)
    RXDCTL = Reg(0x2828, 4, reset=0x01010000)
    RADV = Reg(0x282C, 4, mask=0xFFFF)
    RSRPD = Reg(0x2C00, 4, mask=0xFFF)
    TXDMAC = Reg(0x3000, 4)
    TDBAL = Reg(0x3800, 4, mask=0xFFFFFFF0)
    TDBAH = Reg(0x3804, 4)
    TDLEN = Reg(0x3808, 4, mask=0xFFF80)
    TDH = Reg(0x3810, 4, mask=0xFFFF)
    TDT = Reg(0x3818, 4, mask=0xFFFF)
    TIDV = Reg(0x3820, 4, mask=0xFFFF)
    TXDCTL = Reg(0x3828, 4)
    TADV = Reg(0x382C, 4, mask=0xFFFF)
    TSPMT = Reg(0x3830, 4)
    RXCSUM = Reg(0x5000, 4, mask=0x7FF)
    WUC = Reg(0x5800, 4)
    WUFC = Reg(0x5808, 4)
    WUS = Reg(0x5810, 4)
    MANC = Reg(0x5820, 4, RO)


# Registers that are an array: statistics, multicast and receive addresses, VLANs.
STATS: Final = 0x4000
STATS_END: Final = 0x4100
MTA: Final = 0x5200
MTA_END: Final = 0x5400
RA: Final = 0x5400
RA_END: Final = 0x5480
VFTA: Final = 0x5600
VFTA_END: Final = 0x5800
RA_COUNT: Final = 16
RAH_AV: Final = 1 << 31  # the address is valid
RAH_AS: Final = 3 << 16  # it is a source's: no frame to us has it

# 13.4.1, 13.4.2
CTRL_RST: Final = 1 << 26
CTRL_VME: Final = 1 << 30
CTRL_PHY_RST: Final = 1 << 31
STATUS_FD: Final = 1 << 0
STATUS_LU: Final = 1 << 1
STATUS_SPEED_1000: Final = 1 << 7

# 13.4.3, 13.4.4: EEPROM
EECD_SK: Final = 1 << 0
EECD_CS: Final = 1 << 1
EECD_DI: Final = 1 << 2
EECD_DO: Final = 1 << 3
EECD_FWE_DISABLED: Final = 1 << 4
EECD_REQ: Final = 1 << 6
EECD_GNT: Final = 1 << 7
EECD_PRES: Final = 1 << 8
EERD_START: Final = 1 << 0
EERD_DONE: Final = 1 << 4
EEPROM_WORDS: Final = 64
EEPROM_SUM: Final = 0xBABA
# 5.3.1: Microwire commands: start bit, two bits of opcode, six of address.
COMMAND_BITS: Final = 9
WORD_BITS: Final = 16
OP_WRITE: Final = 0b101
OP_READ: Final = 0b110

# 13.4.6: the way to the PHY
MDIC_DATA: Final = 0xFFFF
MDIC_OP_WRITE: Final = 1 << 26
MDIC_OP_READ: Final = 2 << 26
MDIC_READY: Final = 1 << 28
MDIC_INTERRUPT: Final = 1 << 29
MDIC_ERROR: Final = 1 << 30
MDIC_PHY: Final = 1  # the only address that answers

# 8.12: the PHY's registers, IEEE 802.3 clause 22
PHY_CTRL: Final = 0
PHY_STATUS: Final = 1
PHY_ID1: Final = 2
PHY_ID2: Final = 3
PHY_AUTONEG_ADV: Final = 4
PHY_LP_ABILITY: Final = 5
PHY_AUTONEG_EXP: Final = 6
PHY_1000T_CTRL: Final = 9
PHY_1000T_STATUS: Final = 10
PHY_SPEC_STATUS: Final = 17
PHY_READ_ONLY: Final = frozenset(
    (PHY_STATUS, PHY_ID1, PHY_ID2, PHY_LP_ABILITY, PHY_1000T_STATUS, PHY_SPEC_STATUS)
)
PHY_AT_RESET: Final = {
    PHY_CTRL: 0x1140,  # 1000 Mb/s, full duplex, auto-negotiation
    PHY_STATUS: 0x7949,  # abilities; link and completion are added
    PHY_ID1: 0x0141,  # Marvell 88E1011, revision 4
    PHY_ID2: 0x0C24,
    PHY_AUTONEG_ADV: 0x0DE1,
    PHY_LP_ABILITY: 0x41E1,
    PHY_AUTONEG_EXP: 0x0001,
    PHY_1000T_CTRL: 0x0E00,
    PHY_1000T_STATUS: 0x3C00,  # the partner does 1000 Mb/s, receivers are good
    PHY_SPEC_STATUS: 0xA800,  # 1000 Mb/s, full duplex, resolved
}
PHY_CTRL_SELF_CLEARING: Final = 0x8200  # reset, restart of auto-negotiation
PHY_STATUS_LINK: Final = 0x0024
PHY_SPEC_STATUS_LINK: Final = 0x0400

# 13.4.17: causes of interrupts
ICR_TXDW: Final = 1 << 0  # a transmit descriptor was written back
ICR_TXQE: Final = 1 << 1  # the transmit queue is empty
ICR_LSC: Final = 1 << 2  # the link changed
ICR_RXDMT0: Final = 1 << 4  # few receive descriptors are left
ICR_RXT0: Final = 1 << 7  # frames have come
ICR_MDAC: Final = 1 << 9  # an access to the PHY is done
ICR_SRPD: Final = 1 << 16  # a small frame has come
ITR_NS: Final = 256

# 13.4.22, 13.4.33
RCTL_EN: Final = 1 << 1
RCTL_UPE: Final = 1 << 3
RCTL_MPE: Final = 1 << 4
RCTL_LPE: Final = 1 << 5
RCTL_LBM: Final = 3 << 6
RCTL_RDMTS_SHIFT: Final = 8
RCTL_MO_SHIFT: Final = 12
RCTL_BAM: Final = 1 << 15
RCTL_BSIZE_SHIFT: Final = 16
RCTL_VFE: Final = 1 << 18
RCTL_BSEX: Final = 1 << 25
RCTL_SECRC: Final = 1 << 26
TCTL_EN: Final = 1 << 1
TCTL_PSP: Final = 1 << 3

# 3.2.3: receive descriptors
_RXD: Final = struct.Struct("<QHHBBH")  # address, length, checksum, status, errors, tag
DESC_SIZE: Final = 16
RXD_STAT_DD: Final = 1 << 0
RXD_STAT_EOP: Final = 1 << 1
RXD_STAT_IXSM: Final = 1 << 2  # nothing was found out about checksums
RXD_STAT_VP: Final = 1 << 3  # the VLAN tag is in the descriptor
RXD_STAT_PIF: Final = 1 << 7  # the address matched by hash only

# 3.3: transmit descriptors; the two words behind the address
_TXD: Final = struct.Struct("<QII")
_CONTEXT: Final = struct.Struct("<BBHBBHIBBH")
TXD_STATUS: Final = 12  # its place in a descriptor
TXD_STAT_DD: Final = 1 << 0
TXD_CMD_EOP: Final = 1 << 24
TXD_CMD_IFCS: Final = 1 << 25
TXD_CMD_IC: Final = 1 << 26  # of a legacy descriptor: insert a checksum
TXD_CMD_TSE: Final = 1 << 26  # of a data descriptor: segment
TXD_CMD_RS: Final = 1 << 27
TXD_CMD_DEXT: Final = 1 << 29
TXD_CMD_VLE: Final = 1 << 30
TXD_DTYP: Final = 0xF << 20
TXD_DTYP_CONTEXT: Final = 0
TXD_LENGTH: Final = 0xFFFFF
TXD_LEGACY_LENGTH: Final = 0xFFFF
TXD_POPTS_IXSM: Final = 1 << 8
TXD_POPTS_TXSM: Final = 1 << 9
CONTEXT_TCP: Final = 1 << 24
CONTEXT_IP: Final = 1 << 25

# 13.7: statistics, by their place in the array
MPC: Final = 0x10
PRC64: Final = 0x5C  # and five more, for larger frames
GPRC: Final = 0x74
BPRC: Final = 0x78
MPRC: Final = 0x7C
GPTC: Final = 0x80
GORC: Final = 0x88
GOTC: Final = 0x90
ROC: Final = 0xAC
TOR: Final = 0xC0
TOT: Final = 0xC8
TPR: Final = 0xD0
TPT: Final = 0xD4
PTC64: Final = 0xD8  # and five more
MPTC: Final = 0xF0
BPTC: Final = 0xF4
TSCTC: Final = 0xF8
_WIDE: Final = frozenset((GORC, GOTC, TOR, TOT))  # of 64 bits
_SIZES: Final = (64, 127, 255, 511, 1023)

MULTICAST: Final = 1  # of an address's first byte
BROADCAST: Final = b"\xff" * 6
MTU: Final = 1500
ETHER_HEADER: Final = 14
ETHER_MIN: Final = 60
ETHER_MAX: Final = 1518  # with a VLAN tag, without FCS
ETHER_MAX_LONG: Final = 16384
FCS_SIZE: Final = 4
MACS: Final = 12  # bytes of addresses in front of a VLAN tag
TAG_SIZE: Final = 4
IP_TOTAL_LENGTH: Final = 2
IPV6_PAYLOAD_LENGTH: Final = 4
IPV6_HEADER: Final = 40
TCP_FLAGS: Final = 13
TCP_CWR: Final = 0x80

# Work in one go, before others on the event loop have theirs.
RX_BUDGET: Final = 64  # frames
DESC_BUDGET: Final = 256
"""Descriptors; also the most that one frame may have, else it is lost."""


class Context(NamedTuple):
    """A context descriptor (3.3.6): what is to be done to the frames that follow."""

    ipcss: int = 0
    ipcso: int = 0
    ipcse: int = 0
    tucss: int = 0
    tucso: int = 0
    tucse: int = 0
    command: int = 0
    status: int = 0
    hdr_len: int = 0
    mss: int = 0


@pci_device("e1000", options=NetOptions)
class PciE1000(PciDevice[NetOptions]):
    """The controller, its EEPROM and its PHY.

    ``_lock`` guards the registers and is held for an access; ``_work`` while frames
    move, and comes before it.
    """

    def __init__(
        self, machine: Machine, host: PciHost, address: PciAddress, options: NetOptions
    ) -> None:
        super().__init__(machine, host, address, options)
        self.set_ids(
            VENDOR_INTEL,
            DEV_ID_82545EM_COPPER,
            class_=PCIC_NETWORK,
            subclass=0,
            subvendor=VENDOR_INTEL,
            subdevice=SUBDEV_ID,
        )
        self.add_bar(BAR_REGISTER, BAR_MEM32, REGISTER_LEN)
        self.add_bar(BAR_FLASH, BAR_MEM32, FLASH_LEN)
        self.add_bar(BAR_IOSPACE, BAR_IO, IO_LEN)
        self.add_rom(options.rom)
        self.add_intx()
        self._loop = machine.mevent
        self._vm = machine.ctx.vm
        self._mac = options.mac or generate_mac(
            address.slot, address.func, machine.ctx.name
        )
        self._lock = threading.RLock()
        self._work = threading.Lock()
        self._paused = False
        self._regs = Regs(self)
        self._io_addr = 0
        self._buffer = memoryview(bytearray(FRAME_MAX))
        self._waiting = 0  # bytes of a frame in it that there was no descriptor for
        self._tx_soon = False  # _transmit is about to be called
        self._rx_soon = False  # _refilled is about to be called
        self._resets = 0  # for whoever works while the driver resets the chip
        self._asserted = False  # the interrupt line
        self._throttle: Handle | None = None  # the next interrupt waits for it
        self._interrupted = 0.0  # when the line last went up
        self._power_on()
        self._backend = open_backend(options, machine.mevent, machine.vm.now, MTU)

    # -- reset -----------------------------------------------------------------------

    def _power_on(self) -> None:
        """Everything as after power-on."""
        self._mta = bytearray(MTA_END - MTA)
        self._ra = bytearray(RA_END - RA)
        self._vfta = bytearray(VFTA_END - VFTA)
        self._ra[:8] = self._mac + (RAH_AV >> 16).to_bytes(2, "little")
        self._eeprom = self._make_eeprom()
        self._phy = [PHY_AT_RESET.get(reg, 0) for reg in range(32)]
        self._regs.reset()
        self._reset_chip()

    def _reset_chip(self) -> None:
        """What CTRL.RST resets (14.3), which leaves the tables alone."""
        regs = self._regs
        kept = {
            name: getattr(regs, name)
            for name in ("FCAL", "FCAH", "FCT", "VET", "FCTTV", "TIPG", "TIDV", "TADV")
        }
        regs.reset()
        for name, value in kept.items():
            setattr(regs, name, value)
        self._stats = [0] * ((STATS_END - STATS) // 4)
        self._context = Context()
        # The EEPROM's interface: what was shifted in, and how many bits are to come.
        self._shift = 0
        self._shift_bits = COMMAND_BITS
        self._shift_out = False
        self._shift_write: int | None = None  # the address of a write
        regs.EECD = EECD_PRES | EECD_FWE_DISABLED
        self._resets += 1
        self._waiting = 0
        self._stop_throttle()
        self._update_line()

    def _make_eeprom(self) -> list[int]:
        words = [0] * EEPROM_WORDS
        words[0:3] = struct.unpack("<HHH", self._mac)
        words[0x0B] = SUBDEV_ID
        words[0x0C] = VENDOR_INTEL
        words[0x0D] = DEV_ID_82545EM_COPPER
        words[0x0E] = VENDOR_INTEL
        words[0x3F] = EEPROM_SUM - sum(words) & 0xFFFF
        return words

    # -- accesses: a vCPU's thread ---------------------------------------------------

    def bar_read(self, index: int, offset: int, size: int) -> int:
        """A register, in memory or by way of the I/O ports."""
        with self._lock:
            if index == BAR_REGISTER:
                return self._read(offset, size)
            if index == BAR_IOSPACE:
                if offset >= IODATA:
                    return self._read(self._io_addr + offset - IODATA, size)
                return self._io_addr >> 8 * offset & (1 << 8 * size) - 1
        return (1 << 8 * size) - 1  # no flash

    def bar_write(self, index: int, offset: int, size: int, value: int) -> None:
        """A register, in memory or by way of the I/O ports."""
        with self._lock:
            if index == BAR_REGISTER:
                self._write(offset, size, value)
            elif index == BAR_IOSPACE:
                if offset >= IODATA:
                    self._write(self._io_addr + offset - IODATA, size, value)
                elif offset == IOADDR and size == 4:
                    self._io_addr = value & REGISTER_LEN - 1

    def _read(self, offset: int, size: int) -> int:
        if STATS <= offset < STATS_END:
            return self._read_stat(offset - STATS) if size == 4 else 0
        table = self._table(offset)
        if table is None:
            return self._regs.read(offset, size)
        data, at = table
        return int.from_bytes(data[at : at + size], "little")

    def _write(self, offset: int, size: int, value: int) -> None:
        table = self._table(offset)
        if table is None:
            self._regs.write(offset, size, value)
            return
        data, at = table
        end = min(at + size, len(data))
        data[at:end] = value.to_bytes(size, "little")[: end - at]

    def _table(self, offset: int) -> tuple[bytearray, int] | None:
        if MTA <= offset < MTA_END:
            return self._mta, offset - MTA
        if RA <= offset < RA_END:
            return self._ra, offset - RA
        if VFTA <= offset < VFTA_END:
            return self._vfta, offset - VFTA
        return None

    def _read_stat(self, offset: int) -> int:
        """A counter; reading starts it anew (13.7)."""
        stats, index = self._stats, offset // 4
        if offset in _WIDE:
            return stats[index] & 0xFFFFFFFF  # the upper half clears it
        if offset - 4 in _WIDE:
            value, stats[index - 1] = stats[index - 1] >> 32 & 0xFFFFFFFF, 0
            return value
        value, stats[index] = min(stats[index], 0xFFFFFFFF), 0
        return value

    @Regs.CTRL.write
    def _set_ctrl(self, value: int) -> None:
        if value & CTRL_PHY_RST:
            self._phy = [PHY_AT_RESET.get(reg, 0) for reg in range(32)]
        if value & CTRL_RST:
            self._reset_chip()
        self._regs.CTRL = value & ~(CTRL_RST | CTRL_PHY_RST)

    @Regs.STATUS.read
    def _status(self) -> int:
        link = STATUS_LU if self._backend.link_up else 0
        return STATUS_FD | STATUS_SPEED_1000 | link

    # -- EEPROM (5.3) and PHY (8) ----------------------------------------------------

    @Regs.EECD.write
    def _set_eecd(self, value: int) -> None:
        old = self._regs.EECD
        driven = EECD_SK | EECD_CS | EECD_DI | EECD_REQ
        new = old & ~(driven | EECD_GNT) | value & driven
        if value & EECD_REQ:
            new |= EECD_GNT
        self._regs.EECD = new
        if not new & EECD_CS:
            self._await_command()
        elif new & EECD_SK and not old & EECD_SK:
            self._clock_eeprom()

    def _await_command(self) -> None:
        self._shift = 0
        self._shift_bits = COMMAND_BITS
        self._shift_out = False
        self._shift_write = None

    def _clock_eeprom(self) -> None:
        regs = self._regs
        if self._shift_out:
            regs.EECD &= ~EECD_DO
            if self._shift & 1 << self._shift_bits - 1:
                regs.EECD |= EECD_DO
        else:
            self._shift = self._shift << 1 | bool(regs.EECD & EECD_DI)
        self._shift_bits -= 1
        if self._shift_bits:
            return
        if self._shift_write is not None:
            self._eeprom[self._shift_write] = self._shift & 0xFFFF
        elif not self._shift_out:
            opcode, word = self._shift >> 6, self._shift & EEPROM_WORDS - 1
            self._await_command()
            if opcode in (OP_READ, OP_WRITE):
                self._shift_bits = WORD_BITS
            if opcode == OP_READ:
                self._shift, self._shift_out = self._eeprom[word], True
            elif opcode == OP_WRITE:
                self._shift_write = word
            return
        self._await_command()

    @Regs.EERD.write
    def _set_eerd(self, value: int) -> None:
        if value & EERD_START:
            word = value >> 8 & 0xFF
            data = self._eeprom[word] if word < EEPROM_WORDS else 0
            self._regs.EERD = data << 16 | word << 8 | EERD_DONE

    @Regs.MDIC.write
    def _set_mdic(self, value: int) -> None:
        reg, phy = value >> 16 & 31, value >> 21 & 31
        result = value & ~(MDIC_READY | MDIC_ERROR)
        if phy != MDIC_PHY:
            result |= MDIC_ERROR
        elif value & MDIC_OP_READ:
            result = result & ~MDIC_DATA | self._read_phy(reg)
        elif value & MDIC_OP_WRITE:
            self._write_phy(reg, value & MDIC_DATA)
        self._regs.MDIC = result | MDIC_READY
        if value & MDIC_INTERRUPT:
            self._raise(ICR_MDAC)

    def _read_phy(self, reg: int) -> int:
        value = self._phy[reg]
        if self._backend.link_up:
            if reg == PHY_STATUS:
                value |= PHY_STATUS_LINK
            elif reg == PHY_SPEC_STATUS:
                value |= PHY_SPEC_STATUS_LINK
        elif reg in (PHY_LP_ABILITY, PHY_1000T_STATUS):
            value = 0
        return value

    def _write_phy(self, reg: int, value: int) -> None:
        if reg == PHY_CTRL:
            value &= ~PHY_CTRL_SELF_CLEARING
        if reg not in PHY_READ_ONLY:
            self._phy[reg] = value

    # -- interrupts (13.4.17 to 13.4.21) ---------------------------------------------

    @Regs.ICR.read
    def _take_icr(self) -> int:
        causes, self._regs.ICR = self._regs.ICR, 0
        self._update_line()
        return causes

    @Regs.ICR.write
    def _clear_icr(self, value: int) -> None:
        self._regs.ICR &= ~value
        self._update_line()

    @Regs.ICS.read
    @Regs.IMC.read
    def _write_only(self) -> int:
        return 0

    @Regs.ICS.write
    def _raise(self, causes: int) -> None:
        self._regs.ICR |= causes
        self._update_line()

    @Regs.IMS.write
    def _set_ims(self, value: int) -> None:
        self._regs.IMS |= value
        self._update_line()

    @Regs.IMC.write
    def _set_imc(self, value: int) -> None:
        self._regs.IMS &= ~value
        self._update_line()

    def _update_line(self) -> None:
        """The line is up while an unmasked cause is there, as often as ITR allows."""
        regs = self._regs
        if not regs.ICR & regs.IMS:
            if self._asserted:
                self._asserted = False
                self.intx_deassert()
            return
        if self._asserted or self._throttle is not None:
            return
        now = time.monotonic()
        wait = self._interrupted + regs.ITR * ITR_NS / 1e9 - now
        if wait > 0:
            self._throttle = self._loop.add_timer(wait, self._throttled)
        else:
            self._interrupted = now
            self._asserted = True
            self.intx_assert()

    def _throttled(self) -> None:
        with self._lock:
            if not self._paused:
                self._stop_throttle()
                self._update_line()

    def _stop_throttle(self) -> None:
        if self._throttle is not None:
            self._loop.delete(self._throttle)
            self._throttle = None
        self._interrupted = 0.0

    # -- rings -----------------------------------------------------------------------

    @Regs.RCTL.write
    def _set_rctl(self, value: int) -> None:
        self._regs.RCTL = value & Regs.RCTL.mask
        self._wake_receiver()

    @Regs.RDT.write
    def _set_rdt(self, value: int) -> None:
        self._regs.RDT = value & 0xFFFF
        self._wake_receiver()

    def _wake_receiver(self) -> None:
        if not self._rx_soon:
            self._rx_soon = True
            self._loop.call_soon_threadsafe(self._refilled)

    @Regs.TCTL.write
    def _set_tctl(self, value: int) -> None:
        self._regs.TCTL = value & Regs.TCTL.mask
        self._wake_transmitter()

    @Regs.TDT.write
    def _set_tdt(self, value: int) -> None:
        self._regs.TDT = value & 0xFFFF
        self._wake_transmitter()

    def _wake_transmitter(self) -> None:
        if not self._tx_soon:
            self._tx_soon = True
            self._loop.call_soon_threadsafe(self._transmit)

    def _descriptors(self, base: int, size: int, head: int, count: int) -> bytes:
        """``count`` descriptors from ``head`` on; less where there is no memory."""
        first = min(count, size - head)
        try:
            data = self._vm.read_mem(base + head * DESC_SIZE, first * DESC_SIZE)
            if count > first:
                data += self._vm.read_mem(base, (count - first) * DESC_SIZE)
        except (VmmError, OverflowError):
            return b""
        return data

    # -- transmission: the event loop's thread ---------------------------------------

    def _transmit(self) -> None:
        with self._work:
            with self._lock:
                self._tx_soon = False
                regs = self._regs
                size = regs.TDLEN // DESC_SIZE
                head, tail = regs.TDH, regs.TDT
                if (
                    self._paused
                    or not regs.TCTL & TCTL_EN
                    or not head < size > tail
                    or head == tail
                ):
                    return
                base = regs.TDBAH << 32 | regs.TDBAL
                resets = self._resets
            available = (tail - head) % size
            count = min(available, DESC_BUDGET)
            raw = self._descriptors(base, size, head, count)
            done, reported = self._send_frames(raw, base, size, head)
            if not done and count == DESC_BUDGET:
                done = count  # one frame of all these: it is lost
            with self._lock:
                if not done or resets != self._resets:
                    return
                head = (head + done) % size
                regs.TDH = head
                causes = ICR_TXDW if reported else 0
                if head == regs.TDT:
                    causes |= ICR_TXQE
                else:
                    self._wake_transmitter()
                self._raise(causes)

    def _send_frames(
        self, raw: bytes, base: int, size: int, head: int
    ) -> tuple[int, bool]:
        """Send what descriptors say, as far as there are whole frames.

        Gives how many descriptors that were, and whether one was written back.
        """
        done = 0
        reported = False
        segments: list[tuple[int, int]] = []
        reports: list[tuple[int, int]] = []
        for index, (addr, lower, upper) in enumerate(_TXD.iter_unpack(raw)):
            extended = lower & TXD_CMD_DEXT
            if lower & TXD_CMD_RS:
                reports.append((head + index, upper))
            if extended and lower & TXD_DTYP == TXD_DTYP_CONTEXT:
                words = _CONTEXT.unpack_from(raw, index * DESC_SIZE)
                self._context = Context(*words)
            else:
                length = lower & (TXD_LENGTH if extended else TXD_LEGACY_LENGTH)
                if length:
                    segments.append((addr, length))
                if not lower & TXD_CMD_EOP:
                    continue
                self._send(segments, lower, upper)
                segments = []
            if segments:
                continue
            done = index + 1
            for at, status in reports:
                reported = True
                place = base + at % size * DESC_SIZE + TXD_STATUS
                self._store(place, bytes((status & 0xFF | TXD_STAT_DD,)))
            reports.clear()
        return done, reported

    def _store(self, gpa: int, data: bytes | memoryview) -> bool:
        try:
            self._vm.write_mem(gpa, data)
        except (VmmError, OverflowError):
            return False  # a bus master's write to nowhere
        return True

    def _send(self, segments: list[tuple[int, int]], lower: int, upper: int) -> None:
        """Send a frame; the command is that of its last descriptor."""
        length = sum([length for _, length in segments])
        if not 0 < length <= FRAME_MAX - TAG_SIZE - HEADER_LEGACY:
            return
        try:
            iov = map_iov(self._vm, segments)
        except (VmmError, OverflowError):
            return
        frame = bytearray().join(iov)
        release_iov(iov)
        if not lower & TXD_CMD_IFCS:
            del frame[-FCS_SIZE:]
        if len(frame) < ETHER_HEADER:
            return
        if self._regs.TCTL & TCTL_PSP and len(frame) < ETHER_MIN:
            frame = frame.ljust(ETHER_MIN, b"\0")
        header = VnetHeader()
        if not lower & TXD_CMD_DEXT:
            if lower & TXD_CMD_IC:
                _put_sum(frame, upper >> 8 & 0xFF, lower >> 16 & 0xFF)
        elif lower & TXD_CMD_TSE:
            segmented = _segmentation(frame, self._context)
            if segmented is None:
                return
            header = segmented
        else:
            header = _checksums(frame, self._context, upper)
        if lower & TXD_CMD_VLE and self._regs.CTRL & CTRL_VME:
            tag = self._regs.VET.to_bytes(2, "big") + (upper >> 16).to_bytes(2, "big")
            frame[MACS:MACS] = tag
            if header.flags:
                header = header._replace(
                    csum_start=header.csum_start + TAG_SIZE,
                    hdr_len=header.hdr_len + TAG_SIZE,
                )
        self._backend.send((header.pack(), frame))
        self._count_sent(frame, header)

    def _count_sent(self, frame: bytearray, header: VnetHeader) -> None:
        stats, length = self._stats, len(frame)
        stats[GPTC // 4] += 1
        stats[TPT // 4] += 1
        stats[PTC64 // 4 + bisect_left(_SIZES, length + FCS_SIZE)] += 1
        stats[GOTC // 4] += length
        stats[TOT // 4] += length
        if frame[0] & MULTICAST:
            stats[(BPTC if frame.startswith(BROADCAST) else MPTC) // 4] += 1
        if header.gso_type:
            stats[TSCTC // 4] += 1

    # -- reception: the event loop's thread ------------------------------------------

    def _refilled(self) -> None:
        """There may be descriptors to receive into."""
        with self._work:
            self._rx_soon = False
            if not self._paused:
                self._backend.enable_receive()
        if self._waiting:
            self._receive()

    def _receive(self) -> None:
        """Frames have come."""
        with self._work:
            with self._lock:
                regs = self._regs
                size = regs.RDLEN // DESC_SIZE
                head, tail = regs.RDH, regs.RDT
                rctl, resets = regs.RCTL, self._resets
                base = regs.RDBAH << 32 | regs.RDBAL
            if (
                self._paused
                or not rctl & RCTL_EN
                or rctl & RCTL_LBM
                or not head < size > tail
            ):
                self._backend.disable_receive()
                return
            left = (tail - head) % size
            done, causes = self._take_frames(base, size, head, left, rctl)
            with self._lock:
                if resets != self._resets:
                    return
                regs.RDH = (head + done) % size
                left -= done
                if done and left < size >> (rctl >> RCTL_RDMTS_SHIFT & 3) + 1:
                    causes |= ICR_RXDMT0
                self._raise(causes)

    def _take_frames(
        self, base: int, size: int, head: int, left: int, rctl: int
    ) -> tuple[int, int]:
        """Receive into up to ``left`` descriptors from ``head`` on.

        Gives how many were used, and the causes of interrupts.
        """
        room = _buffer_size(rctl)
        small = self._regs.RSRPD
        raw = self._descriptors(base, size, head, min(left, DESC_BUDGET))
        count = len(raw) // DESC_SIZE
        written: list[bytes] = []
        causes = 0
        for _ in range(RX_BUDGET):
            length = self._waiting or self._backend.receive(self._buffer)
            if not length:
                break
            self._waiting = 0
            accepted = self._filter(length, rctl)
            if accepted is None:
                continue
            frame, status, tag = accepted
            total = len(frame)
            need = -(-total // room)
            if need >= size:
                self._stats[MPC // 4] += 1
                continue  # all of the ring would be too little
            if len(written) + need > count:
                # deviation: bhyve loses it.
                self._waiting = length
                if not written:
                    self._backend.disable_receive()
                break
            for end in range(room, total, room):
                addr = _RXD.unpack_from(raw, len(written) * DESC_SIZE)[0]
                self._store(addr, frame[end - room : end])
                written.append(_RXD.pack(addr, room, 0, RXD_STAT_DD, 0, 0))
            rest = frame[(need - 1) * room :]
            addr = _RXD.unpack_from(raw, len(written) * DESC_SIZE)[0]
            self._store(addr, rest)
            status |= RXD_STAT_EOP
            written.append(_RXD.pack(addr, len(rest), 0, status, 0, tag))
            self._count_received(frame, length - HEADER_LEGACY)
            causes |= ICR_RXT0
            if total <= small:
                causes |= ICR_SRPD
        if written:
            first = size - head
            self._store(base + head * DESC_SIZE, b"".join(written[:first]))
            if len(written) > first:
                self._store(base, b"".join(written[first:]))
        return len(written), causes

    def _filter(self, length: int, rctl: int) -> tuple[bytes, int, int] | None:
        """The frame in the buffer as the driver gets it; None: it is not for us.

        With the status of its descriptors, and its VLAN tag.
        """
        size = length - HEADER_LEGACY
        if size < ETHER_HEADER:
            return None
        if size > (ETHER_MAX_LONG if rctl & RCTL_LPE else ETHER_MAX):
            self._stats[ROC // 4] += 1
            return None
        frame = bytes(self._buffer[HEADER_LEGACY:length])
        destination = frame[:6]
        status = RXD_STAT_DD | RXD_STAT_IXSM
        if destination[0] & MULTICAST:
            if destination == BROADCAST:
                if not rctl & (RCTL_BAM | RCTL_MPE | RCTL_UPE):
                    return None
            elif not self._has_address(destination):
                if not (rctl & RCTL_MPE or self._in_mta(destination, rctl)):
                    return None
                status |= RXD_STAT_PIF
        elif not (rctl & RCTL_UPE or self._has_address(destination)):
            return None
        tag = 0
        if int.from_bytes(frame[MACS : MACS + 2], "big") == self._regs.VET:
            tag = int.from_bytes(frame[MACS + 2 : MACS + TAG_SIZE], "big")
            vlan = tag & 0xFFF
            if rctl & RCTL_VFE and not self._vfta[vlan >> 3] >> (vlan & 7) & 1:
                return None
            if self._regs.CTRL & CTRL_VME:
                frame = frame[:MACS] + frame[MACS + TAG_SIZE :]
                status |= RXD_STAT_VP
            else:
                tag = 0
        if size < ETHER_MIN + TAG_SIZE:
            frame = frame.ljust(ETHER_MIN, b"\0")
        if not rctl & RCTL_SECRC:
            frame += zlib.crc32(frame).to_bytes(FCS_SIZE, "little")
        return frame, status, tag

    def _count_received(self, frame: bytes, length: int) -> None:
        stats = self._stats
        stats[GPRC // 4] += 1
        stats[TPR // 4] += 1
        stats[PRC64 // 4 + bisect_left(_SIZES, length + FCS_SIZE)] += 1
        stats[GORC // 4] += length
        stats[TOR // 4] += length
        if frame[0] & MULTICAST:
            stats[(BPRC if frame.startswith(BROADCAST) else MPRC) // 4] += 1

    def _has_address(self, mac: bytes) -> bool:
        """Whether it is one of the receive addresses (13.5.2)."""
        at = self._ra.find(mac)
        while at >= 0:
            if at % 8 == 0:
                high = int.from_bytes(self._ra[at + 4 : at + 8], "little")
                if high & RAH_AV and not high & RAH_AS:
                    return True
            at = self._ra.find(mac, at + 1)
        return False

    def _in_mta(self, mac: bytes, rctl: int) -> bool:
        """Whether the multicast table has the address's hash (13.5.1)."""
        shift = (4, 3, 2, 0)[rctl >> RCTL_MO_SHIFT & 3]
        index = (mac[4] | mac[5] << 8) >> shift & 0xFFF
        return bool(self._mta[index >> 3] >> (index & 7) & 1)

    def _link_changed(self) -> None:
        with self._lock:
            self._raise(ICR_LSC)

    # -- life ------------------------------------------------------------------------

    def start(self) -> None:
        """Plug the cable in."""
        self._backend.start(self._receive, self._link_changed)

    def pause(self) -> None:
        """Wait for the frame that is on its way, and let others wait."""
        with self._work, self._lock:
            self._paused = True
            self._stop_throttle()

    def resume(self) -> None:
        """Look at what came meanwhile."""
        with self._lock:
            self._paused = False
            self._wake_transmitter()
            self._wake_receiver()
            self._update_line()

    def halt(self) -> None:
        """Unplug the cable."""
        self._stop_throttle()
        self._backend.close()

    def reset_device(self) -> None:
        """As after power-on."""
        with self._lock:
            self._io_addr = 0
            self._power_on()

    def save_device(self) -> dict[str, Any]:
        """Registers, tables, EEPROM and PHY; frames may get lost."""
        with self._lock:
            return {
                "version": 1,
                "registers": self._regs.save(),
                "asserted": self._asserted,
                "io_addr": self._io_addr,
                "mta": bytes(self._mta),
                "ra": bytes(self._ra),
                "vfta": bytes(self._vfta),
                "stats": list(self._stats),
                "eeprom": list(self._eeprom),
                "shift": [
                    self._shift,
                    self._shift_bits,
                    self._shift_out,
                    self._shift_write,
                ],
                "phy": list(self._phy),
                "context": list(self._context),
            }

    def restore_device(self, state: dict[str, Any]) -> None:
        """Take back what save_device() gave."""
        if state["version"] != 1:
            raise ValueError(f"e1000: unknown state version {state['version']}")
        with self._lock:
            self._resets += 1
            self._waiting = 0
            self._regs.restore(state["registers"])
            self._asserted = state["asserted"]
            self._io_addr = state["io_addr"]
            self._mta[:] = state["mta"]
            self._ra[:] = state["ra"]
            self._vfta[:] = state["vfta"]
            self._stats[:] = state["stats"]
            self._eeprom[:] = state["eeprom"]
            self._shift, self._shift_bits, self._shift_out, self._shift_write = state[
                "shift"
            ]
            self._phy[:] = state["phy"]
            self._context = Context(*state["context"])


def _buffer_size(rctl: int) -> int:
    """Bytes of a receive buffer (13.4.22)."""
    size = 2048 >> (rctl >> RCTL_BSIZE_SHIFT & 3)
    # With BSEX 2048 is not allowed.
    return size * 16 if rctl & RCTL_BSEX and size < 2048 else size


def _put_sum(frame: bytearray, start: int, at: int, end: int = 0) -> None:
    """Insert the checksum of what goes from ``start`` through ``end``, if not 0."""
    if start < len(frame) and at + 2 <= len(frame):
        total = internet_sum(frame[start : end + 1] if end else frame[start:])
        frame[at : at + 2] = (total ^ 0xFFFF).to_bytes(2, "big")


def _checksums(frame: bytearray, context: Context, upper: int) -> VnetHeader:
    """Insert the IP checksum, and leave that of TCP or UDP to the backend."""
    if upper & TXD_POPTS_IXSM:
        _put_sum(frame, context.ipcss, context.ipcso, context.ipcse)
    if not upper & TXD_POPTS_TXSM:
        return VnetHeader()
    start, at = context.tucss, context.tucso
    if context.tucse or at < start or at + 2 > len(frame):
        _put_sum(frame, start, at, context.tucse)
        return VnetHeader()
    return VnetHeader(
        VIRTIO_NET_HDR_F_NEEDS_CSUM, csum_start=start, csum_offset=at - start
    )


def _segmentation(frame: bytearray, context: Context) -> VnetHeader | None:
    """Leave TCP segmentation to the backend; None: the frame makes no sense.

    The driver has left lengths out of the headers (3.5.7).
    """
    ip, tcp, at = context.ipcss, context.tucss, context.tucso
    length = len(frame)
    if (
        not context.command & CONTEXT_TCP
        or not context.mss
        or not ip + IPV6_PAYLOAD_LENGTH + 2 <= tcp
        or not tcp + TCP_FLAGS < context.hdr_len <= length
        or not tcp < at <= context.hdr_len - 2
    ):
        return None
    is_ipv4 = bool(context.command & CONTEXT_IP)
    if is_ipv4:
        struct.pack_into(">H", frame, ip + IP_TOTAL_LENGTH, length - ip & 0xFFFF)
        _put_sum(frame, ip, context.ipcso, context.ipcse)
    else:
        payload = length - ip - IPV6_HEADER & 0xFFFF
        struct.pack_into(">H", frame, ip + IPV6_PAYLOAD_LENGTH, payload)
    partial = frame[at : at + 2] + (length - tcp).to_bytes(4, "big")
    frame[at : at + 2] = internet_sum(partial).to_bytes(2, "big")
    gso_type = VIRTIO_NET_HDR_GSO_TCPV4 if is_ipv4 else VIRTIO_NET_HDR_GSO_TCPV6
    if frame[tcp + TCP_FLAGS] & TCP_CWR:
        gso_type |= VIRTIO_NET_HDR_GSO_ECN
    return VnetHeader(
        VIRTIO_NET_HDR_F_NEEDS_CSUM,
        gso_type,
        context.hdr_len,
        context.mss,
        tcp,
        at - tcp,
    )
