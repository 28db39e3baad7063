//! Instructions that run as they are: finding the operand and calling the stub.

use super::stub::Stub;
use super::{Class, Native, covered};
use crate::soft::Cpu;
use crate::soft::decode::Lower;
use crate::soft::mmu::{PAGE, Right};
use crate::soft::op::*;
use crate::soft::state::*;
use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpAccess, OpKind, Register};
use std::mem;
use std::ptr;

/// MXCSR (Intel SDM 1, 10.2.3).
pub mod mxcsr {
    pub const IE: u32 = 1 << 0;
    pub const DE: u32 = 1 << 1;
    pub const ZE: u32 = 1 << 2;
    pub const UE: u32 = 1 << 4;
    pub const FLAGS: u32 = 0x3F;
    /// Exception masks: the flags' order, 7 bits up.
    pub const MASKS: u32 = FLAGS << MASK_SHIFT;
    pub const MASK_SHIFT: u32 = 7;
    pub const FZ: u32 = 1 << 15;
    /// Bits that exist; a load that sets others is #GP.  Misaligned SSE (bit 17) is not shown.
    pub const VALID: u32 = 0xFFFF;
}

/// FSW: an unmasked x87 exception is pending.
pub const FSW_ES: u16 = 1 << 7;
/// FSW: which physical register is ST(0).
pub const FSW_TOP: u16 = 7 << 11;

/// Raise what the processor's mode forbids, or go on.
#[inline(always)]
pub fn check<const K: u8>(cpu: &mut Cpu) -> Result<(), Stop> {
    let mut ok = true;
    if K & (Class::SSE | Class::MMX) != 0 {
        ok &= cpu.cr0 & (cr0::EM | cr0::TS) == 0;
    }
    if K & Class::SSE != 0 {
        ok &= cpu.cr4 & cr4::OSFXSR != 0;
    }
    if K & Class::VEX != 0 {
        ok &= cpu.cr0 & cr0::PE != 0 && cpu.rflags & fl::VM == 0;
    }
    if K & Class::AVX != 0 {
        ok &= cpu.cr4 & cr4::OSXSAVE != 0 && cpu.xcr0 & 6 == 6 && cpu.cr0 & cr0::TS == 0;
    }
    if K & Class::MMX != 0 {
        ok &= cpu.fpu.fsw & FSW_ES == 0;
    }
    if ok { Ok(()) } else { refused(cpu, Class(K)) }
}

#[cold]
#[inline(never)]
fn refused(cpu: &mut Cpu, class: Class) -> Result<(), Stop> {
    let has = |bit| class.0 & bit != 0;
    let ud = has(Class::SSE | Class::MMX) && cpu.cr0 & cr0::EM != 0
        || has(Class::SSE) && cpu.cr4 & cr4::OSFXSR == 0
        || has(Class::VEX) && !cpu.protected()
        || has(Class::AVX) && (cpu.cr4 & cr4::OSXSAVE == 0 || cpu.xcr0 & 6 != 6);
    if ud {
        return Err(cpu.ud());
    }
    if has(Class::SSE | Class::MMX | Class::AVX) && cpu.cr0 & cr0::TS != 0 {
        return Err(cpu.raise(vec::NM, None));
    }
    if has(Class::MMX) { super::x87::pending(cpu) } else { Ok(()) }
}

/// What an MMX instruction does to the x87 unit once nothing can fault any more: its registers are
/// the physical ones, so TOP becomes 0, and none is empty.
#[inline(always)]
pub fn enter_mmx<const K: u8>(cpu: &mut Cpu) {
    if K & Class::MMX != 0 && (cpu.fpu.fsw & FSW_TOP != 0 || cpu.fpu.ftw != 0xFF) {
        cpu.fpu.set_fsw(cpu.fpu.fsw & !FSW_TOP);
        cpu.fpu.ftw = 0xFF;
    }
}

/// Run the op's instruction on `mem`.
///
/// # Safety
/// As [`Stub`].
#[inline(always)]
unsafe fn run<const K: u8>(cpu: &mut Cpu, op: &Op, mem: *mut u8) -> Result<(), Stop> {
    // SAFETY: `lower` put the stub there, and it lives as long as the op.
    let stub = unsafe { mem::transmute::<u64, Stub>(op.imm) };
    if K & Class::FP != 0 && cpu.fpu.mxcsr & mxcsr::MASKS != mxcsr::MASKS {
        // SAFETY: the caller's promise.
        return unsafe { unmasked(cpu, stub, mem) };
    }
    // SAFETY: the caller's promise.
    unsafe { stub(cpu, mem) };
    Ok(())
}

