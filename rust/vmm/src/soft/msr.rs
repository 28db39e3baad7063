//! Model-specific registers.
//!
//! What changes the processor or must be remembered is here; what bhyve answers in userland
//! (its xmsr.c) leaves as an exit, and so does every number that nobody knows.  Intel SDM 4,
//! AMD APM 2 appendix A.

use super::Cpu;
use super::cpuid::{amd, efer_mask};
use super::mmu::{MAXPHYADDR, canonical};
use super::op::{FS, GS};
use super::state::*;
use crate::exit::Exit;
use crate::platform::{NotDecoded, Platform};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;

/// Numbers, with the SDM's or the APM's names.
mod nr {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1B;
    pub const TSC_ADJUST: u32 = 0x3B;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_SIGN_ID: u32 = 0x8B;
    pub const PLATFORM_INFO: u32 = 0xCE;
    pub const MTRRCAP: u32 = 0xFE;
    pub const ARCH_CAPABILITIES: u32 = 0x10A;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17A;
    pub const MISC_ENABLE: u32 = 0x1A0;
    pub const TURBO_RATIO_LIMIT: u32 = 0x1AD;
    pub const MTRR_PHYSBASE0: u32 = 0x200;
    pub const MTRR_PHYSMASK9: u32 = 0x213;
    pub const MTRR_FIX64K: u32 = 0x250;
    pub const MTRR_FIX16K_80000: u32 = 0x258;
    pub const MTRR_FIX16K_A0000: u32 = 0x259;
    pub const MTRR_FIX4K_C0000: u32 = 0x268;
    pub const MTRR_FIX4K_F8000: u32 = 0x26F;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2FF;
    pub const TSC_DEADLINE: u32 = 0x6E0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_LAST: u32 = 0x8FF;
    pub const EFER: u32 = 0xC000_0080;
    pub const STAR: u32 = 0xC000_0081;
    pub const LSTAR: u32 = 0xC000_0082;
    pub const CSTAR: u32 = 0xC000_0083;
    pub const SFMASK: u32 = 0xC000_0084;
    pub const FS_BASE: u32 = 0xC000_0100;
    pub const GS_BASE: u32 = 0xC000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
    pub const TSC_AUX: u32 = 0xC000_0103;
    pub const SYSCFG: u32 = 0xC001_0010;
    pub const TOP_MEM: u32 = 0xC001_001A;
    pub const TOP_MEM2: u32 = 0xC001_001D;
}

/// IA32_ARCH_CAPABILITIES: RDCL_NO IBRS_ALL SKIP_L1DFL_VMENTRY SSB_NO MDS_NO PSCHANGE_MC_NO TAA_NO
/// SBDR_SSDP_NO FBSDP_NO PSDP_NO BHI_NO PBRSB_NO GDS_NO RFDS_NO ITS_NO.  Nothing here speculates.
const ARCH_CAPABILITIES: u64 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;
/// Write-combining, fixed ranges, ten variable ones.
const MTRRCAP: u64 = 1 << 10 | 1 << 8 | VARIABLE_MTRRS as u64;
const VARIABLE_MTRRS: usize = 10;
/// Fast strings; no BTS, no PEBS.
const MISC_ENABLE: u64 = 1 << 12 | 1 << 11 | 1;
/// MISC_ENABLE bits that software may change: fast strings, and those that firmware and
/// kernels clear to be safe (limit CPUID, XD disable); neither has an effect here.
const MISC_ENABLE_WRITABLE: u64 = 1 << 34 | 1 << 22 | 1;

/// Registers that are not part of another piece of the processor's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u32,
    pub pat: u64,
    spec_ctrl: u64,
    misc_enable: u64,
    mcg_status: u64,
    mtrr_def_type: u64,
    mtrr_fixed: [u64; 11],
    /// Base and mask.
    mtrr_variable: [[u64; 2]; VARIABLE_MTRRS],
    syscfg: u64,
    top_mem: [u64; 2],
}

impl Default for Msrs {
    /// As after a reset.
    fn default() -> Self {
        Msrs {
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            pat: 0x0007_0406_0007_0406,
            spec_ctrl: 0,
            misc_enable: MISC_ENABLE,
            mcg_status: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [[0; 2]; VARIABLE_MTRRS],
            syscfg: 0,
            top_mem: [0; 2],
        }
    }
}

