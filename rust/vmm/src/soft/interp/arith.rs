//! Two- and one-operand arithmetic, shifts, bit tests, multiplication and division.

use super::host::*;
use super::{sized, sized_wide};
use crate::soft::Cpu;
use crate::soft::decode::{Lower, reg_offset};
use crate::soft::int::Int;
use crate::soft::op::*;
use crate::soft::state::vec;
use iced_x86::{Mnemonic, OpKind};

/// A two-operand operation with a result.
trait Binary {
    /// CMP and TEST keep their destination.
    const WRITES: bool = true;
    fn run<T: Alu>(a: T, b: T, f: u32) -> (T, u32);
    /// # Safety
    /// As `Alu::lock_add`.
    unsafe fn locked<T: Alu>(p: *mut u8, b: T, f: u32) -> u32;
}

macro_rules! binary_op {
    ($name:ident, $f:ident, $lock:ident) => {
        struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn run<T: Alu>(a: T, b: T, f: u32) -> (T, u32) {
                T::$f(a, b, f)
            }
            #[inline(always)]
            unsafe fn locked<T: Alu>(p: *mut u8, b: T, f: u32) -> u32 {
                // SAFETY: the caller's promise.
                unsafe { T::$lock(p, b, f) }
            }
        }
    };
}
binary_op!(Add, add, lock_add);
binary_op!(Or, or, lock_or);
binary_op!(Adc, adc, lock_adc);
binary_op!(Sbb, sbb, lock_sbb);
binary_op!(And, and, lock_and);
binary_op!(Sub, sub, lock_sub);
binary_op!(Xor, xor, lock_xor);

macro_rules! compare_op {
    ($name:ident, $f:ident) => {
        struct $name;
        impl Binary for $name {
            const WRITES: bool = false;
            #[inline(always)]
            fn run<T: Alu>(a: T, b: T, f: u32) -> (T, u32) {
                T::$f(a, b, f)
            }
            unsafe fn locked<T: Alu>(_: *mut u8, _: T, f: u32) -> u32 {
                f
            }
        }
    };
}
compare_op!(Cmp, sub);
compare_op!(Test, and);

trait Unary {
    fn run<T: Alu>(a: T, f: u32) -> (T, u32);
    /// # Safety
    /// As `Alu::lock_add`.
    unsafe fn locked<T: Alu>(p: *mut u8, f: u32) -> u32;
}

macro_rules! unary_op {
    ($name:ident, $f:ident, $lock:ident) => {
        struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn run<T: Alu>(a: T, f: u32) -> (T, u32) {
                T::$f(a, f)
            }
            #[inline(always)]
            unsafe fn locked<T: Alu>(p: *mut u8, f: u32) -> u32 {
                // SAFETY: the caller's promise.
                unsafe { T::$lock(p, f) }
            }
        }
    };
}
unary_op!(Inc, inc, lock_inc);
unary_op!(Dec, dec, lock_dec);
unary_op!(Neg, neg, lock_neg);
unary_op!(Not, not, lock_not);

trait Shift {
    fn run<T: Alu>(a: T, n: u8, f: u32) -> (T, u32);
}
macro_rules! shift_op {
    ($name:ident, $f:ident) => {
        struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn run<T: Alu>(a: T, n: u8, f: u32) -> (T, u32) {
                T::$f(a, n, f)
            }
        }
    };
}
shift_op!(Shl, shl);
shift_op!(Shr, shr);
shift_op!(Sar, sar);
shift_op!(Rol, rol);
shift_op!(Ror, ror);
shift_op!(Rcl, rcl);
shift_op!(Rcr, rcr);

