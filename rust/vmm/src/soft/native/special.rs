//! Instructions of the vector families that are more than a function of registers and one
//! memory operand.

use super::simd::{check, class, classed, enter_mmx, in_page, mxcsr};
use super::stub::Stub;
use super::{Class, Native};
use crate::soft::Cpu;
use crate::soft::decode::{Lower, reg_offset};
use crate::soft::mmu::Right;
use crate::soft::op::*;
use crate::soft::state::*;
use iced_x86::{Mnemonic, OpKind, Register};
use std::mem;

pub fn lower(l: &mut Lower, native: &mut Native) -> Option<Handler> {
    use Mnemonic::*;
    let insn = l.insn;
    Some(match insn.mnemonic() {
        Vzeroupper | Vzeroall => {
            l.op.dst = if insn.mnemonic() == Vzeroall { 0 } else { 2 };
            l.op.aux = if l.bits == 64 { 16 } else { 8 };
            zero
        }
        Emms => emms,
        Ldmxcsr | Stmxcsr | Vldmxcsr | Vstmxcsr => {
            l.mem();
            match insn.mnemonic() {
                Ldmxcsr => ldmxcsr::<{ Class::SSE }>,
                Stmxcsr => stmxcsr::<{ Class::SSE }>,
                Vldmxcsr => ldmxcsr::<{ Class::AVX | Class::VEX }>,
                _ => stmxcsr::<{ Class::AVX | Class::VEX }>,
            }
        }
        Maskmovq | Maskmovdqu | Vmaskmovdqu => {
            l.op.base = Register::RDI.number() as u8;
            l.op.index = R_ZERO;
            l.op.amask = match insn.op0_kind() {
                OpKind::MemorySegDI => 0xFFFF,
                OpKind::MemorySegEDI => 0xFFFF_FFFF,
                _ => u64::MAX,
            };
            l.seg(insn.memory_segment());
            l.op.src = insn.op1_register().number() as u8;
            l.op.aux = insn.op2_register().number() as u8;
            classed!(class(&insn), masked_bytes)
        }
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq => {
            let store = insn.op0_kind() == OpKind::Memory;
            let width = if matches!(insn.mnemonic(), Vmaskmovps | Vpmaskmovd) { 4 } else { 8 };
            let stub = native.stub(&insn, class(&insn));
            l.mem();
            l.keep(Masked {
                stub,
                mask: insn.op1_register().number(),
                data: if store { Some(insn.op2_register().number()) } else { None },
                width,
                count: insn.memory_size().size() / width,
            });
            masked
        }
        Vgatherdps | Vgatherqps | Vpgatherdd | Vpgatherqd => gather(l, 4),
        Vgatherdpd | Vgatherqpd | Vpgatherdq | Vpgatherqq => gather(l, 8),
        Rdrand | Rdseed => {
            l.op.dst = reg_offset(insn.op0_register());
            l.op.aux = insn.op0_register().size() as u8;
            rdrand
        }
        _ => return None,
    })
}

// -- VZEROALL, VZEROUPPER, EMMS, MXCSR ---------------------------------------------------------

/// `dst` is the first quadword of each register to clear, `aux` how many registers there are.
unsafe fn zero(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, check::<{ Class::AVX | Class::VEX }>(cpu));
    for r in &mut cpu.ymm[..usize::from(o.aux)] {
        r[usize::from(o.dst)..].fill(0);
    }
    next!(cpu, op)
}

unsafe fn emms(cpu: &mut Cpu, op: *const Op) -> Flow {
    tri!(cpu, op, check::<{ Class::MMX }>(cpu));
    enter_mmx::<{ Class::MMX }>(cpu);
    cpu.fpu.ftw = 0;
    next!(cpu, op)
}

unsafe fn ldmxcsr<const K: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, check::<K>(cpu));
    let lin = tri!(cpu, op, cpu.lin(o, 4, false));
    let v = tri!(cpu, op, cpu.ld::<u32>(lin));
    if v & !mxcsr::VALID != 0 {
        let stop = cpu.gp(0);
        return cpu.stop_at(op, stop);
    }
    cpu.fpu.mxcsr = v;
    next!(cpu, op)
}

unsafe fn stmxcsr<const K: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, check::<K>(cpu));
    let lin = tri!(cpu, op, cpu.lin(o, 4, true));
    tri!(cpu, op, cpu.st(lin, cpu.fpu.mxcsr));
    next!(cpu, op)
}

// -- masked moves ------------------------------------------------------------------------------

/// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD, VPMASKMOVQ.
struct Masked {
    stub: Stub,
    mask: usize,
    /// The register that is stored; None: a load.
    data: Option<usize>,
    /// Bytes of an element.
    width: usize,
    count: usize,
}

