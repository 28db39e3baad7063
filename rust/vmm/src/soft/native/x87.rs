//! x87 instructions.
//!
//! Computations run on the host's x87 unit with the guest's whole state loaded, so that the result,
//! the condition codes, and what is stored when an exception is not masked are the hardware's.
//! An exception that an instruction raises stays pending in the guest's status word: the host never
//! sees it, because its unit is cleared before the next instruction that would report it.
//!
//! That costs a hundred nanoseconds.  The common instructions have another way, for when no
//! exception is unmasked and no register that they want is empty or full: only their operands go
//! to the host's stack, and the guest's is turned here (`planned`).
//!
//! Instructions that only move control state work on [`Cpu::fpu`].
//!
//! The last instruction's address, operand and opcode (FIP, FDP, FOP) are kept for every
//! instruction, as processors do that always store error pointers with FXSAVE.  Their selectors
//! are not: they read as 0, as on processors that have done away with FCS and FDS.  In real mode
//! and v8086 mode the addresses are linear.

use super::simd::{FSW_ES, FSW_TOP, readable, writable};
use super::stub::{Stub, X87Plan};
use super::{Class, Native};
use crate::exit::Exit;
use crate::platform::Platform;
use crate::soft::Cpu;
use crate::soft::decode::Lower;
use crate::soft::mmu::Right;
use crate::soft::op::*;
use crate::soft::state::*;
use iced_x86::{
    Code, Encoder, EncodingKind, Instruction, Mnemonic, OpAccess, OpCodeTableKind, OpKind, Register,
};
use std::ptr;

/// Interrupt line that FERR# is wired to in a PC.
const FERR_IRQ: u8 = 13;

/// Exception flags of FSW; their masks in FCW.
const EXCEPTIONS: u16 = 0x3F;
const PE: u16 = 1 << 5;
const FSW_B: u16 = 1 << 15;
/// FSW: one in the field TOP.
const FSW_TOP_ONE: u16 = 1 << 11;
/// FSW: what FNCLEX clears.
const FSW_CLEARED: u16 = 0x80FF;
/// FCW after FNINIT.
const FCW_INIT: u16 = 0x37F;
/// FCW: bits 6, which is always 1, and those that do not exist.
const FCW_ONE: u16 = 1 << 6;
const FCW_NONE: u16 = 0xE080;

impl Fpu {
    fn top(&self) -> u16 {
        (self.fsw & FSW_TOP) >> 11
    }

    /// Set the status word; what follows from it, or from FCW, is derived.
    pub fn set_fsw(&mut self, fsw: u16) {
        let old = self.top();
        self.fsw = fsw;
        // The registers stay, their numbers change.
        let turn = (self.top() + 8 - old) % 8;
        self.st.rotate_left(usize::from(turn));
        self.summarise();
    }

    /// Set the control word.
    pub fn set_fcw(&mut self, fcw: u16) {
        self.fcw = fcw & !FCW_NONE | FCW_ONE;
        self.summarise();
    }

    /// ES and B say whether an exception is pending.
    fn summarise(&mut self) {
        self.fsw &= !(FSW_ES | FSW_B);
        if self.fsw & !self.fcw & EXCEPTIONS != 0 {
            self.fsw |= FSW_ES | FSW_B;
        }
    }

    /// FNINIT.
    pub fn init(&mut self) {
        self.set_fsw(0);
        self.fcw = FCW_INIT;
        self.ftw = 0;
        (self.fop, self.fip, self.fdp) = (0, 0, 0);
    }

    /// Two bits for each physical register: valid, zero, special, empty.
    fn full_tags(&self) -> u16 {
        let mut tags = 0;
        for i in 0..8 {
            let [mantissa, high] = self.st[usize::from((i + 8 - self.top()) % 8)];
            let tag = if self.ftw >> i & 1 == 0 {
                3
            } else {
                match (high as u16 & 0x7FFF, mantissa) {
                    (0, 0) => 1,
                    (0 | 0x7FFF, _) => 2,
                    (_, m) if m >> 63 == 0 => 2,
                    _ => 0,
                }
            };
            tags |= tag << (2 * i);
        }
        tags
    }