/// Index of a fixed-range MTRR.
fn fixed_mtrr(msr: u32) -> Option<usize> {
    Some(match msr {
        nr::MTRR_FIX64K => 0,
        nr::MTRR_FIX16K_80000 => 1,
        nr::MTRR_FIX16K_A0000 => 2,
        nr::MTRR_FIX4K_C0000..=nr::MTRR_FIX4K_F8000 => (3 + msr - nr::MTRR_FIX4K_C0000) as usize,
        _ => return None,
    })
}

/// UC WC WT WP WB; the PAT has UC- (7) besides.
fn memory_types(value: u64, uc_minus: bool) -> bool {
    value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4 | 5 | 6) || uc_minus && *t == 7)
}

fn fits(value: u64, bits: u32) -> bool {
    value >> bits == 0
}

impl Msrs {
    /// Registers that only hold a value.
    fn stored(&self, msr: u32) -> Option<u64> {
        Some(match msr {
            nr::STAR => self.star,
            nr::LSTAR => self.lstar,
            nr::CSTAR => self.cstar,
            nr::SFMASK => self.sfmask,
            nr::KERNEL_GS_BASE => self.kernel_gs_base,
            nr::SYSENTER_CS => self.sysenter_cs,
            nr::SYSENTER_ESP => self.sysenter_esp,
            nr::SYSENTER_EIP => self.sysenter_eip,
            nr::TSC_AUX => self.tsc_aux.into(),
            nr::PAT => self.pat,
            nr::MCG_STATUS => self.mcg_status,
            nr::MTRRCAP => MTRRCAP,
            nr::MTRR_DEF_TYPE => self.mtrr_def_type,
            nr::MTRR_PHYSBASE0..=nr::MTRR_PHYSMASK9 => {
                let i = (msr - nr::MTRR_PHYSBASE0) as usize;
                self.mtrr_variable[i / 2][i % 2]
            }
            // No banks: nothing in this machine fails by parity.
            nr::MCG_CAP => 0,
            nr::SPEC_CTRL if !amd() => self.spec_ctrl,
            nr::ARCH_CAPABILITIES if !amd() => ARCH_CAPABILITIES,
            nr::MISC_ENABLE if !amd() => self.misc_enable,
            nr::BIOS_SIGN_ID if amd() => 0,
            nr::SYSCFG if amd() => self.syscfg,
            nr::TOP_MEM if amd() => self.top_mem[0],
            nr::TOP_MEM2 if amd() => self.top_mem[1],
            _ => self.mtrr_fixed[fixed_mtrr(msr)?],
        })
    }

    /// None: not one of them; Some(false): #GP.
    fn store(&mut self, msr: u32, value: u64) -> Option<bool> {
        let physical = fits(value, MAXPHYADDR);
        let (slot, good) = match msr {
            nr::STAR => (&mut self.star, true),
            nr::LSTAR => (&mut self.lstar, canonical(value)),
            nr::CSTAR => (&mut self.cstar, canonical(value)),
            nr::SFMASK if amd() => {
                self.sfmask = value & 0xFFFF_FFFF;
                return Some(true);
            }
            nr::SFMASK => (&mut self.sfmask, fits(value, 32)),
            nr::KERNEL_GS_BASE => (&mut self.kernel_gs_base, canonical(value)),
            nr::SYSENTER_CS => {
                self.sysenter_cs = value & 0xFFFF_FFFF;
                return Some(true);
            }
            nr::SYSENTER_ESP => (&mut self.sysenter_esp, canonical(value)),
            nr::SYSENTER_EIP => (&mut self.sysenter_eip, canonical(value)),
            nr::TSC_AUX => {
                let good = amd() || fits(value, 32);
                if good {
                    self.tsc_aux = value as u32;
                }
                return Some(good);
            }
            nr::PAT => (&mut self.pat, memory_types(value, true)),
            nr::MCG_STATUS => (&mut self.mcg_status, fits(value, 3)),
            nr::MTRR_DEF_TYPE => {
                let good = value & !0xCFF == 0 && memory_types(value & 0xFF, false);
                (&mut self.mtrr_def_type, good)
            }
            nr::MTRR_PHYSBASE0..=nr::MTRR_PHYSMASK9 => {
                let i = (msr - nr::MTRR_PHYSBASE0) as usize;
                let good = physical
                    && if i.is_multiple_of(2) {
                        value & 0xF00 == 0 && memory_types(value & 0xFF, false)
                    } else {
                        value & 0x7FF == 0
                    };
                (&mut self.mtrr_variable[i / 2][i % 2], good)
            }
            nr::MTRRCAP | nr::MCG_CAP => return Some(false),
            nr::ARCH_CAPABILITIES if !amd() => return Some(false),
            nr::SPEC_CTRL if !amd() => (&mut self.spec_ctrl, value & !3 == 0),
            // Forgets predictions, of which there are none.
            nr::PRED_CMD if !amd() => return Some(value & !1 == 0),
            nr::MISC_ENABLE if !amd() => {
                let kept = MISC_ENABLE & !MISC_ENABLE_WRITABLE;
                self.misc_enable = value & MISC_ENABLE_WRITABLE | kept;
                return Some(true);
            }
            // TOM2 and MTRR extensions: firmware sets them, nothing depends on them.
            nr::SYSCFG if amd() => (&mut self.syscfg, fits(value, 32)),
            nr::TOP_MEM if amd() => (&mut self.top_mem[0], physical),
            nr::TOP_MEM2 if amd() => (&mut self.top_mem[1], physical),
            _ => (&mut self.mtrr_fixed[fixed_mtrr(msr)?], memory_types(value, false)),
        };
        if good {
            *slot = value;
        }
        Some(good)
    }
}

