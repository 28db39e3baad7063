//! MOVS, STOS, LODS, CMPS, SCAS with their repeat prefixes.
//!
//! Registers are committed element by element (or run by run), so that a fault, an interrupt or a
//! device access in the middle leaves an instruction that can go on where it was.

use super::host::{Alu, ZF};
use super::sized;
use crate::soft::Cpu;
use crate::soft::decode::Lower;
use crate::soft::op::*;
use crate::soft::state::*;
use iced_x86::{Mnemonic, OpKind, Register};
use std::arch::asm;

/// Elements between two looks at the mailbox.
const BATCH: u64 = 1024;

const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;

impl Cpu {
    /// Write a register in the address size.
    #[inline(always)]
    fn set_addr(&mut self, reg: usize, mask: u64, v: u64) {
        self.r[reg] = match mask {
            0xFFFF => self.r[reg] & !0xFFFF | v & 0xFFFF,
            m => v & m,
        };
    }

    /// Leave the block in front of this instruction, to look at the mailbox.
    fn again(&mut self, op: *const Op) -> Flow {
        // SAFETY: handlers pass their own op; `current` is its block.
        let (o, n) = unsafe { (&*op, (*self.cache.current).count) };
        self.rip = o.rip(self) & self.rip_mask();
        self.cache.retired = self.cache.retired.wrapping_sub(n - u64::from(o.pos));
        BREAK
    }

