//! The processor: registers, and what the interpreter keeps beside them.

use super::block::Cache;
use super::mmu::Tlb;
use super::op::*;
use crate::exit::Exit;
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use std::sync::atomic::AtomicU8;

/// CR0 bits (Intel SDM 3A, 2.5).
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits (Intel SDM 3A, 2.5).
pub mod cr4 {
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// EFER bits (AMD APM 2, 3.1.7).
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// RFLAGS bits.
pub mod fl {
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// CF PF AF ZF SF OF: kept in `Cpu::fl`, not in `Cpu::rflags`.
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Exception vectors.
pub mod vec {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// Access word of a segment: type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15,
/// unusable 16 (vmm's layout, VMX's too).
pub mod acc {
    pub const CODE: u32 = 1 << 3;
    pub const CONFORMING: u32 = 1 << 2;
    pub const EXPAND_DOWN: u32 = 1 << 2;
    /// Readable code, writable data.
    pub const RW: u32 = 1 << 1;
    pub const ACCESSED: u32 = 1 << 0;
    pub const S: u32 = 1 << 4;
    pub const P: u32 = 1 << 7;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;

    pub fn dpl(access: u32) -> u8 {
        (access >> 5 & 3) as u8
    }
}

/// A segment register with its hidden part.  `limit` is in bytes, granularity applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Seg {
    pub sel: u16,
    pub base: u64,
    pub limit: u32,
    pub access: u32,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TableReg {
    pub base: u64,
    pub limit: u16,
}

/// x87, MMX and the SSE control register, as FXSAVE shows them (Intel SDM 1, 10.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Fpu {
    pub fcw: u16,
    pub fsw: u16,
    /// Abridged tag word: bit i is set when physical register i is not empty.
    pub ftw: u8,
    pub fop: u16,
    pub fip: u64,
    pub fdp: u64,
    pub mxcsr: u32,
    /// ST(0) to ST(7) relative to TOP, 80 bits each in 16 bytes.
    pub st: [[u64; 2]; 8],
}

/// Why an instruction could not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stop {
    /// `Cpu::exc` is to be delivered to the guest.
    Exception,
    /// `Cpu::exit` goes to userland; the instruction runs again afterwards.
    Exit,
}

/// An exception waiting to be delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Exc {
    pub vector: u8,
    pub error: Option<u32>,
    /// Faulting linear address (#PF), or DR6 bits (#DB).
    pub payload: u64,
}

/// Port and MMIO accesses that the running instruction has already done through userland.
/// The instruction runs again from its start and finds them here, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Replay {
    pub addr: u64,
    pub size: u8,
    pub port: bool,
    pub write: bool,
    pub value: u64,
}

#[repr(C, align(64))]
pub struct Cpu {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8-R15, then R_RIP and R_ZERO.
    pub r: [u64; 18],
    /// Arithmetic flags as `lahf; seto al` leaves them in AX: OF 0, CF 8, PF 10, AF 12, ZF 14, SF 15.
    pub fl: u32,
    /// 0-3.
    pub cpl: u8,
    /// Added to the tags of code pages, so that flushing them is a change of number.
    pub asid: u64,
    /// Aligned to its size, which `native` counts on for speed.
    pub ymm: [[u64; 4]; 16],
    /// Bases used for address computation, by segment number: 0 for ES CS SS DS in 64-bit mode.
    pub seg_base: [u64; 6],
    /// Mask of the stack pointer's width: all ones, 32 or 16 bits.
    pub sp_mask: u64,
    /// The TLB bank for data accesses at the present privilege.
    pub bank: usize,
    /// Its first entry, in the present address space.
    pub bank_at: *mut super::mmu::Entry,
    pub tlb: Box<Tlb>,

    pub rip: u64,
    /// All of RFLAGS but the arithmetic flags.
    pub rflags: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub xcr0: u64,
    pub efer: u64,
    pub seg: [Seg; 6],
    pub ldtr: Seg,
    pub tr: Seg,
    pub gdtr: TableReg,
    pub idtr: TableReg,
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    /// PDPTE registers (PAE paging).
    pub pdpte: [u64; 4],
    pub msr: super::msr::Msrs,
    pub fpu: Fpu,