trait Bit {
    const WRITES: bool = true;
    fn run<T: Wide>(a: T, n: T, f: u32) -> (T, u32);
    /// # Safety
    /// As `Wide::lock_bts`.
    unsafe fn locked<T: Wide>(p: *mut u8, n: T, f: u32) -> u32;
}
macro_rules! bit_op {
    ($name:ident, $f:ident, $lock:ident) => {
        struct $name;
        impl Bit for $name {
            #[inline(always)]
            fn run<T: Wide>(a: T, n: T, f: u32) -> (T, u32) {
                T::$f(a, n, f)
            }
            #[inline(always)]
            unsafe fn locked<T: Wide>(p: *mut u8, n: T, f: u32) -> u32 {
                // SAFETY: the caller's promise.
                unsafe { T::$lock(p, n, f) }
            }
        }
    };
}
bit_op!(Bts, bts, lock_bts);
bit_op!(Btr, btr, lock_btr);
bit_op!(Btc, btc, lock_btc);
struct Bt;
impl Bit for Bt {
    const WRITES: bool = false;
    #[inline(always)]
    fn run<T: Wide>(a: T, n: T, f: u32) -> (T, u32) {
        T::bt(a, n, f)
    }
    unsafe fn locked<T: Wide>(_: *mut u8, _: T, f: u32) -> u32 {
        f
    }
}

// -- two operands --------------------------------------------------------------------------------

unsafe fn bin_rr<T: Alu, O: Binary>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let (v, f) = O::run(cpu.get::<T>(o.dst), cpu.get::<T>(o.src), cpu.fl);
    if O::WRITES {
        cpu.set(o.dst, v);
    }
    cpu.fl = f;
    next!(cpu, op)
}

unsafe fn bin_ri<T: Alu, O: Binary>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let (v, f) = O::run(cpu.get::<T>(o.dst), T::from_u64(o.imm), cpu.fl);
    if O::WRITES {
        cpu.set(o.dst, v);
    }
    cpu.fl = f;
    next!(cpu, op)
}

unsafe fn bin_rm<T: Alu, O: Binary>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, false));
    let b = tri!(cpu, op, cpu.ld::<T>(lin));
    let (v, f) = O::run(cpu.get::<T>(o.dst), b, cpu.fl);
    if O::WRITES {
        cpu.set(o.dst, v);
    }
    cpu.fl = f;
    next!(cpu, op)
}

/// Memory destination, register (`IMM` false) or immediate source.
unsafe fn bin_m<T: Alu, O: Binary, const IMM: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let b = if IMM { T::from_u64(o.imm) } else { cpu.get::<T>(o.src) };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, O::WRITES));
    if !O::WRITES {
        let a = tri!(cpu, op, cpu.ld::<T>(lin));
        cpu.fl = O::run(a, b, cpu.fl).1;
        next!(cpu, op)
    }
    if o.flags & F_LOCK != 0 {
        let p = tri!(cpu, op, cpu.wptr_locked::<T>(lin));
        // SAFETY: `wptr_locked` gives a pointer to the operand.
        let f = unsafe { O::locked::<T>(p, b, cpu.fl) };
        tri!(cpu, op, cpu.commit());
        cpu.fl = f;
        next!(cpu, op)
    }
    let p = tri!(cpu, op, cpu.wptr::<T>(lin));
    // SAFETY: `wptr` gives a pointer to the operand.
    let f = unsafe {
        let (v, f) = O::run(T::load(p), b, cpu.fl);
        T::store(p, v);
        f
    };
    tri!(cpu, op, cpu.commit());
    cpu.fl = f;
    next!(cpu, op)
}

unsafe fn bin_mr<T: Alu, O: Binary>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: passed on.
    unsafe { bin_m::<T, O, false>(cpu, op) }
}
unsafe fn bin_mi<T: Alu, O: Binary>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: passed on.
    unsafe { bin_m::<T, O, true>(cpu, op) }
}

