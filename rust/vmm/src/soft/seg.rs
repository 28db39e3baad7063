//! Descriptors, segment registers and far transfers of control.
//!
//! Intel SDM 3A chapters 3 and 5-7, AMD APM 2 chapter 4.  Everything that can fault comes before
//! anything that changes the processor.

use super::Cpu;
use super::cpuid::amd;
use super::decode::{Next, reg_offset, seg_index};
use super::mmu::canonical;
use super::op::*;
use super::state::*;
use super::sys::{operand_lin, read_rm16, write_rm};
use super::task::Switch;
use iced_x86::{Code, Instruction, OpKind};
use std::sync::atomic::{AtomicU8, Ordering};

/// Types of system descriptors (SDM 3A, 3.5).
pub mod sys_type {
    pub const TSS16: u32 = 1;
    pub const LDT: u32 = 2;
    pub const TSS16_BUSY: u32 = 3;
    pub const CALL_GATE16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const INT_GATE16: u32 = 6;
    pub const TRAP_GATE16: u32 = 7;
    pub const TSS32: u32 = 9;
    pub const TSS32_BUSY: u32 = 0xB;
    pub const CALL_GATE32: u32 = 0xC;
    pub const INT_GATE32: u32 = 0xE;
    pub const TRAP_GATE32: u32 = 0xF;
    /// Bit of the busy TSS types.
    pub const BUSY: u32 = 2;
    /// Bit of the 32-bit (in long mode 64-bit) types.
    pub const WIDE: u32 = 8;
}
use sys_type::*;

/// A selector's part of an error code: index and table.
pub fn sel_error(sel: u16) -> u32 {
    u32::from(sel & 0xFFFC)
}

pub fn is_null(sel: u16) -> bool {
    sel & 0xFFFC == 0
}

pub fn rpl(sel: u16) -> u8 {
    (sel & 3) as u8
}

/// The first eight bytes of a descriptor, and where they lie.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub raw: u64,
    pub at: u64,
}

impl Desc {
    /// In `Seg::access`'s layout.
    pub fn access(&self) -> u32 {
        (self.raw >> 40) as u32 & 0xF0FF
    }

    pub fn base(&self) -> u64 {
        self.raw >> 16 & 0xFF_FFFF | self.raw >> 32 & 0xFF00_0000
    }

    /// In bytes.
    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xFFFF | self.raw >> 32 & 0xF_0000) as u32;
        if self.access() & acc::G != 0 { limit << 12 | 0xFFF } else { limit }
    }

    pub fn dpl(&self) -> u8 {
        acc::dpl(self.access())
    }

    pub fn present(&self) -> bool {
        self.access() & acc::P != 0
    }

    pub fn is_code(&self) -> bool {
        self.access() & (acc::S | acc::CODE) == acc::S | acc::CODE
    }

    pub fn is_conforming(&self) -> bool {
        self.access() & (acc::S | acc::CODE | acc::CONFORMING)
            == acc::S | acc::CODE | acc::CONFORMING
    }

    pub fn is_writable_data(&self) -> bool {
        self.access() & (acc::S | acc::CODE | acc::RW) == acc::S | acc::RW
    }

    pub fn is_readable(&self) -> bool {
        let a = self.access();
        a & acc::S != 0 && (a & acc::CODE == 0 || a & acc::RW != 0)
    }

    /// Type of a system descriptor.
    pub fn system(&self) -> Option<u32> {
        (self.access() & acc::S == 0).then_some(self.access() & 0xF)
    }

    /// Code for 64-bit mode.
    pub fn is_long(&self) -> bool {
        self.access() & acc::L != 0
    }

    /// Of a gate: selector of the code segment or TSS.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }

    /// Of a gate: offset, without the upper half of a 64-bit one.
    pub fn gate_offset(&self) -> u64 {
        self.raw & 0xFFFF | self.raw >> 32 & 0xFFFF_0000
    }

    /// The segment register that this descriptor makes.
    pub fn segment(&self, sel: u16) -> Seg {
        let access = self.access() | if self.access() & acc::S != 0 { acc::ACCESSED } else { 0 };
        Seg { sel, base: self.base(), limit: self.limit(), access }
    }
}

/// A segment register after a null selector was loaded.
pub fn null_segment(sel: u16) -> Seg {
    Seg { sel, base: 0, limit: 0, access: acc::UNUSABLE }
}

/// SS after a switch to an inner level in 64-bit mode.
pub fn null_stack(cpl: u8) -> Seg {
    Seg { access: acc::UNUSABLE | u32::from(cpl) << 5, ..null_segment(cpl.into()) }
}

/// A segment register in v8086 mode.
pub fn v86_segment(sel: u16) -> Seg {
    Seg { sel, base: u64::from(sel) << 4, limit: 0xFFFF, access: 0xF3 }
}

/// A stack that is being written to, before or without becoming the current one.
pub struct Stack {
    pub seg: Seg,
    /// RSP.
    pub sp: u64,
    mask: u64,
    /// Level with whose right it is accessed.
    cpl: u8,
    long: bool,
    /// Error code of its #SS.
    error: u32,
}

impl Stack {
    pub fn current(cpu: &Cpu, error: u32) -> Stack {
        let (mask, long) = (cpu.sp_mask, cpu.code64());
        Stack { seg: cpu.seg[SS as usize], sp: cpu.r[4], mask, cpl: cpu.cpl, long, error }
    }