    fn set_full_tags(&mut self, tags: u16) {
        self.ftw = (0..8).map(|i| u8::from(tags >> (2 * i) & 3 != 3) << i).sum();
    }
}

/// What a waiting instruction does first: report the exception that an earlier one left pending.
pub fn pending(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.fpu.fsw & FSW_ES == 0 {
        return Ok(());
    }
    if cpu.cr0 & cr0::NE != 0 {
        return Err(cpu.raise(vec::MF, None));
    }
    // MS-DOS compatible reporting: the processor waits for the interrupt.
    cpu.vm().isa_pulse(Some(FERR_IRQ), Some(FERR_IRQ));
    Err(cpu.leave(Exit::Bogus))
}

#[inline(always)]
fn available(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(cpu.raise(vec::NM, None));
    }
    Ok(())
}

/// Opcodes D8 to DF.
fn escape(insn: &Instruction) -> bool {
    let code = insn.op_code();
    let opcode = if code.op_code_len() == 2 { code.op_code() >> 8 } else { code.op_code() };
    code.encoding() == EncodingKind::Legacy
        && code.table() == OpCodeTableKind::Normal
        && (0xD8..=0xDF).contains(&opcode)
}

pub fn lower(l: &mut Lower, native: &mut Native) -> Option<Handler> {
    let insn = l.insn;
    if insn.code() != Code::Wait && !escape(&insn) {
        return None;
    }
    let memory = (0..insn.op_count()).find(|&n| insn.op_kind(n) == OpKind::Memory);
    if memory.is_some() {
        l.mem();
        l.op.aux = insn.memory_size().size() as u8;
    }
    Some(match insn.code() {
        Code::Wait => wait,
        Code::Fnop => nop,
        // Of coprocessors before the 387; they do nothing.
        Code::Fneni | Code::Fndisi | Code::Fnsetpm => control::<NOTHING>,
        Code::Fninit => control::<INIT>,
        Code::Fnclex => control::<CLEAR>,
        Code::Fnstsw_AX => control::<STATUS_TO_AX>,
        Code::Fnstsw_m2byte => store_word::<true>,
        Code::Fnstcw_m2byte => store_word::<false>,
        Code::Fldcw_m2byte => fldcw,
        Code::Fnstenv_m14byte => store_environment::<2, false>,
        Code::Fnstenv_m28byte => store_environment::<4, false>,
        Code::Fnsave_m94byte => store_environment::<2, true>,
        Code::Fnsave_m108byte => store_environment::<4, true>,
        Code::Fldenv_m14byte => load_environment::<2, false>,
        Code::Fldenv_m28byte => load_environment::<4, false>,
        Code::Frstor_m94byte => load_environment::<2, true>,
        Code::Frstor_m108byte => load_environment::<4, true>,
        _ => {
            let planned = plan(&insn).map(|(stub, effect)| {
                let stub = native.x87_stub(&insn, &stub);
                Planned { stub, effect }
            });
            let whole = native.stub(&insn, Class(Class::X87));
            l.keep(Computation { whole, planned, fop: opcode(&insn, l.bits) });
            match memory.map(|n| native.info.info(&insn).op_access(n)) {
                None => on_stack,
                Some(OpAccess::Read) => from_memory,
                Some(_) => to_memory,
            }
        }
    })
}

/// FOP: the low bits of the first opcode byte, and the ModRM byte.
fn opcode(insn: &Instruction, bits: u32) -> u16 {
    let mut e = Encoder::new(bits);
    e.encode(insn, insn.ip()).expect("a decoded instruction can be encoded");
    let bytes = e.take_buffer();
    let at = bytes.iter().position(|b| b & 0xF8 == 0xD8).expect("an x87 instruction");
    u16::from(bytes[at] & 7) << 8 | u16::from(bytes[at + 1])
}

