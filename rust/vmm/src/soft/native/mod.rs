//! Vector, x87 and bit-manipulation instructions, on the host's own units.
//!
//! Guest and host share the instruction set, so an instruction that only moves data between
//! registers and at most one memory operand is not interpreted but executed: `stub` makes a host
//! function of it when it is decoded, `simd` finds its operand and calls it.  What that does
//! not cover is `special`: masked accesses, gathers, control registers.  x87 instructions run
//! with the whole of the guest's x87 state loaded (`x87`), and `xsave` has FXSAVE and XSAVE.
//!
//! # Safety
//!
//! A stub is generated code that Rust cannot check.  It is sound because of these rules:
//!
//! 1. Only instructions of the families in [`covered`] become stubs, and those among them with
//!    implicit memory operands, with vector indices or with control effects are handled elsewhere.
//!    What remains reads and writes registers and at most one memory operand.
//! 2. The memory operand is always `[rsi]`.  Its size is what the decoder says the instruction
//!    accesses; `rsi` points to guest memory with at least that many bytes left in its page, or to
//!    [`Native::bounce`], which is larger than any operand.
//! 3. Other memory that a stub touches is fields of the [`Cpu`] that `rdi` points to, at offsets
//!    that the compiler computed.
//! 4. A stub changes only registers that its calling convention lets it change, and leaves MXCSR,
//!    the x87 state and the upper vector halves as that convention wants them.
//! 5. An instruction never traps: vector exceptions are masked while it runs, x87 exceptions
//!    stay pending until the state has been saved and cleared, and aligned forms run on an
//!    address whose alignment was checked (guest memory and the bounce buffer keep alignment
//!    up to a page and 64 bytes).
//! 6. Code is written through one mapping and run through another, and a byte that can be run never
//!    changes (`codebuf`).  [`Native::reset`] takes all of it away, which is only done when no
//!    block that refers to it is left.

pub(super) mod codebuf;
pub(super) mod simd;
mod special;
mod stub;
#[cfg(test)]
mod tests;
mod x87;
mod xsave;

use super::decode::Lower;
use super::op::{Handler, MAX_OPS};
use super::state::Fpu;
use codebuf::CodeBuf;
use iced_x86::{CpuidFeature, Instruction, InstructionInfoFactory};
use std::arch::asm;
use std::collections::HashMap;
use std::mem;
use stub::{Stub, X87Plan};

/// Bytes of stubs.  One has about 40, so this is more than the vector instructions of a large guest
/// with all its programs.
const CODE_SIZE: usize = 1 << 20;

/// Which conditions an instruction depends on, and what it touches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Class(u8);

impl Class {
    /// Legacy SSE: wants CR4.OSFXSR.
    pub const SSE: u8 = 1 << 0;
    /// AVX state: wants CR4.OSXSAVE and XCR0.
    pub const AVX: u8 = 1 << 1;
    /// VEX-encoded: protected mode only.
    pub const VEX: u8 = 1 << 2;
    /// Uses MMX registers.
    pub const MMX: u8 = 1 << 3;
    /// Obeys MXCSR and sets its flags.
    pub const FP: u8 = 1 << 4;
    /// x87: `Native::image` goes in and out.
    pub const X87: u8 = 1 << 5;

    pub fn vex(self) -> bool {
        self.0 & Self::VEX != 0
    }

    pub fn mmx(self) -> bool {
        self.0 & Self::MMX != 0
    }

    pub fn x87(self) -> bool {
        self.0 & Self::X87 != 0
    }

    pub fn mxcsr(self) -> bool {
        self.0 & Self::FP != 0
    }
}

/// Staging for an operand that has no single host address.
#[repr(C, align(64))]
struct Bounce([u8; 64]);

/// What FXSAVE64 and FXRSTOR64 use.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Image {
    fpu: Fpu,
    /// XMM registers, which are of no interest here, and unused space.
    rest: [u64; 44],
}

/// Which of two stubs for an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    /// Of `stub::build`.
    Whole,
    /// Of `stub::build_x87`.
    Planned,
}

