//! Arithmetic on the host's own arithmetic unit, with the flags that it produces.
//!
//! Flags travel in the form that `seto al; lahf` gives in AX: OF in bit 0, CF 8, PF 10, AF 12,
//! ZF 14, SF 15.  `add al, 127; sahf` brings them back.  So results, defined and undefined flags
//! alike, are those of the host processor.

use crate::soft::int::Int;
use std::arch::asm;

pub const CF: u32 = 1 << 8;
pub const PF: u32 = 1 << 10;
pub const AF: u32 = 1 << 12;
pub const ZF: u32 = 1 << 14;
pub const SF: u32 = 1 << 15;
pub const OF: u32 = 1 << 0;

/// Arithmetic of one operand size.  The last parameter and the last result are flags.
pub trait Alu: Int {
    fn add(a: Self, b: Self, f: u32) -> (Self, u32);
    fn or(a: Self, b: Self, f: u32) -> (Self, u32);
    fn adc(a: Self, b: Self, f: u32) -> (Self, u32);
    fn sbb(a: Self, b: Self, f: u32) -> (Self, u32);
    fn and(a: Self, b: Self, f: u32) -> (Self, u32);
    fn sub(a: Self, b: Self, f: u32) -> (Self, u32);
    fn xor(a: Self, b: Self, f: u32) -> (Self, u32);
    fn inc(a: Self, f: u32) -> (Self, u32);
    fn dec(a: Self, f: u32) -> (Self, u32);
    fn neg(a: Self, f: u32) -> (Self, u32);
    fn not(a: Self, f: u32) -> (Self, u32);
    fn shl(a: Self, n: u8, f: u32) -> (Self, u32);
    fn shr(a: Self, n: u8, f: u32) -> (Self, u32);
    fn sar(a: Self, n: u8, f: u32) -> (Self, u32);
    fn rol(a: Self, n: u8, f: u32) -> (Self, u32);
    fn ror(a: Self, n: u8, f: u32) -> (Self, u32);
    fn rcl(a: Self, n: u8, f: u32) -> (Self, u32);
    fn rcr(a: Self, n: u8, f: u32) -> (Self, u32);

    /// The same on memory, as one bus-locked operation.
    ///
    /// # Safety
    /// `p` points to `SIZE` mapped, writable bytes.
    unsafe fn lock_add(p: *mut u8, b: Self, f: u32) -> u32;
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_or(p: *mut u8, b: Self, f: u32) -> u32;
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_adc(p: *mut u8, b: Self, f: u32) -> u32;
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_sbb(p: *mut u8, b: Self, f: u32) -> u32;
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_and(p: *mut u8, b: Self, f: u32) -> u32;
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_sub(p: *mut u8, b: Self, f: u32) -> u32;
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_xor(p: *mut u8, b: Self, f: u32) -> u32;
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_inc(p: *mut u8, f: u32) -> u32;
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_dec(p: *mut u8, f: u32) -> u32;
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_neg(p: *mut u8, f: u32) -> u32;
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_not(p: *mut u8, f: u32) -> u32;
    /// Returns the old value of memory.
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_xadd(p: *mut u8, b: Self, f: u32) -> (Self, u32);
    /// Returns the old value of memory.
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_xchg(p: *mut u8, b: Self) -> Self;
    /// Returns the accumulator and flags.
    /// # Safety
    /// As `lock_add`.
    unsafe fn lock_cmpxchg(p: *mut u8, acc: Self, b: Self, f: u32) -> (Self, u32);
    /// Low and high half of the product.
    fn mul(a: Self, b: Self, f: u32) -> (Self, Self, u32);
    fn imul(a: Self, b: Self, f: u32) -> (Self, Self, u32);
    /// Unsigned division of `hi:lo`; None: #DE.  Quotient, remainder, flags.
    fn div(hi: Self, lo: Self, d: Self, f: u32) -> Option<(Self, Self, u32)>;
    fn idiv(hi: Self, lo: Self, d: Self, f: u32) -> Option<(Self, Self, u32)>;
}

