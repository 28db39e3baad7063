//! Instructions of kernels: control, debug and model-specific registers, the flags that matter
//! to them, system calls, ports, software interrupts.
//!
//! Intel SDM 2 and AMD APM 3, by instruction; the vendors differ in SYSCALL and SYSENTER.

use super::Cpu;
use super::cpuid::{self, amd};
use super::decode::{Next, Slow, reg_index, reg_offset, seg_index};
use super::excp::Kind;
use super::mmu::{MAXPHYADDR, Right, canonical};
use super::op::*;
use super::seg;
use super::state::*;
use crate::caps::Caps;
use crate::exit::Exit;
use crate::platform::Platform;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

/// RDX, RCX and so on as indices into `Cpu::r`.
const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;
const R11: usize = 11;

/// DR6: MOV DR while DR7.GD is set.
const DR6_BD: u64 = 1 << 13;
const DR7_GD: u64 = 1 << 13;
/// Bits of DR6 and DR7 that can be written, and those that read as 1.
const DR6_WRITABLE: u64 = 0xE00F;
const DR6_ONES: u64 = 0xFFFF_0FF0;
const DR7_WRITABLE: u64 = 0xFFFF_23FF;
const DR7_ONES: u64 = 0x400;

/// CR3: keep the translations of the address space that is entered.
const CR3_KEEP: u64 = 1 << 63;

/// Offset of the I/O permission bitmap's offset in a 32- or 64-bit TSS.
const TSS_IO_MAP: u64 = 0x66;

// -- operands ----------------------------------------------------------------------------------

/// Effective address of the memory operand.
fn effective_address(cpu: &Cpu, i: &Instruction) -> u64 {
    let (base, index) = (i.memory_base(), i.memory_index());
    let register = |r: Register| match r {
        Register::None => 0,
        // iced adds the address of the following instruction, as it was when it was decoded.
        Register::RIP | Register::EIP => cpu.rip.wrapping_sub(i.ip()),
        r => cpu.r[reg_index(r) as usize],
    };
    let bytes = match (base, index) {
        (Register::None, Register::None) => i.memory_displ_size(),
        (Register::None, r) | (r, _) => r.size() as u32,
    };
    let ea = register(base)
        .wrapping_add(register(index).wrapping_mul(i.memory_index_scale().into()))
        .wrapping_add(i.memory_displacement64());
    match bytes {
        2 => ea & 0xFFFF,
        4 => ea & 0xFFFF_FFFF,
        _ => ea,
    }
}

/// Linear address of `size` bytes at `ea` in a segment, checked; raises #GP or #SS.
fn segment_lin(cpu: &mut Cpu, s: u8, ea: u64, size: u64, write: bool) -> Result<u64, Stop> {
    if !cpu.code64() {
        return cpu.lin_checked(s, ea, size, write);
    }
    let lin = cpu.seg_base[s as usize].wrapping_add(ea);
    if canonical(lin) && canonical(lin.wrapping_add(size - 1)) {
        return Ok(lin);
    }
    Err(cpu.raise(if s == SS { vec::SS } else { vec::GP }, Some(0)))
}

/// Linear address of an instruction's memory operand of `size` bytes, checked; for slow handlers.
pub fn operand_lin(cpu: &mut Cpu, i: &Instruction, size: u64, write: bool) -> Result<u64, Stop> {
    let ea = effective_address(cpu, i);
    segment_lin(cpu, seg_index(i.memory_segment()), ea, size, write)
}

/// A 16-bit register or memory operand.
pub fn read_rm16(cpu: &mut Cpu, i: &Instruction, op: u32) -> Result<u16, Stop> {
    if i.op_kind(op) == OpKind::Memory {
        let lin = operand_lin(cpu, i, 2, false)?;
        return cpu.ld(lin);
    }
    Ok(cpu.get(reg_offset(i.op_register(op))))
}

/// Write operand 0: a register in its whole size, memory as 16 bits.
pub fn write_rm(cpu: &mut Cpu, i: &Instruction, v: u64) -> Result<(), Stop> {
    if i.op0_kind() == OpKind::Memory {
        let lin = operand_lin(cpu, i, 2, true)?;
        return cpu.st(lin, v as u16);
    }
    let r = i.op0_register();
    match r.size() {
        2 => cpu.set(reg_offset(r), v as u16),
        4 => cpu.set(reg_offset(r), v as u32),
        _ => cpu.set(reg_offset(r), v),
    }
    Ok(())
}

/// The low half of a register.
fn low(cpu: &Cpu, r: usize) -> u32 {
    cpu.r[r] as u32
}

/// Set EDX:EAX, clearing the upper halves.
fn set_edx_eax(cpu: &mut Cpu, v: u64) {
    cpu.r[RAX] = v & 0xFFFF_FFFF;
    cpu.r[RDX] = v >> 32;
}

fn edx_eax(cpu: &Cpu) -> u64 {
    u64::from(low(cpu, RDX)) << 32 | u64::from(low(cpu, RAX))
}