fn binary<O: Binary>(l: &mut Lower) -> Handler {
    let i = l.insn;
    let size = operand_size(l);
    match (i.op0_kind(), i.op1_kind()) {
        (OpKind::Register, OpKind::Register) => {
            l.op.dst = reg_offset(i.op0_register());
            l.op.src = reg_offset(i.op1_register());
            sized!(size, bin_rr, O)
        }
        (OpKind::Register, OpKind::Memory) => {
            l.op.dst = reg_offset(i.op0_register());
            l.mem();
            sized!(size, bin_rm, O)
        }
        (OpKind::Memory, OpKind::Register) => {
            l.op.src = reg_offset(i.op1_register());
            l.mem();
            sized!(size, bin_mr, O)
        }
        (OpKind::Memory, _) => {
            l.op.imm = i.immediate(1);
            l.mem();
            sized!(size, bin_mi, O)
        }
        (_, _) => {
            l.op.dst = reg_offset(i.op0_register());
            l.op.imm = i.immediate(1);
            sized!(size, bin_ri, O)
        }
    }
}

/// Size of the first operand, bytes.
pub fn operand_size(l: &Lower) -> usize {
    match l.insn.op0_kind() {
        OpKind::Register => l.insn.op0_register().size(),
        _ => l.insn.memory_size().size(),
    }
}

// -- one operand ---------------------------------------------------------------------------------

unsafe fn un_r<T: Alu, O: Unary>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let (v, f) = O::run(cpu.get::<T>(o.dst), cpu.fl);
    cpu.set(o.dst, v);
    cpu.fl = f;
    next!(cpu, op)
}

unsafe fn un_m<T: Alu, O: Unary>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, true));
    let f = if o.flags & F_LOCK != 0 {
        let p = tri!(cpu, op, cpu.wptr_locked::<T>(lin));
        // SAFETY: `wptr_locked` gives a pointer to the operand.
        unsafe { O::locked::<T>(p, cpu.fl) }
    } else {
        let p = tri!(cpu, op, cpu.wptr::<T>(lin));
        // SAFETY: `wptr` gives a pointer to the operand.
        unsafe {
            let (v, f) = O::run(T::load(p), cpu.fl);
            T::store(p, v);
            f
        }
    };
    tri!(cpu, op, cpu.commit());
    cpu.fl = f;
    next!(cpu, op)
}

fn unary<O: Unary>(l: &mut Lower) -> Handler {
    let size = operand_size(l);
    if l.insn.op0_kind() == OpKind::Register {
        l.op.dst = reg_offset(l.insn.op0_register());
        return sized!(size, un_r, O);
    }
    l.mem();
    sized!(size, un_m, O)
}

// -- shifts --------------------------------------------------------------------------------------

/// Count in `imm`, or in CL where `src` is CL's offset and `aux` is 1.
#[inline(always)]
fn count(cpu: &Cpu, o: &Op) -> u8 {
    if o.aux != 0 { cpu.get::<u8>(8) } else { o.imm as u8 }
}

unsafe fn shift_r<T: Alu, O: Shift>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let (v, f) = O::run(cpu.get::<T>(o.dst), count(cpu, o), cpu.fl);
    cpu.set(o.dst, v);
    cpu.fl = f;
    next!(cpu, op)
}

unsafe fn shift_m<T: Alu, O: Shift>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, true));
    let p = tri!(cpu, op, cpu.wptr::<T>(lin));
    // SAFETY: `wptr` gives a pointer to the operand.
    let f = unsafe {
        let (v, f) = O::run(T::load(p), count(cpu, o), cpu.fl);
        T::store(p, v);
        f
    };
    tri!(cpu, op, cpu.commit());
    cpu.fl = f;
    next!(cpu, op)
}

fn shift<O: Shift>(l: &mut Lower) -> Handler {
    let size = operand_size(l);
    if l.insn.op1_kind() == OpKind::Register {
        l.op.aux = 1;
    } else {
        l.op.imm = l.insn.immediate(1);
    }
    if l.insn.op0_kind() == OpKind::Register {
        l.op.dst = reg_offset(l.insn.op0_register());
        return sized!(size, shift_r, O);
    }
    l.mem();
    sized!(size, shift_m, O)
}