/// Operations that bytes do not have.
pub trait Wide: Alu {
    fn imul2(a: Self, b: Self, f: u32) -> (Self, u32);
    fn shld(a: Self, b: Self, n: u8, f: u32) -> (Self, u32);
    fn shrd(a: Self, b: Self, n: u8, f: u32) -> (Self, u32);
    /// The destination keeps `a` when the source is zero, as the host does it.
    fn bsf(a: Self, b: Self, f: u32) -> (Self, u32);
    fn bsr(a: Self, b: Self, f: u32) -> (Self, u32);
    fn bt(a: Self, n: Self, f: u32) -> (Self, u32);
    fn bts(a: Self, n: Self, f: u32) -> (Self, u32);
    fn btr(a: Self, n: Self, f: u32) -> (Self, u32);
    fn btc(a: Self, n: Self, f: u32) -> (Self, u32);
    /// # Safety
    /// As `lock_add`; `n` is below `BITS`.
    unsafe fn lock_bts(p: *mut u8, n: Self, f: u32) -> u32;
    /// # Safety
    /// As `lock_bts`.
    unsafe fn lock_btr(p: *mut u8, n: Self, f: u32) -> u32;
    /// # Safety
    /// As `lock_bts`.
    unsafe fn lock_btc(p: *mut u8, n: Self, f: u32) -> u32;
}

macro_rules! binary {
    ($name:ident, $insn:literal, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: Self, b: Self, _: u32) -> (Self, u32) {
            let f: u16;
            // SAFETY: registers only.
            unsafe {
                asm!(concat!($insn, " {a", $m, "}, {b", $m, "}"), "seto al", "lahf",
                    a = inout($class) a, b = in($class) b, out("ax") f,
                    options(pure, nomem, nostack));
            }
            (a, u32::from(f))
        }
    };
}

macro_rules! carry {
    ($name:ident, $insn:literal, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: Self, b: Self, f: u32) -> (Self, u32) {
            let g: u16;
            // SAFETY: registers only.
            unsafe {
                asm!("bt {f:e}, 8", concat!($insn, " {a", $m, "}, {b", $m, "}"), "seto al", "lahf",
                    f = in(reg) f, a = inout($class) a, b = in($class) b, out("ax") g,
                    options(pure, nomem, nostack));
            }
            (a, u32::from(g))
        }
    };
}

macro_rules! unary {
    ($name:ident, $insn:literal, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: Self, f: u32) -> (Self, u32) {
            let g: u16;
            // SAFETY: registers only.
            unsafe {
                asm!("bt {f:e}, 8", concat!($insn, " {a", $m, "}"), "seto al", "lahf",
                    f = in(reg) f, a = inout($class) a, out("ax") g,
                    options(pure, nomem, nostack));
            }
            (a, u32::from(g))
        }
    };
}

macro_rules! shift {
    ($name:ident, $insn:literal, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: Self, n: u8, mut f: u32) -> (Self, u32) {
            // SAFETY: registers only.
            unsafe {
                asm!("add al, 127", "sahf", concat!($insn, " {a", $m, "}, cl"), "seto al", "lahf",
                    a = inout($class) a, in("cl") n, inout("eax") f,
                    options(pure, nomem, nostack));
            }
            (a, f & 0xFFFF)
        }
    };
}

macro_rules! locked {
    ($name:ident, $insn:literal, $class:ident, $m:literal, $ptr:literal) => {
        #[inline(always)]
        unsafe fn $name(p: *mut u8, b: Self, f: u32) -> u32 {
            let g: u16;
            // SAFETY: the caller's promise about `p`.
            unsafe {
                asm!("bt {f:e}, 8", concat!("lock ", $insn, " ", $ptr, " [{p}], {b", $m, "}"),
                    "seto al", "lahf",
                    f = in(reg) f, p = in(reg) p, b = in($class) b, out("ax") g,
                    options(nostack));
            }
            u32::from(g)
        }
    };
}

macro_rules! locked1 {
    ($name:ident, $insn:literal, $ptr:literal) => {
        #[inline(always)]
        unsafe fn $name(p: *mut u8, f: u32) -> u32 {
            let g: u16;
            // SAFETY: the caller's promise about `p`.
            unsafe {
                asm!("bt {f:e}, 8", concat!("lock ", $insn, " ", $ptr, " [{p}]"), "seto al", "lahf",
                    f = in(reg) f, p = in(reg) p, out("ax") g, options(nostack));
            }
            u32::from(g)
        }
    };
}