    /// Interrupts are held off for one instruction (STI, or MOV/POP SS).
    pub shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// Stopped by HLT.
    pub halted: bool,
    /// INIT received, waiting for SIPI (only without IPI_EXIT).
    pub wait_sipi: bool,
    /// An event whose delivery userland asked for, or that faulted while being delivered.
    pub injected: Option<Exc>,
    pub exc: Exc,
    pub exit: Option<Exit>,
    pub replay: Vec<Replay>,
    /// How many of `replay` this run of the instruction has used.
    pub replay_pos: usize,
    /// The access that userland has been asked for, and its answer.
    pub asked: Option<Replay>,
    pub answer: Option<u64>,
    /// Why the last handler gave `STOP`.
    pub stopped: Option<Stop>,
    /// `Tlb` has an unfinished read-modify-write.
    pub pending_commit: bool,
    /// Data breakpoints hit by the running instruction: DR6 bits 0-3.
    pub watch_hits: u64,
    /// The instruction just run must not be followed by a single-step trap.
    pub no_trap: bool,
    /// The local APIC or the PIC may have an interrupt for us.
    pub intr: bool,
    pub nmi_pending: bool,
    /// Inside an exclusive section; the epoch of the TLB (`safepoint`).
    pub exclusive: bool,
    pub epoch: u64,
    /// RIP behind the instruction that a slow handler runs; `rip` is at the instruction itself.
    pub next_rip: u64,

    pub id: u32,
    pub config: super::cpuid::CpuConfig,
    pub cache: Cache,
    pub native: super::native::Native,
    pub jit: super::translate::Jit,
    pub mem_base: *mut u8,
    pub mem_flags: *const AtomicU8,
    pub mem_pages: u64,
    pub(super) vm: *const Vm,
    pub(super) vcpu: *const Vcpu,
}

// SAFETY: the raw pointers are to guest memory and to the VM; they are set by `run` for the time
// of the call, on the thread that makes it.
unsafe impl Send for Cpu {}

impl Cpu {
    pub fn vm(&self) -> &Vm {
        // SAFETY: set by `run`, whose caller holds the VM for as long as it takes.
        unsafe { &*self.vm }
    }

    pub fn vcpu(&self) -> &Vcpu {
        // SAFETY: as in `vm`.
        unsafe { &*self.vcpu }
    }

    // -- modes ---------------------------------------------------------------------------------

    /// IA-32e mode is active (64-bit or compatibility).
    #[inline(always)]
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Running 64-bit code.
    #[inline(always)]
    pub fn code64(&self) -> bool {
        self.long_mode() && self.seg[CS as usize].access & acc::L != 0
    }

    /// Protected mode, v8086 excluded.
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0 && self.rflags & fl::VM == 0
    }

    pub fn v86(&self) -> bool {
        self.rflags & fl::VM != 0
    }

    pub fn iopl(&self) -> u8 {
        (self.rflags >> 12 & 3) as u8
    }

    /// Width of code, bits: 16, 32 or 64.
    pub fn code_bits(&self) -> u32 {
        match self.seg[CS as usize].access {
            a if self.long_mode() && a & acc::L != 0 => 64,
            a if a & acc::DB != 0 => 32,
            _ => 16,
        }
    }

    /// RIP as far as the mode sees it.
    pub fn rip_mask(&self) -> u64 {
        if self.code64() { u64::MAX } else { 0xFFFF_FFFF }
    }

    // -- flags ---------------------------------------------------------------------------------

    /// RFLAGS, whole.
    pub fn get_rflags(&self) -> u64 {
        let f = u64::from(self.fl);
        self.rflags | fl::FIXED | (f >> 8 & 0xD5) | (f & 1) << 11
    }

    /// Set RFLAGS, whole; the caller has applied the privilege rules.
    pub fn set_rflags(&mut self, v: u64) {
        let old = self.rflags;
        self.fl = ((v & 0xD5) << 8 | (v >> 11 & 1)) as u32;
        self.rflags = v & 0x003F_7700 | fl::FIXED;
        if (old ^ v) & (fl::AC | fl::VM) != 0 {
            self.mode_changed();
        }
    }

    // -- exceptions ----------------------------------------------------------------------------

    /// Record an exception; `return Err(cpu.raise(..))`.
    #[cold]
    pub fn raise(&mut self, vector: u8, error: Option<u32>) -> Stop {
        self.exc = Exc { vector, error, payload: 0 };
        Stop::Exception
    }

    #[cold]
    pub fn gp(&mut self, error: u32) -> Stop {
        self.raise(vec::GP, Some(error))
    }

    #[cold]
    pub fn ud(&mut self) -> Stop {
        self.raise(vec::UD, None)
    }

    /// Leave for userland; the instruction runs again when the vCPU does.
    #[cold]
    pub fn leave(&mut self, exit: Exit) -> Stop {
        self.exit = Some(exit);
        Stop::Exit
    }

    /// What a handler returns when its instruction cannot complete.
    #[cold]
    #[inline(never)]
    pub(crate) fn stop_at(&mut self, op: *const Op, stop: Stop) -> Flow {
        // SAFETY: handlers pass the op that they were called with.
        let op = unsafe { &*op };
        self.rip = op.rip(self) & self.rip_mask();
        self.cache.retired += u64::from(op.pos);
        if op.seg == SS {
            self.stack_fault(stop);
        }
        self.stopped = Some(stop);
        STOP
    }
}