    pub fn new(seg: Seg, sp: u64, cpl: u8, error: u32) -> Stack {
        let mask = if seg.access & acc::DB != 0 { 0xFFFF_FFFF } else { 0xFFFF };
        Stack { seg, sp, mask, cpl, long: false, error }
    }

    pub fn long(seg: Seg, sp: u64, cpl: u8, error: u32) -> Stack {
        Stack { seg, sp, mask: u64::MAX, cpl, long: true, error }
    }

    /// Push values of `size` bytes.
    pub fn push(&mut self, cpu: &mut Cpu, size: u64, values: &[u64]) -> Result<(), Stop> {
        cpu.as_cpl(self.cpl, |cpu| {
            for &v in values {
                let sp = self.sp.wrapping_sub(size) & self.mask;
                let lin = self.lin(cpu, sp, size)?;
                match size {
                    2 => cpu.st(lin, v as u16),
                    4 => cpu.st(lin, v as u32),
                    _ => cpu.st(lin, v),
                }?;
                self.sp = self.joined(sp);
            }
            Ok(())
        })
    }

    fn lin(&self, cpu: &mut Cpu, sp: u64, size: u64) -> Result<u64, Stop> {
        let last = sp.wrapping_add(size - 1);
        let s = &self.seg;
        if self.long {
            if canonical(sp) && canonical(last) {
                return Ok(sp);
            }
        } else if s.access & (acc::UNUSABLE | acc::P) == acc::P {
            let limit = u64::from(s.limit);
            let good = if s.access & (acc::CODE | acc::EXPAND_DOWN) == acc::EXPAND_DOWN {
                sp > limit && last <= self.mask
            } else {
                last <= limit
            };
            if good {
                return Ok(s.base.wrapping_add(sp) & 0xFFFF_FFFF);
            }
        }
        Err(cpu.raise(vec::SS, Some(self.error)))
    }

    /// RSP with `sp` in the stack pointer's width.
    fn joined(&self, sp: u64) -> u64 {
        if self.mask == 0xFFFF { self.sp & !0xFFFF | sp } else { sp }
    }
}

impl Cpu {
    // -- descriptor tables ---------------------------------------------------------------------

    /// The descriptor of a selector; None beyond its table's limit.
    pub fn find_descriptor(&mut self, sel: u16) -> Result<Option<Desc>, Stop> {
        let (base, limit) = if sel & 4 == 0 {
            (self.gdtr.base, u32::from(self.gdtr.limit))
        } else if self.ldtr.access & (acc::UNUSABLE | acc::P) == acc::P {
            (self.ldtr.base, self.ldtr.limit)
        } else {
            return Ok(None);
        };
        let offset = u32::from(sel & 0xFFF8);
        if offset + 7 > limit {
            return Ok(None);
        }
        let at = base.wrapping_add(offset.into());
        Ok(Some(Desc { raw: self.ld_sys(at)?, at }))
    }

    /// The descriptor of a selector; exception `vector` beyond its table's limit.
    pub fn descriptor(&mut self, sel: u16, vector: u8, ext: u32) -> Result<Desc, Stop> {
        match self.find_descriptor(sel)? {
            Some(d) => Ok(d),
            None => Err(self.raise(vector, Some(sel_error(sel) | ext))),
        }
    }

    /// Second half of a 16-byte descriptor; #GP where the table ends or its type is not 0.
    fn descriptor_high(&mut self, sel: u16, d: &Desc) -> Result<u64, Stop> {
        let limit = if sel & 4 == 0 { u32::from(self.gdtr.limit) } else { self.ldtr.limit };
        if u32::from(sel & 0xFFF8) + 15 <= limit {
            let high: u64 = self.ld_sys(d.at.wrapping_add(8))?;
            if high >> 40 & 0x1F == 0 {
                return Ok(high);
            }
        }
        Err(self.gp(sel_error(sel)))
    }

    /// Change the type byte of a descriptor in memory, as one locked operation.
    fn update_type(&mut self, d: &Desc, set: u8, clear: u8) -> Result<(), Stop> {
        self.as_system(|cpu| {
            let p = cpu.wptr_locked::<u8>(d.at.wrapping_add(5))?;
            // SAFETY: `wptr_locked` gives a mapped, writable byte.
            let byte = unsafe { AtomicU8::from_ptr(p) };
            if set != 0 {
                byte.fetch_or(set, Ordering::SeqCst);
            }
            if clear != 0 {
                byte.fetch_and(!clear, Ordering::SeqCst);
            }
            cpu.commit()
        })
    }

    pub fn mark_accessed(&mut self, d: &Desc) -> Result<(), Stop> {
        if d.access() & acc::ACCESSED != 0 {
            return Ok(());
        }
        self.update_type(d, acc::ACCESSED as u8, 0)
    }

    pub fn set_busy(&mut self, d: &Desc, busy: bool) -> Result<(), Stop> {
        if busy { self.update_type(d, BUSY as u8, 0) } else { self.update_type(d, 0, BUSY as u8) }
    }

    // -- data segments -------------------------------------------------------------------------

    /// What a data segment register would hold; exception `vector` for a wrong type or privilege.
    pub fn data_segment(&mut self, sel: u16, vector: u8) -> Result<Seg, Stop> {
        if is_null(sel) {
            return Ok(null_segment(sel));
        }
        let d = self.descriptor(sel, vector, 0)?;
        let allowed = d.is_conforming() || d.dpl() >= self.cpl.max(rpl(sel));
        if !d.is_readable() || !allowed {
            return Err(self.raise(vector, Some(sel_error(sel))));
        }
        if !d.present() {
            return Err(self.raise(vec::NP, Some(sel_error(sel))));
        }
        self.mark_accessed(&d)?;
        Ok(d.segment(sel))
    }

