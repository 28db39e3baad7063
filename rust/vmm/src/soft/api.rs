//! The processor as `vcpu` sees it: registers by number, reset, state.

use super::block::Cache;
use super::cpuid::CpuConfig;
use super::msr::Msrs;
use super::op::*;
use super::state::*;
use crate::regs::{Reg, SegDesc};
use serde::{Deserialize, Serialize};
use std::ptr;

/// Version of `CpuState`.
const VERSION: u32 = 1;

/// Everything the guest can tell a difference by, and what an interrupted instruction has done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuState {
    pub version: u32,
    pub gpr: [u64; 16],
    pub rip: u64,
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
    pub cpl: u8,
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    pub pdpte: [u64; 4],
    pub msr: Msrs,
    pub ymm: [[u64; 4]; 16],
    pub fcw: u16,
    pub fsw: u16,
    pub ftw: u8,
    pub fop: u16,
    pub fip: u64,
    pub fdp: u64,
    pub mxcsr: u32,
    pub st: [[u64; 2]; 8],
    pub shadow: bool,
    pub nmi_blocked: bool,
    pub nmi_pending: bool,
    pub halted: bool,
    pub wait_sipi: bool,
    pub injected: Option<Exc>,
    pub asked: Option<Replay>,
    pub answer: Option<u64>,
    pub replay: Vec<Replay>,
}

const NULL_SEG: Seg = Seg { sel: 0, base: 0, limit: 0xFFFF, access: 0x93 };

impl Cpu {
    /// A processor in its power-on state.
    pub fn new(id: u32, config: &CpuConfig) -> Box<Cpu> {
        let mut cpu = Box::new(Cpu {
            r: [0; 18],
            fl: 0,
            cpl: 0,
            seg_base: [0; 6],
            asid: 0,
            sp_mask: 0xFFFF,
            bank: 0,
            bank_at: ptr::null_mut(),
            tlb: Box::default(),
            rip: 0,
            rflags: fl::FIXED,
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            efer: 0,
            seg: [NULL_SEG; 6],
            ldtr: NULL_SEG,
            tr: NULL_SEG,
            gdtr: TableReg::default(),
            idtr: TableReg::default(),
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            pdpte: [0; 4],
            msr: Msrs::default(),
            ymm: [[0; 4]; 16],
            fpu: Fpu::RESET,
            shadow: false,
            nmi_blocked: false,
            halted: false,
            wait_sipi: false,
            injected: None,
            exc: Exc::default(),
            exit: None,
            replay: Vec::new(),
            replay_pos: 0,
            asked: None,
            answer: None,
            stopped: None,
            pending_commit: false,
            watch_hits: 0,
            no_trap: false,
            intr: false,
            nmi_pending: false,
            exclusive: false,
            epoch: 0,
            next_rip: 0,
            id,
            config: config.clone(),
            cache: Cache::default(),
            native: super::native::Native::default(),
            jit: super::translate::Jit::default(),
            mem_base: ptr::null_mut(),
            mem_flags: ptr::null(),
            mem_pages: 0,
            vm: ptr::null(),
            vcpu: ptr::null(),
        });
        cpu.reset();
        cpu
    }

    /// Power-on state (SDM 3A, table 10-1; bhyve: vcpu_reset, whose CR0 has only NE).
    pub fn reset(&mut self) {
        self.init();
        self.wait_sipi = false;
        self.ymm = [[0; 4]; 16];
        self.fpu = Fpu::RESET;
        self.xcr0 = 1;
        self.msr = Msrs::default();
    }

    /// What INIT leaves of the state; an application processor then waits for its start-up IPI.
    pub fn init(&mut self) {
        self.r = [0; 18];
        self.r[2] = 0xF00;
        self.rip = 0xFFF0;
        self.fl = 0;
        self.rflags = fl::FIXED;
        self.cr0 = cr0::NE | self.cr0 & (cr0::CD | cr0::NW);
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = 0;
        self.efer = 0;
        self.cpl = 0;
        self.seg = [NULL_SEG; 6];
        self.seg[CS as usize] = Seg { sel: 0xF000, base: 0xFFFF_0000, limit: 0xFFFF, access: 0x9B };
        self.ldtr = Seg { sel: 0, base: 0, limit: 0xFFFF, access: 0x82 };
        self.tr = Seg { sel: 0, base: 0, limit: 0, access: 0x8B };
        self.gdtr = TableReg { base: 0, limit: 0xFFFF };
        self.idtr = TableReg { base: 0, limit: 0xFFFF };
        self.dr = [0; 4];
        self.dr6 = 0xFFFF_0FF0;
        self.dr7 = 0x400;
        self.pdpte = [0; 4];
        self.shadow = false;
        self.nmi_blocked = false;
        self.nmi_pending = false;
        self.halted = false;
        self.wait_sipi = self.id != 0;
        self.injected = None;
        self.asked = None;
        self.answer = None;
        self.replay.clear();
        self.replay_pos = 0;
        self.flush_tlb();
        self.mode_changed();
    }

