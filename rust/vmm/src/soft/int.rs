//! Guest memory accesses and integer widths.
//!
//! Guest memory is shared with other vCPUs, devices and other processes, so it is only ever
//! touched through these functions: one host instruction each, with the host's memory ordering
//! (which is the guest's), opaque to the compiler.

use std::arch::asm;

/// An operand size of general-purpose instructions.
pub trait Int: Copy + Eq + Default {
    const SIZE: u64;
    const BITS: u32;
    /// # Safety
    /// `p` points to `SIZE` mapped bytes.
    unsafe fn load(p: *const u8) -> Self;
    /// # Safety
    /// `p` points to `SIZE` mapped, writable bytes.
    unsafe fn store(p: *mut u8, v: Self);
    /// Write a register: 32-bit results clear the upper half.
    /// # Safety
    /// `p` points into `Cpu::r`; to a register's start when `SIZE` is 4.
    unsafe fn put(p: *mut u8, v: Self);
    fn from_u64(v: u64) -> Self;
    /// Zero-extended.
    fn to_u64(self) -> u64;
    /// Sign-extended.
    fn to_i64(self) -> i64;
}

macro_rules! int {
    ($t:ty, $s:ty, $load:literal, $store:literal, $class:ident, $wide:ty, $reg:ty) => {
        impl Int for $t {
            const SIZE: u64 = size_of::<$t>() as u64;
            const BITS: u32 = <$t>::BITS;
            #[inline(always)]
            unsafe fn load(p: *const u8) -> Self {
                let v: $wide;
                // SAFETY: the caller's promise.
                unsafe {
                    asm!($load, v = lateout(reg) v, p = in(reg) p,
                        options(nostack, preserves_flags, readonly));
                }
                v as $t
            }
            #[inline(always)]
            unsafe fn store(p: *mut u8, v: Self) {
                // SAFETY: the caller's promise.
                unsafe {
                    asm!($store, v = in($class) v, p = in(reg) p,
                        options(nostack, preserves_flags));
                }
            }
            #[inline(always)]
            unsafe fn put(p: *mut u8, v: Self) {
                // SAFETY: the caller's promise.
                unsafe { p.cast::<$reg>().write_unaligned(v as $reg) }
            }
            #[inline(always)]
            fn from_u64(v: u64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                u64::from(self)
            }
            #[inline(always)]
            fn to_i64(self) -> i64 {
                i64::from(self as $s)
            }
        }
    };
}

int!(u8, i8, "movzx {v:e}, byte ptr [{p}]", "mov byte ptr [{p}], {v}", reg_byte, u32, u8);
int!(u16, i16, "movzx {v:e}, word ptr [{p}]", "mov word ptr [{p}], {v:x}", reg, u32, u16);
int!(u32, i32, "mov {v:e}, dword ptr [{p}]", "mov dword ptr [{p}], {v:e}", reg, u32, u64);
int!(u64, i64, "mov {v}, qword ptr [{p}]", "mov qword ptr [{p}], {v}", reg, u64, u64);