    /// What SS would hold at privilege level `cpl`; the selector is not null.
    pub fn stack_segment(&mut self, sel: u16, cpl: u8, vector: u8, ext: u32) -> Result<Seg, Stop> {
        let d = self.descriptor(sel, vector, ext)?;
        if rpl(sel) != cpl || d.dpl() != cpl || !d.is_writable_data() {
            return Err(self.raise(vector, Some(sel_error(sel) | ext)));
        }
        if !d.present() {
            return Err(self.raise(vec::SS, Some(sel_error(sel) | ext)));
        }
        self.mark_accessed(&d)?;
        Ok(d.segment(sel))
    }

    /// Load ES, SS, DS, FS or GS.
    pub fn load_segment(&mut self, reg: u8, sel: u16) -> Result<(), Stop> {
        let s = if !self.protected() {
            self.real_segment(reg, sel)
        } else if reg != SS {
            self.data_segment(sel, vec::GP)?
        } else if !is_null(sel) {
            self.stack_segment(sel, self.cpl, vec::GP, 0)?
        } else if self.code64() && self.cpl != 3 && rpl(sel) == self.cpl {
            null_stack(self.cpl)
        } else {
            return Err(self.gp(0));
        };
        self.set_segment(reg, s);
        Ok(())
    }

    /// A segment register that is loaded in real or v8086 mode.  Real mode changes selector and
    /// base, and keeps limit and type from before.
    fn real_segment(&self, reg: u8, sel: u16) -> Seg {
        let old = self.seg[reg as usize];
        if self.v86() {
            v86_segment(sel)
        } else if old.access & (acc::UNUSABLE | acc::P) != acc::P {
            Seg { access: 0x93, ..v86_segment(sel) }
        } else {
            Seg { sel, base: u64::from(sel) << 4, ..old }
        }
    }

    fn set_segment(&mut self, reg: u8, s: Seg) {
        let i = reg as usize;
        let same = s.access == self.seg[i].access && s.limit == self.seg[i].limit;
        self.seg[i] = s;
        // Flatness and the stack's width are all that a data segment decides besides its base.
        if reg >= FS {
            self.seg_base[i] = s.base;
        } else if self.code64() && reg != SS {
            self.seg_base[i] = 0;
        } else if same && !self.protected() {
            self.seg_base[i] = s.base;
        } else {
            self.mode_changed();
        }
    }

    /// On a return to an outer level: data segments that it may not use become null.
    fn drop_inner_segments(&mut self) {
        for reg in [ES, DS, FS, GS] {
            let s = &mut self.seg[reg as usize];
            let conforming =
                s.access & (acc::CODE | acc::CONFORMING) == acc::CODE | acc::CONFORMING;
            if s.access & acc::UNUSABLE == 0 && !conforming && acc::dpl(s.access) < self.cpl {
                *s = Seg { base: s.base, ..null_segment(0) };
            }
        }
    }

    // -- code segments -------------------------------------------------------------------------

    /// RIP must be canonical in 64-bit code, and within the limit in other code.
    pub fn check_entry(&mut self, cs: &Desc, rip: u64, ext: u32) -> Result<(), Stop> {
        let good = if self.long_mode() && cs.is_long() {
            canonical(rip)
        } else {
            rip <= u64::from(cs.limit())
        };
        if good { Ok(()) } else { Err(self.gp(ext)) }
    }

    /// A code segment for 64-bit mode must not ask for 32-bit operands.
    fn check_long(&mut self, sel: u16, cs: &Desc) -> Result<(), Stop> {
        let both = acc::L | acc::DB;
        if self.long_mode() && cs.access() & both == both {
            return Err(self.gp(sel_error(sel)));
        }
        Ok(())
    }

    fn present_or_np(&mut self, sel: u16, d: &Desc) -> Result<(), Stop> {
        if d.present() { Ok(()) } else { Err(self.raise(vec::NP, Some(sel_error(sel)))) }
    }

    /// Enter a code segment at a privilege level; `mode_changed` is the caller's.
    pub fn set_cs(&mut self, sel: u16, d: &Desc, cpl: u8) {
        self.seg[CS as usize] = d.segment(sel & !3 | u16::from(cpl));
        self.cpl = cpl;
    }

    /// Make a stack the current one; `mode_changed` is the caller's.
    pub fn set_stack(&mut self, stack: &Stack) {
        self.seg[SS as usize] = stack.seg;
        self.r[4] = stack.sp;
    }

    /// Go on at `rip`, after whatever changed with CS.
    pub fn transfer(&mut self, rip: u64) -> Next {
        self.mode_changed();
        self.next_rip = rip;
        Next::Break
    }

    /// Far transfer in real or v8086 mode; a call writes the return address.
    fn real_transfer(&mut self, sel: u16, rip: u64, size: u64, call: bool) -> Result<Next, Stop> {
        if rip > u64::from(self.seg[CS as usize].limit) {
            return Err(self.gp(0));
        }
        if call {
            self.push_return(size)?;
        }
        self.seg[CS as usize] = self.real_segment(CS, sel);
        Ok(self.transfer(rip))
    }

    /// Push CS and the address of the next instruction on the current stack.
    fn push_return(&mut self, size: u64) -> Result<(), Stop> {
        let mut stack = Stack::current(self, 0);
        let cs = self.seg[CS as usize].sel;
        stack.push(self, size, &[cs.into(), self.next_rip])?;
        self.r[4] = stack.sp;
        Ok(())
    }

