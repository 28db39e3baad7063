"""Registers of an AHCI host bus adapter, and what it shares with its driver in memory.

Serial ATA AHCI 1.3.1, chapters 3 (registers) and 4 (memory); Serial ATA 3.1, 10.3.
"""

from __future__ import annotations

import struct
from typing import Final

from pybhyve.regs import RO, W1C, Reg, RegBlock

PORTS_MAX: Final = 32
SLOTS: Final = 32
PORT_BASE: Final = 0x100  # of the first port's registers
PORT_STEP: Final = 0x80

# 3.1.1 CAP
CAP_S64A: Final = 1 << 31  # addresses of 64 bits
CAP_SNCQ: Final = 1 << 30  # native command queuing
CAP_SSNTF: Final = 1 << 29  # PxSNTF
CAP_SMPS: Final = 1 << 28  # mechanical presence switch
CAP_SSS: Final = 1 << 27  # staggered spin-up
CAP_SALP: Final = 1 << 26  # aggressive link power management
CAP_SAL: Final = 1 << 25  # activity LED
CAP_SCLO: Final = 1 << 24  # PxCMD.CLO
CAP_ISS_GEN3: Final = 3 << 20  # 6 Gbit/s
CAP_PMD: Final = 1 << 15  # several DRQ blocks for PIO
CAP_SSC: Final = 1 << 14  # slumber
CAP_PSC: Final = 1 << 13  # partial
CAP_NCS: Final = SLOTS - 1 << 8
CAP_SXS: Final = 1 << 5  # external ports
# 3.1.2 GHC
GHC_HR: Final = 1 << 0  # reset
GHC_IE: Final = 1 << 1  # interrupts
GHC_AE: Final = 1 << 31  # AHCI; there is nothing else here
VS_1_3: Final = 0x10300
# 3.1.10 CAP2
CAP2_APST: Final = 1 << 2  # automatic partial to slumber

# 3.3.5 PxIS, 3.3.6 PxIE
IS_DHRS: Final = 1 << 0  # a register FIS
IS_PSS: Final = 1 << 1  # a PIO setup FIS
IS_SDBS: Final = 1 << 3  # a set device bits FIS
IS_DPS: Final = 1 << 5  # a PRD with its interrupt bit set is done
IS_OFS: Final = 1 << 24  # more data than the PRDs have room for
IS_IFS: Final = 1 << 27  # interface fatal error
IS_HBFS: Final = 1 << 29  # host bus fatal error: a bad pointer
IS_TFES: Final = 1 << 30  # the task file says error
IE_MASK: Final = 0xFDC000FF

# 3.3.7 PxCMD
CMD_ST: Final = 1 << 0  # process the command list
CMD_SUD: Final = 1 << 1  # spin up
CMD_POD: Final = 1 << 2  # power on
CMD_CLO: Final = 1 << 3  # clear BSY and DRQ
CMD_FRE: Final = 1 << 4  # receive FISes
CMD_CCS_SHIFT: Final = 8
CMD_CCS: Final = SLOTS - 1 << CMD_CCS_SHIFT  # the slot that is processed
CMD_FR: Final = 1 << 14  # FISes are received
CMD_CR: Final = 1 << 15  # the command list is processed
CMD_CPS: Final = 1 << 16  # there is a device
CMD_APSTE: Final = 1 << 23
CMD_ATAPI: Final = 1 << 24
CMD_DLAE: Final = 1 << 25
CMD_ALPE: Final = 1 << 26
CMD_ASP: Final = 1 << 27
# The interface communication control, bits 31:28, is a command: done at once, it reads
# as idle.
CMD_STORED: Final = (
    CMD_SUD | CMD_POD | CMD_APSTE | CMD_ATAPI | CMD_DLAE | CMD_ALPE | CMD_ASP
)

# 3.3.8 PxTFD: status in bits 7:0, error in bits 15:8
STS_ERR: Final = 0x01
STS_DRQ: Final = 0x08
STS_DSC: Final = 0x10
STS_DRDY: Final = 0x40
STS_BSY: Final = 0x80
STS_OF_SDB: Final = 0x77  # what a set device bits FIS changes
TFD_NONE: Final = 0x7F  # without a device

