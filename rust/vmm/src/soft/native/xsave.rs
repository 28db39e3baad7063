//! FXSAVE, XSAVE and their kin (Intel SDM 1, 10.5 and chapter 13).
//!
//! State components: x87 (0), SSE (1) and AVX (2).  A component is in use when it differs from
//! its initial state; there is no further tracking, so XSAVEOPT leaves out what is initial and
//! writes the rest.

use super::simd::{in_page, mxcsr};
use crate::soft::Cpu;
use crate::soft::decode::Lower;
use crate::soft::mmu::Right;
use crate::soft::op::*;
use crate::soft::state::*;
use iced_x86::Code;
use std::ops::Range;
use std::ptr;

const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;

/// XCOMP_BV: the image is in the compacted format.
const COMPACTED: u64 = 1 << 63;

/// MXCSR in its initial state.
const MXCSR_INIT: u32 = 0x1F80;

// Offsets of an image.
const FXSAVE_LEN: usize = 512;
const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;
const HEADER: usize = 512;
const HEADER_LEN: usize = 64;
/// Upper halves of the YMM registers; the same in both formats, because nothing comes before.
const YMM: usize = 576;
const XSAVE_LEN: usize = 832;

pub fn lower(l: &mut Lower) -> Option<Handler> {
    use Code::*;
    let f: Handler = match l.insn.code() {
        Fxsave_m512byte => fxsave::<false>,
        Fxsave64_m512byte => fxsave::<true>,
        Fxrstor_m512byte => fxrstor::<false>,
        Fxrstor64_m512byte => fxrstor::<true>,
        Xsave_mem => xsave::<PLAIN, false>,
        Xsave64_mem => xsave::<PLAIN, true>,
        Xsaveopt_mem => xsave::<OPT, false>,
        Xsaveopt64_mem => xsave::<OPT, true>,
        Xsavec_mem => xsave::<COMPACT, false>,
        Xsavec64_mem => xsave::<COMPACT, true>,
        Xrstor_mem => xrstor::<false>,
        Xrstor64_mem => xrstor::<true>,
        _ => return None,
    };
    l.mem();
    Some(f)
}

impl Cpu {
    /// XINUSE: the components that are not in their initial state.
    pub fn xinuse(&self) -> u64 {
        let mut initial = self.fpu;
        initial.set_initial();
        let x87 = self.fpu != initial;
        let sse = self.ymm.iter().any(|y| y[0] | y[1] != 0);
        let avx = self.ymm.iter().any(|y| y[2] | y[3] != 0);
        u64::from(x87) | u64::from(sse) << 1 | u64::from(avx) << 2
    }

    /// Vector registers that the mode shows.
    fn vectors(&self) -> usize {
        if self.code64() { 16 } else { 8 }
    }
}

impl Fpu {
    /// The x87 component's initial state; MXCSR stays.
    fn set_initial(&mut self) {
        self.init();
        self.st = [[0; 2]; 8];
    }
}

/// A save area in the making or in use.
struct Image([u8; XSAVE_LEN]);

impl Image {
    fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        self.0[at..at + N].copy_from_slice(&bytes);
    }

    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().expect("N bytes")
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.get(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.get(at))
    }

    /// `wide`: 64-bit pointers instead of 32 bits and a selector.
    fn put_x87(&mut self, f: &Fpu, wide: bool) {
        self.put(0, f.fcw.to_le_bytes());
        self.put(2, f.fsw.to_le_bytes());
        self.put(4, [f.ftw, 0]);
        self.put(6, f.fop.to_le_bytes());
        let mask = if wide { u64::MAX } else { 0xFFFF_FFFF };
        self.put(8, (f.fip & mask).to_le_bytes());
        self.put(16, (f.fdp & mask).to_le_bytes());
        for (i, st) in f.st.iter().enumerate() {
            self.put(ST + 16 * i, st[0].to_le_bytes());
            self.put(ST + 16 * i + 8, (st[1] & 0xFFFF).to_le_bytes());
        }
    }

    fn get_x87(&self, f: &mut Fpu, wide: bool) {
        f.set_fsw(self.u16(2));
        f.set_fcw(self.u16(0));
        f.ftw = self.0[4];
        f.fop = self.u16(6) & 0x7FF;
        let mask = if wide { u64::MAX } else { 0xFFFF_FFFF };
        f.fip = self.u64(8) & mask;
        f.fdp = self.u64(16) & mask;
        for (i, st) in f.st.iter_mut().enumerate() {
            *st = [self.u64(ST + 16 * i), self.u64(ST + 16 * i + 8) & 0xFFFF];
        }
    }

    fn put_mxcsr(&mut self, v: u32) {
        self.put(MXCSR, v.to_le_bytes());
        self.put(MXCSR + 4, mxcsr::VALID.to_le_bytes());
    }

    /// Halves of vector registers: the lower ones (0) at `XMM`, the upper ones (2) at `YMM`.
    fn put_halves(&mut self, at: usize, ymm: &[[u64; 4]], half: usize) {
        for (i, y) in ymm.iter().enumerate() {
            self.put(at + 16 * i, y[half].to_le_bytes());
            self.put(at + 16 * i + 8, y[half + 1].to_le_bytes());
        }
    }

    fn get_halves(&self, at: usize, ymm: &mut [[u64; 4]], half: usize) {
        for (i, y) in ymm.iter_mut().enumerate() {
            y[half] = self.u64(at + 16 * i);
            y[half + 1] = self.u64(at + 16 * i + 8);
        }
    }
}