unsafe fn double_r<T: Wide, const LEFT: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let f = if LEFT { T::shld } else { T::shrd };
    let (v, f) = f(cpu.get(o.dst), cpu.get(o.src), count(cpu, o), cpu.fl);
    cpu.set(o.dst, v);
    cpu.fl = f;
    next!(cpu, op)
}

unsafe fn double_m<T: Wide, const LEFT: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let f = if LEFT { T::shld } else { T::shrd };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, true));
    let p = tri!(cpu, op, cpu.wptr::<T>(lin));
    // SAFETY: `wptr` gives a pointer to the operand.
    let f = unsafe {
        let (v, f) = f(T::load(p), cpu.get(o.src), count(cpu, o), cpu.fl);
        T::store(p, v);
        f
    };
    tri!(cpu, op, cpu.commit());
    cpu.fl = f;
    next!(cpu, op)
}

macro_rules! sized_dir {
    ($size:expr, $f:ident, $c:expr) => {
        match $size {
            2 => $f::<u16, $c> as Handler,
            4 => $f::<u32, $c> as Handler,
            _ => $f::<u64, $c> as Handler,
        }
    };
}

fn double<const LEFT: bool>(l: &mut Lower) -> Handler {
    let size = operand_size(l);
    l.op.src = reg_offset(l.insn.op1_register());
    if l.insn.op2_kind() == OpKind::Register {
        l.op.aux = 1;
    } else {
        l.op.imm = l.insn.immediate(2);
    }
    if l.insn.op0_kind() == OpKind::Register {
        l.op.dst = reg_offset(l.insn.op0_register());
        return sized_dir!(size, double_r, LEFT);
    }
    l.mem();
    sized_dir!(size, double_m, LEFT)
}

// -- bits ----------------------------------------------------------------------------------------

/// Bit offset: immediate where `aux` is 1, else the source register.
#[inline(always)]
fn bit_offset<T: Int>(cpu: &Cpu, o: &Op) -> T {
    if o.aux != 0 { T::from_u64(o.imm) } else { cpu.get(o.src) }
}

unsafe fn bit_r<T: Wide, O: Bit>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let (v, f) = O::run::<T>(cpu.get(o.dst), bit_offset(cpu, o), cpu.fl);
    if O::WRITES {
        cpu.set(o.dst, v);
    }
    cpu.fl = f;
    next!(cpu, op)
}

unsafe fn bit_m<T: Wide, O: Bit>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let n: T = bit_offset(cpu, o);
    let bit = T::from_u64(n.to_u64() & u64::from(T::BITS - 1));
    // A register offset reaches beyond the operand, in both directions.
    let far = if o.aux != 0 { 0 } else { (n.to_i64() >> T::BITS.trailing_zeros()) as u64 };
    let ea = cpu.ea(o).wrapping_add(far.wrapping_mul(T::SIZE)) & o.amask;
    let lin = if o.flags & F_CHECK != 0 {
        tri!(cpu, op, cpu.lin_checked(o.seg, ea, T::SIZE, O::WRITES))
    } else {
        cpu.seg_base[o.seg as usize].wrapping_add(ea)
    };
    if !O::WRITES {
        let a = tri!(cpu, op, cpu.ld::<T>(lin));
        cpu.fl = O::run(a, bit, cpu.fl).1;
        next!(cpu, op)
    }
    let f = if o.flags & F_LOCK != 0 {
        let p = tri!(cpu, op, cpu.wptr_locked::<T>(lin));
        // SAFETY: `wptr_locked` gives a pointer to the operand; `bit` is inside it.
        unsafe { O::locked::<T>(p, bit, cpu.fl) }
    } else {
        let p = tri!(cpu, op, cpu.wptr::<T>(lin));
        // SAFETY: `wptr` gives a pointer to the operand.
        unsafe {
            let (v, f) = O::run(T::load(p), bit, cpu.fl);
            T::store(p, v);
            f
        }
    };
    tri!(cpu, op, cpu.commit());
    cpu.fl = f;
    next!(cpu, op)
}