// -- computations ------------------------------------------------------------------------------

/// What `op.imm` points to.
struct Computation {
    /// Wants and leaves the whole state in `Native::image`.
    whole: Stub,
    planned: Option<Planned>,
    fop: u16,
}

/// The way of an instruction that finds its operands in place.
struct Planned {
    stub: Stub,
    effect: Effect,
}

#[derive(Clone, Copy)]
struct Effect {
    /// Bit i: ST(i) must not be empty.
    full: u8,
    /// ST(7) must be empty, and becomes the new ST(0).
    push: bool,
    pops: u8,
    /// Condition codes of FSW that it sets.
    conditions: u16,
}

/// Condition codes.
const C0: u16 = 1 << 8;
const C1: u16 = 1 << 9;
const C2: u16 = 1 << 10;
const C3: u16 = 1 << 14;

/// How to run an instruction on its operands alone; None: not one of the common ones.
fn plan(insn: &Instruction) -> Option<(X87Plan, Effect)> {
    use Mnemonic::*;
    let register = (0..insn.op_count())
        .filter(|&n| insn.op_kind(n) == OpKind::Register)
        .map(|n| insn.op_register(n).number() as u8);
    let other = register.clone().find(|&i| i != 0);
    let registers = register.count();
    let to_other = registers == 2 && insn.op0_register() != Register::ST0;
    // The host's stack as the instruction leaves it.
    let mut results: Vec<Option<u8>> = Vec::new();
    let (mut top, mut push, mut pops, mut conditions) = (true, false, 0, C1);
    let mut other = other;
    let mut moved = false;
    let mut full = 0;
    match insn.mnemonic() {
        Fld | Fild | Fld1 | Fldz | Fldpi | Fldl2e | Fldl2t | Fldlg2 | Fldln2 => {
            moved = registers == 1;
            // FLD ST(0) too takes its operand from where `other` says.
            other = moved.then(|| other.unwrap_or(0));
            top = false;
            push = true;
            results.push(Some(7));
        }
        Fst | Fstp if registers == 1 => {
            moved = true;
            let to = other.take().unwrap_or(0);
            results.push(Some(to));
            // Its tag need not change then.
            full = 1 << to;
            pops = u8::from(insn.mnemonic() == Fstp);
        }
        Fst | Fist => results.push(None),
        Fstp | Fistp | Fisttp => pops = 1,
        Fxch => {
            moved = true;
            results.extend([other, Some(0)]);
            other?;
        }
        Fadd | Fsub | Fsubr | Fmul | Fdiv | Fdivr if to_other => results.extend([None, other]),
        Fadd | Fsub | Fsubr | Fmul | Fdiv | Fdivr | Fiadd | Fisub | Fisubr | Fimul | Fidiv
        | Fidivr => {
            results.push(Some(0));
            results.extend(other.map(|_| None));
        }
        Fcmovb | Fcmovbe | Fcmove | Fcmovnb | Fcmovnbe | Fcmovne | Fcmovnu | Fcmovu => {
            results.push(Some(0));
            results.extend(other.map(|_| None));
            // As on AMD's processors; Intel's clear C1.  The same for FCOMI.
            conditions = 0;
        }
        Faddp | Fsubp | Fsubrp | Fmulp | Fdivp | Fdivrp => {
            results.push(other);
            other?;
            pops = 1;
        }
        Fabs | Fchs | Fsqrt | Frndint => results.push(Some(0)),
        Fcomi | Fucomi => {
            results.push(None);
            results.extend(other.map(|_| None));
            conditions = 0;
        }
        Fcomip | Fucomip => {
            results.extend(other.map(|_| None));
            pops = 1;
            conditions = 0;
        }
        Fcom | Fucom | Ficom | Ftst | Fxam => {
            results.push(None);
            results.extend(other.map(|_| None));
            conditions = C0 | C1 | C2 | C3;
        }
        Fcomp | Fucomp | Ficomp => {
            results.extend(other.map(|_| None));
            pops = 1;
            conditions = C0 | C1 | C2 | C3;
        }
        Fcompp | Fucompp => {
            other = Some(1);
            pops = 2;
            conditions = C0 | C1 | C2 | C3;
        }
        _ => return None,
    }
    full |= other.map_or(0, |i| 1 << i) | u8::from(top);
    let insn = (!moved).then_some(*insn);
    Some((X87Plan { other, top, insn, results }, Effect { full, push, pops, conditions }))
}