/// Linear address of the op's area; `align` is a power of two.
fn area(cpu: &mut Cpu, op: &Op, len: usize, align: u64, write: bool) -> Result<u64, Stop> {
    let lin = cpu.lin(op, len as u64, write)?;
    if lin & (align - 1) != 0 {
        return Err(cpu.gp(0));
    }
    Ok(lin)
}

fn read(cpu: &mut Cpu, lin: u64, len: usize) -> Result<Image, Stop> {
    let mut image = Image([0; XSAVE_LEN]);
    if in_page(lin, len as u64)
        && let Some(p) = cpu.span(lin, false)?
    {
        // SAFETY: `len` bytes of guest memory, which the image has room for.
        unsafe { ptr::copy_nonoverlapping(p, image.0.as_mut_ptr(), len) };
    } else {
        cpu.read_lin(lin, &mut image.0[..len], Right::Current)?;
    }
    Ok(image)
}

/// Write some parts of an area; nothing is written if one of them faults.
fn write(cpu: &mut Cpu, lin: u64, image: &Image, parts: &[Range<usize>]) -> Result<(), Stop> {
    let len = parts.iter().map(|r| r.end).max().unwrap_or(0);
    if in_page(lin, len as u64)
        && let Some(p) = cpu.span(lin, true)?
    {
        for r in parts {
            // SAFETY: inside the `len` bytes of guest memory at `p`.
            unsafe {
                ptr::copy_nonoverlapping(image.0[r.clone()].as_ptr(), p.add(r.start), r.len());
            }
        }
        return Ok(());
    }
    cpu.probe_write(lin, len as u64, Right::Current)?;
    for r in parts {
        cpu.write_lin(lin.wrapping_add(r.start as u64), &image.0[r.clone()], Right::Current)?;
    }
    Ok(())
}

// -- FXSAVE, FXRSTOR ---------------------------------------------------------------------------

/// FXSAVE and FXRSTOR are allowed.  Unlike other instructions they do not need CR4.OSFXSR.
fn fx_allowed(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(cpu.raise(vec::NM, None));
    }
    Ok(())
}

unsafe fn fxsave<const WIDE: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, fx_allowed(cpu));
    let lin = tri!(cpu, op, area(cpu, o, FXSAVE_LEN, 16, true));
    let n = cpu.vectors();
    let mut image = Image([0; XSAVE_LEN]);
    image.put_x87(&cpu.fpu, WIDE);
    image.put_mxcsr(cpu.fpu.mxcsr);
    image.put_halves(XMM, &cpu.ymm[..n], 0);
    tri!(cpu, op, write(cpu, lin, &image, &[0..XMM, XMM..XMM + 16 * n]));
    next!(cpu, op)
}

unsafe fn fxrstor<const WIDE: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, fx_allowed(cpu));
    let lin = tri!(cpu, op, area(cpu, o, FXSAVE_LEN, 16, false));
    let image = tri!(cpu, op, read(cpu, lin, FXSAVE_LEN));
    let mxcsr = image.u32(MXCSR);
    if mxcsr & !mxcsr::VALID != 0 {
        let stop = cpu.gp(0);
        return cpu.stop_at(op, stop);
    }
    image.get_x87(&mut cpu.fpu, WIDE);
    cpu.fpu.mxcsr = mxcsr;
    let n = cpu.vectors();
    image.get_halves(XMM, &mut cpu.ymm[..n], 0);
    next!(cpu, op)
}

// -- XSAVE, XRSTOR -----------------------------------------------------------------------------

/// RFBM, the components that an instruction is asked for, or why there are none.
fn requested(cpu: &mut Cpu) -> Result<u64, Stop> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    if cpu.cr0 & cr0::TS != 0 {
        return Err(cpu.raise(vec::NM, None));
    }
    Ok((cpu.r[2] << 32 | cpu.r[0] & 0xFFFF_FFFF) & cpu.xcr0)
}

/// Bytes of an area with these components.
fn length(components: u64) -> usize {
    if components & AVX != 0 { XSAVE_LEN } else { HEADER + HEADER_LEN }
}

