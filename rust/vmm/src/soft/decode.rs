//! From bytes to a block of ops.

use super::block::{Block, mode};
use super::interp;
use super::mmu::PAGE;
use super::native;
use super::op::*;
use super::state::*;
use super::sys;
use iced_x86::{Code, Decoder, DecoderError, Instruction, OpKind, Register};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
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
                op.disp =
                    i.memory_displacement64().wrapping_sub(i.ip()).wrapping_add(u64::from(op.off));
                R_RIP
            }
            r => reg_index(r),
        };
        op.index = match i.memory_index() {
            Register::None => R_ZERO,
            r => reg_index(r),
        };
        op.scale = i.memory_index_scale().trailing_zeros() as u8;
        let seg = self.memory_segment();
        self.seg(seg);
    }

    /// Segment of the memory operand; 64-bit mode ignores overrides with ES, CS, SS and DS.
    pub fn memory_segment(&self) -> Register {
        let i = &self.insn;
        match i.memory_segment() {
            s @ (Register::FS | Register::GS) => s,
            s if self.bits != 64 || !i.has_segment_prefix() => s,
            _ => match i.memory_base() {
                Register::RSP | Register::ESP | Register::RBP | Register::EBP => Register::SS,
                _ => Register::DS,
            },
        }
    }

    /// Use `seg` for the op's memory operand.
    pub fn seg(&mut self, seg: Register) {
        self.op.seg = seg_index(seg);
        // Flat says nothing of FS and GS, and no write goes through CS.
        let checked = self.bits != 64
            && (!self.flat || matches!(seg, Register::FS | Register::GS | Register::CS));
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
        // `stop_at` tells #SS from #GP by it.
        if self.insn.memory_segment() != Register::None {
            self.op.seg = seg_index(self.memory_segment());
        }
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

/// Is it run by a slow handler?
pub fn is_slow(op: &Op) -> bool {
    let f = op.f.get();
    ptr::fn_addr_eq(f, slow_mid as Handler) || ptr::fn_addr_eq(f, slow_end as Handler)
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

/// Bytes decoded at once: enough for `MAX_OPS` common instructions.
const WINDOW: usize = 256;
/// The longest legal instruction.
const MAX_LEN: usize = 15;

/// More than 15 bytes: #GP.
fn too_long(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    Err(cpu.gp(0))
}

impl Cpu {
    /// The block at a linear address (`rip` is set to it), decoded now if need be.  With
    /// `single`, of one instruction.
    pub(super) fn block_at(&mut self, lin: u64, single: bool) -> Result<*const Block, Stop> {
        let gpa = self.fetch_gpa(lin)?;
        let flat = self.cache.mode & mode::FLAT != 0;
        if let Some(b) = self.cache.get(gpa, single) {
            // SAFETY: blocks live until `drop_blocks`.
            let known = unsafe { &*b };
            let same = match known.gpa2 {
                None => true,
                Some(g) => self.fetch_gpa(next_page(lin))? == g,
            };
            if same && (flat || self.rip + known.len - 1 <= self.code_limit()) {
                return Ok(b);
            }
        }
        let block = self.decode(lin, gpa, single, flat)?;
        Ok(self.insert(block, single))
    }

    fn code_limit(&self) -> u64 {
        u64::from(self.seg[CS as usize].limit)
    }

    fn decode(&mut self, lin: u64, gpa: u64, single: bool, flat: bool) -> Result<Box<Block>, Stop> {
        let bits = self.code_bits();
        self.watch_code_page(gpa);
        let mut buf = [0; WINDOW + 2 * MAX_LEN];
        let in_page = (PAGE - (gpa & (PAGE - 1))) as usize;
        let first = in_page.min(WINDOW + MAX_LEN);
        self.fetch_bytes(gpa, &mut buf[..first]);
        // Where CS ends in the middle of the window, instructions beyond it raise #GP.
        let limit = if flat || self.code64() { u64::MAX } else { self.code_limit() };
        let mut block = Box::new(Block {
            ops: Box::new([]),
            data: Vec::new(),
            links: [Cell::new(ptr::null()), Cell::new(ptr::null())],
            valid: Cell::new(true),
            gpa,
            len: 0,
            gpa2: None,
            count: 0,
            key: 0,
            runs: Cell::new(0),
            entry: Cell::new(ptr::null()),
            code: UnsafeCell::new(None),
        });
        let mut ops: Vec<Op> = Vec::with_capacity(16);
        let mut off = 0;
        let mut end = false;
        let most = if single { 1 } else { MAX_OPS - 1 };
        while !end && ops.len() < most && off < first.min(WINDOW) {
            if self.rip.wrapping_add(off as u64) > limit {
                if off == 0 {
                    return Err(self.gp(0));
                }
                break;
            }
            let mut insn = decode_one(bits, &buf[off..first], self.rip.wrapping_add(off as u64));
            if insn.is_err() && first == in_page && off + MAX_LEN > first {
                // It runs off the page: a block of its own.
                if off > 0 {
                    break;
                }
                let more = self.fetch_gpa(next_page(lin))?;
                self.watch_code_page(more);
                self.fetch_bytes(more, &mut buf[first..first + MAX_LEN]);
                block.gpa2 = Some(more);
                insn = decode_one(bits, &buf[..first + MAX_LEN], self.rip);
                if insn.as_ref().is_ok_and(|i| i.len() <= first) {
                    block.gpa2 = None;
                }
            }
            let (insn, legal) = match insn {
                Ok(i) => (i, true),
                Err(i) => (i, false),
            };
            if self.rip.wrapping_add((off + insn.len().max(1)) as u64 - 1) > limit {
                if off == 0 {
                    return Err(self.gp(0));
                }
                break;
            }
            let mut l = Lower {
                insn,
                bits,
                big_stack: self.cache.mode & mode::BIG_STACK != 0,
                flat,
                op: Op::new(interp::control::fall, off, insn.len(), ops.len()),
                data: &mut block.data,
                end: false,
            };
            let f = if legal {
                self.lower(&mut l)
            } else if over_long(bits, &buf[off..]) {
                l.slow(too_long, true)
            } else {
                l.slow(interp::misc::undefined, true)
            };
            l.op.f.set(f);
            off += insn.len().max(1);
            end = l.end;
            ops.push(l.op);
            if block.gpa2.is_some() {
                break;
            }
        }
        block.count = ops.len() as u64;
        block.len = off as u64;
        if !end {
            ops.push(Op::new(interp::control::fall, off, 0, ops.len()));
        }
        block.ops = ops.into();
        Ok(block)
    }

    fn lower(&mut self, l: &mut Lower) -> Handler {
        if !super::cpuid::shown(&l.insn) || no_prefetch(&l.insn) {
            return l.slow(interp::misc::undefined, true);
        }
        if let Some(h) = interp::lower(l).or_else(|| native::lower(l, &mut self.native)) {
            return h;
        }
        match sys::lookup(&l.insn) {
            Some((f, end)) => l.slow(f, end),
            None => l.slow(interp::misc::undefined, true),
        }
    }

    /// Instruction bytes of a block; None where there is no memory any more.
    pub(super) fn code_bytes(&self, gpa: u64, out: &mut [u8]) -> Option<()> {
        if self.page_flags(gpa) & crate::memory::PRESENT == 0 {
            return None;
        }
        self.fetch_bytes(gpa, out);
        Some(())
    }

    /// Instruction bytes from one physical page; what is no memory reads as all ones.
    fn fetch_bytes(&self, gpa: u64, out: &mut [u8]) {
        if self.page_flags(gpa) & crate::memory::PRESENT == 0 {
            out.fill(0xFF);
            return;
        }
        // SAFETY: the page is guest memory, and callers do not ask beyond its end.
        unsafe {
            let p = self.mem_base.add(gpa as usize);
            ptr::copy_nonoverlapping(p, out.as_mut_ptr(), out.len());
        }
    }
}

/// PREFETCHW and its kin on a register: a NOP for Intel, undefined for AMD.
fn no_prefetch(i: &Instruction) -> bool {
    let in_0f0d = matches!(
        i.code(),
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    );
    in_0f0d && i.op0_kind() == OpKind::Register && super::cpuid::amd()
}

fn next_page(lin: u64) -> u64 {
    (lin | (PAGE - 1)).wrapping_add(1)
}

/// Err: not an instruction (its length is still that of the bytes looked at), or cut off.
fn decode_one(bits: u32, bytes: &[u8], ip: u64) -> Result<Instruction, Instruction> {
    let mut d = Decoder::with_ip(bits, bytes, ip, super::cpuid::decoder_options());
    let i = d.decode();
    if d.last_error() == DecoderError::None && i.code() != Code::INVALID { Ok(i) } else { Err(i) }
}

/// Is it an instruction but for having too many prefixes?
fn over_long(bits: u32, bytes: &[u8]) -> bool {
    let prefix = |b: u8| {
        matches!(b, 0x26 | 0x2E | 0x36 | 0x3E | 0x64 | 0x65 | 0x66 | 0x67 | 0xF0 | 0xF2 | 0xF3)
            || bits == 64 && b & 0xF0 == 0x40
    };
    let n = bytes.iter().take_while(|&&b| prefix(b)).count();
    n >= MAX_LEN
        || n > 0
            && (1..=n).any(|skip| {
                decode_one(bits, &bytes[skip..], 0).is_ok_and(|i| i.len() + skip > MAX_LEN)
            })
}