/// Run an instruction whose exceptions are not all masked: with the masks set, and as if it had
/// not run when it turns out to have raised one.
///
/// Two things are not the hardware's.  Beside an overflow or underflow that is not masked, PE
/// tells whether the masked result would have been inexact, not the one with a wider exponent.
/// And a dot product shows the flags of all its steps, not those up to the first that failed.
///
/// # Safety
/// As [`Stub`]; an operand that is written is not guest memory.
#[cold]
#[inline(never)]
unsafe fn unmasked(cpu: &mut Cpu, stub: Stub, mem: *mut u8) -> Result<(), Stop> {
    let guest = cpu.fpu.mxcsr;
    let (r, ymm, fpu, flags) = (cpu.r, cpu.ymm, cpu.fpu, cpu.fl);
    let undo = |cpu: &mut Cpu| {
        (cpu.r, cpu.ymm, cpu.fpu, cpu.fl) = (r, ymm, fpu, flags);
    };
    let exec = |cpu: &mut Cpu, control: u32| {
        cpu.fpu.mxcsr = control;
        // SAFETY: the caller's promise.
        unsafe { stub(cpu, mem) };
        cpu.fpu.mxcsr & mxcsr::FLAGS
    };
    let unmasked = !(guest >> mxcsr::MASK_SHIFT) & mxcsr::FLAGS;
    let mut control = guest & !mxcsr::FLAGS | mxcsr::MASKS;
    let mut raised = 0;
    if unmasked & mxcsr::UE != 0 {
        // Unmasked, underflow means tiny, not tiny and inexact, and FZ has no effect.
        // With the mask set, it is flushing to zero that tells of every tiny result.
        raised = exec(cpu, control | mxcsr::FZ) & mxcsr::UE;
        undo(cpu);
        control &= !mxcsr::FZ;
    }
    raised |= exec(cpu, control);
    let early = raised & (mxcsr::IE | mxcsr::DE | mxcsr::ZE);
    if early & unmasked != 0 {
        // Nothing was computed, so nothing is known about results (SDM 1, 11.5.3).
        raised = early;
    }
    if raised & unmasked != 0 {
        undo(cpu);
        cpu.fpu.mxcsr = guest | raised;
        let vector = if cpu.cr4 & cr4::OSXMMEXCPT != 0 { vec::XM } else { vec::UD };
        return Err(cpu.raise(vector, None));
    }
    cpu.fpu.mxcsr = guest | raised;
    Ok(())
}

/// Linear address of the op's operand, alignment checked.
#[inline(always)]
fn address(cpu: &mut Cpu, op: &Op, write: bool) -> Result<u64, Stop> {
    let misaligned = |lin: u64| lin & u64::from(op.dst) != 0;
    // Alignment comes before limits.
    if op.flags & F_CHECK != 0 && misaligned(cpu.seg[usize::from(op.seg)].base + cpu.ea(op)) {
        return Err(cpu.gp(0));
    }
    let lin = cpu.lin(op, u64::from(op.aux), write)?;
    if misaligned(lin) {
        return Err(cpu.gp(0));
    }
    Ok(lin)
}

#[inline(always)]
pub fn in_page(lin: u64, size: u64) -> bool {
    lin & (PAGE - 1) <= PAGE - size
}

/// Host address of the op's operand, to be read.
#[inline(always)]
fn source(cpu: &mut Cpu, op: &Op) -> Result<*mut u8, Stop> {
    let lin = address(cpu, op, false)?;
    readable(cpu, lin, u64::from(op.aux))
}

/// Host address of `size` bytes to be read: the guest's, or that of a copy.
#[inline(always)]
pub fn readable(cpu: &mut Cpu, lin: u64, size: u64) -> Result<*mut u8, Stop> {
    match cpu.direct(lin, size, false) {
        Some(p) => Ok(p),
        None => readable_slow(cpu, lin, size),
    }
}