    #[inline(always)]
    fn string_lin(
        &mut self,
        o: &Op,
        seg: u8,
        ea: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Stop> {
        if o.flags & F_CHECK != 0 {
            return self.lin_checked(seg, ea, size, write);
        }
        Ok(self.seg_base[seg as usize].wrapping_add(ea))
    }

    /// An element is done: what userland answered for it is used up.
    #[inline(always)]
    fn element_done(&mut self) {
        if self.replay_pos != 0 {
            self.replay.clear();
            self.replay_pos = 0;
        }
    }
}

/// How many elements of `size` fit between `lin` and the end of its page.
#[inline(always)]
fn room(lin: u64, size: u64) -> u64 {
    (0x1000 - (lin & 0xFFF)) / size
}

trait StringOp {
    const SRC: bool;
    const DST: bool;
    const COMPARES: bool;
    /// One element at the current pointers.
    fn one<T: Alu>(cpu: &mut Cpu, o: &Op) -> Result<(), Stop>;
    /// Up to `n` elements forward at once; how many were done.
    fn run<T: Alu>(_: &mut Cpu, _: &Op, _: u64) -> Result<u64, Stop> {
        Ok(0)
    }
}

struct Movs;
struct Stos;
struct Lods;
struct Cmps;
struct Scas;

fn src<T: Alu>(cpu: &mut Cpu, o: &Op) -> Result<T, Stop> {
    let ea = cpu.r[RSI] & o.amask;
    let lin = cpu.string_lin(o, o.seg, ea, T::SIZE, false)?;
    cpu.ld(lin)
}

fn dst_lin<T: Alu>(cpu: &mut Cpu, o: &Op, write: bool) -> Result<u64, Stop> {
    let ea = cpu.r[RDI] & o.amask;
    cpu.string_lin(o, ES, ea, T::SIZE, write)
}

fn dst<T: Alu>(cpu: &mut Cpu, o: &Op) -> Result<T, Stop> {
    let lin = dst_lin::<T>(cpu, o, false)?;
    cpu.ld(lin)
}

impl StringOp for Movs {
    const SRC: bool = true;
    const DST: bool = true;
    const COMPARES: bool = false;
    fn one<T: Alu>(cpu: &mut Cpu, o: &Op) -> Result<(), Stop> {
        let v: T = src(cpu, o)?;
        let lin = dst_lin::<T>(cpu, o, true)?;
        cpu.st(lin, v)
    }
    fn run<T: Alu>(cpu: &mut Cpu, o: &Op, n: u64) -> Result<u64, Stop> {
        let from = cpu.string_lin(o, o.seg, cpu.r[RSI] & o.amask, T::SIZE, false)?;
        let to = dst_lin::<T>(cpu, o, true)?;
        let n = n.min(room(from, T::SIZE)).min(room(to, T::SIZE));
        if n < 2 {
            return Ok(0);
        }
        let (Some(s), Some(d)) = (cpu.span(from, false)?, cpu.span(to, true)?) else {
            return Ok(0);
        };
        // SAFETY: both runs stay in pages of guest memory that may be accessed so.
        unsafe {
            match T::SIZE {
                1 => {
                    asm!("rep movsb", inout("rcx") n => _, inout("rsi") s => _, inout("rdi") d => _,
                    options(nostack, preserves_flags))
                }
                2 => {
                    asm!("rep movsw", inout("rcx") n => _, inout("rsi") s => _, inout("rdi") d => _,
                    options(nostack, preserves_flags))
                }
                4 => {
                    asm!("rep movsd", inout("rcx") n => _, inout("rsi") s => _, inout("rdi") d => _,
                    options(nostack, preserves_flags))
                }
                _ => {
                    asm!("rep movsq", inout("rcx") n => _, inout("rsi") s => _, inout("rdi") d => _,
                    options(nostack, preserves_flags))
                }
            }
        }
        Ok(n)
    }
}

impl StringOp for Stos {
    const SRC: bool = false;
    const DST: bool = true;
    const COMPARES: bool = false;
    fn one<T: Alu>(cpu: &mut Cpu, o: &Op) -> Result<(), Stop> {
        let lin = dst_lin::<T>(cpu, o, true)?;
        let v: T = cpu.get(0);
        cpu.st(lin, v)
    }
    fn run<T: Alu>(cpu: &mut Cpu, o: &Op, n: u64) -> Result<u64, Stop> {
        let to = dst_lin::<T>(cpu, o, true)?;
        let n = n.min(room(to, T::SIZE));
        if n < 2 {
            return Ok(0);
        }
        let Some(d) = cpu.span(to, true)? else { return Ok(0) };
        let a = cpu.r[0];
        // SAFETY: the run stays in a page of guest memory that may be written.
        unsafe {
            match T::SIZE {
                1 => asm!("rep stosb", inout("rcx") n => _, inout("rdi") d => _, in("rax") a,
                    options(nostack, preserves_flags)),
                2 => asm!("rep stosw", inout("rcx") n => _, inout("rdi") d => _, in("rax") a,
                    options(nostack, preserves_flags)),
                4 => asm!("rep stosd", inout("rcx") n => _, inout("rdi") d => _, in("rax") a,
                    options(nostack, preserves_flags)),
                _ => asm!("rep stosq", inout("rcx") n => _, inout("rdi") d => _, in("rax") a,
                    options(nostack, preserves_flags)),
            }
        }
        Ok(n)
    }
}

impl StringOp for Lods {
    const SRC: bool = true;
    const DST: bool = false;
    const COMPARES: bool = false;
    fn one<T: Alu>(cpu: &mut Cpu, o: &Op) -> Result<(), Stop> {
        let v: T = src(cpu, o)?;
        cpu.set(0, v);
        Ok(())
    }
}

impl StringOp for Cmps {
    const SRC: bool = true;
    const DST: bool = true;
    const COMPARES: bool = true;
    fn one<T: Alu>(cpu: &mut Cpu, o: &Op) -> Result<(), Stop> {
        let b: T = dst(cpu, o)?;
        let a: T = src(cpu, o)?;
        cpu.fl = T::sub(a, b, cpu.fl).1;
        Ok(())
    }
}

impl StringOp for Scas {
    const SRC: bool = false;
    const DST: bool = true;
    const COMPARES: bool = true;
    fn one<T: Alu>(cpu: &mut Cpu, o: &Op) -> Result<(), Stop> {
        let b: T = dst(cpu, o)?;
        cpu.fl = T::sub(cpu.get(0), b, cpu.fl).1;
        Ok(())
    }
}

fn advance<T: Alu, S: StringOp>(cpu: &mut Cpu, o: &Op, n: u64) {
    let bytes = n.wrapping_mul(T::SIZE);
    let step = if cpu.rflags & fl::DF != 0 { bytes.wrapping_neg() } else { bytes };
    if S::SRC {
        cpu.set_addr(RSI, o.amask, cpu.r[RSI].wrapping_add(step));
    }
    if S::DST {
        cpu.set_addr(RDI, o.amask, cpu.r[RDI].wrapping_add(step));
    }
}

unsafe fn once<T: Alu, S: StringOp>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    tri!(cpu, op, S::one::<T>(cpu, o));
    advance::<T, S>(cpu, o, 1);
    next!(cpu, op)
}