impl Planned {
    fn possible(&self, f: &Fpu) -> bool {
        // Bit i: ST(i) is not empty.
        let full = f.ftw.rotate_right(f.top().into());
        let e = &self.effect;
        f.fcw & EXCEPTIONS == EXCEPTIONS
            && full & e.full == e.full
            && !(e.push && full & 1 << 7 != 0)
    }
}

/// Run the op's instruction.
///
/// # Safety
/// As [`Stub`].
#[inline(always)]
unsafe fn run(cpu: &mut Cpu, op: &Op, mem: *mut u8) {
    // SAFETY: `lower` kept a `Computation`, and its stubs live as long as the op.
    let c = unsafe { &*(op.imm as *const Computation) };
    match &c.planned {
        // SAFETY: the caller's promise.
        Some(p) if p.possible(&cpu.fpu) => unsafe { run_planned(cpu, p, mem) },
        // SAFETY: the caller's promise.
        _ => unsafe { run_whole(cpu, c.whole, mem) },
    }
    cpu.fpu.fop = c.fop;
    cpu.fpu.fip = op.rip(cpu) & cpu.rip_mask();
    if op.aux != 0 {
        cpu.fpu.fdp = cpu.ea(op);
    }
    if !cpu.protected() {
        cpu.fpu.fip += cpu.seg[CS as usize].base;
        if op.aux != 0 {
            cpu.fpu.fdp += cpu.seg[usize::from(op.seg)].base;
        }
    }
}

/// # Safety
/// As [`Stub`]; `p` is possible.
#[inline(always)]
unsafe fn run_planned(cpu: &mut Cpu, p: &Planned, mem: *mut u8) {
    if cpu.native.x87_status & EXCEPTIONS & !cpu.fpu.fsw != 0 {
        // The guest has cleared flags that the host's unit still has.
        cpu.native.enter();
    }
    // SAFETY: the caller's promise.
    unsafe { (p.stub)(cpu, mem) };
    let (f, e) = (&mut cpu.fpu, &p.effect);
    // The host's flags are the guest's, or fewer.
    f.fsw = f.fsw & !e.conditions | cpu.native.x87_status & (e.conditions | EXCEPTIONS);
    if e.push {
        f.st.rotate_right(1);
        f.fsw = f.fsw & !FSW_TOP | f.fsw.wrapping_sub(FSW_TOP_ONE) & FSW_TOP;
        f.ftw |= 1 << f.top();
    }
    if e.pops != 0 {
        f.st.rotate_left(e.pops.into());
        for _ in 0..e.pops {
            f.ftw &= !(1 << f.top());
            f.fsw = f.fsw & !FSW_TOP | f.fsw.wrapping_add(FSW_TOP_ONE) & FSW_TOP;
        }
    }
}

/// # Safety
/// As [`Stub`].
#[cold]
#[inline(never)]
unsafe fn run_whole(cpu: &mut Cpu, stub: Stub, mem: *mut u8) {
    let guest_mxcsr = cpu.fpu.mxcsr;
    cpu.native.image.fpu = cpu.fpu;
    cpu.native.image.fpu.mxcsr = cpu.native.host_mxcsr;
    // SAFETY: the caller's promise.
    unsafe { stub(cpu, mem) };
    cpu.native.x87_status = 0;
    cpu.fpu = cpu.native.image.fpu;
    cpu.fpu.mxcsr = guest_mxcsr;
}

fn start(cpu: &mut Cpu) -> Result<(), Stop> {
    available(cpu)?;
    pending(cpu)
}