fn bit<O: Bit>(l: &mut Lower) -> Handler {
    let size = operand_size(l);
    if l.insn.op1_kind() == OpKind::Register {
        l.op.src = reg_offset(l.insn.op1_register());
    } else {
        l.op.aux = 1;
        l.op.imm = l.insn.immediate(1);
    }
    if l.insn.op0_kind() == OpKind::Register {
        l.op.dst = reg_offset(l.insn.op0_register());
        return sized_wide!(size, bit_r, O);
    }
    l.mem();
    sized_wide!(size, bit_m, O)
}

/// BSF, BSR and two-operand IMUL: register destination.
trait Source {
    /// Nothing is written, not even the upper half, when the source is zero.
    const ZERO_KEEPS: bool;
    fn run<T: Wide>(a: T, b: T, f: u32) -> (T, u32);
}
macro_rules! source_op {
    ($name:ident, $f:ident, $keeps:literal) => {
        struct $name;
        impl Source for $name {
            const ZERO_KEEPS: bool = $keeps;
            #[inline(always)]
            fn run<T: Wide>(a: T, b: T, f: u32) -> (T, u32) {
                T::$f(a, b, f)
            }
        }
    };
}
source_op!(Bsf, bsf, true);
source_op!(Bsr, bsr, true);
source_op!(Imul2, imul2, false);

unsafe fn src_r<T: Wide, O: Source>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let b: T = cpu.get(o.src);
    let (v, f) = O::run::<T>(cpu.get(o.dst), b, cpu.fl);
    if !O::ZERO_KEEPS || b != T::default() {
        cpu.set(o.dst, v);
    }
    cpu.fl = f;
    next!(cpu, op)
}

unsafe fn src_m<T: Wide, O: Source>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, false));
    let b = tri!(cpu, op, cpu.ld::<T>(lin));
    let (v, f) = O::run::<T>(cpu.get(o.dst), b, cpu.fl);
    if !O::ZERO_KEEPS || b != T::default() {
        cpu.set(o.dst, v);
    }
    cpu.fl = f;
    next!(cpu, op)
}

fn source<O: Source>(l: &mut Lower) -> Handler {
    let size = operand_size(l);
    l.op.dst = reg_offset(l.insn.op0_register());
    if l.insn.op1_kind() == OpKind::Register {
        l.op.src = reg_offset(l.insn.op1_register());
        return sized_wide!(size, src_r, O);
    }
    l.mem();
    sized_wide!(size, src_m, O)
}

unsafe fn imul3_r<T: Wide>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let (v, f) = T::imul2(cpu.get(o.src), T::from_u64(o.imm), cpu.fl);
    cpu.set(o.dst, v);
    cpu.fl = f;
    next!(cpu, op)
}

unsafe fn imul3_m<T: Wide>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, false));
    let a = tri!(cpu, op, cpu.ld::<T>(lin));
    let (v, f) = T::imul2(a, T::from_u64(o.imm), cpu.fl);
    cpu.set(o.dst, v);
    cpu.fl = f;
    next!(cpu, op)
}

// -- accumulator multiplication and division -----------------------------------------------------