// -- privilege ---------------------------------------------------------------------------------

impl Cpu {
    /// #GP(0) outside of level 0.
    pub fn need_cpl0(&mut self) -> Result<(), Stop> {
        if self.cpl == 0 { Ok(()) } else { Err(self.gp(0)) }
    }

    /// CR4.UMIP keeps SGDT, SIDT, SLDT, SMSW and STR from programs.
    pub fn check_umip(&mut self) -> Result<(), Stop> {
        if self.cr4 & cr4::UMIP != 0 && self.cpl != 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    /// Whether `size` bytes at a port may be accessed: IOPL, then the TSS's bitmap.
    pub fn check_io(&mut self, port: u16, size: u8) -> Result<(), Stop> {
        if self.cr0 & cr0::PE == 0 || !self.v86() && self.cpl <= self.iopl() {
            return Ok(());
        }
        let wide = self.tr.access & (seg::sys_type::WIDE | acc::P) == seg::sys_type::WIDE | acc::P;
        if wide && self.tr.limit >= 0x67 {
            let map: u16 = self.ld_sys(self.tr.base.wrapping_add(TSS_IO_MAP))?;
            let at = u32::from(map) + u32::from(port >> 3);
            // Two bytes are read always.
            if at < self.tr.limit {
                let bits: u16 = self.ld_sys(self.tr.base.wrapping_add(at.into()))?;
                if bits >> (port & 7) & ((1 << size) - 1) == 0 {
                    return Ok(());
                }
            }
        }
        Err(self.gp(0))
    }
}

// -- control and debug registers ---------------------------------------------------------------

impl Cpu {
    /// MOV to CR0, LMSW.
    pub fn write_cr0(&mut self, v: u64) -> Result<(), Stop> {
        use cr0::*;
        let old = self.cr0;
        let new = v & (PE | MP | EM | TS | NE | WP | AM | NW | CD | PG) | ET;
        let paging = new & PG != 0;
        let starts = paging && old & PG == 0;
        let stops = !paging && old & PG != 0;
        let bad = v >> 32 != 0
            || paging && new & PE == 0
            || new & NW != 0 && new & CD == 0
            || stops && (self.code64() || self.cr4 & cr4::PCIDE != 0);
        let activates = starts && self.efer & efer::LME != 0;
        let bad_long = activates
            && (self.cr4 & cr4::PAE == 0
                || self.seg[CS as usize].access & acc::L != 0
                || self.tr.access & seg::sys_type::WIDE == 0);
        if bad || bad_long {
            return Err(self.gp(0));
        }
        let pae = paging && self.cr4 & cr4::PAE != 0 && self.efer & efer::LME == 0;
        if pae && (old ^ new) & (PG | CD | NW) != 0 {
            self.load_pdptes(self.cr3)?;
        }
        self.cr0 = new;
        if activates {
            self.efer |= efer::LMA;
        } else if stops {
            self.efer &= !efer::LMA;
        }
        if (old ^ new) & (PG | WP | PE) != 0 {
            self.flush_tlb();
        }
        self.mode_changed();
        Ok(())
    }

    /// MOV to CR3, and a task switch's change of address space.
    pub fn load_cr3(&mut self, v: u64) -> Result<(), Stop> {
        let pcide = self.cr4 & cr4::PCIDE != 0;
        let keep = pcide && v & CR3_KEEP != 0;
        let mut v = if pcide { v & !CR3_KEEP } else { v };
        if self.long_mode() {
            if v >> MAXPHYADDR != 0 {
                return Err(self.gp(0));
            }
        } else {
            v &= 0xFFFF_FFFF;
            if self.cr0 & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 {
                self.load_pdptes(v)?;
            }
        }
        self.cr3 = v;
        self.switch_space(keep);
        Ok(())
    }

    pub fn write_cr4(&mut self, v: u64) -> Result<(), Stop> {
        use cr4::*;
        let mut known = VME
            | PVI
            | TSD
            | DE
            | PSE
            | PAE
            | MCE
            | PGE
            | PCE
            | OSFXSR
            | OSXMMEXCPT
            | UMIP
            | FSGSBASE
            | PCIDE
            | SMEP
            | SMAP;
        if cpuid::xsave() {
            known |= OSXSAVE;
        }
        let changed = self.cr4 ^ v;
        let long = self.long_mode();
        let bad_pcide = changed & v & PCIDE != 0 && (!long || self.cr3 & 0xFFF != 0);
        if v & !known != 0 || long && v & PAE == 0 || bad_pcide {
            return Err(self.gp(0));
        }
        let pae = self.cr0 & cr0::PG != 0 && v & PAE != 0 && !long;
        if pae && changed & (PAE | PGE | PSE | SMEP) != 0 {
            self.load_pdptes(self.cr3)?;
        }
        self.cr4 = v;
        if changed & (PSE | PAE | PGE | PCIDE | SMEP | SMAP) != 0 {
            self.flush_tlb();
        }
        self.mode_changed();
        Ok(())
    }