    /// A start-up IPI: real mode at page `page`.
    pub fn start_up(&mut self, page: u8) {
        self.seg[CS as usize].sel = u16::from(page) << 8;
        self.seg[CS as usize].base = u64::from(page) << 12;
        self.rip = 0;
        self.wait_sipi = false;
        self.mode_changed();
    }

    pub fn get_reg(&self, reg: Reg) -> u64 {
        let sel = |s: u8| u64::from(self.seg[s as usize].sel);
        match reg {
            Reg::Rax => self.r[0],
            Reg::Rcx => self.r[1],
            Reg::Rdx => self.r[2],
            Reg::Rbx => self.r[3],
            Reg::Rsp => self.r[4],
            Reg::Rbp => self.r[5],
            Reg::Rsi => self.r[6],
            Reg::Rdi => self.r[7],
            Reg::R8 => self.r[8],
            Reg::R9 => self.r[9],
            Reg::R10 => self.r[10],
            Reg::R11 => self.r[11],
            Reg::R12 => self.r[12],
            Reg::R13 => self.r[13],
            Reg::R14 => self.r[14],
            Reg::R15 => self.r[15],
            Reg::Cr0 => self.cr0,
            Reg::Cr2 => self.cr2,
            Reg::Cr3 => self.cr3,
            Reg::Cr4 => self.cr4,
            Reg::Rip => self.rip,
            Reg::Rflags => self.get_rflags(),
            Reg::Es => sel(ES),
            Reg::Cs => sel(CS),
            Reg::Ss => sel(SS),
            Reg::Ds => sel(DS),
            Reg::Fs => sel(FS),
            Reg::Gs => sel(GS),
            Reg::Ldtr => u64::from(self.ldtr.sel),
            Reg::Tr => u64::from(self.tr.sel),
            Reg::Idtr => self.idtr.base,
            Reg::Gdtr => self.gdtr.base,
            Reg::Efer => self.efer,
            Reg::Pdpte0 => self.pdpte[0],
            Reg::Pdpte1 => self.pdpte[1],
            Reg::Pdpte2 => self.pdpte[2],
            Reg::Pdpte3 => self.pdpte[3],
            Reg::IntrShadow => u64::from(self.shadow),
            Reg::Dr0 => self.dr[0],
            Reg::Dr1 => self.dr[1],
            Reg::Dr2 => self.dr[2],
            Reg::Dr3 => self.dr[3],
            Reg::Dr6 => self.dr6,
            Reg::Dr7 => self.dr7,
            Reg::EntryInstLength => 0,
            Reg::FsBase => self.seg[FS as usize].base,
            Reg::GsBase => self.seg[GS as usize].base,
            Reg::KgsBase => self.msr.kernel_gs_base,
            // The APIC has it; `Vcpu` answers before it comes here.
            Reg::Tpr => 0,
        }
    }