/// One-operand MUL, IMUL, DIV, IDIV on `b`.
#[inline(always)]
fn accumulate<T: Alu>(cpu: &mut Cpu, kind: u8, b: T) -> Result<(), crate::soft::state::Stop> {
    let byte = T::SIZE == 1;
    // AH is the upper half for bytes, (R|E)DX otherwise.
    let hi_at = if byte { 1 } else { 16 };
    let lo: T = cpu.get(0);
    let (lo, hi) = match kind {
        0 | 1 => {
            let (lo, hi, f) =
                if kind == 0 { T::mul(lo, b, cpu.fl) } else { T::imul(lo, b, cpu.fl) };
            cpu.fl = f;
            (lo, hi)
        }
        _ => {
            let hi: T = cpu.get(hi_at);
            let r = if kind == 2 { T::div(hi, lo, b, cpu.fl) } else { T::idiv(hi, lo, b, cpu.fl) };
            match r {
                Some((q, r, f)) => {
                    cpu.fl = f;
                    (q, r)
                }
                None => return Err(cpu.raise(vec::DE, None)),
            }
        }
    };
    cpu.set(0, lo);
    cpu.set(hi_at, hi);
    Ok(())
}

unsafe fn acc_r<T: Alu>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let b: T = cpu.get(o.src);
    tri!(cpu, op, accumulate(cpu, o.aux, b));
    next!(cpu, op)
}

unsafe fn acc_m<T: Alu>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, false));
    let b = tri!(cpu, op, cpu.ld::<T>(lin));
    tri!(cpu, op, accumulate(cpu, o.aux, b));
    next!(cpu, op)
}

fn accumulator(l: &mut Lower, kind: u8) -> Handler {
    let size = operand_size(l);
    l.op.aux = kind;
    if l.insn.op0_kind() == OpKind::Register {
        l.op.src = reg_offset(l.insn.op0_register());
        return sized!(size, acc_r);
    }
    l.mem();
    sized!(size, acc_m)
}

// -- exchange ------------------------------------------------------------------------------------

unsafe fn xchg_rr<T: Alu>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let (a, b): (T, T) = (cpu.get(o.dst), cpu.get(o.src));
    cpu.set(o.dst, b);
    cpu.set(o.src, a);
    next!(cpu, op)
}

unsafe fn xchg_mr<T: Alu>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, true));
    let p = tri!(cpu, op, cpu.wptr_locked::<T>(lin));
    // SAFETY: `wptr_locked` gives a pointer to the operand.
    let a = unsafe { T::lock_xchg(p, cpu.get(o.src)) };
    tri!(cpu, op, cpu.commit());
    cpu.set(o.src, a);
    next!(cpu, op)
}

unsafe fn xadd_rr<T: Alu>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let (a, b): (T, T) = (cpu.get(o.dst), cpu.get(o.src));
    let (v, f) = T::add(a, b, cpu.fl);
    cpu.set(o.src, a);
    cpu.set(o.dst, v);
    cpu.fl = f;
    next!(cpu, op)
}

unsafe fn xadd_mr<T: Alu>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, true));
    let p = tri!(cpu, op, cpu.wptr_locked::<T>(lin));
    // SAFETY: `wptr_locked` gives a pointer to the operand.
    let (a, f) = unsafe { T::lock_xadd(p, cpu.get(o.src), cpu.fl) };
    tri!(cpu, op, cpu.commit());
    cpu.set(o.src, a);
    cpu.fl = f;
    next!(cpu, op)
}

unsafe fn cmpxchg_rr<T: Alu>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let (acc, a): (T, T) = (cpu.get(0), cpu.get(o.dst));
    cpu.fl = T::sub(acc, a, cpu.fl).1;
    if acc == a {
        let b: T = cpu.get(o.src);
        cpu.set(o.dst, b);
    } else {
        cpu.set(0, a);
    }
    next!(cpu, op)
}

unsafe fn cmpxchg_mr<T: Alu>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, true));
    let p = tri!(cpu, op, cpu.wptr_locked::<T>(lin));
    let old: T = cpu.get(0);
    // SAFETY: `wptr_locked` gives a pointer to the operand.
    let (acc, f) = unsafe { T::lock_cmpxchg(p, old, cpu.get(o.src), cpu.fl) };
    tri!(cpu, op, cpu.commit());
    // On success the accumulator is not written: its upper half stays.
    if f & ZF == 0 {
        cpu.set(0, acc);
    }
    cpu.fl = f;
    next!(cpu, op)
}