const PLAIN: u8 = 0;
const OPT: u8 = 1;
const COMPACT: u8 = 2;

unsafe fn xsave<const KIND: u8, const WIDE: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    let rfbm = tri!(cpu, op, requested(cpu));
    let n = cpu.vectors();
    let mut in_use = cpu.xinuse();
    if KIND == COMPACT && cpu.fpu.mxcsr != MXCSR_INIT {
        // The compacted format has MXCSR with the SSE component.
        in_use |= SSE;
    }
    let saved = if KIND == PLAIN { rfbm } else { rfbm & in_use };
    let lin = tri!(cpu, op, area(cpu, o, length(saved), 64, true));
    let mut image = Image([0; XSAVE_LEN]);
    let mut parts: Vec<Range<usize>> = Vec::with_capacity(6);
    if saved & X87 != 0 {
        image.put_x87(&cpu.fpu, WIDE);
        parts.extend([0..MXCSR, ST..XMM]);
    }
    if if KIND == COMPACT { saved & SSE } else { rfbm & (SSE | AVX) } != 0 {
        image.put_mxcsr(cpu.fpu.mxcsr);
        parts.push(MXCSR..ST);
    }
    if saved & SSE != 0 {
        image.put_halves(XMM, &cpu.ymm[..n], 0);
        parts.push(XMM..XMM + 16 * n);
    }
    if saved & AVX != 0 {
        image.put_halves(YMM, &cpu.ymm[..n], 2);
        parts.push(YMM..YMM + 16 * n);
    }
    let mut xstate_bv = rfbm & in_use;
    if KIND == COMPACT {
        image.put(HEADER + 8, (COMPACTED | rfbm).to_le_bytes());
        parts.push(HEADER..HEADER + 16);
    } else {
        let old = tri!(cpu, op, cpu.ld::<u64>(lin.wrapping_add(HEADER as u64)));
        xstate_bv |= old & !rfbm;
        parts.push(HEADER..HEADER + 8);
    }
    image.put(HEADER, xstate_bv.to_le_bytes());
    tri!(cpu, op, write(cpu, lin, &image, &parts));
    next!(cpu, op)
}

unsafe fn xrstor<const WIDE: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    let rfbm = tri!(cpu, op, requested(cpu));
    let lin = tri!(cpu, op, area(cpu, o, length(0), 64, false));
    let xstate_bv = tri!(cpu, op, cpu.ld::<u64>(lin.wrapping_add(HEADER as u64)));
    let len = length(rfbm & xstate_bv);
    tri!(cpu, op, area(cpu, o, len, 64, false));
    let image = tri!(cpu, op, read(cpu, lin, len));
    if !restore::<WIDE>(cpu, &image, rfbm) {
        let stop = cpu.gp(0);
        return cpu.stop_at(op, stop);
    }
    next!(cpu, op)
}

/// False: the image is not legal, and nothing has been changed.
fn restore<const WIDE: bool>(cpu: &mut Cpu, image: &Image, rfbm: u64) -> bool {
    let xstate_bv = image.u64(HEADER);
    let xcomp_bv = image.u64(HEADER + 8);
    let compacted = xcomp_bv & COMPACTED != 0;
    let zero = |r: Range<usize>| image.0[r].iter().all(|&b| b == 0);
    let legal = if compacted {
        let present = xcomp_bv & !COMPACTED;
        present & !cpu.xcr0 == 0
            && xstate_bv & !present == 0
            && zero(HEADER + 16..HEADER + HEADER_LEN)
    } else {
        xstate_bv & !cpu.xcr0 == 0 && zero(HEADER + 8..HEADER + 24)
    };
    let mxcsr = if compacted {
        match (rfbm & SSE != 0, xstate_bv & SSE != 0) {
            (false, _) => cpu.fpu.mxcsr,
            (true, false) => MXCSR_INIT,
            (true, true) => image.u32(MXCSR),
        }
    } else if rfbm & (SSE | AVX) != 0 {
        image.u32(MXCSR)
    } else {
        cpu.fpu.mxcsr
    };
    if !legal || mxcsr & !mxcsr::VALID != 0 {
        return false;
    }
    cpu.fpu.mxcsr = mxcsr;
    if rfbm & X87 != 0 {
        if xstate_bv & X87 != 0 {
            image.get_x87(&mut cpu.fpu, WIDE);
        } else {
            cpu.fpu.set_initial();
        }
    }
    // A component that the image does not have becomes initial: zeros.
    let initial = Image([0; XSAVE_LEN]);
    let n = cpu.vectors();
    for (component, at, half) in [(SSE, XMM, 0), (AVX, YMM, 2)] {
        if rfbm & component != 0 {
            let from = if xstate_bv & component != 0 { image } else { &initial };
            from.get_halves(at, &mut cpu.ymm[..n], half);
        }
    }
    true
}
