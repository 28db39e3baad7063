"""NVM Express 1.4: the specification's constants, registers and structures."""

from __future__ import annotations

import struct
from typing import Final

from pybhyve.layout import Layout
from pybhyve.regs import RO, Reg, RegBlock

PAGE: Final = 4096  # the only memory page size offered (CAP.MPSMIN, CAP.MPSMAX)


class ControllerRegs(RegBlock, size=0x1000):  # 3.1
    """Controller registers; the doorbells follow."""

    CAP = Reg(0x00, 8, RO)
    VS = Reg(0x08, 4, RO, reset=0x00010400)
    INTMS = Reg(0x0C, 4)
    INTMC = Reg(0x10, 4)
    CC = Reg(0x14, 4)
    CSTS = Reg(0x1C, 4, RO)
    AQA = Reg(0x24, 4, mask=0x0FFF0FFF)
    ASQ = Reg(0x28, 8, mask=(1 << 64) - PAGE)
    ACQ = Reg(0x30, 8, mask=(1 << 64) - PAGE)


DOORBELLS: Final = 0x1000  # 3.1.24: two dwords for each queue id (CAP.DSTRD is 0)
DOORBELL_SIZE: Final = 8

CAP_CQR: Final = 1 << 16  # queues are physically contiguous
CAP_TO: Final = 60 << 24  # times 500 ms: what a reset may take
CAP_CSS_NVM: Final = 1 << 37

CC_EN: Final = 1 << 0
CC_RESERVED: Final = 0xFF00000E
CC_CSS: Final = 7 << 4
CC_MPS: Final = 15 << 7
CC_AMS: Final = 7 << 11
CC_SHN: Final = 3 << 14
CC_IOSQES_SHIFT: Final = 16
CC_IOCQES_SHIFT: Final = 20

CSTS_RDY: Final = 1 << 0
CSTS_CFS: Final = 1 << 1
CSTS_SHST: Final = 3 << 2
CSTS_SHST_OCCURRING: Final = 1 << 2
CSTS_SHST_COMPLETE: Final = 2 << 2

AQA_ASQS: Final = 0xFFF
AQA_ACQS_SHIFT: Final = 16

SQE: Final = struct.Struct("<IIQQQQ6I")  # 4.2: dwords 0, 1; 2-3; MPTR; PRP 1, 2; 10-15
SQE_SIZE: Final = 64
CQE: Final = struct.Struct("<IIHHHH")  # 4.6: dwords 0, 1; SQHD, SQID, CID, status
CQE_SIZE: Final = 16
SQES: Final = 6  # log2 of the sizes
CQES: Final = 4
QUEUE_MIN: Final = 2  # entries

CMD_FUSE: Final = 3 << 8  # 4.2: in dword 0
CMD_PSDT: Final = 3 << 14

NSID: Final = 1
NSID_ALL: Final = 0xFFFFFFFF

# Opcodes of the admin command set (5).
ADMIN_DELETE_SQ: Final = 0x00
ADMIN_CREATE_SQ: Final = 0x01
ADMIN_GET_LOG_PAGE: Final = 0x02
ADMIN_DELETE_CQ: Final = 0x04
ADMIN_CREATE_CQ: Final = 0x05
ADMIN_IDENTIFY: Final = 0x06
ADMIN_ABORT: Final = 0x08
ADMIN_SET_FEATURES: Final = 0x09
ADMIN_GET_FEATURES: Final = 0x0A
ADMIN_ASYNC_EVENT: Final = 0x0C
ADMIN_FORMAT: Final = 0x80

# Opcodes of the NVM command set (6).
NVM_FLUSH: Final = 0x00
NVM_WRITE: Final = 0x01
NVM_READ: Final = 0x02
NVM_WRITE_ZEROES: Final = 0x08
NVM_DSM: Final = 0x09