#[cold]
#[inline(never)]
fn readable_slow(cpu: &mut Cpu, lin: u64, size: u64) -> Result<*mut u8, Stop> {
    if in_page(lin, size)
        && let Some(p) = cpu.span(lin, false)?
    {
        return Ok(p);
    }
    let mut b = [0; 64];
    cpu.read_lin(lin, &mut b[..size as usize], Right::Current)?;
    cpu.native.bounce.0 = b;
    Ok(cpu.native.bounce.0.as_mut_ptr())
}

/// Host address of `size` bytes to be written; None: they have no single one.
#[inline(always)]
pub fn writable(cpu: &mut Cpu, lin: u64, size: u64) -> Result<Option<*mut u8>, Stop> {
    match cpu.direct(lin, size, true) {
        Some(p) => Ok(Some(p)),
        None if in_page(lin, size) => cpu.span(lin, true),
        None => Ok(None),
    }
}

/// An instruction without a memory operand.
unsafe fn on_registers<const K: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, check::<K>(cpu));
    enter_mmx::<K>(cpu);
    // SAFETY: the stub does not use its operand.
    tri!(cpu, op, unsafe { run::<K>(cpu, o, ptr::null_mut()) });
    next!(cpu, op)
}

/// An instruction that reads memory.
unsafe fn from_memory<const K: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, check::<K>(cpu));
    let p = tri!(cpu, op, source(cpu, o));
    enter_mmx::<K>(cpu);
    // SAFETY: `p` is good for the operand's size.
    tri!(cpu, op, unsafe { run::<K>(cpu, o, p) });
    next!(cpu, op)
}

/// An instruction that writes memory.
unsafe fn to_memory<const K: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, check::<K>(cpu));
    let lin = tri!(cpu, op, address(cpu, o, true));
    if K & Class::FP == 0
        && let Some(p) = tri!(cpu, op, writable(cpu, lin, u64::from(o.aux)))
    {
        enter_mmx::<K>(cpu);
        // SAFETY: `p` is good for the operand's size.
        tri!(cpu, op, unsafe { run::<K>(cpu, o, p) });
    } else {
        // SAFETY: `o` is an op that writes memory.
        tri!(cpu, op, unsafe { to_bounce::<K>(cpu, o, lin) });
    }
    next!(cpu, op)
}

/// # Safety
/// `op` is one that writes memory.
#[cold]
#[inline(never)]
unsafe fn to_bounce<const K: u8>(cpu: &mut Cpu, op: &Op, lin: u64) -> Result<(), Stop> {
    let size = usize::from(op.aux);
    cpu.probe_write(lin, size as u64, Right::Current)?;
    enter_mmx::<K>(cpu);
    let p = cpu.native.bounce.0.as_mut_ptr();
    // SAFETY: the bounce buffer is larger than any operand.
    unsafe { run::<K>(cpu, op, p)? };
    let b = cpu.native.bounce.0;
    cpu.write_lin(lin, &b[..size], Right::Current)
}