    // -- JMP and CALL --------------------------------------------------------------------------

    /// Far JMP or CALL to `sel:offset` with an operand size of `size` bytes.
    fn go_far(&mut self, sel: u16, offset: u64, size: u64, call: bool) -> Result<Next, Stop> {
        if !self.protected() {
            return self.real_transfer(sel, offset, size, call);
        }
        if is_null(sel) {
            return Err(self.gp(0));
        }
        let d = self.descriptor(sel, vec::GP, 0)?;
        if let Some(kind) = d.system() {
            return self.go_system(sel, &d, kind, call);
        }
        let allowed = if d.is_conforming() {
            d.dpl() <= self.cpl
        } else {
            rpl(sel) <= self.cpl && d.dpl() == self.cpl
        };
        if !d.is_code() || !allowed {
            return Err(self.gp(sel_error(sel)));
        }
        self.present_or_np(sel, &d)?;
        self.check_long(sel, &d)?;
        self.check_entry(&d, offset, 0)?;
        self.mark_accessed(&d)?;
        if call {
            self.push_return(size)?;
        }
        self.set_cs(sel, &d, self.cpl);
        Ok(self.transfer(offset))
    }

    /// Far JMP or CALL through a call gate, a task gate or to a TSS.
    fn go_system(&mut self, sel: u16, d: &Desc, kind: u32, call: bool) -> Result<Next, Stop> {
        let known = match kind {
            CALL_GATE32 => true,
            TSS16 | TSS32 | CALL_GATE16 | TASK_GATE => !self.long_mode(),
            _ => false,
        };
        if !known || d.dpl() < self.cpl.max(rpl(sel)) {
            return Err(self.gp(sel_error(sel)));
        }
        self.present_or_np(sel, d)?;
        let switch = if call { Switch::Call } else { Switch::Jump };
        match kind {
            TSS16 | TSS32 => self.switch_task(sel, d, switch),
            TASK_GATE => {
                let tss = d.gate_selector();
                let d = self.task_descriptor(tss, vec::GP, 0)?;
                self.switch_task(tss, &d, switch)
            }
            _ => self.go_gate(sel, d, kind, call),
        }
    }

    fn go_gate(&mut self, gate_sel: u16, gate: &Desc, kind: u32, call: bool) -> Result<Next, Stop> {
        let long = self.long_mode();
        let (mut offset, size) = match kind {
            CALL_GATE16 => (gate.gate_offset() & 0xFFFF, 2),
            _ if !long => (gate.gate_offset(), 4),
            _ => (gate.gate_offset(), 8),
        };
        if long {
            offset |= self.descriptor_high(gate_sel, gate)? << 32;
        }
        let sel = gate.gate_selector();
        if is_null(sel) {
            return Err(self.gp(0));
        }
        let d = self.descriptor(sel, vec::GP, 0)?;
        let inner = !d.is_conforming() && d.dpl() < self.cpl;
        let wrong_width = long && d.access() & (acc::L | acc::DB) != acc::L;
        if !d.is_code() || d.dpl() > self.cpl || wrong_width || inner && !call {
            return Err(self.gp(sel_error(sel)));
        }
        self.present_or_np(sel, &d)?;
        if !inner {
            self.check_entry(&d, offset, 0)?;
            self.mark_accessed(&d)?;
            if call {
                self.push_return(size)?;
            }
            self.set_cs(sel, &d, self.cpl);
            return Ok(self.transfer(offset));
        }

        let (cs, ss) = (self.seg[CS as usize].sel, self.seg[SS as usize].sel);
        let (cs, ss, sp) = (cs.into(), ss.into(), self.r[4]);
        let mut stack = self.inner_stack(d.dpl(), 0)?;
        self.check_entry(&d, offset, 0)?;
        if long {
            stack.push(self, size, &[ss, sp])?;
        } else {
            let mut words = [0; 31];
            let count = (gate.raw >> 32 & 0x1F) as usize;
            for (i, word) in words[..count].iter_mut().enumerate() {
                let above = i as u64 * size;
                *word = if size == 2 {
                    self.peek::<u16>(above)?.into()
                } else {
                    self.peek::<u32>(above)?.into()
                };
            }
            words[..count].reverse();
            stack.push(self, size, &[ss, sp])?;
            stack.push(self, size, &words[..count])?;
        }
        stack.push(self, size, &[cs, self.next_rip])?;
        self.mark_accessed(&d)?;
        self.set_cs(sel, &d, d.dpl());
        self.set_stack(&stack);
        Ok(self.transfer(offset))
    }

    /// The stack that the TSS has for an inner level; raises #TS and #SS.
    pub fn inner_stack(&mut self, level: u8, ext: u32) -> Result<Stack, Stop> {
        if self.long_mode() {
            let sp = self.tss_stack64(4 + 8 * u32::from(level), ext)?;
            return Ok(Stack::long(null_stack(level), sp, level, ext));
        }
        let wide = self.tr.access & WIDE != 0;
        let (at, size) = if wide { (4 + 8 * level, 8) } else { (2 + 4 * level, 4) };
        if u32::from(at) + size - if wide { 2 } else { 0 } - 1 > self.tr.limit {
            return Err(self.raise(vec::TS, Some(sel_error(self.tr.sel) | ext)));
        }
        let at = self.tr.base.wrapping_add(at.into());
        let (sp, sel) = if wide {
            (u64::from(self.ld_sys::<u32>(at)?), self.ld_sys::<u16>(at.wrapping_add(4))?)
        } else {
            (u64::from(self.ld_sys::<u16>(at)?), self.ld_sys::<u16>(at.wrapping_add(2))?)
        };
        if is_null(sel) {
            return Err(self.raise(vec::TS, Some(sel_error(sel) | ext)));
        }
        let seg = self.stack_segment(sel, level, vec::TS, ext)?;
        Ok(Stack::new(seg, sp, level, sel_error(sel) | ext))
    }

