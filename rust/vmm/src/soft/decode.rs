//! From bytes to a block of ops.

use super::block::{Block, mode};
use super::interp;
use super::mmu::PAGE;
use super::native;
use super::op::*;
use super::state::*;
use super::sys;
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};
use std::any::Any;
use std::cell::Cell;
use std::ptr;

/// How an instruction that a slow handler ran ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Go on with the following instruction in the block.
    Seq,
    /// `rip` has been set.
    Jump,
    /// Go on behind the instruction, but look at mode, interrupts and privilege first.
    Break,
}

/// A handler that works from the decoded instruction itself: for what is rare or complicated.
/// When it runs, `rip` is the instruction's and `next_rip` the following one's.
pub type Slow = fn(&mut Cpu, &Instruction) -> Result<Next, Stop>;

/// One instruction being turned into an op.
pub struct Lower<'a> {
    pub insn: Instruction,
    /// 16, 32 or 64.
    pub bits: u32,
    /// Stack pointer wider than 16 bits.
    pub big_stack: bool,
    pub flat: bool,
    /// Offset, length and position are filled in.
    pub op: Op,
    /// Keeps what `op.imm` may point to.
    pub data: &'a mut Vec<Box<dyn Any>>,
    /// The block ends here.
    pub end: bool,
}

/// Index into `Cpu::r` of a general-purpose register of any size.
pub fn reg_index(r: Register) -> u8 {
    r.full_register() as u8 - Register::RAX as u8
}

/// Byte offset into `Cpu::r` of a general-purpose register: AH to BH are odd.
pub fn reg_offset(r: Register) -> u8 {
    let high = matches!(r, Register::AH | Register::CH | Register::DH | Register::BH);
    reg_index(r) * 8 + u8::from(high)
}

/// ES to GS as 0 to 5.
pub fn seg_index(r: Register) -> u8 {
    r as u8 - Register::ES as u8
}

impl Lower<'_> {
    /// Fill in the memory operand.
    pub fn mem(&mut self) {
        let i = &self.insn;
        let op = &mut self.op;
        let width = match i.memory_base() {
            Register::None => match i.memory_index() {
                Register::None => match i.memory_displ_size() {
                    2 => 16,
                    4 => 32,
                    _ => 64,
                },
                r => r.size() * 8,
            },
            Register::RIP => 64,
            Register::EIP => 32,
            r => r.size() * 8,
        };
        op.amask = match width {
            16 => 0xFFFF,
            32 => 0xFFFF_FFFF,
            _ => u64::MAX,
        };
        op.disp = i.memory_displacement64();
        op.base = match i.memory_base() {
            Register::None => R_ZERO,
            Register::RIP | Register::EIP => {
                // iced gives the target; make it relative to the block's first byte.
                op.disp = i.memory_displacement64().wrapping_sub(i.ip()).wrapping_add(u64::from(op.off));
                R_RIP
            }
            r => reg_index(r),
        };
        op.index = match i.memory_index() {
            Register::None => R_ZERO,
            r => reg_index(r),
        };
        op.scale = i.memory_index_scale().trailing_zeros() as u8;
        self.seg(i.memory_segment());
    }

    /// Use `seg` for the op's memory operand.
    pub fn seg(&mut self, seg: Register) {
        self.op.seg = seg_index(seg);
        let checked = self.bits != 64
            && (!self.flat || matches!(seg, Register::FS | Register::GS));
        if checked {
            self.op.flags |= F_CHECK;
        } else {
            self.op.flags &= !F_CHECK;
        }
    }

    /// Keep a value for as long as the block lives, and point `op.imm` at it.
    pub fn keep<T: 'static>(&mut self, v: T) {
        let b = Box::new(v);
        self.op.imm = &raw const *b as u64;
        self.data.push(b);
    }

    /// Run this instruction through a slow handler.
    pub fn slow(&mut self, f: Slow, end: bool) -> Handler {
        self.keep(SlowOp { f, insn: self.insn });
        self.end |= end;
        if self.end { slow_end } else { slow_mid }
    }
}

struct SlowOp {
    f: Slow,
    insn: Instruction,
}

/// Call the slow handler of an op.
unsafe fn call_slow(cpu: &mut Cpu, op: *const Op) -> Result<Next, Stop> {
    // SAFETY: `imm` points to the `SlowOp` that `Lower::keep` put into the op's own block.
    let (op, s) = unsafe { (&*op, &*((*op).imm as *const SlowOp)) };
    let mask = cpu.rip_mask();
    cpu.rip = op.rip(cpu) & mask;
    cpu.next_rip = op.next_rip(cpu) & mask;
    (s.f)(cpu, &s.insn)
}

unsafe fn slow_mid(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    match unsafe { call_slow(cpu, op) } {
        Ok(_) => next!(cpu, op),
        Err(s) => cpu.stop_at(op, s),
    }
}

unsafe fn slow_end(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    match unsafe { call_slow(cpu, op) } {
        Ok(Next::Jump) => INDIRECT,
        Ok(n) => {
            cpu.rip = cpu.next_rip;
            if n == Next::Seq { FALL } else { BREAK }
        }
        Err(s) => cpu.stop_at(op, s),
    }
}