/// Whether an instruction obeys MXCSR or sets its flags.
fn uses_mxcsr(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Addpd
            | Addps
            | Addsd
            | Addss
            | Addsubpd
            | Addsubps
            | Cmppd
            | Cmpps
            | Cmpsd
            | Cmpss
            | Comisd
            | Comiss
            | Cvtdq2ps
            | Cvtpd2dq
            | Cvtpd2pi
            | Cvtpd2ps
            | Cvtpi2ps
            | Cvtps2dq
            | Cvtps2pd
            | Cvtps2pi
            | Cvtsd2si
            | Cvtsd2ss
            | Cvtsi2sd
            | Cvtsi2ss
            | Cvtss2sd
            | Cvtss2si
            | Cvttpd2dq
            | Cvttpd2pi
            | Cvttps2dq
            | Cvttps2pi
            | Cvttsd2si
            | Cvttss2si
            | Divpd
            | Divps
            | Divsd
            | Divss
            | Dppd
            | Dpps
            | Haddpd
            | Haddps
            | Hsubpd
            | Hsubps
            | Maxpd
            | Maxps
            | Maxsd
            | Maxss
            | Minpd
            | Minps
            | Minsd
            | Minss
            | Mulpd
            | Mulps
            | Mulsd
            | Mulss
            | Roundpd
            | Roundps
            | Roundsd
            | Roundss
            | Sqrtpd
            | Sqrtps
            | Sqrtsd
            | Sqrtss
            | Subpd
            | Subps
            | Subsd
            | Subss
            | Ucomisd
            | Ucomiss
            | Vaddpd
            | Vaddps
            | Vaddsd
            | Vaddss
            | Vaddsubpd
            | Vaddsubps
            | Vcmppd
            | Vcmpps
            | Vcmpsd
            | Vcmpss
            | Vcomisd
            | Vcomiss
            | Vcvtdq2ps
            | Vcvtpd2dq
            | Vcvtpd2ps
            | Vcvtph2ps
            | Vcvtps2dq
            | Vcvtps2pd
            | Vcvtps2ph
            | Vcvtsd2si
            | Vcvtsd2ss
            | Vcvtsi2sd
            | Vcvtsi2ss
            | Vcvtss2sd
            | Vcvtss2si
            | Vcvttpd2dq
            | Vcvttps2dq
            | Vcvttsd2si
            | Vcvttss2si
            | Vdivpd
            | Vdivps
            | Vdivsd
            | Vdivss
            | Vdppd
            | Vdpps
            | Vhaddpd
            | Vhaddps
            | Vhsubpd
            | Vhsubps
            | Vmaxpd
            | Vmaxps
            | Vmaxsd
            | Vmaxss
            | Vminpd
            | Vminps
            | Vminsd
            | Vminss
            | Vmulpd
            | Vmulps
            | Vmulsd
            | Vmulss
            | Vroundpd
            | Vroundps
            | Vroundsd
            | Vroundss
            | Vsqrtpd
            | Vsqrtps
            | Vsqrtsd
            | Vsqrtss
            | Vsubpd
            | Vsubps
            | Vsubsd
            | Vsubss
            | Vucomisd
            | Vucomiss
            | Vfmadd132pd
            | Vfmadd132ps
            | Vfmadd132sd
            | Vfmadd132ss
            | Vfmadd213pd
            | Vfmadd213ps
            | Vfmadd213sd
            | Vfmadd213ss
            | Vfmadd231pd
            | Vfmadd231ps
            | Vfmadd231sd
            | Vfmadd231ss
            | Vfmaddsub132pd
            | Vfmaddsub132ps
            | Vfmaddsub213pd
            | Vfmaddsub213ps
            | Vfmaddsub231pd
            | Vfmaddsub231ps
            | Vfmsub132pd
            | Vfmsub132ps
            | Vfmsub132sd
            | Vfmsub132ss
            | Vfmsub213pd
            | Vfmsub213ps
            | Vfmsub213sd
            | Vfmsub213ss
            | Vfmsub231pd
            | Vfmsub231ps
            | Vfmsub231sd
            | Vfmsub231ss
            | Vfmsubadd132pd
            | Vfmsubadd132ps
            | Vfmsubadd213pd
            | Vfmsubadd213ps
            | Vfmsubadd231pd
            | Vfmsubadd231ps
            | Vfnmadd132pd
            | Vfnmadd132ps
            | Vfnmadd132sd
            | Vfnmadd132ss
            | Vfnmadd213pd
            | Vfnmadd213ps
            | Vfnmadd213sd
            | Vfnmadd213ss
            | Vfnmadd231pd
            | Vfnmadd231ps
            | Vfnmadd231sd
            | Vfnmadd231ss
            | Vfnmsub132pd
            | Vfnmsub132ps
            | Vfnmsub132sd
            | Vfnmsub132ss
            | Vfnmsub213pd
            | Vfnmsub213ps
            | Vfnmsub213sd
            | Vfnmsub213ss
            | Vfnmsub231pd
            | Vfnmsub231ps
            | Vfnmsub231sd
            | Vfnmsub231ss
    )
}

/// Whether a memory operand must be aligned to its size (SDM 1, 14.9).
pub fn wants_aligned(insn: &Instruction, class: Class, size: usize) -> bool {
    use Mnemonic::*;
    if class.vex() {
        return matches!(
            insn.mnemonic(),
            Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa
        );
    }
    let sha = matches!(
        insn.mnemonic(),
        Sha1msg1 | Sha1msg2 | Sha1nexte | Sha1rnds4 | Sha256msg1 | Sha256msg2 | Sha256rnds2
    );
    if sha && crate::soft::cpuid::amd() {
        // As its processors do, whatever the manual says.
        return false;
    }
    let any = matches!(
        insn.mnemonic(),
        Movups
            | Movupd
            | Movdqu
            | Lddqu
            | Pcmpestri
            | Pcmpestri64
            | Pcmpestrm
            | Pcmpestrm64
            | Pcmpistri
            | Pcmpistrm
    );
    size == 16 && !any
}