macro_rules! alu {
    ($t:ty, $class:ident, $m:literal, $ptr:literal, $acc:literal) => {
        binary!(add, "add", $class, $m);
        binary!(or, "or", $class, $m);
        binary!(and, "and", $class, $m);
        binary!(sub, "sub", $class, $m);
        binary!(xor, "xor", $class, $m);
        carry!(adc, "adc", $class, $m);
        carry!(sbb, "sbb", $class, $m);
        unary!(inc, "inc", $class, $m);
        unary!(dec, "dec", $class, $m);
        unary!(neg, "neg", $class, $m);
        #[inline(always)]
        fn not(a: Self, f: u32) -> (Self, u32) {
            (!a, f)
        }
        shift!(shl, "shl", $class, $m);
        shift!(shr, "shr", $class, $m);
        shift!(sar, "sar", $class, $m);
        shift!(rol, "rol", $class, $m);
        shift!(ror, "ror", $class, $m);
        shift!(rcl, "rcl", $class, $m);
        shift!(rcr, "rcr", $class, $m);
        locked!(lock_add, "add", $class, $m, $ptr);
        locked!(lock_or, "or", $class, $m, $ptr);
        locked!(lock_adc, "adc", $class, $m, $ptr);
        locked!(lock_sbb, "sbb", $class, $m, $ptr);
        locked!(lock_and, "and", $class, $m, $ptr);
        locked!(lock_sub, "sub", $class, $m, $ptr);
        locked!(lock_xor, "xor", $class, $m, $ptr);
        locked1!(lock_inc, "inc", $ptr);
        locked1!(lock_dec, "dec", $ptr);
        locked1!(lock_neg, "neg", $ptr);
        #[inline(always)]
        unsafe fn lock_not(p: *mut u8, f: u32) -> u32 {
            // SAFETY: the caller's promise about `p`.
            unsafe { asm!(concat!("lock not ", $ptr, " [{p}]"), p = in(reg) p, options(nostack)) };
            f
        }
        #[inline(always)]
        unsafe fn lock_xadd(p: *mut u8, mut b: Self, _: u32) -> (Self, u32) {
            let g: u16;
            // SAFETY: the caller's promise about `p`.
            unsafe {
                asm!(concat!("lock xadd ", $ptr, " [{p}], {b", $m, "}"), "seto al", "lahf",
                    p = in(reg) p, b = inout($class) b, out("ax") g, options(nostack));
            }
            (b, u32::from(g))
        }
        #[inline(always)]
        unsafe fn lock_xchg(p: *mut u8, mut b: Self) -> Self {
            // SAFETY: the caller's promise about `p`.
            unsafe {
                asm!(concat!("xchg ", $ptr, " [{p}], {b", $m, "}"),
                    p = in(reg) p, b = inout($class) b, options(nostack));
            }
            b
        }
        #[inline(always)]
        unsafe fn lock_cmpxchg(p: *mut u8, acc: Self, b: Self, _: u32) -> (Self, u32) {
            let (r, g): (u64, u64);
            // SAFETY: the caller's promise about `p`.
            unsafe {
                asm!(concat!("lock cmpxchg ", $ptr, " [{p}], {b", $m, "}"), "mov {r}, rax",
                    "seto al", "lahf",
                    p = in(reg) p, b = in($class) b, r = out(reg) r,
                    inout("rax") acc.to_u64() => g, options(nostack));
            }
            (Self::from_u64(r), g as u32 & 0xFFFF)
        }
    };
}

macro_rules! wide {
    ($t:ty, $s:ty, $d:ty, $sd:ty, $m:literal, $ptr:literal) => {
        impl Wide for $t {
            keep!(imul2, "imul", $m);
            double!(shld, "shld", $m);
            double!(shrd, "shrd", $m);
            keep!(bsf, "bsf", $m);
            keep!(bsr, "bsr", $m);
            keep!(bt, "bt", $m);
            keep!(bts, "bts", $m);
            keep!(btr, "btr", $m);
            keep!(btc, "btc", $m);
            lockbit!(lock_bts, "bts", $m, $ptr);
            lockbit!(lock_btr, "btr", $m, $ptr);
            lockbit!(lock_btc, "btc", $m, $ptr);
        }
    };
}