    /// A stack pointer of the 64-bit TSS.
    pub fn tss_stack64(&mut self, offset: u32, ext: u32) -> Result<u64, Stop> {
        if offset + 7 > self.tr.limit {
            return Err(self.raise(vec::TS, Some(sel_error(self.tr.sel) | ext)));
        }
        self.ld_sys(self.tr.base.wrapping_add(offset.into()))
    }

    // -- RET and IRET --------------------------------------------------------------------------

    /// A slot of the current stack.
    fn peek_sized(&mut self, size: u64, above: u64) -> Result<u64, Stop> {
        Ok(match size {
            2 => self.peek::<u16>(above)?.into(),
            4 => self.peek::<u32>(above)?.into(),
            _ => self.peek::<u64>(above)?,
        })
    }

    /// Code segment of a return; raises #GP and #NP.
    fn return_segment(&mut self, sel: u16) -> Result<Desc, Stop> {
        if is_null(sel) {
            return Err(self.gp(0));
        }
        let d = self.descriptor(sel, vec::GP, 0)?;
        let level = rpl(sel);
        let allowed = if d.is_conforming() { d.dpl() <= level } else { d.dpl() == level };
        if !d.is_code() || level < self.cpl || !allowed {
            return Err(self.gp(sel_error(sel)));
        }
        self.present_or_np(sel, &d)?;
        self.check_long(sel, &d)?;
        Ok(d)
    }

    /// Stack segment of a return to code segment `cs` at `level`.
    fn return_stack(&mut self, sel: u16, cs: &Desc, level: u8) -> Result<Seg, Stop> {
        if !is_null(sel) {
            return self.stack_segment(sel, level, vec::GP, 0);
        }
        if self.long_mode() && cs.is_long() && level != 3 && rpl(sel) == level {
            return Ok(null_stack(level));
        }
        Err(self.gp(0))
    }

    /// Take on the stack of a return.
    fn set_returned_stack(&mut self, cs: &Desc, seg: Seg, sp: u64) {
        self.seg[SS as usize] = seg;
        self.r[4] = if self.long_mode() && cs.is_long() {
            sp
        } else if seg.access & acc::DB != 0 {
            sp & 0xFFFF_FFFF
        } else {
            self.r[4] & !0xFFFF | sp & 0xFFFF
        };
    }

    fn ret_far(&mut self, size: u64, release: u64) -> Result<Next, Stop> {
        let rip = self.peek_sized(size, 0)?;
        let sel = self.peek_sized(size, size)? as u16;
        let popped = 2 * size + release;
        if !self.protected() {
            let next = self.real_transfer(sel, rip, size, false)?;
            self.set_sp(self.r[4].wrapping_add(popped) & self.sp_mask);
            return Ok(next);
        }
        let d = self.return_segment(sel)?;
        let level = rpl(sel);
        if level == self.cpl {
            self.check_entry(&d, rip, 0)?;
            self.mark_accessed(&d)?;
            self.set_sp(self.r[4].wrapping_add(popped) & self.sp_mask);
            self.set_cs(sel, &d, level);
            return Ok(self.transfer(rip));
        }
        let sp = self.peek_sized(size, popped)?;
        let ss = self.peek_sized(size, popped + size)? as u16;
        let ss = self.return_stack(ss, &d, level)?;
        self.check_entry(&d, rip, 0)?;
        self.mark_accessed(&d)?;
        self.set_returned_stack(&d, ss, sp.wrapping_add(release));
        self.set_cs(sel, &d, level);
        self.drop_inner_segments();
        Ok(self.transfer(rip))
    }

    fn iret(&mut self, size: u64) -> Result<Next, Stop> {
        let next = if !self.protected() {
            self.iret_real(size)?
        } else if self.rflags & fl::NT != 0 {
            if self.long_mode() {
                return Err(self.gp(0));
            }
            self.iret_task()?
        } else {
            self.iret_protected(size)?
        };
        self.nmi_blocked = false;
        Ok(next)
    }

    fn iret_real(&mut self, size: u64) -> Result<Next, Stop> {
        let virtual_if = self.v86() && self.iopl() < 3;
        if virtual_if && (self.cr4 & cr4::VME == 0 || size != 2) {
            return Err(self.gp(0));
        }
        let rip = self.peek_sized(size, 0)?;
        let sel = self.peek_sized(size, size)? as u16;
        let flags = self.peek_sized(size, 2 * size)?;
        let flags = if virtual_if {
            self.virtual_flags(flags)?
        } else {
            let mut mask = 0xFFFF;
            if size == 4 {
                mask |= fl::RF | fl::AC | fl::ID;
            }
            if self.v86() {
                mask &= !fl::IOPL;
            }
            self.get_rflags() & !mask | flags & mask
        };
        let next = self.real_transfer(sel, rip, size, false)?;
        self.set_sp(self.r[4].wrapping_add(3 * size) & self.sp_mask);
        self.set_rflags(flags);
        Ok(next)
    }