/// The sign bits of a register's elements of `width` bytes.
fn signs(ymm: &[u64; 4], width: usize, count: usize) -> u32 {
    let bytes = bytes(ymm);
    (0..count).map(|i| u32::from(bytes[(i + 1) * width - 1] >> 7) << i).sum()
}

fn bytes(ymm: &[u64; 4]) -> [u8; 32] {
    let mut b = [0; 32];
    for (to, from) in b.chunks_exact_mut(8).zip(ymm) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    b
}

/// Linear address for an offset in the segment of the op's memory operand.
fn lin_at(cpu: &mut Cpu, op: &Op, ea: u64, size: u64, write: bool) -> Result<u64, Stop> {
    let ea = ea & op.amask;
    if op.flags & F_CHECK != 0 {
        return cpu.lin_checked(op.seg, ea, size, write);
    }
    Ok(cpu.seg_base[usize::from(op.seg)].wrapping_add(ea))
}

/// Write those elements of `data` that `select` names; nothing is written if one of them faults.
fn write_selected(
    cpu: &mut Cpu,
    op: &Op,
    data: &[u8],
    width: usize,
    select: u32,
) -> Result<(), Stop> {
    let ea = cpu.ea(op);
    // Neighbours together.
    let mut runs: Vec<(u64, &[u8])> = Vec::new();
    let mut rest = u64::from(select);
    while rest != 0 {
        let first = rest.trailing_zeros() as usize;
        let n = (rest >> first).trailing_ones() as usize;
        let part = &data[first * width..(first + n) * width];
        let at = ea.wrapping_add((first * width) as u64);
        let lin = lin_at(cpu, op, at, part.len() as u64, true)?;
        cpu.probe_write(lin, part.len() as u64, Right::Current)?;
        runs.push((lin, part));
        rest &= !(((1 << n) - 1) << first);
    }
    for (lin, part) in runs {
        cpu.write_lin(lin, part, Right::Current)?;
    }
    Ok(())
}

unsafe fn masked(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler; `lower` kept a `Masked`.
    let (o, m) = unsafe { (&*op, &*((*op).imm as *const Masked)) };
    tri!(cpu, op, check::<{ Class::AVX | Class::VEX }>(cpu));
    tri!(cpu, op, run_masked(cpu, o, m));
    next!(cpu, op)
}

fn run_masked(cpu: &mut Cpu, op: &Op, m: &Masked) -> Result<(), Stop> {
    let select = signs(&cpu.ymm[m.mask], m.width, m.count);
    let size = (m.width * m.count) as u64;
    if op.flags & F_CHECK == 0 && select != 0 {
        let lin = lin_at(cpu, op, cpu.ea(op), size, m.data.is_some())?;
        // What a fault reports is the first element that is accessed.
        let skip = select.trailing_zeros() as usize * m.width;
        if in_page(lin, size)
            && let Some(p) = cpu.span(lin.wrapping_add(skip as u64), m.data.is_some())?
        {
            // SAFETY: all of the operand lies in the page that `p` points into.
            unsafe { (m.stub)(cpu, p.sub(skip)) };
            return Ok(());
        }
    }
    if let Some(data) = m.data {
        let data = bytes(&cpu.ymm[data]);
        return write_selected(cpu, op, &data, m.width, select);
    }
    let ea = cpu.ea(op);
    let mut b = [0; 64];
    for i in (0..m.count).filter(|i| select >> i & 1 != 0) {
        let at = ea.wrapping_add((i * m.width) as u64);
        let lin = lin_at(cpu, op, at, m.width as u64, false)?;
        cpu.read_lin(lin, &mut b[i * m.width..(i + 1) * m.width], Right::Current)?;
    }
    cpu.native.bounce.0 = b;
    // SAFETY: the bounce buffer is larger than any operand.
    unsafe { (m.stub)(cpu, cpu.native.bounce.0.as_mut_ptr()) };
    Ok(())
}

/// MASKMOVQ and MASKMOVDQU: bytes of register `src` that register `aux` selects.
unsafe fn masked_bytes<const K: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, check::<K>(cpu));
    let (data, mask) = (usize::from(o.src), usize::from(o.aux));
    // Even when the store faults.
    enter_mmx::<K>(cpu);
    let (data, mask, count) = if K & Class::MMX != 0 {
        ([cpu.fpu.st[data][0], 0, 0, 0], [cpu.fpu.st[mask][0], 0, 0, 0], 8)
    } else {
        (cpu.ymm[data], cpu.ymm[mask], 16)
    };
    // The segment's limit counts for all bytes.
    tri!(cpu, op, cpu.lin(o, count as u64, true));
    let select = signs(&mask, 1, count);
    tri!(cpu, op, write_selected(cpu, o, &bytes(&data), 1, select));
    next!(cpu, op)
}