macro_rules! double {
    ($name:ident, $insn:literal, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: Self, b: Self, n: u8, mut f: u32) -> (Self, u32) {
            // SAFETY: registers only.
            unsafe {
                asm!("add al, 127", "sahf", concat!($insn, " {a", $m, "}, {b", $m, "}, cl"),
                    "seto al", "lahf",
                    a = inout(reg) a, b = in(reg) b, in("cl") n, inout("eax") f,
                    options(pure, nomem, nostack));
            }
            (a, f & 0xFFFF)
        }
    };
}

/// Two operands, with the old flags in place.
macro_rules! keep {
    ($name:ident, $insn:literal, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: Self, b: Self, mut f: u32) -> (Self, u32) {
            // SAFETY: registers only.
            unsafe {
                asm!("add al, 127", "sahf", concat!($insn, " {a", $m, "}, {b", $m, "}"),
                    "seto al", "lahf",
                    a = inout(reg) a, b = in(reg) b, inout("eax") f,
                    options(pure, nomem, nostack));
            }
            (a, f & 0xFFFF)
        }
    };
}

macro_rules! lockbit {
    ($name:ident, $insn:literal, $m:literal, $ptr:literal) => {
        #[inline(always)]
        unsafe fn $name(p: *mut u8, n: Self, mut f: u32) -> u32 {
            // SAFETY: the caller's promise about `p`; `n` does not lead out of the operand.
            unsafe {
                asm!("add al, 127", "sahf", concat!("lock ", $insn, " ", $ptr, " [{p}], {n", $m, "}"),
                    "seto al", "lahf",
                    p = in(reg) p, n = in(reg) n, inout("eax") f, options(nostack));
            }
            f & 0xFFFF
        }
    };
}

macro_rules! muldiv {
    ($s:ty, $d:ty, $sd:ty, $m:literal) => {
        #[inline(always)]
        fn mul(a: Self, b: Self, f: u32) -> (Self, Self, u32) {
            let (lo, hi, g): (u64, u64, u64);
            // SAFETY: registers only.
            unsafe {
                asm!("add al, 127", "sahf", "mov rax, {a}", concat!("mul {b", $m, "}"),
                    "mov {a}, rax", "seto al", "lahf",
                    b = in(reg) b, a = inout(reg) a.to_u64() => lo, out("rdx") hi,
                    inout("rax") u64::from(f) => g, options(pure, nomem, nostack));
            }
            (Self::from_u64(lo), Self::from_u64(hi), g as u32 & 0xFFFF)
        }
        #[inline(always)]
        fn imul(a: Self, b: Self, f: u32) -> (Self, Self, u32) {
            let (lo, hi, g): (u64, u64, u64);
            // SAFETY: registers only.
            unsafe {
                asm!("add al, 127", "sahf", "mov rax, {a}", concat!("imul {b", $m, "}"),
                    "mov {a}, rax", "seto al", "lahf",
                    b = in(reg) b, a = inout(reg) a.to_u64() => lo, out("rdx") hi,
                    inout("rax") u64::from(f) => g, options(pure, nomem, nostack));
            }
            (Self::from_u64(lo), Self::from_u64(hi), g as u32 & 0xFFFF)
        }
        divide!($s, $d, $sd, $m);
    };
}