    /// RFLAGS after POPF or IRET of the 16-bit `flags` in v8086 mode with VME and IOPL below 3:
    /// IF is VIF.
    pub fn virtual_flags(&mut self, flags: u64) -> Result<u64, Stop> {
        let wants_if = flags & fl::IF != 0;
        if flags & fl::TF != 0 || wants_if && self.rflags & fl::VIP != 0 {
            return Err(self.gp(0));
        }
        let mask = 0xFFFF & !(fl::IF | fl::IOPL);
        let vif = if wants_if { fl::VIF } else { 0 };
        Ok(self.get_rflags() & !(mask | fl::VIF) | flags & mask | vif)
    }

    fn iret_task(&mut self) -> Result<Next, Stop> {
        let sel: u16 = self.ld_sys(self.tr.base)?;
        if sel & 4 != 0 {
            return Err(self.raise(vec::TS, Some(sel_error(sel))));
        }
        let d = self.descriptor(sel, vec::TS, 0)?;
        if !matches!(d.system(), Some(TSS16_BUSY | TSS32_BUSY)) {
            return Err(self.raise(vec::TS, Some(sel_error(sel))));
        }
        self.present_or_np(sel, &d)?;
        self.switch_task(sel, &d, Switch::Iret)
    }

    fn iret_protected(&mut self, size: u64) -> Result<Next, Stop> {
        let rip = self.peek_sized(size, 0)?;
        let sel = self.peek_sized(size, size)? as u16;
        let flags = self.peek_sized(size, 2 * size)?;
        if flags & fl::VM != 0 && self.cpl == 0 && size == 4 && !self.long_mode() {
            return self.iret_to_v86(rip, sel, flags);
        }
        let d = self.return_segment(sel)?;
        let level = rpl(sel);
        let mut mask = fl::ARITH | fl::TF | fl::DF | fl::NT;
        if size != 2 {
            mask |= fl::RF | fl::AC | fl::ID;
        }
        if self.cpl <= self.iopl() {
            mask |= fl::IF;
        }
        if self.cpl == 0 {
            mask |= fl::IOPL | if size != 2 { fl::VIF | fl::VIP } else { 0 };
        }
        let flags = self.get_rflags() & !mask | flags & mask;
        if level == self.cpl && !self.code64() {
            self.check_entry(&d, rip, 0)?;
            self.mark_accessed(&d)?;
            self.set_sp(self.r[4].wrapping_add(3 * size) & self.sp_mask);
            self.set_cs(sel, &d, level);
        } else {
            let sp = self.peek_sized(size, 3 * size)?;
            let ss = self.peek_sized(size, 4 * size)? as u16;
            let ss = self.return_stack(ss, &d, level)?;
            self.check_entry(&d, rip, 0)?;
            self.mark_accessed(&d)?;
            let outer = level != self.cpl;
            self.set_returned_stack(&d, ss, sp);
            self.set_cs(sel, &d, level);
            if outer {
                self.drop_inner_segments();
            }
        }
        self.set_rflags(flags);
        Ok(self.transfer(rip))
    }

    fn iret_to_v86(&mut self, rip: u64, cs: u16, flags: u64) -> Result<Next, Stop> {
        let mut slot = [0; 6];
        for (i, v) in slot.iter_mut().enumerate() {
            *v = self.peek_sized(4, 12 + 4 * i as u64)?;
        }
        if rip > 0xFFFF {
            return Err(self.gp(0));
        }
        let [sp, ss, es, ds, fs, gs] = slot;
        for (reg, sel) in [(CS, cs.into()), (SS, ss), (ES, es), (DS, ds), (FS, fs), (GS, gs)] {
            self.seg[reg as usize] = v86_segment(sel as u16);
        }
        self.r[4] = sp;
        self.cpl = 3;
        self.set_rflags(flags);
        Ok(self.transfer(rip))
    }
}

// -- instructions ------------------------------------------------------------------------------

/// What ends an instruction that loaded a segment register: the rest of the block was decoded
/// for the mode before.
fn after_load(cpu: &mut Cpu, reg: u8, sel: u16) -> Result<Next, Stop> {
    let mode = cpu.cache.mode;
    cpu.load_segment(reg, sel)?;
    Ok(if cpu.cache.mode == mode { Next::Seq } else { Next::Break })
}

/// MOV Sreg, r/m16.
pub fn mov_to_sreg(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let sel = read_rm16(cpu, i, 1)?;
    let reg = seg_index(i.op0_register());
    let next = after_load(cpu, reg, sel)?;
    if reg != SS {
        return Ok(next);
    }
    (cpu.shadow, cpu.no_trap) = (true, true);
    Ok(Next::Break)
}

/// MOV r/m, Sreg: a register is written in its whole size, memory always as 16 bits.
pub fn mov_from_sreg(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let sel = cpu.seg[seg_index(i.op1_register()) as usize].sel;
    write_rm(cpu, i, sel.into())?;
    Ok(Next::Seq)
}

fn stack_slot(code: Code) -> u64 {
    match code {
        Code::Popw_ES | Code::Popw_SS | Code::Popw_DS | Code::Popw_FS | Code::Popw_GS => 2,
        Code::Pushw_ES | Code::Pushw_CS | Code::Pushw_SS => 2,
        Code::Pushw_DS | Code::Pushw_FS | Code::Pushw_GS => 2,
        Code::Popq_FS | Code::Popq_GS | Code::Pushq_FS | Code::Pushq_GS => 8,
        _ => 4,
    }
}