fn exchange(l: &mut Lower, rr: Handler, mr: Handler) -> Handler {
    let i = l.insn;
    match (i.op0_kind(), i.op1_kind()) {
        (OpKind::Register, OpKind::Register) => {
            l.op.dst = reg_offset(i.op0_register());
            l.op.src = reg_offset(i.op1_register());
            rr
        }
        (OpKind::Register, _) => {
            l.op.src = reg_offset(i.op0_register());
            l.mem();
            mr
        }
        _ => {
            l.op.src = reg_offset(i.op1_register());
            l.mem();
            mr
        }
    }
}

pub fn lower(l: &mut Lower) -> Option<Handler> {
    let i = l.insn;
    if i.has_lock_prefix() {
        l.op.flags |= F_LOCK;
    }
    let size = operand_size(l);
    Some(match i.mnemonic() {
        Mnemonic::Add => binary::<Add>(l),
        Mnemonic::Or => binary::<Or>(l),
        Mnemonic::Adc => binary::<Adc>(l),
        Mnemonic::Sbb => binary::<Sbb>(l),
        Mnemonic::And => binary::<And>(l),
        Mnemonic::Sub => binary::<Sub>(l),
        Mnemonic::Xor => binary::<Xor>(l),
        Mnemonic::Cmp => binary::<Cmp>(l),
        Mnemonic::Test => binary::<Test>(l),
        Mnemonic::Inc => unary::<Inc>(l),
        Mnemonic::Dec => unary::<Dec>(l),
        Mnemonic::Neg => unary::<Neg>(l),
        Mnemonic::Not => unary::<Not>(l),
        Mnemonic::Shl | Mnemonic::Sal => shift::<Shl>(l),
        Mnemonic::Shr => shift::<Shr>(l),
        Mnemonic::Sar => shift::<Sar>(l),
        Mnemonic::Rol => shift::<Rol>(l),
        Mnemonic::Ror => shift::<Ror>(l),
        Mnemonic::Rcl => shift::<Rcl>(l),
        Mnemonic::Rcr => shift::<Rcr>(l),
        Mnemonic::Shld => double::<true>(l),
        Mnemonic::Shrd => double::<false>(l),
        Mnemonic::Bt => bit::<Bt>(l),
        Mnemonic::Bts => bit::<Bts>(l),
        Mnemonic::Btr => bit::<Btr>(l),
        Mnemonic::Btc => bit::<Btc>(l),
        Mnemonic::Bsf => source::<Bsf>(l),
        Mnemonic::Bsr => source::<Bsr>(l),
        Mnemonic::Imul if i.op_count() == 2 => source::<Imul2>(l),
        Mnemonic::Imul if i.op_count() == 3 => {
            l.op.dst = reg_offset(i.op0_register());
            l.op.imm = i.immediate(2);
            if i.op1_kind() == OpKind::Register {
                l.op.src = reg_offset(i.op1_register());
                sized_wide!(size, imul3_r)
            } else {
                l.mem();
                sized_wide!(size, imul3_m)
            }
        }
        Mnemonic::Mul => accumulator(l, 0),
        Mnemonic::Imul => accumulator(l, 1),
        Mnemonic::Div => accumulator(l, 2),
        Mnemonic::Idiv => accumulator(l, 3),
        Mnemonic::Xchg => exchange(l, sized!(size, xchg_rr), sized!(size, xchg_mr)),
        Mnemonic::Xadd => exchange(l, sized!(size, xadd_rr), sized!(size, xadd_mr)),
        Mnemonic::Cmpxchg => exchange(l, sized!(size, cmpxchg_rr), sized!(size, cmpxchg_mr)),
        _ => return None,
    })
}