// -- gathers -----------------------------------------------------------------------------------

struct Gather {
    dst: usize,
    mask: usize,
    index: usize,
    scale: u32,
    /// Bytes of an index and of an element.
    index_width: usize,
    width: usize,
    count: usize,
}

fn gather(l: &mut Lower, width: usize) -> Handler {
    use Mnemonic::*;
    let insn = l.insn;
    let index = insn.memory_index();
    let wide = matches!(insn.mnemonic(), Vgatherqps | Vgatherqpd | Vpgatherqd | Vpgatherqq);
    let index_width = if wide { 8 } else { 4 };
    let vl = if insn.op0_register().is_ymm() || index.is_ymm() { 32 } else { 16 };
    // What is left is an ordinary operand: base and displacement.
    l.insn.set_memory_index(Register::None);
    l.insn.set_memory_index_scale(1);
    l.mem();
    l.insn = insn;
    l.keep(Gather {
        dst: insn.op0_register().number(),
        mask: insn.op2_register().number(),
        index: index.number(),
        scale: insn.memory_index_scale().trailing_zeros(),
        index_width,
        width,
        count: vl / index_width.max(width),
    });
    gathered
}

unsafe fn gathered(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler; `gather` kept a `Gather`.
    let (o, g) = unsafe { (&*op, &*((*op).imm as *const Gather)) };
    tri!(cpu, op, check::<{ Class::AVX | Class::VEX }>(cpu));
    let mut dst = bytes(&cpu.ymm[g.dst]);
    let mut mask = bytes(&cpu.ymm[g.mask]);
    let mut left = signs(&cpu.ymm[g.mask], g.width, g.count);
    let r = gather_elements(cpu, o, g, &mut dst, &mut left);
    // A fault leaves what was gathered, and the mask clear up to there; userland's part of an
    // access does not, because the instruction is run again from its start.
    if r != Err(Stop::Exit) {
        if r.is_ok() {
            dst[g.count * g.width..].fill(0);
            mask.fill(0);
        }
        let done = (left.trailing_zeros() as usize).min(g.count);
        mask[..done * g.width].fill(0);
        cpu.ymm[g.dst] = quads(&dst);
        cpu.ymm[g.mask] = quads(&mask);
    }
    tri!(cpu, op, r);
    next!(cpu, op)
}

fn quads(b: &[u8; 32]) -> [u64; 4] {
    let mut q = [0; 4];
    for (to, from) in q.iter_mut().zip(b.chunks_exact(8)) {
        *to = u64::from_le_bytes(from.try_into().expect("8 bytes"));
    }
    q
}

/// Load the elements that `left` names into `dst`, clearing their bits.
fn gather_elements(
    cpu: &mut Cpu,
    op: &Op,
    g: &Gather,
    dst: &mut [u8; 32],
    left: &mut u32,
) -> Result<(), Stop> {
    let index = bytes(&cpu.ymm[g.index]);
    let ea = cpu.ea(op);
    while *left != 0 {
        let i = left.trailing_zeros() as usize;
        let mut b = [0; 8];
        b[..g.index_width].copy_from_slice(&index[i * g.index_width..(i + 1) * g.index_width]);
        let unused = 64 - 8 * g.index_width as u32;
        let offset = i64::from_le_bytes(b) << unused >> unused;
        let at = ea.wrapping_add((offset as u64) << g.scale);
        let lin = lin_at(cpu, op, at, g.width as u64, false)?;
        let out = &mut dst[i * g.width..(i + 1) * g.width];
        if g.width == 4 {
            out.copy_from_slice(&cpu.ld::<u32>(lin)?.to_le_bytes());
        } else {
            out.copy_from_slice(&cpu.ld::<u64>(lin)?.to_le_bytes());
        }
        *left &= *left - 1;
    }
    Ok(())
}

// -- RDRAND, RDSEED ----------------------------------------------------------------------------

/// Register at offset `dst`, `aux` bytes.
unsafe fn rdrand(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    let v = random();
    let r = &mut cpu.r[usize::from(o.dst / 8)];
    *r = match o.aux {
        2 => *r & !0xFFFF | v & 0xFFFF,
        4 => v & 0xFFFF_FFFF,
        _ => v,
    };
    // CF: there was a number.  The other arithmetic flags become 0.
    cpu.fl = 1 << 8;
    next!(cpu, op)
}

/// The host's random numbers.
fn random() -> u64 {
    let mut b = [0; 8];
    loop {
        // SAFETY: the buffer is 8 bytes long.
        let n = unsafe { libc::getrandom(b.as_mut_ptr().cast(), mem::size_of_val(&b), 0) };
        // Short or interrupted only before the kernel's pool is ready.
        if n == 8 {
            return u64::from_le_bytes(b);
        }
    }
}