/// PUSH Sreg.
pub fn push_sreg(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let sel = cpu.seg[seg_index(i.op0_register()) as usize].sel;
    match stack_slot(i.code()) {
        2 => cpu.push(sel)?,
        4 if amd() => cpu.push(u32::from(sel))?,
        4 => {
            // Intel writes the selector's two bytes only.
            let sp = cpu.r[4].wrapping_sub(4) & cpu.sp_mask;
            let lin = cpu.stack_lin(sp, 2, true)?;
            cpu.st(lin, sel).map_err(|s| cpu.stack_fault(s))?;
            cpu.set_sp(sp);
        }
        _ => cpu.push(u64::from(sel))?,
    }
    Ok(Next::Seq)
}

/// POP Sreg.
pub fn pop_sreg(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let sel = cpu.peek::<u16>(0)?;
    let reg = seg_index(i.op0_register());
    // The width of the stack before the load counts.
    let (sp, mask) = (cpu.r[4].wrapping_add(stack_slot(i.code())), cpu.sp_mask);
    let mut next = after_load(cpu, reg, sel)?;
    cpu.r[4] = if mask == 0xFFFF { cpu.r[4] & !0xFFFF | sp & 0xFFFF } else { sp & mask };
    if reg == SS {
        (cpu.shadow, cpu.no_trap) = (true, true);
        next = Next::Break;
    }
    Ok(next)
}

/// Far pointer in memory: selector and offset of `size` bytes.
fn far_pointer(cpu: &mut Cpu, i: &Instruction, size: u64) -> Result<(u16, u64), Stop> {
    let lin = operand_lin(cpu, i, size + 2, false)?;
    let offset = match size {
        2 => cpu.ld::<u16>(lin)?.into(),
        4 => cpu.ld::<u32>(lin)?.into(),
        _ => cpu.ld::<u64>(lin)?,
    };
    Ok((cpu.ld(lin.wrapping_add(size))?, offset))
}

/// LDS, LES, LSS, LFS, LGS.
pub fn load_far_pointer(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    use iced_x86::Mnemonic::*;
    let reg = match i.mnemonic() {
        Lds => DS,
        Les => ES,
        Lss => SS,
        Lfs => FS,
        _ => GS,
    };
    let dst = i.op0_register();
    let (sel, offset) = far_pointer(cpu, i, dst.size() as u64)?;
    after_load(cpu, reg, sel)?;
    match dst.size() {
        2 => cpu.set(reg_offset(dst), offset as u16),
        4 => cpu.set(reg_offset(dst), offset as u32),
        _ => cpu.set(reg_offset(dst), offset),
    }
    Ok(Next::Break)
}

/// Operand size of a far JMP or CALL, bytes, and where it goes.
fn far_target(cpu: &mut Cpu, i: &Instruction) -> Result<(u16, u64, u64), Stop> {
    let size = match i.code() {
        Code::Jmp_ptr1616 | Code::Jmp_m1616 | Code::Call_ptr1616 | Code::Call_m1616 => 2,
        Code::Jmp_m1664 | Code::Call_m1664 => 8,
        _ => 4,
    };
    let (sel, offset) = match i.op0_kind() {
        OpKind::FarBranch16 => (i.far_branch_selector(), i.far_branch16().into()),
        OpKind::FarBranch32 => (i.far_branch_selector(), i.far_branch32().into()),
        _ => far_pointer(cpu, i, size)?,
    };
    Ok((sel, offset, size))
}

pub fn jmp_far(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let (sel, offset, size) = far_target(cpu, i)?;
    cpu.go_far(sel, offset, size, false)
}

pub fn call_far(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let (sel, offset, size) = far_target(cpu, i)?;
    cpu.go_far(sel, offset, size, true)
}

pub fn retf(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let release = if i.op_count() == 1 { i.immediate16().into() } else { 0 };
    let size = match i.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfq | Code::Retfq_imm16 => 8,
        _ => 4,
    };
    cpu.ret_far(size, release)
}

pub fn iret(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let size = match i.code() {
        Code::Iretw => 2,
        Code::Iretq => 8,
        _ => 4,
    };
    cpu.iret(size)
}

/// LLDT, LTR, LAR and their like do not exist in real and v8086 mode.
fn need_protected(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.protected() { Ok(()) } else { Err(cpu.ud()) }
}

/// A descriptor that LLDT or LTR may load.
fn system_descriptor(cpu: &mut Cpu, sel: u16, types: &[u32]) -> Result<(Desc, u64), Stop> {
    if sel & 4 != 0 {
        return Err(cpu.gp(sel_error(sel)));
    }
    let d = cpu.descriptor(sel, vec::GP, 0)?;
    if !d.system().is_some_and(|t| types.contains(&t)) {
        return Err(cpu.gp(sel_error(sel)));
    }
    cpu.present_or_np(sel, &d)?;
    let mut base = d.base();
    if cpu.long_mode() {
        base |= cpu.descriptor_high(sel, &d)? << 32;
        if !canonical(base) {
            return Err(cpu.gp(sel_error(sel)));
        }
    }
    Ok((d, base))
}

pub fn lldt(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    need_protected(cpu)?;
    cpu.need_cpl0()?;
    let sel = read_rm16(cpu, i, 0)?;
    cpu.ldtr = if is_null(sel) {
        null_segment(sel)
    } else {
        let (d, base) = system_descriptor(cpu, sel, &[LDT])?;
        Seg { base, ..d.segment(sel) }
    };
    Ok(Next::Seq)
}

