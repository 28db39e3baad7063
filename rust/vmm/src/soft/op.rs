//! A decoded instruction, and how handlers hand over to the next one.
//!
//! A block is an array of [`Op`].  Each handler does its work and then *calls the next op's
//! handler as its last act*, which the optimiser turns into a jump (threaded code: every
//! handler has an indirect branch of its own for the host to predict).  Where it does not, the
//! stack stays bounded all the same, because a block has at most [`MAX_OPS`] ops.

use super::Cpu;
use std::cell::Cell;

/// Instructions in a block.
pub const MAX_OPS: usize = 64;

/// How a block ended; what `run` does next.
pub type Flow = u32;
/// Fell through or was not taken: `rip` is set, follow link 0.
pub const FALL: Flow = 0;
/// Direct branch taken: `rip` is set, follow link 1.
pub const TAKEN: Flow = 1;
/// `rip` is set to a computed target: look it up.
pub const INDIRECT: Flow = 2;
/// `rip` is set; the processor's mode or the interrupt flag may have changed.
pub const BREAK: Flow = 3;
/// `rip` is at the instruction that could not complete; `Cpu::stop` says why.
pub const STOP: Flow = 4;

pub type Handler = unsafe fn(&mut Cpu, *const Op) -> Flow;

/// Index in `Cpu::r` of the RIP at which the running block starts.
pub const R_RIP: u8 = 16;
/// Index in `Cpu::r` of a register that is always 0.
pub const R_ZERO: u8 = 17;

pub const ES: u8 = 0;
pub const CS: u8 = 1;
pub const SS: u8 = 2;
pub const DS: u8 = 3;
pub const FS: u8 = 4;
pub const GS: u8 = 5;

/// The memory operand needs segment checks (not 64-bit mode, not flat).
pub const F_CHECK: u8 = 1 << 0;
/// LOCK prefix, or an implied one.
pub const F_LOCK: u8 = 1 << 1;
pub const F_REP: u8 = 1 << 2;
pub const F_REPNE: u8 = 1 << 3;

/// One instruction, pre-resolved.
#[repr(C)]
pub struct Op {
    /// Replaced by a handler that leaves the block when the block's code is overwritten.
    pub f: Cell<Handler>,
    /// Displacement; for RIP-relative operands relative to the start of the block.
    pub disp: u64,
    /// Immediate, or an index into the block's stored instructions.
    pub imm: u64,
    /// Mask of the address size.
    pub amask: u64,
    /// Indices into `Cpu::r`.
    pub base: u8,
    pub index: u8,
    pub scale: u8,
    /// Segment of the memory operand: ES to GS.
    pub seg: u8,
    /// Byte offsets into `Cpu::r` of register operands (AH is 1).
    pub dst: u8,
    pub src: u8,
    pub aux: u8,
    pub flags: u8,
    /// Offset of the instruction from the start of the block, bytes.
    pub off: u16,
    pub len: u8,
    /// Position in the block.
    pub pos: u8,
}

impl Op {
    /// An op without operands.
    pub fn new(f: Handler, off: usize, len: usize, pos: usize) -> Op {
        Op {
            f: Cell::new(f),
            disp: 0,
            imm: 0,
            amask: u64::MAX,
            base: R_ZERO,
            index: R_ZERO,
            scale: 0,
            seg: DS,
            dst: 0,
            src: 0,
            aux: 0,
            flags: 0,
            off: off as u16,
            len: len as u8,
            pos: pos as u8,
        }
    }

    /// The same, for another place.
    pub fn copy(&self) -> Op {
        Op { f: Cell::new(self.f.get()), ..*self }
    }

    /// RIP of this instruction.
    #[inline(always)]
    pub fn rip(&self, cpu: &Cpu) -> u64 {
        cpu.r[R_RIP as usize].wrapping_add(u64::from(self.off))
    }

    /// RIP of the following instruction, before truncation to the mode's width.
    #[inline(always)]
    pub fn next_rip(&self, cpu: &Cpu) -> u64 {
        cpu.r[R_RIP as usize].wrapping_add(u64::from(self.off) + u64::from(self.len))
    }
}

/// Go on with the op behind `op`.
macro_rules! next {
    ($cpu:expr, $op:expr) => {{
        // SAFETY: a block's last op never uses `next!`, so there is one behind this.
        unsafe {
            let n = $op.add(1);
            return ((*n).f.get())($cpu, n);
        }
    }};
}
pub(crate) use next;

/// Unwrap a fallible access; on failure leave the block with `rip` at this instruction.
macro_rules! tri {
    ($cpu:expr, $op:expr, $e:expr) => {
        match $e {
            Ok(v) => v,
            Err(s) => return $cpu.stop_at($op, s),
        }
    };
}
pub(crate) use tri;