    /// Set a register, with the bits that it has; nothing is checked, as for a hypervisor.
    pub fn set_reg(&mut self, reg: Reg, v: u64) {
        match reg {
            Reg::Rax => self.r[0] = v,
            Reg::Rcx => self.r[1] = v,
            Reg::Rdx => self.r[2] = v,
            Reg::Rbx => self.r[3] = v,
            Reg::Rsp => self.r[4] = v,
            Reg::Rbp => self.r[5] = v,
            Reg::Rsi => self.r[6] = v,
            Reg::Rdi => self.r[7] = v,
            Reg::R8 => self.r[8] = v,
            Reg::R9 => self.r[9] = v,
            Reg::R10 => self.r[10] = v,
            Reg::R11 => self.r[11] = v,
            Reg::R12 => self.r[12] = v,
            Reg::R13 => self.r[13] = v,
            Reg::R14 => self.r[14] = v,
            Reg::R15 => self.r[15] = v,
            Reg::Cr0 => self.cr0 = v,
            Reg::Cr2 => self.cr2 = v,
            Reg::Cr3 => self.cr3 = v,
            Reg::Cr4 => self.cr4 = v,
            Reg::Rip => {
                self.rip = v;
                // Userland moved on: what it had answered belongs to another instruction.
                self.forget_access();
            }
            Reg::Rflags => self.set_rflags(v),
            Reg::Es => self.seg[ES as usize].sel = v as u16,
            Reg::Cs => self.seg[CS as usize].sel = v as u16,
            Reg::Ss => self.seg[SS as usize].sel = v as u16,
            Reg::Ds => self.seg[DS as usize].sel = v as u16,
            Reg::Fs => self.seg[FS as usize].sel = v as u16,
            Reg::Gs => self.seg[GS as usize].sel = v as u16,
            Reg::Ldtr => self.ldtr.sel = v as u16,
            Reg::Tr => self.tr.sel = v as u16,
            Reg::Idtr => self.idtr.base = v,
            Reg::Gdtr => self.gdtr.base = v,
            Reg::Efer => self.efer = v,
            Reg::Pdpte0 => self.pdpte[0] = v,
            Reg::Pdpte1 => self.pdpte[1] = v,
            Reg::Pdpte2 => self.pdpte[2] = v,
            Reg::Pdpte3 => self.pdpte[3] = v,
            Reg::IntrShadow => self.shadow = v & 1 != 0,
            Reg::Dr0 => self.dr[0] = v,
            Reg::Dr1 => self.dr[1] = v,
            Reg::Dr2 => self.dr[2] = v,
            Reg::Dr3 => self.dr[3] = v,
            Reg::Dr6 => self.dr6 = v & 0xFFFF_FFFF,
            Reg::Dr7 => self.dr7 = v & 0xFFFF_FFFF | 0x400,
            Reg::EntryInstLength => {}
            Reg::FsBase => self.seg[FS as usize].base = v,
            Reg::GsBase => self.seg[GS as usize].base = v,
            Reg::KgsBase => self.msr.kernel_gs_base = v,
            Reg::Tpr => {}
        }
        if matches!(reg, Reg::Cr0 | Reg::Cr3 | Reg::Cr4 | Reg::Efer) {
            self.flush_tlb();
        }
        self.follow_cpl();
        self.mode_changed();
    }

    /// A processor's CPL is SS's DPL; in real mode 0, in v8086 mode 3.
    fn follow_cpl(&mut self) {
        self.cpl = if self.cr0 & cr0::PE == 0 {
            0
        } else if self.v86() {
            3
        } else {
            acc::dpl(self.seg[SS as usize].access)
        };
    }

    fn segment(&mut self, reg: Reg) -> Option<&mut Seg> {
        Some(match reg {
            Reg::Es => &mut self.seg[ES as usize],
            Reg::Cs => &mut self.seg[CS as usize],
            Reg::Ss => &mut self.seg[SS as usize],
            Reg::Ds => &mut self.seg[DS as usize],
            Reg::Fs => &mut self.seg[FS as usize],
            Reg::Gs => &mut self.seg[GS as usize],
            Reg::Ldtr => &mut self.ldtr,
            Reg::Tr => &mut self.tr,
            _ => return None,
        })
    }

    /// The hidden part of a segment register, or GDTR/IDTR (whose access is 0).
    pub fn get_desc(&mut self, reg: Reg) -> SegDesc {
        match reg {
            Reg::Gdtr => {
                SegDesc { base: self.gdtr.base, limit: u32::from(self.gdtr.limit), access: 0 }
            }
            Reg::Idtr => {
                SegDesc { base: self.idtr.base, limit: u32::from(self.idtr.limit), access: 0 }
            }
            r => match self.segment(r) {
                Some(s) => SegDesc { base: s.base, limit: s.limit, access: s.access },
                None => SegDesc { base: 0, limit: 0, access: 0 },
            },
        }
    }

    pub fn set_desc(&mut self, reg: Reg, d: SegDesc) {
        match reg {
            Reg::Gdtr => self.gdtr = TableReg { base: d.base, limit: d.limit as u16 },
            Reg::Idtr => self.idtr = TableReg { base: d.base, limit: d.limit as u16 },
            r => {
                if let Some(s) = self.segment(r) {
                    (s.base, s.limit, s.access) = (d.base, d.limit, d.access & 0x1_F0FF);
                }
            }
        }
        self.follow_cpl();
        self.mode_changed();
    }

    fn forget_access(&mut self) {
        self.asked = None;
        self.answer = None;
        self.replay.clear();
        self.replay_pos = 0;
    }

    /// Answer of userland to the read that `run` returned for.
    pub fn complete(&mut self, value: u64) {
        self.answer = Some(value);
    }