pub fn ltr(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    need_protected(cpu)?;
    cpu.need_cpl0()?;
    let sel = read_rm16(cpu, i, 0)?;
    if is_null(sel) {
        return Err(cpu.gp(0));
    }
    let types: &[u32] = if cpu.long_mode() { &[TSS32] } else { &[TSS16, TSS32] };
    let (d, base) = system_descriptor(cpu, sel, types)?;
    cpu.set_busy(&d, true)?;
    let s = d.segment(sel);
    cpu.tr = Seg { base, access: s.access | BUSY, ..s };
    Ok(Next::Seq)
}

/// SLDT and STR.
pub fn store_selector(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    need_protected(cpu)?;
    cpu.check_umip()?;
    let s = if i.mnemonic() == iced_x86::Mnemonic::Str { cpu.tr } else { cpu.ldtr };
    write_rm(cpu, i, s.sel.into())?;
    Ok(Next::Seq)
}

/// The descriptor that LAR, LSL, VERR or VERW may look at; None: ZF becomes 0.
fn inspect(cpu: &mut Cpu, sel: u16) -> Result<Option<Desc>, Stop> {
    if is_null(sel) {
        return Ok(None);
    }
    let d = cpu.find_descriptor(sel)?;
    Ok(d.filter(|d| d.is_conforming() || d.dpl() >= cpu.cpl.max(rpl(sel))))
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    let zf = (fl::ZF as u32) << 8;
    cpu.fl = cpu.fl & !zf | if on { zf } else { 0 };
}

/// LAR and LSL.
pub fn load_rights(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    need_protected(cpu)?;
    let sel = read_rm16(cpu, i, 1)?;
    let lar = i.mnemonic() == iced_x86::Mnemonic::Lar;
    let long = cpu.long_mode();
    let value = inspect(cpu, sel)?.and_then(|d| {
        let known = match d.system() {
            None | Some(TSS32 | TSS32_BUSY | LDT) => true,
            Some(TSS16 | TSS16_BUSY) => !long,
            Some(CALL_GATE32) => lar,
            Some(CALL_GATE16 | TASK_GATE) => lar && !long,
            _ => false,
        };
        let value = if lar { (d.raw >> 32) as u32 & 0x00FF_FF00 } else { d.limit() };
        known.then_some(value)
    });
    set_zf(cpu, value.is_some());
    if let Some(v) = value {
        // Bits 19:16 of LAR's result are undefined; hardware shows the limit's.
        let dst = i.op0_register();
        match dst.size() {
            2 => cpu.set(reg_offset(dst), v as u16),
            _ => cpu.set(reg_offset(dst), v),
        }
    }
    Ok(Next::Seq)
}

/// VERR and VERW.
pub fn verify(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    need_protected(cpu)?;
    let sel = read_rm16(cpu, i, 0)?;
    let write = i.mnemonic() == iced_x86::Mnemonic::Verw;
    let good = inspect(cpu, sel)?
        .is_some_and(|d| if write { d.is_writable_data() } else { d.is_readable() });
    set_zf(cpu, good);
    Ok(Next::Seq)
}

/// ARPL r/m16, r16.
pub fn arpl(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    need_protected(cpu)?;
    let src: u16 = cpu.get(reg_offset(i.op1_register()));
    let (dst, lin) = if i.op0_kind() == OpKind::Memory {
        let lin = operand_lin(cpu, i, 2, true)?;
        (cpu.ld::<u16>(lin)?, Some(lin))
    } else {
        (cpu.get(reg_offset(i.op0_register())), None)
    };
    let lower = dst & 3 < src & 3;
    if lower {
        let v = dst & !3 | src & 3;
        match lin {
            Some(lin) => cpu.st(lin, v)?,
            None => cpu.set(reg_offset(i.op0_register()), v),
        }
    }
    set_zf(cpu, lower);
    Ok(Next::Seq)
}

/// LGDT and LIDT.
pub fn load_table(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    cpu.need_cpl0()?;
    let (size, mask) = match i.code() {
        Code::Lgdt_m1664 | Code::Lidt_m1664 => (8, u64::MAX),
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => (4, 0xFF_FFFF),
        _ => (4, 0xFFFF_FFFF),
    };
    let lin = operand_lin(cpu, i, size + 2, false)?;
    let limit = cpu.ld::<u16>(lin)?;
    let at = lin.wrapping_add(2);
    let base = if size == 8 { cpu.ld::<u64>(at)? } else { cpu.ld::<u32>(at)?.into() } & mask;
    if size == 8 && !canonical(base) {
        return Err(cpu.gp(0));
    }
    let table = TableReg { base, limit };
    if i.mnemonic() == iced_x86::Mnemonic::Lgdt {
        cpu.gdtr = table;
    } else {
        cpu.idtr = table;
    }
    Ok(Next::Seq)
}

/// SGDT and SIDT.
pub fn store_table(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    cpu.check_umip()?;
    let wide = matches!(i.code(), Code::Sgdt_m1664 | Code::Sidt_m1664);
    let size = if wide { 8 } else { 4 };
    let t = if i.mnemonic() == iced_x86::Mnemonic::Sgdt { cpu.gdtr } else { cpu.idtr };
    let lin = operand_lin(cpu, i, size + 2, true)?;
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&t.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&t.base.to_le_bytes());
    cpu.write_lin(lin, &bytes[..size as usize + 2], super::mmu::Right::Current)?;
    Ok(Next::Seq)
}
