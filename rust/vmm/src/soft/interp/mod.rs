//! General-purpose instructions.

pub mod arith;
pub mod control;
pub mod host;
pub mod misc;
pub mod mov;
pub mod string;

use super::Cpu;
use super::decode::Lower;
use super::int::Int;
use super::op::Handler;

impl Cpu {
    /// A register operand, by byte offset.
    #[inline(always)]
    pub fn get<T: Int>(&self, off: u8) -> T {
        // SAFETY: offsets come from `decode::reg_offset`, below 18 * 8.
        unsafe { T::load((&raw const self.r).cast::<u8>().add(off as usize)) }
    }

    /// Write a register operand; a 32-bit one clears the upper half.
    #[inline(always)]
    pub fn set<T: Int>(&mut self, off: u8, v: T) {
        // SAFETY: as in `get`; 32-bit registers have offsets that are multiples of 8.
        unsafe { T::put((&raw mut self.r).cast::<u8>().add(off as usize), v) }
    }
}

/// Handler for a general-purpose instruction; None: not one.
pub fn lower(l: &mut Lower) -> Option<Handler> {
    arith::lower(l)
        .or_else(|| mov::lower(l))
        .or_else(|| control::lower(l))
        .or_else(|| string::lower(l))
        .or_else(|| misc::lower(l))
}

/// The instance of a generic handler for an operand size in bytes.
macro_rules! sized {
    ($size:expr, $f:ident $(, $g:ty)*) => {
        match $size {
            1 => $f::<u8 $(, $g)*> as Handler,
            2 => $f::<u16 $(, $g)*> as Handler,
            4 => $f::<u32 $(, $g)*> as Handler,
            _ => $f::<u64 $(, $g)*> as Handler,
        }
    };
}
pub(crate) use sized;

/// As `sized`, for handlers that have no byte form.
macro_rules! sized_wide {
    ($size:expr, $f:ident $(, $g:ty)*) => {
        match $size {
            2 => $f::<u16 $(, $g)*> as Handler,
            4 => $f::<u32 $(, $g)*> as Handler,
            _ => $f::<u64 $(, $g)*> as Handler,
        }
    };
}
pub(crate) use sized_wide;