    /// Deliver an exception before the next instruction.  With `restart` the instruction that
    /// `run` returned for is the faulting one; without it, it counts as done.
    pub fn inject_exception(&mut self, vector: u8, error: Option<u32>, restart: bool) {
        if restart {
            self.forget_access();
        }
        let payload = if vector == vec::PF { self.cr2 } else { 0 };
        self.injected = Some(Exc { vector, error, payload });
    }

    pub fn inject_nmi(&mut self) {
        self.nmi_pending = true;
    }

    /// vmm's intinfo words: the event being injected, and one behind it (always 0 here).
    pub fn get_intinfo(&self) -> (u64, u64) {
        let info = self.injected.map_or(0, |e| {
            let error = e.error.map_or(0, |c| u64::from(c) << 32 | 1 << 11);
            u64::from(e.vector) | 3 << 8 | 1 << 31 | error
        });
        (info, 0)
    }

    pub fn set_intinfo(&mut self, info: u64) {
        if info & 1 << 31 == 0 {
            self.injected = None;
            return;
        }
        let error = (info & 1 << 11 != 0).then_some((info >> 32) as u32);
        self.inject_exception(info as u8, error, true);
    }

    pub fn save(&self) -> CpuState {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.r[..16]);
        CpuState {
            version: VERSION,
            gpr,
            rip: self.rip,
            rflags: self.get_rflags(),
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            xcr0: self.xcr0,
            efer: self.efer,
            seg: self.seg,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cpl: self.cpl,
            dr: self.dr,
            dr6: self.dr6,
            dr7: self.dr7,
            pdpte: self.pdpte,
            msr: self.msr.clone(),
            ymm: self.ymm,
            fcw: self.fpu.fcw,
            fsw: self.fpu.fsw,
            ftw: self.fpu.ftw,
            fop: self.fpu.fop,
            fip: self.fpu.fip,
            fdp: self.fpu.fdp,
            mxcsr: self.fpu.mxcsr,
            st: self.fpu.st,
            shadow: self.shadow,
            nmi_blocked: self.nmi_blocked,
            nmi_pending: self.nmi_pending,
            halted: self.halted,
            wait_sipi: self.wait_sipi,
            injected: self.injected,
            asked: self.asked,
            answer: self.answer,
            replay: self.replay.clone(),
        }
    }

    /// Take over a state; what no processor could be in is refused.
    pub fn restore(&mut self, s: CpuState) -> Result<(), String> {
        if s.version != VERSION {
            return Err(format!(
                "processor state version {} (this program has {VERSION})",
                s.version
            ));
        }
        if s.cpl > 3 || s.mxcsr & !0xFFFF != 0 || s.xcr0 & !7 != 0 || s.xcr0 & 1 == 0 {
            return Err("processor state holds impossible values (CPL, MXCSR or XCR0)".into());
        }
        self.r[..16].copy_from_slice(&s.gpr);
        self.rip = s.rip;
        (self.cr0, self.cr2, self.cr3, self.cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
        (self.xcr0, self.efer) = (s.xcr0, s.efer);
        (self.seg, self.ldtr, self.tr) = (s.seg, s.ldtr, s.tr);
        (self.gdtr, self.idtr, self.cpl) = (s.gdtr, s.idtr, s.cpl);
        (self.dr, self.dr6, self.dr7, self.pdpte) = (s.dr, s.dr6, s.dr7, s.pdpte);
        self.msr = s.msr;
        self.ymm = s.ymm;
        self.fpu = Fpu {
            fcw: s.fcw,
            fsw: s.fsw,
            ftw: s.ftw,
            fop: s.fop,
            fip: s.fip,
            fdp: s.fdp,
            mxcsr: s.mxcsr,
            st: s.st,
        };
        (self.shadow, self.nmi_blocked, self.nmi_pending) =
            (s.shadow, s.nmi_blocked, s.nmi_pending);
        (self.halted, self.wait_sipi, self.injected) = (s.halted, s.wait_sipi, s.injected);
        (self.asked, self.answer, self.replay) = (s.asked, s.answer, s.replay);
        self.replay_pos = 0;
        // The APIC may hold an interrupt that arrived before.
        self.intr = true;
        self.set_rflags(s.rflags);
        self.flush_tlb();
        self.mode_changed();
        Ok(())
    }
}

impl Fpu {
    /// After FNINIT, with MXCSR as at reset.
    pub const RESET: Fpu =
        Fpu { fcw: 0x37F, fsw: 0, ftw: 0, fop: 0, fip: 0, fdp: 0, mxcsr: 0x1F80, st: [[0; 2]; 8] };
}