SIG_NONE: Final = 0xFFFFFFFF

# 3.3.10 PxSSTS
SSTS_PRESENT: Final = 0x103  # active, communication established
SSTS_OFFLINE: Final = 0x004
SPD_SHIFT: Final = 4
SPD_MASK: Final = 0xF0
SPD_GEN3: Final = 3

# 3.3.11 PxSCTL
SCTL_DET: Final = 0xF
DET_NONE: Final = 0
DET_COMRESET: Final = 1
DET_OFFLINE: Final = 4
SCTL_MASK: Final = 0xFFF

# 3.3.12 PxSERR
SERR_P: Final = 1 << 10  # protocol error
SERR_DIAG_T: Final = 1 << 24  # transport state transition error


class HbaRegs(RegBlock, size=PORT_BASE):
    """3.1 Generic host control."""

    CAP = Reg(0x00, 4, RO)
    GHC = Reg(0x04, 4, reset=GHC_AE)
    IS = Reg(0x08, 4, W1C)
    PI = Reg(0x0C, 4, RO)
    VS = Reg(0x10, 4, RO, reset=VS_1_3)
    CCC_CTL = Reg(0x14, 4, RO)
    CCC_PORTS = Reg(0x18, 4, RO)
    EM_LOC = Reg(0x1C, 4, RO)
    EM_CTL = Reg(0x20, 4, RO)
    CAP2 = Reg(0x24, 4, RO, reset=CAP2_APST)
    BOHC = Reg(0x28, 4, RO)


class PortRegs(RegBlock, size=PORT_STEP):
    """3.3 Port registers."""

    CLB = Reg(0x00, 4, mask=0xFFFFFC00)
    CLBU = Reg(0x04, 4)
    FB = Reg(0x08, 4, mask=0xFFFFFF00)
    FBU = Reg(0x0C, 4)
    IS = Reg(0x10, 4, W1C)
    IE = Reg(0x14, 4)
    CMD = Reg(0x18, 4, reset=CMD_SUD | CMD_POD)
    TFD = Reg(0x20, 4, RO, reset=TFD_NONE)
    SIG = Reg(0x24, 4, RO, reset=SIG_NONE)
    SSTS = Reg(0x28, 4, RO)
    SCTL = Reg(0x2C, 4)
    SERR = Reg(0x30, 4, W1C)
    SACT = Reg(0x34, 4)
    CI = Reg(0x38, 4)
    SNTF = Reg(0x3C, 4, W1C, mask=0xFFFF)
    FBS = Reg(0x40, 4, RO)


# 4.2.2 Command list: flags, PRDTL, PRDBC, command table
HEADER: Final = struct.Struct("<HHIQ")
HEADER_SIZE: Final = 32
HEADER_CFL: Final = 0x1F  # dwords of the command FIS
PRDBC: Final = 4  # offset of the byte count in a header

# 4.2.3 Command table
TABLE_ACMD: Final = 0x40
TABLE_PRDT: Final = 0x80
CFIS_AREA: Final = 0x40
PRD: Final = struct.Struct("<QII")  # address, reserved, count - 1 and flag
PRD_DBC: Final = 0x3FFFFF
PRD_I: Final = 1 << 31

# 4.2.1 Received FISes
RFIS_PSFIS: Final = 0x20
RFIS_RFIS: Final = 0x40
RFIS_SDBFIS: Final = 0x58

FIS_H2D: Final = 0x27
FIS_D2H: Final = 0x34
FIS_PIO_SETUP: Final = 0x5F
FIS_SDB: Final = 0xA1
FIS_C: Final = 0x80  # H2D byte 1: a command, not device control
FIS_I: Final = 0x40  # D2H byte 1: interrupt
FIS_D: Final = 0x20  # PIO setup byte 1: to the host
FIS_H2D_SIZE: Final = 20
CONTROL_SRST: Final = 0x04  # of the device control register, H2D byte 15