    /// PAE paging's four registers; raises #GP for reserved bits.
    fn load_pdptes(&mut self, cr3: u64) -> Result<(), Stop> {
        const RESERVED: u64 = 0x1E6 | !((1 << MAXPHYADDR) - 1);
        let mut pdpte = [0; 4];
        for (i, e) in pdpte.iter_mut().enumerate() {
            *e = self.read_pte((cr3 & 0xFFFF_FFE0) + 8 * i as u64, true);
            if *e & 1 != 0 && *e & RESERVED != 0 {
                return Err(self.gp(0));
            }
        }
        self.pdpte = pdpte;
        Ok(())
    }
}

/// Number of a control or debug register.
fn number(r: Register, first: Register) -> u32 {
    r as u32 - first as u32
}

fn mov_from_cr(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    cpu.need_cpl0()?;
    let v = match i.op1_register() {
        Register::CR0 => cpu.cr0,
        Register::CR2 => cpu.cr2,
        Register::CR3 => cpu.cr3,
        Register::CR4 => cpu.cr4,
        Register::CR8 => cpu.vcpu().lapic.cr8().into(),
        _ => return Err(cpu.ud()),
    };
    write_rm(cpu, i, v)?;
    Ok(Next::Seq)
}

fn mov_to_cr(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let src = i.op1_register();
    let v = cpu.r[reg_index(src) as usize];
    let v = if src.size() == 4 { v & 0xFFFF_FFFF } else { v };
    cpu.need_cpl0()?;
    match i.op0_register() {
        Register::CR0 => cpu.write_cr0(v)?,
        Register::CR2 => cpu.cr2 = v,
        Register::CR3 => cpu.load_cr3(v)?,
        Register::CR4 => cpu.write_cr4(v)?,
        Register::CR8 if v < 16 => cpu.vcpu().lapic.set_cr8(cpu.vm(), v as u8),
        Register::CR8 => return Err(cpu.gp(0)),
        _ => return Err(cpu.ud()),
    }
    Ok(Next::Break)
}

/// The checks that MOV DR begins with; the register's number.
fn debug_register(cpu: &mut Cpu, r: Register) -> Result<u32, Stop> {
    let n = number(r, Register::DR0);
    if n > 7 || matches!(n, 4 | 5) && cpu.cr4 & cr4::DE != 0 {
        return Err(cpu.ud());
    }
    cpu.need_cpl0()?;
    if cpu.dr7 & DR7_GD != 0 {
        cpu.exc = Exc { vector: vec::DB, error: None, payload: DR6_BD };
        return Err(Stop::Exception);
    }
    Ok(n)
}

fn mov_from_dr(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let v = match debug_register(cpu, i.op1_register())? {
        n @ 0..=3 => cpu.dr[n as usize],
        4 | 6 => cpu.dr6,
        _ => cpu.dr7,
    };
    write_rm(cpu, i, v)?;
    Ok(Next::Seq)
}

fn mov_to_dr(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let src = i.op1_register();
    let v = cpu.r[reg_index(src) as usize];
    let v = if src.size() == 4 { v & 0xFFFF_FFFF } else { v };
    let n = debug_register(cpu, i.op0_register())?;
    if n >= 4 && v >> 32 != 0 {
        return Err(cpu.gp(0));
    }
    match n {
        0..=3 => cpu.dr[n as usize] = v,
        4 | 6 => cpu.dr6 = v & DR6_WRITABLE | DR6_ONES,
        _ => cpu.dr7 = v & DR7_WRITABLE | DR7_ONES,
    }
    cpu.mode_changed();
    Ok(Next::Break)
}

fn clts(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    cpu.need_cpl0()?;
    cpu.cr0 &= !cr0::TS;
    cpu.mode_changed();
    Ok(Next::Seq)
}

fn smsw(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    cpu.check_umip()?;
    write_rm(cpu, i, cpu.cr0)?;
    Ok(Next::Seq)
}

/// LMSW sets PE but does not clear it.
fn lmsw(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    cpu.need_cpl0()?;
    let v = u64::from(read_rm16(cpu, i, 0)?);
    cpu.write_cr0(cpu.cr0 & !0xE | v & 0xF)?;
    Ok(Next::Break)
}

fn invlpg(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    cpu.need_cpl0()?;
    let ea = effective_address(cpu, i);
    let lin = cpu.seg_base[seg_index(i.memory_segment()) as usize].wrapping_add(ea);
    let lin = if cpu.code64() { lin } else { lin & 0xFFFF_FFFF };
    if canonical(lin) {
        cpu.flush_page(lin);
    }
    Ok(Next::Break)
}

fn invpcid(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    cpu.need_cpl0()?;
    let kind = cpu.r[reg_index(i.op0_register()) as usize];
    let kind = if cpu.code64() { kind } else { kind & 0xFFFF_FFFF };
    let lin = operand_lin(cpu, i, 16, false)?;
    let mut b = [0; 16];
    cpu.read_lin(lin, &mut b, Right::Current)?;
    let pcid = u64::from_le_bytes(b[..8].try_into().expect("eight bytes"));
    let address = u64::from_le_bytes(b[8..].try_into().expect("eight bytes"));
    let single = kind <= 1;
    let bad = kind > 3
        || pcid >> 12 != 0
        || single && cpu.cr4 & cr4::PCIDE == 0 && pcid != 0
        || kind == 0 && !canonical(address);
    if bad {
        return Err(cpu.gp(0));
    }
    match kind {
        0 => cpu.flush_page(address),
        1 => cpu.flush_pcid(pcid as u16),
        _ => cpu.flush_tlb(),
    }
    Ok(Next::Break)
}

/// INVD, WBINVD, WBNOINVD: guest memory is always coherent.
fn cache_control(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    cpu.need_cpl0()?;
    Ok(Next::Seq)
}

fn clzero(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let ea = match i.code() {
        Code::Clzeroq => cpu.r[RAX],
        Code::Clzerod => cpu.r[RAX] & 0xFFFF_FFFF,
        _ => cpu.r[RAX] & 0xFFFF,
    } & !63;
    let s = match i.segment_prefix() {
        Register::None => DS,
        r => seg_index(r),
    };
    let lin = segment_lin(cpu, s, ea, 64, true)?;
    cpu.write_lin(lin, &[0; 64], Right::Current)?;
    Ok(Next::Seq)
}

fn xgetbv(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    let v = match low(cpu, RCX) {
        0 => cpu.xcr0,
        // What is in use; a processor may say so of a component in its initial state.
        1 if cpuid::xgetbv1() => cpu.xcr0,
        _ => return Err(cpu.gp(0)),
    };
    set_edx_eax(cpu, v);
    Ok(Next::Seq)
}

fn xsetbv(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    cpu.need_cpl0()?;
    let v = edx_eax(cpu);
    // x87 always; AVX not without SSE.
    if low(cpu, RCX) != 0 || v & !cpuid::xcr0_mask() != 0 || v & 1 == 0 || v & 6 == 4 {
        return Err(cpu.gp(0));
    }
    cpu.xcr0 = v;
    cpu.mode_changed();
    Ok(Next::Break)
}

// -- flags -------------------------------------------------------------------------------------

fn hlt(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    cpu.need_cpl0()?;
    cpu.halt()
}

/// Which flag CLI and STI change; raises #GP(0).
fn interrupt_flag(cpu: &mut Cpu) -> Result<u64, Stop> {
    if cpu.cpl <= cpu.iopl() {
        return Ok(fl::IF);
    }
    let bit = if cpu.v86() { cr4::VME } else { cr4::PVI };
    if cpu.cpl == 3 && cpu.cr4 & bit != 0 { Ok(fl::VIF) } else { Err(cpu.gp(0)) }
}

fn cli(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    let flag = interrupt_flag(cpu)?;
    cpu.rflags &= !flag;
    Ok(Next::Seq)
}

fn sti(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    let flag = interrupt_flag(cpu)?;
    if flag == fl::VIF {
        if cpu.rflags & fl::VIP != 0 {
            return Err(cpu.gp(0));
        }
    } else if cpu.rflags & fl::IF == 0 {
        cpu.shadow = true;
    }
    cpu.rflags |= flag;
    Ok(Next::Break)
}

/// STAC and CLAC.
fn set_ac(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    if i.mnemonic() == Mnemonic::Stac {
        cpu.rflags |= fl::AC;
    } else {
        cpu.rflags &= !fl::AC;
    }
    cpu.choose_bank();
    Ok(Next::Seq)
}

fn pushf(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let mut v = cpu.get_rflags() & !(fl::VM | fl::RF);
    if cpu.v86() && cpu.iopl() < 3 {
        if cpu.cr4 & cr4::VME == 0 || i.code() != Code::Pushfw {
            return Err(cpu.gp(0));
        }
        let vif = v & fl::VIF != 0;
        v = v & !fl::IF | fl::IOPL | if vif { fl::IF } else { 0 };
    }
    match i.code() {
        Code::Pushfw => cpu.push(v as u16)?,
        Code::Pushfd => cpu.push(v as u32)?,
        _ => cpu.push(v)?,
    }
    Ok(Next::Seq)
}

fn popf(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let (v, size) = match i.code() {
        Code::Popfw => (cpu.peek::<u16>(0)?.into(), 2),
        Code::Popfd => (cpu.peek::<u32>(0)?.into(), 4),
        _ => (cpu.peek::<u64>(0)?, 8),
    };
    let flags = if cpu.v86() && cpu.iopl() < 3 {
        if cpu.cr4 & cr4::VME == 0 || size != 2 {
            return Err(cpu.gp(0));
        }
        cpu.virtual_flags(v)?
    } else {
        let mut mask = fl::ARITH | fl::TF | fl::DF | fl::NT;
        if size != 2 {
            // RF is popped as 0.
            mask |= fl::AC | fl::ID;
        }
        if cpu.cpl <= cpu.iopl() {
            mask |= fl::IF;
        }
        if cpu.cpl == 0 {
            mask |= fl::IOPL;
        }
        cpu.get_rflags() & !(mask | fl::RF) | v & mask
    };
    cpu.set_sp(cpu.r[RSP].wrapping_add(size) & cpu.sp_mask);
    cpu.set_rflags(flags);
    Ok(Next::Break)
}

// -- system calls ------------------------------------------------------------------------------

/// A flat segment that SYSCALL and its like load without looking at a table.
fn flat(sel: u16, access: u32) -> Seg {
    Seg { sel, base: 0, limit: u32::MAX, access }
}

/// Access words: G, P, S; code is executable and readable, data writable; both accessed.
const FLAT_CODE64: u32 = 0xA09B;
const FLAT_CODE32: u32 = 0xC09B;
const FLAT_DATA: u32 = 0xC093;
const DPL3: u32 = 3 << 5;

/// Enter level 0 or 3 with flat segments; SS follows CS in the table by 8.
fn enter_flat(cpu: &mut Cpu, cs: u16, ss: u16, cpl: u8, long: bool) {
    let dpl = if cpl == 3 { DPL3 } else { 0 };
    let code = if long { FLAT_CODE64 } else { FLAT_CODE32 };
    cpu.seg[CS as usize] = flat(cs, code | dpl);
    cpu.seg[SS as usize] = flat(ss, FLAT_DATA | dpl);
    cpu.cpl = cpl;
}

/// Go on at `rip` after a change of privilege and flags.
fn go(cpu: &mut Cpu, rip: u64, flags: u64) -> Next {
    let before = cpu.rflags;
    cpu.rflags = cpu.rflags & fl::AC | fl::FIXED;
    cpu.set_rflags(flags);
    cpu.mode_changed();
    if (before | cpu.rflags) & (fl::TF | fl::IF) & !(before & fl::IF) == 0 {
        // Nothing that the run loop has to look at.
        cpu.rip = rip;
        return Next::Jump;
    }
    cpu.next_rip = rip;
    Next::Break
}

fn syscall(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    let long = cpu.long_mode();
    let exists = cpu.efer & efer::SCE != 0 && cpu.protected() && (amd() || cpu.code64());
    if !exists {
        return Err(cpu.ud());
    }
    let flags = cpu.get_rflags();
    let star = cpu.msr.star;
    let cs = (star >> 32) as u16 & 0xFFFC;
    cpu.r[RCX] = cpu.next_rip;
    let (rip, flags) = if long {
        let rip = if cpu.code64() { cpu.msr.lstar } else { cpu.msr.cstar };
        cpu.r[R11] = flags & !fl::RF;
        (rip, flags & !cpu.msr.sfmask & !fl::RF)
    } else {
        (star & 0xFFFF_FFFF, flags & !(fl::IF | fl::VM | fl::RF))
    };
    enter_flat(cpu, cs, cs.wrapping_add(8), 0, long);
    // A single-step trap looks at TF as SFMASK has left it.
    cpu.no_trap = flags & fl::TF == 0;
    Ok(go(cpu, rip, flags))
}

fn sysret(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let exists = cpu.efer & efer::SCE != 0 && cpu.protected() && (amd() || cpu.code64());
    if !exists {
        return Err(cpu.ud());
    }
    cpu.need_cpl0()?;
    let wide = i.code() == Code::Sysretq;
    if wide && !amd() && !canonical(cpu.r[RCX]) {
        return Err(cpu.gp(0));
    }
    let rip = if wide { cpu.r[RCX] } else { cpu.r[RCX] & 0xFFFF_FFFF };
    let base = (cpu.msr.star >> 48) as u16;
    let cs = if wide { base.wrapping_add(16) } else { base } | 3;
    let ss = base.wrapping_add(8) | if amd() { 0 } else { 3 };
    let flags =
        if cpu.long_mode() { cpu.r[R11] & !(fl::RF | fl::VM) } else { cpu.get_rflags() | fl::IF };
    enter_flat(cpu, cs, ss, 3, wide);
    Ok(go(cpu, rip, flags))
}

/// AMD has SYSENTER and SYSEXIT in legacy mode only.
fn sysenter_exists(cpu: &mut Cpu) -> Result<(), Stop> {
    if amd() && cpu.long_mode() {
        return Err(cpu.ud());
    }
    if cpu.cr0 & cr0::PE == 0 || cpu.msr.sysenter_cs & 0xFFFC == 0 {
        return Err(cpu.gp(0));
    }
    Ok(())
}

fn sysenter(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    sysenter_exists(cpu)?;
    let long = cpu.long_mode();
    let mask = if long { u64::MAX } else { 0xFFFF_FFFF };
    let cs = cpu.msr.sysenter_cs as u16 & 0xFFFC;
    let flags = cpu.get_rflags() & !(fl::VM | fl::IF | fl::RF);
    cpu.r[RSP] = cpu.msr.sysenter_esp & mask;
    let rip = cpu.msr.sysenter_eip & mask;
    enter_flat(cpu, cs, cs.wrapping_add(8), 0, long);
    Ok(go(cpu, rip, flags))
}

fn sysexit(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    sysenter_exists(cpu)?;
    cpu.need_cpl0()?;
    let wide = i.code() == Code::Sysexitq;
    let (rip, rsp) = (cpu.r[RDX], cpu.r[RCX]);
    if wide && !(canonical(rip) && canonical(rsp)) {
        return Err(cpu.gp(0));
    }
    let mask = if wide { u64::MAX } else { 0xFFFF_FFFF };
    let base = cpu.msr.sysenter_cs as u16;
    let cs = base.wrapping_add(if wide { 32 } else { 16 }) | 3;
    cpu.r[RSP] = rsp & mask;
    enter_flat(cpu, cs, cs.wrapping_add(8), 3, wide);
    let flags = cpu.get_rflags();
    Ok(go(cpu, rip & mask, flags))
}

fn swapgs(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    cpu.need_cpl0()?;
    let gs = cpu.seg[GS as usize].base;
    cpu.set_base(GS, cpu.msr.kernel_gs_base);
    cpu.msr.kernel_gs_base = gs;
    Ok(Next::Seq)
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
fn base_access(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    if cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(cpu.ud());
    }
    let m = i.mnemonic();
    let s = if matches!(m, Mnemonic::Rdfsbase | Mnemonic::Wrfsbase) { FS } else { GS };
    if matches!(m, Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        write_rm(cpu, i, cpu.seg[s as usize].base)?;
        return Ok(Next::Seq);
    }
    let r = i.op0_register();
    let v = cpu.r[reg_index(r) as usize];
    let v = if r.size() == 4 { v & 0xFFFF_FFFF } else { v };
    if !canonical(v) {
        return Err(cpu.gp(0));
    }
    cpu.set_base(s, v);
    Ok(Next::Seq)
}

// -- identification, time, MSRs ----------------------------------------------------------------

fn cpuid_insn(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    cpu.vcpu().stats.cpuid.inc();
    let r = cpu.cpuid(low(cpu, RAX), low(cpu, RCX));
    for (i, v) in [RAX, RBX, RCX, RDX].into_iter().zip(r) {
        cpu.r[i] = v.into();
    }
    Ok(Next::Seq)
}

fn rdtsc(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    if cpu.cr4 & cr4::TSD != 0 && cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let tsc = cpu.vm().tsc(cpu.id);
    set_edx_eax(cpu, tsc);
    if i.mnemonic() == Mnemonic::Rdtscp {
        cpu.r[RCX] = cpu.msr.tsc_aux.into();
    }
    Ok(Next::Seq)
}

fn rdpid(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    cpu.r[reg_index(i.op0_register()) as usize] = cpu.msr.tsc_aux.into();
    Ok(Next::Seq)
}

/// There is no performance monitoring; AMD's first four counters exist all the same.
fn rdpmc(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    let allowed = cpu.cpl == 0 || cpu.cr4 & cr4::PCE != 0;
    if !allowed || !amd() || low(cpu, RCX) > 3 {
        return Err(cpu.gp(0));
    }
    set_edx_eax(cpu, 0);
    Ok(Next::Seq)
}

fn rdmsr(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    cpu.need_cpl0()?;
    let v = cpu.rdmsr(low(cpu, RCX))?;
    cpu.vcpu().stats.rdmsr.inc();
    set_edx_eax(cpu, v);
    Ok(Next::Seq)
}

fn wrmsr(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    cpu.need_cpl0()?;
    cpu.wrmsr(low(cpu, RCX), edx_eax(cpu))?;
    cpu.vcpu().stats.wrmsr.inc();
    Ok(Next::Break)
}

// -- ports -------------------------------------------------------------------------------------

fn port_read(cpu: &mut Cpu, port: u16, size: u8) -> Result<u32, Stop> {
    let v = match cpu.vm().port_read(cpu.id, port, size) {
        Some(v) => v,
        None => {
            let exit = |_| Exit::Inout { port, size, value: None };
            cpu.replayed(port.into(), size, true, None, exit)? as u32
        }
    };
    cpu.vcpu().stats.inout.inc();
    Ok(v & u32::MAX >> (32 - 8 * u32::from(size)))
}

fn port_write(cpu: &mut Cpu, port: u16, size: u8, value: u32) -> Result<(), Stop> {
    if !cpu.vm().port_write(cpu.id, port, size, value) {
        let exit = |_| Exit::Inout { port, size, value: Some(value) };
        cpu.replayed(port.into(), size, true, Some(value.into()), exit)?;
    }
    cpu.vcpu().stats.inout.inc();
    Ok(())
}

/// The port operand of IN and OUT.
fn port_operand(cpu: &Cpu, i: &Instruction, op: u32) -> u16 {
    match i.op_kind(op) {
        OpKind::Immediate8 => i.immediate8().into(),
        _ => cpu.r[RDX] as u16,
    }
}

fn insn_in(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let size = i.op0_register().size() as u8;
    let port = port_operand(cpu, i, 1);
    cpu.check_io(port, size)?;
    let v = port_read(cpu, port, size)?;
    match size {
        1 => cpu.set(0, v as u8),
        2 => cpu.set(0, v as u16),
        _ => cpu.set(0, v),
    }
    Ok(Next::Break)
}

fn insn_out(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let size = i.op1_register().size() as u8;
    let port = port_operand(cpu, i, 0);
    cpu.check_io(port, size)?;
    let v = low(cpu, RAX) & u32::MAX >> (32 - 8 * u32::from(size));
    port_write(cpu, port, size, v)?;
    Ok(Next::Break)
}

/// Add to a register in the width of addresses.
fn advance(cpu: &mut Cpu, r: usize, by: u64, mask: u64) {
    let v = cpu.r[r].wrapping_add(by) & mask;
    cpu.r[r] = if mask == 0xFFFF { cpu.r[r] & !0xFFFF | v } else { v };
}

/// INS and OUTS, with REP.  Each iteration is complete in itself, and between two of them
/// interrupts come in.
fn string_io(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let input = matches!(i.mnemonic(), Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd);
    let size: u8 = match i.mnemonic() {
        Mnemonic::Insb | Mnemonic::Outsb => 1,
        Mnemonic::Insw | Mnemonic::Outsw => 2,
        _ => 4,
    };
    let mask = match i.op_kind(u32::from(!input)) {
        OpKind::MemoryESDI | OpKind::MemorySegSI => 0xFFFF,
        OpKind::MemoryESEDI | OpKind::MemorySegESI => 0xFFFF_FFFF,
        _ => u64::MAX,
    };
    let rep = i.has_rep_prefix() || i.has_repne_prefix();
    if rep && cpu.r[RCX] & mask == 0 {
        return Ok(Next::Seq);
    }
    let port = cpu.r[RDX] as u16;
    cpu.check_io(port, size)?;
    let step = if cpu.rflags & fl::DF != 0 { u64::from(size).wrapping_neg() } else { size.into() };
    let bytes = usize::from(size);
    loop {
        if input {
            let lin = segment_lin(cpu, ES, cpu.r[RDI] & mask, size.into(), true)?;
            // The device must not lose what a fault would then throw away.
            cpu.probe_write(lin, size.into(), Right::Current)?;
            let v = port_read(cpu, port, size)?;
            cpu.write_lin(lin, &v.to_le_bytes()[..bytes], Right::Current)?;
            advance(cpu, RDI, step, mask);
        } else {
            let s = seg_index(i.memory_segment());
            let lin = segment_lin(cpu, s, cpu.r[RSI] & mask, size.into(), false)?;
            let mut b = [0; 4];
            cpu.read_lin(lin, &mut b[..bytes], Right::Current)?;
            port_write(cpu, port, size, u32::from_le_bytes(b))?;
            advance(cpu, RSI, step, mask);
        }
        if !rep {
            return Ok(Next::Break);
        }
        advance(cpu, RCX, u64::MAX, mask);
        if cpu.r[RCX] & mask == 0 {
            return Ok(Next::Break);
        }
        cpu.replay.clear();
        cpu.replay_pos = 0;
        if cpu.rflags & fl::TF != 0 || cpu.vcpu().events.peek() != 0 {
            cpu.next_rip = cpu.rip;
            return Ok(Next::Break);
        }
    }
}

// -- software interrupts -----------------------------------------------------------------------

fn software_interrupt(cpu: &mut Cpu, vector: u8, kind: Kind) -> Result<Next, Stop> {
    cpu.interrupt(vector, kind, None, cpu.next_rip)?;
    cpu.next_rip = cpu.rip;
    // TF is cleared on the way into the handler.
    cpu.no_trap = true;
    Ok(Next::Break)
}

fn int_n(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let vector = i.immediate8();
    if cpu.v86() {
        if cpu.cr4 & cr4::VME != 0 && cpu.interrupt_virtual(vector, cpu.next_rip)? {
            cpu.next_rip = cpu.rip;
            cpu.no_trap = true;
            return Ok(Next::Break);
        }
        if cpu.iopl() < 3 {
            return Err(cpu.gp(0));
        }
    }
    software_interrupt(cpu, vector, Kind::Software)
}

fn int3(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    if cpu.vcpu().has_cap(Caps::BPT_EXIT) {
        return Err(cpu.leave(Exit::Bpt { inst_length: i.len() as u8 }));
    }
    software_interrupt(cpu, vec::BP, Kind::Trap)
}

fn into(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    if cpu.get_rflags() & fl::OF == 0 {
        return Ok(Next::Seq);
    }
    software_interrupt(cpu, vec::OF, Kind::Trap)
}

fn int1(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    software_interrupt(cpu, vec::DB, Kind::Icebp)
}

fn bound(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let r = i.op0_register();
    let size = r.size() as u64;
    let lin = operand_lin(cpu, i, 2 * size, false)?;
    let inside = if size == 2 {
        let (lower, upper) = (cpu.ld::<u16>(lin)?, cpu.ld::<u16>(lin.wrapping_add(2))?);
        let v = cpu.get::<u16>(reg_offset(r)) as i16;
        (lower as i16..=upper as i16).contains(&v)
    } else {
        let (lower, upper) = (cpu.ld::<u32>(lin)?, cpu.ld::<u32>(lin.wrapping_add(4))?);
        let v = cpu.get::<u32>(reg_offset(r)) as i32;
        (lower as i32..=upper as i32).contains(&v)
    };
    if inside { Ok(Next::Seq) } else { Err(cpu.raise(vec::BR, None)) }
}

fn undefined(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    Err(cpu.ud())
}

/// A guest that spins waits for another vCPU, which may need this host processor.
fn pause(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    if cpu.vcpu().has_cap(Caps::PAUSE_EXIT) {
        cpu.replayed(0, 0, false, Some(0), |_| Exit::Pause)?;
    } else if cpu.config.ncpu > 1 {
        std::thread::yield_now();
    }
    Ok(Next::Seq)
}

/// The handler of an instruction, and whether it ends its block; None: not one of ours.
pub fn lookup(i: &Instruction) -> Option<(Slow, bool)> {
    use Mnemonic::*;
    let long = i.code_size() == iced_x86::CodeSize::Code64;
    // In 64-bit mode only SS says anything about how to go on.
    let ends = |r: Register| !long || r == Register::SS;
    let handler: (Slow, bool) = match i.mnemonic() {
        Mov => {
            let (dst, src) = (i.op0_register(), i.op1_register());
            if src.is_segment_register() {
                (seg::mov_from_sreg, false)
            } else if dst.is_segment_register() {
                // MOV CS does not exist.
                let exists = dst != Register::CS;
                (if exists { seg::mov_to_sreg } else { undefined }, ends(dst))
            } else if src.is_cr() {
                (mov_from_cr, false)
            } else if dst.is_cr() {
                (mov_to_cr, true)
            } else if src.is_dr() {
                (mov_from_dr, false)
            } else if dst.is_dr() {
                (mov_to_dr, true)
            } else {
                return None;
            }
        }
        Push if i.op0_register().is_segment_register() => (seg::push_sreg, false),
        Pop if i.op0_register().is_segment_register() => (seg::pop_sreg, ends(i.op0_register())),
        Lds | Les | Lss | Lfs | Lgs => (seg::load_far_pointer, true),
        Jmp if is_far(i) => (seg::jmp_far, true),
        Call if is_far(i) => (seg::call_far, true),
        Retf => (seg::retf, true),
        Iret | Iretd | Iretq => (seg::iret, true),
        Lldt => (seg::lldt, false),
        Ltr => (seg::ltr, false),
        Sldt | Str => (seg::store_selector, false),
        Lar | Lsl => (seg::load_rights, false),
        Verr | Verw => (seg::verify, false),
        Arpl => (seg::arpl, false),
        Lgdt | Lidt => (seg::load_table, false),
        Sgdt | Sidt => (seg::store_table, false),
        Smsw => (smsw, false),
        Lmsw => (lmsw, true),
        Clts => (clts, false),
        Invlpg => (invlpg, true),
        Invpcid => (invpcid, true),
        Invd | Wbinvd | Wbnoinvd => (cache_control, false),
        Clzero => (clzero, false),
        Xgetbv => (xgetbv, false),
        Xsetbv => (xsetbv, true),
        Hlt => (hlt, true),
        Cli => (cli, false),
        Sti => (sti, true),
        Stac | Clac => (set_ac, false),
        Pushf | Pushfd | Pushfq => (pushf, false),
        Popf | Popfd | Popfq => (popf, true),
        Syscall => (syscall, true),
        Sysret | Sysretq => (sysret, true),
        Sysenter => (sysenter, true),
        Sysexit | Sysexitq => (sysexit, true),
        Swapgs => (swapgs, false),
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => (base_access, false),
        Cpuid => (cpuid_insn, false),
        Rdtsc | Rdtscp => (rdtsc, false),
        Rdpid => (rdpid, false),
        Rdpmc => (rdpmc, false),
        Rdmsr => (rdmsr, false),
        Wrmsr => (wrmsr, true),
        In => (insn_in, true),
        Out => (insn_out, true),
        Insb | Insw | Insd | Outsb | Outsw | Outsd => (string_io, true),
        Int => (int_n, true),
        Int3 => (int3, true),
        Into => (into, true),
        Int1 => (int1, true),
        Bound => (bound, false),
        Pause => (pause, false),
        Ud0 | Ud1 | Ud2 => (undefined, true),
        _ => return None,
    };
    Some(handler)
}

fn is_far(i: &Instruction) -> bool {
    use Code::*;
    matches!(
        i.code(),
        Jmp_ptr1616
            | Jmp_ptr1632
            | Jmp_m1616
            | Jmp_m1632
            | Jmp_m1664
            | Call_ptr1616
            | Call_ptr1632
            | Call_m1616
            | Call_m1632
            | Call_m1664
    )
}
