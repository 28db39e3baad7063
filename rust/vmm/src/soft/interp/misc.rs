//! What is left of the general-purpose instructions: sign extension of the accumulator, flag
//! bits, BCD, XLAT, BSWAP, the wide compare-and-exchanges, hints.

use super::host::{AF, Alu, CF, OF, PF, SF, ZF};
use crate::soft::Cpu;
use crate::soft::decode::{Lower, Next, reg_offset};
use crate::soft::op::*;
use crate::soft::state::*;
use crate::soft::sys::operand_lin;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use std::arch::asm;

unsafe fn nop(cpu: &mut Cpu, op: *const Op) -> Flow {
    next!(cpu, op)
}

/// Fences: the host's own, whose ordering the guest's memory model is.
unsafe fn fence(cpu: &mut Cpu, op: *const Op) -> Flow {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    next!(cpu, op)
}

unsafe fn cbw(cpu: &mut Cpu, op: *const Op) -> Flow {
    let v = cpu.get::<u8>(0) as i8 as u16;
    cpu.set(0, v);
    next!(cpu, op)
}
unsafe fn cwde(cpu: &mut Cpu, op: *const Op) -> Flow {
    let v = cpu.get::<u16>(0) as i16 as u32;
    cpu.set(0, v);
    next!(cpu, op)
}
unsafe fn cdqe(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.r[0] = cpu.r[0] as i32 as u64;
    next!(cpu, op)
}
unsafe fn cwd(cpu: &mut Cpu, op: *const Op) -> Flow {
    let v = (cpu.get::<u16>(0) as i16 >> 15) as u16;
    cpu.set(16, v);
    next!(cpu, op)
}
unsafe fn cdq(cpu: &mut Cpu, op: *const Op) -> Flow {
    let v = (cpu.get::<u32>(0) as i32 >> 31) as u32;
    cpu.set(16, v);
    next!(cpu, op)
}
unsafe fn cqo(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.r[2] = (cpu.r[0] as i64 >> 63) as u64;
    next!(cpu, op)
}

unsafe fn clc(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.fl &= !CF;
    next!(cpu, op)
}
unsafe fn stc(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.fl |= CF;
    next!(cpu, op)
}
unsafe fn cmc(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.fl ^= CF;
    next!(cpu, op)
}
unsafe fn cld(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.rflags &= !fl::DF;
    next!(cpu, op)
}
unsafe fn std(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.rflags |= fl::DF;
    next!(cpu, op)
}
unsafe fn lahf(cpu: &mut Cpu, op: *const Op) -> Flow {
    let v = cpu.get_rflags() as u8;
    cpu.set(1, v);
    next!(cpu, op)
}
unsafe fn sahf(cpu: &mut Cpu, op: *const Op) -> Flow {
    let ah: u8 = cpu.get(1);
    cpu.fl = cpu.fl & OF | u32::from(ah & 0xD5) << 8;
    next!(cpu, op)
}

unsafe fn bswap32(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let v = cpu.get::<u32>(o.dst).swap_bytes();
    cpu.set(o.dst, v);
    next!(cpu, op)
}
unsafe fn bswap64(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let v = cpu.get::<u64>(o.dst).swap_bytes();
    cpu.set(o.dst, v);
    next!(cpu, op)
}
/// Undefined by the manuals; processors give zero.
unsafe fn bswap16(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    cpu.set(o.dst, 0u16);
    next!(cpu, op)
}

fn xlat(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let mask = match i.memory_base() {
        Register::BX => 0xFFFF,
        Register::EBX => 0xFFFF_FFFF,
        _ => u64::MAX,
    };
    let ea = cpu.r[3].wrapping_add(u64::from(cpu.get::<u8>(0))) & mask;
    let seg = crate::soft::decode::seg_index(i.memory_segment());
    let lin = cpu.lin_checked(seg, ea, 1, false)?;
    let v: u8 = cpu.ld(lin)?;
    cpu.set(0, v);
    Ok(Next::Seq)
}

fn salc(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    let v: u8 = if cpu.fl & CF != 0 { 0xFF } else { 0 };
    cpu.set(0, v);
    Ok(Next::Seq)
}

// -- BCD (SDM 2A) --------------------------------------------------------------------------------

/// SF, ZF and PF of a byte.
fn szp(v: u8) -> u32 {
    (if v & 0x80 != 0 { SF } else { 0 })
        | (if v == 0 { ZF } else { 0 })
        | (if v.count_ones().is_multiple_of(2) { PF } else { 0 })
}

fn daa_das(cpu: &mut Cpu, sub: bool) {
    let old: u8 = cpu.get(0);
    let (cf, af) = (cpu.fl & CF != 0, cpu.fl & AF != 0);
    let mut al = old;
    let mut f = 0;
    let step = |al: u8, n: u8| if sub { al.wrapping_sub(n) } else { al.wrapping_add(n) };
    if old & 0xF > 9 || af {
        al = step(al, 6);
        f |= AF;
        if cf || sub && old < 6 {
            f |= CF;
        }
    }
    if old > 0x99 || cf {
        al = step(al, 0x60);
        f |= CF;
    }
    cpu.set(0, al);
    cpu.fl = f | szp(al);
}

fn daa(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    daa_das(cpu, false);
    Ok(Next::Seq)
}

fn das(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    daa_das(cpu, true);
    Ok(Next::Seq)
}

fn aaa_aas(cpu: &mut Cpu, sub: bool) {
    let ax: u16 = cpu.get(0);
    let adjust = ax & 0xF > 9 || cpu.fl & AF != 0;
    let v = match (adjust, sub) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
    };
    let v = v & 0xFF0F;
    cpu.set(0, v);
    cpu.fl = (if adjust { CF | AF } else { 0 }) | szp(v as u8);
}