/// Instructions of covered families that are not data: fences, hints, and what needs more than a
/// memory operand.
pub fn excluded(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Lfence | Mfence | Sfence | Pause | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2
    )
}

pub fn class(insn: &Instruction) -> Class {
    let operand = |f: fn(Register) -> bool| {
        (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && f(insn.op_register(n)))
    };
    let vector = operand(Register::is_vector_register);
    let fp = uses_mxcsr(insn.mnemonic());
    let mut k = 0;
    if insn.encoding() == EncodingKind::VEX {
        k |= Class::VEX;
        let bmi = |f: &CpuidFeature| matches!(f, CpuidFeature::BMI1 | CpuidFeature::BMI2);
        if !insn.cpuid_features().iter().any(bmi) {
            k |= Class::AVX;
        }
    } else if vector || fp {
        k |= Class::SSE;
    }
    if operand(Register::is_mm) {
        k |= Class::MMX;
    }
    if fp {
        k |= Class::FP;
    }
    Class(k)
}

/// The instance of a generic handler for a class.
macro_rules! classed {
    ($k:expr, $f:ident) => {{
        const SSE: u8 = Class::SSE;
        const SSE_FP: u8 = Class::SSE | Class::FP;
        const AVX: u8 = Class::AVX | Class::VEX;
        const AVX_FP: u8 = Class::AVX | Class::VEX | Class::FP;
        const MMX: u8 = Class::MMX;
        const MMX_SSE: u8 = Class::MMX | Class::SSE;
        const MMX_FP: u8 = Class::MMX | Class::SSE | Class::FP;
        const VEX: u8 = Class::VEX;
        match $k.0 {
            0 => $f::<0> as Handler,
            SSE => $f::<SSE>,
            SSE_FP => $f::<SSE_FP>,
            AVX => $f::<AVX>,
            AVX_FP => $f::<AVX_FP>,
            MMX => $f::<MMX>,
            MMX_SSE => $f::<MMX_SSE>,
            MMX_FP => $f::<MMX_FP>,
            VEX => $f::<VEX>,
            k => unreachable!("class {k:#x}"),
        }
    }};
}
pub(super) use classed;

/// What an op of this module is: its class, and the mask of its operand's alignment.  None: it is
/// none, or it uses MMX registers or MXCSR.
pub fn examine(op: &Op, insn: &Instruction) -> Option<(Class, u8)> {
    let class = class(insn);
    if class.mmx() || class.mxcsr() || class.x87() {
        return None;
    }
    let f = op.f.get();
    let memory = insn.op_kinds().any(|k| k == OpKind::Memory);
    let ours = if memory {
        ptr::fn_addr_eq(f, classed!(class, from_memory))
            || ptr::fn_addr_eq(f, classed!(class, to_memory))
    } else {
        ptr::fn_addr_eq(f, classed!(class, on_registers))
    };
    ours.then_some((class, if memory { op.dst } else { 0 }))
}

pub fn lower(l: &mut Lower, native: &mut Native) -> Option<Handler> {
    let insn = l.insn;
    let size = insn.memory_size().size();
    let simple = insn.op_kinds().all(|k| match k {
        OpKind::Register | OpKind::Immediate8 => true,
        OpKind::Memory => (1..=32).contains(&size),
        _ => false,
    });
    if !insn.cpuid_features().iter().all(|&f| covered(f))
        || excluded(insn.mnemonic())
        || !simple
        || insn.is_vsib()
    {
        return None;
    }
    let class = class(&insn);
    l.op.imm = native.stub(&insn, class) as usize as u64;
    let Some(n) = (0..insn.op_count()).find(|&n| insn.op_kind(n) == OpKind::Memory) else {
        return Some(classed!(class, on_registers));
    };
    l.mem();
    l.op.aux = size as u8;
    l.op.dst = if wants_aligned(&insn, class, size) { size as u8 - 1 } else { 0 };
    let access = native.info.info(&insn).op_access(n);
    Some(if access == OpAccess::Write {
        classed!(class, to_memory)
    } else {
        classed!(class, from_memory)
    })
}