impl Cpu {
    /// RDMSR without its privilege check; raises #GP, or leaves for userland.
    pub fn rdmsr(&mut self, msr: u32) -> Result<u64, Stop> {
        if let Some(v) = self.msr.stored(msr) {
            return Ok(v);
        }
        let p: &dyn Platform = self.vm();
        let vcpu = self.vcpu();
        let ratio = (p.tsc_hz() / 100_000_000) & 0xFF;
        Ok(match msr {
            nr::EFER => self.efer,
            nr::FS_BASE => self.seg[FS as usize].base,
            nr::GS_BASE => self.seg[GS as usize].base,
            nr::TSC => p.tsc(self.id),
            nr::TSC_ADJUST => vcpu.tsc_adjust.load(Ordering::Relaxed),
            nr::TSC_DEADLINE => vcpu.lapic.tsc_deadline(),
            nr::APIC_BASE => vcpu.lapic.apicbase(),
            nr::X2APIC_FIRST..=nr::X2APIC_LAST => match vcpu.lapic.msr_read(p, msr) {
                Ok(v) => v,
                Err(NotDecoded) => return Err(self.gp(0)),
            },
            // Maximum and minimum ratio to a bus of 100 MHz.
            nr::PLATFORM_INFO if !amd() => ratio << 8 | ratio << 40,
            nr::TURBO_RATIO_LIMIT if !amd() => ratio * 0x0101_0101_0101_0101,
            _ => return self.replayed(msr.into(), 8, false, None, |_| Exit::Rdmsr { msr }),
        })
    }

    /// WRMSR without its privilege check.
    pub fn wrmsr(&mut self, msr: u32, value: u64) -> Result<(), Stop> {
        match self.msr.store(msr, value) {
            Some(true) => return Ok(()),
            Some(false) => return Err(self.gp(0)),
            None => {}
        }
        let p: &dyn Platform = self.vm();
        let vcpu = self.vcpu();
        let accepted = match msr {
            nr::EFER => return self.write_efer(value),
            nr::FS_BASE | nr::GS_BASE => {
                if !canonical(value) {
                    return Err(self.gp(0));
                }
                self.set_base(if msr == nr::FS_BASE { FS } else { GS }, value);
                true
            }
            nr::TSC | nr::TSC_ADJUST => {
                let adjust = vcpu.tsc_adjust.load(Ordering::Relaxed);
                let new = if msr == nr::TSC {
                    adjust.wrapping_add(value.wrapping_sub(p.tsc(self.id)))
                } else {
                    value
                };
                vcpu.tsc_adjust.store(new, Ordering::Relaxed);
                vcpu.lapic.tsc_changed(p);
                true
            }
            nr::TSC_DEADLINE => {
                vcpu.lapic.set_tsc_deadline(p, value);
                true
            }
            nr::X2APIC_FIRST..=nr::X2APIC_LAST => vcpu.lapic.msr_write(p, msr, value).is_ok(),
            // bhyve: a base or mode that it refuses is userland's.
            nr::APIC_BASE if vcpu.lapic.set_apicbase(p, value).is_ok() => true,
            nr::PLATFORM_INFO | nr::TURBO_RATIO_LIMIT if !amd() => false,
            // Loads microcode; reports none.
            nr::BIOS_SIGN_ID if amd() => true,
            _ => {
                let exit = |_| Exit::Wrmsr { msr, value };
                return self.replayed(msr.into(), 8, false, Some(value), exit).map(|_| ());
            }
        };
        if accepted { Ok(()) } else { Err(self.gp(0)) }
    }