fn aaa(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    aaa_aas(cpu, false);
    Ok(Next::Seq)
}

fn aas(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    aaa_aas(cpu, true);
    Ok(Next::Seq)
}

fn aam(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let n = i.immediate8();
    if n == 0 {
        return Err(cpu.raise(vec::DE, None));
    }
    let al: u8 = cpu.get(0);
    cpu.set(0, u16::from(al / n) << 8 | u16::from(al % n));
    cpu.fl = szp(al % n);
    Ok(Next::Seq)
}

fn aad(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let (al, ah): (u8, u8) = (cpu.get(0), cpu.get(1));
    let (v, f) = u8::add(al, ah.wrapping_mul(i.immediate8()), cpu.fl);
    cpu.set(0, u16::from(v));
    cpu.fl = f;
    Ok(Next::Seq)
}

// -- CMPXCHG8B, CMPXCHG16B -----------------------------------------------------------------------

fn cmpxchg8b(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let lin = operand_lin(cpu, i, 8, true)?;
    let p = cpu.wptr_locked::<u64>(lin)?;
    let old = u64::from(cpu.get::<u32>(16)) << 32 | u64::from(cpu.get::<u32>(0));
    let new = u64::from(cpu.get::<u32>(8)) << 32 | u64::from(cpu.get::<u32>(24));
    // SAFETY: `wptr_locked` gives a pointer to the operand.
    let (was, f) = unsafe { u64::lock_cmpxchg(p, old, new, cpu.fl) };
    cpu.commit()?;
    if f & ZF != 0 {
        cpu.fl |= ZF;
    } else {
        cpu.fl &= !ZF;
        cpu.set(0, was as u32);
        cpu.set(16, (was >> 32) as u32);
    }
    Ok(Next::Seq)
}

fn cmpxchg16b(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let lin = operand_lin(cpu, i, 16, true)?;
    if lin & 15 != 0 {
        return Err(cpu.gp(0));
    }
    let p = cpu.wptr_slow(lin, 16, true)?;
    let (mut lo, mut hi) = (cpu.r[0], cpu.r[2]);
    let ok: u8;
    // The bounce buffer of a device operand need not be aligned for the host's instruction.
    if p as usize & 15 == 0 {
        // SAFETY: `wptr_slow` gives a pointer to the operand, which is aligned.
        unsafe {
            asm!("xchg rbx, {b}", "lock cmpxchg16b [{p}]", "sete {ok}", "mov rbx, {b}",
                b = inout(reg) cpu.r[3] => _, p = in(reg) p, ok = out(reg_byte) ok,
                inout("rax") lo, inout("rdx") hi, in("rcx") cpu.r[1], options(nostack));
        }
    } else {
        let q = p.cast::<u64>();
        // SAFETY: as above; this is our own buffer.
        unsafe {
            let was = (q.read_unaligned(), q.add(1).read_unaligned());
            ok = u8::from(was == (lo, hi));
            if ok != 0 {
                q.write_unaligned(cpu.r[3]);
                q.add(1).write_unaligned(cpu.r[1]);
            }
            (lo, hi) = was;
        }
    }
    cpu.commit()?;
    if ok != 0 {
        cpu.fl |= ZF;
    } else {
        cpu.fl &= !ZF;
        cpu.r[0] = lo;
        cpu.r[2] = hi;
    }
    Ok(Next::Seq)
}

/// CLFLUSH and its kin: the line must be readable; caches are the host's business.
fn cache_line(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let lin = operand_lin(cpu, i, 1, false)?;
    cpu.ld::<u8>(lin)?;
    Ok(Next::Seq)
}

/// Defined to be undefined: UD0, UD1, UD2, and any opcode we do not show.
pub fn undefined(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    Err(cpu.ud())
}

/// Does it nothing that a guest could notice?
pub fn hint(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Nop | Endbr32
            | Endbr64
            | Rdsspd
            | Rdsspq
            | Prefetchnta
            | Prefetcht0
            | Prefetcht1
            | Prefetcht2
            | Prefetchw
            | Prefetchwt1
            | Prefetchit0
            | Prefetchit1
            | Prefetch
            | Cldemote
            | Reservednop
    )
}

pub fn lower(l: &mut Lower) -> Option<Handler> {
    let i = l.insn;
    use Mnemonic::*;
    Some(match i.mnemonic() {
        m if hint(m) => nop,
        // Loads are done one by one anyway.
        Lfence => nop,
        Mfence | Sfence => fence,
        Cbw => cbw,
        Cwde => cwde,
        Cdqe => cdqe,
        Cwd => cwd,
        Cdq => cdq,
        Cqo => cqo,
        Clc => clc,
        Stc => stc,
        Cmc => cmc,
        Cld => cld,
        Std => std,
        Lahf => lahf,
        Sahf => sahf,
        Bswap => {
            l.op.dst = reg_offset(i.op0_register());
            match i.op0_register().size() {
                2 => bswap16,
                4 => bswap32,
                _ => bswap64,
            }
        }
        Xlatb => l.slow(xlat, false),
        Salc => l.slow(salc, false),
        Daa => l.slow(daa, false),
        Das => l.slow(das, false),
        Aaa => l.slow(aaa, false),
        Aas => l.slow(aas, false),
        Aam => l.slow(aam, false),
        Aad => l.slow(aad, false),
        Cmpxchg8b => l.slow(cmpxchg8b, false),
        Cmpxchg16b => l.slow(cmpxchg16b, false),
        Clflush | Clflushopt | Clwb if i.op0_kind() == OpKind::Memory => l.slow(cache_line, false),
        Ud0 | Ud1 | Ud2 | INVALID => l.slow(undefined, true),
        _ => return None,
    })
}