unsafe fn on_stack(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, start(cpu));
    // SAFETY: the stub does not use its operand.
    unsafe { run(cpu, o, ptr::null_mut()) };
    next!(cpu, op)
}

unsafe fn from_memory(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, start(cpu));
    let size = u64::from(o.aux);
    let lin = tri!(cpu, op, cpu.lin(o, size, false));
    let p = tri!(cpu, op, readable(cpu, lin, size));
    // SAFETY: `p` is good for the operand's size.
    unsafe { run(cpu, o, p) };
    next!(cpu, op)
}

unsafe fn to_memory(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, start(cpu));
    let size = u64::from(o.aux);
    let lin = tri!(cpu, op, cpu.lin(o, size, true));
    if let Some(p) = tri!(cpu, op, writable(cpu, lin, size)) {
        // SAFETY: `p` is good for the operand's size.
        unsafe { run(cpu, o, p) };
        next!(cpu, op)
    }
    tri!(cpu, op, to_bounce(cpu, o, lin));
    next!(cpu, op)
}

#[cold]
#[inline(never)]
fn to_bounce(cpu: &mut Cpu, op: &Op, lin: u64) -> Result<(), Stop> {
    let size = usize::from(op.aux);
    cpu.probe_write(lin, size as u64, Right::Current)?;
    let before = cpu.fpu;
    let p = cpu.native.bounce.0.as_mut_ptr();
    // SAFETY: the bounce buffer is larger than any operand.
    unsafe { run(cpu, op, p) };
    // Nothing is stored when an exception other than inexactness is not masked.
    if cpu.fpu.fsw & !cpu.fpu.fcw & (EXCEPTIONS & !PE) == 0 {
        let b = cpu.native.bounce.0;
        // A device may send us out to userland, to come back and start again.
        cpu.write_lin(lin, &b[..size], Right::Current).inspect_err(|_| cpu.fpu = before)?;
    }
    Ok(())
}

// -- control -----------------------------------------------------------------------------------

unsafe fn wait(cpu: &mut Cpu, op: *const Op) -> Flow {
    let nm = cr0::MP | cr0::TS;
    if cpu.cr0 & nm == nm {
        let stop = cpu.raise(vec::NM, None);
        return cpu.stop_at(op, stop);
    }
    tri!(cpu, op, pending(cpu));
    next!(cpu, op)
}

unsafe fn nop(cpu: &mut Cpu, op: *const Op) -> Flow {
    tri!(cpu, op, start(cpu));
    next!(cpu, op)
}

const NOTHING: u8 = 0;
const INIT: u8 = 1;
const CLEAR: u8 = 2;
const STATUS_TO_AX: u8 = 3;

unsafe fn control<const WHAT: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    tri!(cpu, op, available(cpu));
    match WHAT {
        INIT => cpu.fpu.init(),
        CLEAR => cpu.fpu.fsw &= !FSW_CLEARED,
        STATUS_TO_AX => cpu.r[0] = cpu.r[0] & !0xFFFF | u64::from(cpu.fpu.fsw),
        _ => {}
    }
    next!(cpu, op)
}

unsafe fn store_word<const STATUS: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, available(cpu));
    let lin = tri!(cpu, op, cpu.lin(o, 2, true));
    tri!(cpu, op, cpu.st(lin, if STATUS { cpu.fpu.fsw } else { cpu.fpu.fcw }));
    next!(cpu, op)
}

unsafe fn fldcw(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, start(cpu));
    let lin = tri!(cpu, op, cpu.lin(o, 2, false));
    let fcw = tri!(cpu, op, cpu.ld::<u16>(lin));
    cpu.fpu.set_fcw(fcw);
    next!(cpu, op)
}

/// The longest image: environment and registers, 32-bit format.
const MAX_IMAGE: usize = 108;

/// Length of an environment in words of `W` bytes (SDM 1, 8.1.10).
const fn environment(w: usize) -> usize {
    7 * w
}