    fn write_efer(&mut self, value: u64) -> Result<(), Stop> {
        let switches_lme = (value ^ self.efer) & efer::LME != 0;
        if value & !efer_mask() != 0 || switches_lme && self.cr0 & cr0::PG != 0 {
            return Err(self.gp(0));
        }
        let value = value & !efer::LMA | self.efer & efer::LMA;
        let flush = (value ^ self.efer) & efer::NXE != 0;
        self.efer = value;
        if flush {
            self.flush_tlb();
        }
        Ok(())
    }

    /// Set the base of FS or GS.
    pub fn set_base(&mut self, seg: u8, base: u64) {
        self.seg[seg as usize].base = base;
        self.seg_base[seg as usize] = base;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_types_are_checked() {
        let mut m = Msrs::default();
        for (msr, value, good) in [
            (nr::PAT, 0x0007_0106_0007_0406, true),
            (nr::PAT, 0x0002, false),
            (nr::MTRR_DEF_TYPE, 0xC06, true),
            (nr::MTRR_DEF_TYPE, 0xC07, false),
            (nr::MTRR_DEF_TYPE, 0x1000, false),
            (nr::MTRR_FIX4K_F8000, 0x0606_0606_0606_0606, true),
            (nr::MTRR_FIX64K, 3, false),
            (nr::MTRR_PHYSBASE0, 0xC000_0000, true),
            (nr::MTRR_PHYSBASE0 + 1, 0xFF_C000_0800, true),
            (nr::MTRR_PHYSMASK9, 1 << MAXPHYADDR, false),
            (nr::MTRRCAP, MTRRCAP, false),
        ] {
            let before = m.stored(msr);
            assert_eq!(m.store(msr, value), Some(good), "{msr:#x} <- {value:#x}");
            assert_eq!(m.stored(msr), if good { Some(value) } else { before }, "{msr:#x}");
        }
    }

    #[test]
    fn every_mtrr_has_its_own_place() {
        let mut m = Msrs::default();
        let all: Vec<u32> = (nr::MTRR_PHYSBASE0..=nr::MTRR_PHYSMASK9)
            .chain([nr::MTRR_FIX64K, nr::MTRR_FIX16K_80000, nr::MTRR_FIX16K_A0000])
            .chain(nr::MTRR_FIX4K_C0000..=nr::MTRR_FIX4K_F8000)
            .collect();
        let value = |i: usize, msr: u32| match msr {
            nr::MTRR_PHYSBASE0..=nr::MTRR_PHYSMASK9 => (i as u64 + 1) << 12,
            _ => {
                let types = [0, 1, 4, 5, 6];
                u64::from_le_bytes([types[i % 5], types[i / 5 % 5], types[i / 25], 0, 0, 0, 0, 0])
            }
        };
        for (i, &msr) in all.iter().enumerate() {
            assert_eq!(m.store(msr, value(i, msr)), Some(true), "{msr:#x}");
        }
        for (i, &msr) in all.iter().enumerate() {
            assert_eq!(m.stored(msr), Some(value(i, msr)), "{msr:#x}");
        }
        for msr in [nr::EFER, nr::FS_BASE, nr::X2APIC_FIRST, 0x4000_0000] {
            assert_eq!(m.stored(msr), None, "{msr:#x} is not plain storage");
        }
    }

    #[test]
    fn state_survives_serialisation() {
        let mut m = Msrs::default();
        m.store(nr::LSTAR, 0xFFFF_8000_0000_1000);
        m.store(nr::TSC_AUX, 7);

        let json = serde_json::to_string(&m).unwrap();

        assert_eq!(serde_json::from_str::<Msrs>(&json).unwrap(), m);
    }
}