/// The host divides, once it is certain that it will not raise #DE.
macro_rules! divide {
    ($s:ty, $d:ty, $sd:ty, $m:literal) => {
        fn div(hi: Self, lo: Self, d: Self, f: u32) -> Option<(Self, Self, u32)> {
            if hi >= d {
                return None;
            }
            let (q, r, g): (u64, u64, u64);
            // SAFETY: registers only; the quotient fits.
            unsafe {
                asm!("add al, 127", "sahf", "mov rax, {a}", concat!("div {d", $m, "}"),
                    "mov {a}, rax", "seto al", "lahf",
                    d = in(reg) d, a = inout(reg) lo.to_u64() => q,
                    inout("rdx") hi.to_u64() => r, inout("rax") u64::from(f) => g,
                    options(pure, nomem, nostack));
            }
            Some((Self::from_u64(q), Self::from_u64(r), g as u32 & 0xFFFF))
        }
        fn idiv(hi: Self, lo: Self, d: Self, f: u32) -> Option<(Self, Self, u32)> {
            let n = ((hi as $s) as $sd) << Self::BITS | lo as $sd;
            // Division of double width is slow, and hardly ever needed to know.
            if n == (lo as $s) as $sd {
                (lo as $s).checked_div(d as $s)?;
            } else {
                <$s>::try_from(n.checked_div((d as $s) as $sd)?).ok()?;
            }
            let (q, r, g): (u64, u64, u64);
            // SAFETY: registers only; the quotient fits.
            unsafe {
                asm!("add al, 127", "sahf", "mov rax, {a}", concat!("idiv {d", $m, "}"),
                    "mov {a}, rax", "seto al", "lahf",
                    d = in(reg) d, a = inout(reg) lo.to_u64() => q,
                    inout("rdx") hi.to_u64() => r, inout("rax") u64::from(f) => g,
                    options(pure, nomem, nostack));
            }
            Some((Self::from_u64(q), Self::from_u64(r), g as u32 & 0xFFFF))
        }
    };
}

/// AH:AL by a byte: quotient in AL, remainder in AH.
macro_rules! divide_byte {
    ($name:ident, $insn:literal, $wide:ty, $narrow:ty, $operand:ty) => {
        fn $name(hi: u8, lo: u8, d: u8, f: u32) -> Option<(u8, u8, u32)> {
            let n = u16::from(hi) << 8 | u16::from(lo);
            <$narrow>::try_from((n as $wide).checked_div(<$wide>::from(d as $operand))?).ok()?;
            let (p, g): (u64, u64);
            // SAFETY: registers only; the quotient fits.
            unsafe {
                asm!("add al, 127", "sahf", "mov rax, {p}", concat!($insn, " {d}"),
                    "mov {p}, rax", "seto al", "lahf",
                    d = in(reg_byte) d, p = inout(reg) u64::from(n) => p,
                    inout("rax") u64::from(f) => g, options(pure, nomem, nostack));
            }
            Some((p as u8, (p >> 8) as u8, g as u32 & 0xFFFF))
        }
    };
}

impl Alu for u8 {
    alu!(u8, reg_byte, "", "byte ptr", "al");
    #[inline(always)]
    fn mul(a: u8, b: u8, f: u32) -> (u8, u8, u32) {
        let (p, g): (u64, u64);
        // SAFETY: registers only.
        unsafe {
            asm!("add al, 127", "sahf", "mov rax, {p}", "mul {b}", "mov {p}, rax", "seto al", "lahf",
                b = in(reg_byte) b, p = inout(reg) u64::from(a) => p,
                inout("rax") u64::from(f) => g, options(pure, nomem, nostack));
        }
        (p as u8, (p >> 8) as u8, g as u32 & 0xFFFF)
    }
    #[inline(always)]
    fn imul(a: u8, b: u8, f: u32) -> (u8, u8, u32) {
        let (p, g): (u64, u64);
        // SAFETY: registers only.
        unsafe {
            asm!("add al, 127", "sahf", "mov rax, {p}", "imul {b}", "mov {p}, rax", "seto al", "lahf",
                b = in(reg_byte) b, p = inout(reg) u64::from(a) => p,
                inout("rax") u64::from(f) => g, options(pure, nomem, nostack));
        }
        (p as u8, (p >> 8) as u8, g as u32 & 0xFFFF)
    }
    divide_byte!(div, "div", u16, u8, u8);
    divide_byte!(idiv, "idiv", i16, i8, i8);
}
impl Alu for u16 {
    alu!(u16, reg, ":x", "word ptr", "ax");
    muldiv!(i16, u32, i32, ":x");
}
impl Alu for u32 {
    alu!(u32, reg, ":e", "dword ptr", "eax");
    muldiv!(i32, u64, i64, ":e");
}
impl Alu for u64 {
    alu!(u64, reg, "", "qword ptr", "rax");
    muldiv!(i64, u128, i128, "");
}
wide!(u16, i16, u32, i32, ":x", "word ptr");
wide!(u32, i32, u64, i64, ":e", "dword ptr");
wide!(u64, i64, u128, i128, "", "qword ptr");