unsafe fn rep<T: Alu, S: StringOp>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let mut budget = BATCH;
    let forward = cpu.rflags & fl::DF == 0;
    loop {
        let left = cpu.r[RCX] & o.amask;
        if left == 0 {
            break;
        }
        let mut n = 0;
        if !S::COMPARES && forward && o.flags & F_CHECK == 0 && o.amask == u64::MAX {
            n = tri!(cpu, op, S::run::<T>(cpu, o, left));
        }
        if n == 0 {
            tri!(cpu, op, S::one::<T>(cpu, o));
            n = 1;
        }
        cpu.element_done();
        advance::<T, S>(cpu, o, n);
        cpu.set_addr(RCX, o.amask, left - n);
        if S::COMPARES {
            let equal = cpu.fl & ZF != 0;
            if equal != (o.flags & F_REP != 0) {
                break;
            }
        }
        // The element may have overwritten this very instruction.
        // SAFETY: `current` is the block of this op.
        let stale = unsafe { !(*cpu.cache.current).valid.get() };
        budget = budget.saturating_sub(1 + n / 64);
        if left - n != 0 && (stale || budget == 0) {
            budget = BATCH;
            if stale || cpu.vcpu().events.peek() != 0 {
                return cpu.again(op);
            }
        }
    }
    next!(cpu, op)
}

fn pick<S: StringOp>(l: &mut Lower, size: usize) -> Handler {
    if l.op.flags & (F_REP | F_REPNE) != 0 { sized!(size, rep, S) } else { sized!(size, once, S) }
}

pub fn lower(l: &mut Lower) -> Option<Handler> {
    let i = l.insn;
    let m = i.mnemonic();
    use Mnemonic::*;
    if !i.is_string_instruction()
        || !matches!(
            m,
            Movsb
                | Movsw
                | Movsd
                | Movsq
                | Stosb
                | Stosw
                | Stosd
                | Stosq
                | Lodsb
                | Lodsw
                | Lodsd
                | Lodsq
                | Cmpsb
                | Cmpsw
                | Cmpsd
                | Cmpsq
                | Scasb
                | Scasw
                | Scasd
                | Scasq
        )
    {
        return None;
    }
    for k in [i.op0_kind(), i.op1_kind()] {
        match k {
            OpKind::MemorySegSI | OpKind::MemoryESDI => l.op.amask = 0xFFFF,
            OpKind::MemorySegESI | OpKind::MemoryESEDI => l.op.amask = 0xFFFF_FFFF,
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => l.op.amask = u64::MAX,
            _ => {}
        }
    }
    let seg = l.memory_segment();
    l.seg(if seg == Register::None { Register::ES } else { seg });
    if l.bits != 64 && !l.flat {
        l.op.flags |= F_CHECK;
    }
    let compares = matches!(m, Cmpsb | Cmpsw | Cmpsd | Cmpsq | Scasb | Scasw | Scasd | Scasq);
    if i.has_repne_prefix() && compares {
        l.op.flags |= F_REPNE;
    } else if i.has_rep_prefix() || i.has_repne_prefix() {
        l.op.flags |= F_REP;
    }
    let size = i.memory_size().size();
    Some(match m {
        Movsb | Movsw | Movsd | Movsq => pick::<Movs>(l, size),
        Stosb | Stosw | Stosd | Stosq => pick::<Stos>(l, size),
        Lodsb | Lodsw | Lodsd | Lodsq => pick::<Lods>(l, size),
        Cmpsb | Cmpsw | Cmpsd | Cmpsq => pick::<Cmps>(l, size),
        _ => pick::<Scas>(l, size),
    })
}