/// FNSTENV and FNSAVE.
unsafe fn store_environment<const W: usize, const REGS: bool>(
    cpu: &mut Cpu,
    op: *const Op,
) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, available(cpu));
    let size = environment(W) + if REGS { 80 } else { 0 };
    let lin = tri!(cpu, op, cpu.lin(o, size as u64, true));
    let f = &cpu.fpu;
    let (fip, fdp, fop) = (f.fip as u32, f.fdp as u32, u32::from(f.fop));
    // Upper halves that mean nothing are ones.
    let word = |w: u16| 0xFFFF_0000 | u32::from(w);
    let [fip_high, fdp_high, last] = match (cpu.protected(), W) {
        (true, 4) => [fop << 16, fdp, 0xFFFF_0000],
        (false, 4) => [fip >> 16 << 12 | fop, word(fdp as u16), fdp >> 16 << 12],
        (true, _) => [0, fdp, 0],
        (false, _) => [(fip >> 16 << 12) | fop, fdp, fdp >> 16 << 12],
    };
    let fip = if W == 4 && !cpu.protected() { word(fip as u16) } else { fip };
    let words = [word(f.fcw), word(f.fsw), word(f.full_tags()), fip, fip_high, fdp_high, last];
    let mut image = [0; MAX_IMAGE];
    for (to, w) in image.chunks_exact_mut(W).zip(words) {
        to.copy_from_slice(&w.to_le_bytes()[..W]);
    }
    for (to, st) in image[environment(W)..].chunks_exact_mut(10).zip(&f.st) {
        to[..8].copy_from_slice(&st[0].to_le_bytes());
        to[8..].copy_from_slice(&st[1].to_le_bytes()[..2]);
    }
    tri!(cpu, op, cpu.write_lin(lin, &image[..size], Right::Current));
    if REGS {
        cpu.fpu.init();
    } else {
        cpu.fpu.set_fcw(cpu.fpu.fcw | EXCEPTIONS);
    }
    next!(cpu, op)
}

/// FLDENV and FRSTOR.
unsafe fn load_environment<const W: usize, const REGS: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler.
    let o = unsafe { &*op };
    tri!(cpu, op, start(cpu));
    let size = environment(W) + if REGS { 80 } else { 0 };
    let lin = tri!(cpu, op, cpu.lin(o, size as u64, false));
    let mut image = [0; MAX_IMAGE];
    tri!(cpu, op, cpu.read_lin(lin, &mut image[..size], Right::Current));
    let words: [u32; 7] = std::array::from_fn(|i| {
        let mut b = [0; 4];
        b[..W].copy_from_slice(&image[W * i..W * (i + 1)]);
        u32::from_le_bytes(b)
    });
    let [fcw, fsw, tags, ip, ip_high, dp, dp_high] = words;
    let low = |w: u32| w & 0xFFFF;
    let (fip, fdp, fop) = match (cpu.protected(), W) {
        (true, 4) => (ip, dp, ip_high >> 16),
        (true, _) => (ip, dp, u32::from(cpu.fpu.fop)),
        (false, 4) => (low(ip) | (ip_high >> 12) << 16, low(dp) | (dp_high >> 12) << 16, ip_high),
        (false, _) => (ip | ip_high >> 12 << 16, dp | dp_high >> 12 << 16, ip_high),
    };
    let f = &mut cpu.fpu;
    f.set_fsw(fsw as u16);
    f.set_fcw(fcw as u16);
    f.set_full_tags(tags as u16);
    (f.fip, f.fdp, f.fop) = (u64::from(fip), u64::from(fdp), fop as u16 & 0x7FF);
    if REGS {
        for (from, st) in image[environment(W)..].chunks_exact(10).zip(&mut f.st) {
            let (mantissa, high) = from.split_at(8);
            *st = [
                u64::from_le_bytes(mantissa.try_into().expect("8 bytes")),
                u64::from(u16::from_le_bytes(high.try_into().expect("2 bytes"))),
            ];
        }
    }
    next!(cpu, op)
}