/// Generated code of a vCPU.
pub struct Native {
    /// What the host's MXCSR and x87 control word are outside of stubs.
    host_mxcsr: u32,
    host_fcw: u16,
    /// x87 status word behind the last stub of `stub::build_x87`.  The host's exception flags
    /// are sticky: they are among these until the next time that something clears them.
    x87_status: u16,
    bounce: Bounce,
    /// The x87 state while an instruction uses it.
    image: Image,
    code: Option<CodeBuf>,
    /// By what `stub::normalise` makes of an instruction.
    stubs: HashMap<(Instruction, Kind), Stub>,
    info: InstructionInfoFactory,
}

impl Default for Native {
    fn default() -> Self {
        Native {
            host_mxcsr: 0x1F80,
            host_fcw: 0x37F,
            x87_status: 0,
            bounce: Bounce([0; 64]),
            image: Image { fpu: Fpu::RESET, rest: [0; 44] },
            code: None,
            stubs: HashMap::new(),
            info: InstructionInfoFactory::new(),
        }
    }
}

impl Native {
    /// There may be no room for the stubs of one more block: drop all blocks and `reset`.
    pub fn full(&self) -> bool {
        self.code.as_ref().is_some_and(|c| c.room() < MAX_OPS * stub::MAX_LEN)
    }

    /// The vCPU starts to run on this thread, on which others may have used the x87 unit.
    pub fn enter(&mut self) {
        // SAFETY: it clears exception flags; nobody keeps anything in the x87 unit across this.
        unsafe {
            asm!(
                "fnclex",
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                options(nomem, nostack, preserves_flags)
            );
        }
        self.x87_status = 0;
    }

    /// Forget all stubs.  No block decoded before may run again.
    pub fn reset(&mut self) {
        self.stubs.clear();
        self.code = None;
    }

    /// The stub for an instruction.
    ///
    /// # Panics
    /// If the host gives no memory for code, or if `full` was not heeded.
    fn stub(&mut self, insn: &Instruction, class: Class) -> Stub {
        self.cached(insn, Kind::Whole, |insn, info| stub::build(insn, class, info))
    }

    /// The stub for an x87 instruction, with `plan` made for it.
    ///
    /// # Panics
    /// As `stub`.
    fn x87_stub(&mut self, insn: &Instruction, plan: &X87Plan) -> Stub {
        self.cached(insn, Kind::Planned, |_, _| stub::build_x87(plan))
    }

    fn cached(
        &mut self,
        insn: &Instruction,
        kind: Kind,
        build: impl FnOnce(&Instruction, &mut InstructionInfoFactory) -> Vec<u8>,
    ) -> Stub {
        let insn = stub::normalise(insn);
        if let Some(&s) = self.stubs.get(&(insn, kind)) {
            return s;
        }
        let bytes = build(&insn, &mut self.info);
        let code = self.code.get_or_insert_with(|| {
            CodeBuf::new(CODE_SIZE)
                .unwrap_or_else(|e| panic!("cannot map memory for generated code: {e}"))
        });
        let at = code.push(&bytes).expect("`full` is asked before each block");
        // SAFETY: the bytes are a function of this type; they stay until `reset`.
        let s = unsafe { mem::transmute::<*mut u8, Stub>(at.as_ptr()) };
        self.stubs.insert((insn, kind), s);
        s
    }
}

fn covered(f: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        f,
        MMX | SSE
            | SSE2
            | SSE3
            | SSSE3
            | SSE4_1
            | SSE4_2
            | AVX
            | AVX2
            | FMA
            | F16C
            | AES
            | PCLMULQDQ
            | SHA
            | BMI1
            | BMI2
            | ADX
            | LZCNT
            | POPCNT
            | MOVBE
    )
}

/// Handler for a vector, x87 or bit-manipulation instruction; None: not one.
pub fn lower(l: &mut Lower, native: &mut Native) -> Option<Handler> {
    x87::lower(l, native)
        .or_else(|| xsave::lower(l))
        .or_else(|| special::lower(l, native))
        .or_else(|| simd::lower(l, native))
}