RW_FUA: Final = 1 << 30  # 6.9: in dword 12
DSM_AD: Final = 1 << 2  # 6.7: deallocate
DSM_RANGE: Final = struct.Struct("<IIQ")  # attributes, blocks, first block

# Status codes, with the type in bits 10:8 and "do not retry" in bit 14 (4.6.1).
DNR: Final = 1 << 14
SC_SUCCESS: Final = 0x000
SC_INVALID_OPCODE: Final = DNR | 0x001
SC_INVALID_FIELD: Final = DNR | 0x002
SC_ID_CONFLICT: Final = DNR | 0x003
SC_DATA_TRANSFER_ERROR: Final = 0x004
SC_INTERNAL_ERROR: Final = 0x006
SC_ABORT_REQUESTED: Final = 0x007
SC_SQ_DELETED: Final = 0x008
SC_INVALID_NAMESPACE: Final = DNR | 0x00B
SC_SEQUENCE_ERROR: Final = DNR | 0x00C
SC_PRP_OFFSET: Final = DNR | 0x013
SC_WRITE_PROTECTED: Final = DNR | 0x020
SC_LBA_RANGE: Final = DNR | 0x080
SC_CAPACITY_EXCEEDED: Final = 0x081
SC_FORMAT_IN_PROGRESS: Final = 0x084
SC_CQ_INVALID: Final = DNR | 0x100
SC_QUEUE_IDENTIFIER: Final = DNR | 0x101
SC_QUEUE_SIZE: Final = DNR | 0x102
SC_ASYNC_LIMIT: Final = DNR | 0x105
SC_INTERRUPT_VECTOR: Final = DNR | 0x108
SC_LOG_PAGE: Final = DNR | 0x109
SC_INVALID_FORMAT: Final = DNR | 0x10A
SC_QUEUE_DELETION: Final = DNR | 0x10C
SC_NOT_SAVEABLE: Final = DNR | 0x10D
SC_NOT_NAMESPACE_SPECIFIC: Final = DNR | 0x10F
SC_WRITE_FAULT: Final = 0x280
SC_READ_ERROR: Final = 0x281

# Asynchronous events: type, information (5.2).
AE_ERROR: Final = 0
AE_ERROR_INVALID_DOORBELL: Final = 0
AE_ERROR_INVALID_VALUE: Final = 1
AE_SMART: Final = 1
AE_SMART_TEMPERATURE: Final = 1
AE_NOTICE: Final = 2
AE_NOTICE_NAMESPACE: Final = 0

# Log pages (5.14.1).
LOG_ERROR: Final = 0x01
LOG_SMART: Final = 0x02
LOG_FIRMWARE: Final = 0x03
LOG_CHANGED_NAMESPACES: Final = 0x04
LOG_RAE: Final = 1 << 15  # keep the event masked

ERROR_ENTRY: Final = Layout(  # 5.14.1.1
    "<QHHHHQIBB2xQ24x", "count sqid cid status location lba nsid vendor transport value"
)

# Features (5.21.1).
FEAT_ARBITRATION: Final = 0x01
FEAT_POWER: Final = 0x02
FEAT_TEMPERATURE: Final = 0x04
FEAT_ERROR_RECOVERY: Final = 0x05
FEAT_WRITE_CACHE: Final = 0x06
FEAT_QUEUES: Final = 0x07
FEAT_COALESCING: Final = 0x08
FEAT_VECTOR: Final = 0x09
FEAT_ATOMICITY: Final = 0x0A
FEAT_ASYNC_EVENT: Final = 0x0B
FEAT_SAVE: Final = 1 << 31

ASYNC_NAMESPACE: Final = 1 << 8  # in feature 0Bh
ASYNC_TEMPERATURE: Final = 1 << 1
ASYNC_DEFAULT: Final = ASYNC_NAMESPACE | 0xFF


class CommandError(Exception):
    """A command ends with a status other than success."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status:#x}")
        self.status = status
