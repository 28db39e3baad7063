//! Delivery of exceptions and interrupts (Intel SDM 3A chapter 7 and section 21, AMD APM 2
//! chapter 8).
//!
//! A delivery that faults leaves the processor as it was, so that the second exception is
//! delivered from the same place.

use super::Cpu;
use super::mmu::canonical;
use super::op::*;
use super::seg::{Stack, is_null, null_segment, null_stack, sel_error, sys_type};
use super::state::*;
use super::task::{Departure, Switch};

/// Where an event comes from: decides about privilege checks and the EXT bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// From the local APIC or the PIC.
    External,
    Nmi,
    Exception,
    /// INT n.
    Software,
    /// INT3, INTO.
    Trap,
    /// INT1.
    Icebp,
}

impl Kind {
    /// EXT bit: not caused by the program itself (software interrupts are).
    fn ext(self) -> u32 {
        u32::from(!self.is_software())
    }

    /// The gate's DPL is checked.
    fn is_software(self) -> bool {
        matches!(self, Kind::Software | Kind::Trap)
    }
}

/// Why an event was not delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Undelivered {
    /// An exception during the delivery of a double fault: the processor shuts down.
    TripleFault,
    /// The stack or a table lies in a device that userland answers for.  `Cpu::exit` is set and
    /// the event is in `Cpu::injected`.
    Exit,
}

/// How an exception behaves when it follows another (SDM 3A, table 7-4).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(e: &Exc) -> Class {
    match e.vector {
        vec::DE | vec::TS | vec::NP | vec::SS | vec::GP => Class::Contributory,
        vec::PF => Class::PageFault,
        vec::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What is delivered after `second` was raised by the delivery of `first`; None: nothing more.
fn combine(first: Class, second: Exc) -> Option<Exc> {
    match (first, class(&second)) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault | Class::DoubleFault) => None,
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => {
            Some(Exc { vector: vec::DF, error: Some(0), payload: 0 })
        }
        _ => Some(second),
    }
}

/// DR6 as it reads with no condition met, and the breakpoint bits that a new #DB clears.
const DR6_FIXED: u64 = 0xFFFF_0FF0;
const DR6_HITS: u64 = 0xF;
const DR7_GD: u64 = 1 << 13;

impl Cpu {
    /// Deliver `exc`, and what its delivery raises.  `rip` is what the handler will return to.
    ///
    /// Events that userland injected come this way too; INT3 and INTO, which return behind
    /// themselves, are one byte long.
    pub fn deliver(&mut self) -> Result<(), Undelivered> {
        let mut first = true;
        loop {
            let e = self.exc;
            let (kind, rip) = match e.vector {
                vec::NMI => (Kind::Nmi, self.rip),
                vec::BP | vec::OF if first => (Kind::Trap, self.rip.wrapping_add(1)),
                32.. => (Kind::External, self.rip),
                _ => (Kind::Exception, self.rip),
            };
            first = false;
            match e.vector {
                vec::PF => self.cr2 = e.payload,
                vec::DB => {
                    self.dr6 = self.dr6 & !DR6_HITS | e.payload | DR6_FIXED;
                    self.dr7 &= !DR7_GD;
                }
                _ => {}
            }
            match self.interrupt(e.vector, kind, e.error, rip) {
                Ok(()) => return Ok(()),
                Err(stop) => self.undelivered(e, class(&e), stop)?,
            }
        }
    }

    /// Deliver an interrupt, and the exceptions that its delivery raises.  `kind` is External
    /// or Nmi.
    pub fn deliver_interrupt(&mut self, vector: u8, kind: Kind) -> Result<(), Undelivered> {
        match self.interrupt(vector, kind, None, self.rip) {
            Ok(()) => Ok(()),
            Err(stop) => {
                let e = Exc { vector, error: None, payload: 0 };
                self.undelivered(e, Class::Benign, stop)?;
                self.deliver()
            }
        }
    }

    /// Put the event to be delivered next into `exc`.
    fn undelivered(&mut self, e: Exc, first: Class, stop: Stop) -> Result<(), Undelivered> {
        if stop == Stop::Exit {
            self.injected = Some(e);
            return Err(Undelivered::Exit);
        }
        if self.exc.vector == vec::PF {
            // Also when it makes a double fault: kernels tell a stack overflow by it.
            self.cr2 = self.exc.payload;
        }
        match combine(first, self.exc) {
            Some(next) => {
                self.exc = next;
                Ok(())
            }
            None => Err(Undelivered::TripleFault),
        }
    }

    /// Enter the handler of `vector`, which will return to `rip`.
    pub fn interrupt(
        &mut self,
        vector: u8,
        kind: Kind,
        error: Option<u32>,
        rip: u64,
    ) -> Result<(), Stop> {
        if self.long_mode() {
            self.interrupt_long(vector, kind, error, rip)?;
        } else if self.cr0 & cr0::PE == 0 {
            self.interrupt_real(vector, rip)?;
        } else {
            self.interrupt_protected(vector, kind, error, rip)?;
        }
        self.shadow = false;
        self.halted = false;
        if kind == Kind::Nmi {
            self.nmi_blocked = true;
        }
        Ok(())
    }

    /// RFLAGS as the handler finds them on its stack.  A fault sets RF, so that an instruction
    /// breakpoint does not hit again on return; #DB leaves that to its handler.
    fn flags_image(&self, vector: u8, kind: Kind) -> u64 {
        let fault = kind == Kind::Exception && vector != vec::DB;
        self.get_rflags() | if fault { fl::RF } else { 0 }
    }

    /// RFLAGS in a handler.
    fn enter_handler(&mut self, interrupt_gate: bool) {
        self.rflags &= !(fl::TF | fl::NT | fl::RF | fl::VM);
        if interrupt_gate {
            self.rflags &= !fl::IF;
        }
    }

    // -- real mode -----------------------------------------------------------------------------

    fn interrupt_real(&mut self, vector: u8, rip: u64) -> Result<(), Stop> {
        let offset = u64::from(vector) * 4;
        if offset + 3 > u64::from(self.idtr.limit) {
            return Err(self.gp(u32::from(vector) * 8 + 2));
        }
        let entry: u32 = self.ld_sys(self.idtr.base.wrapping_add(offset))?;
        let flags = self.get_rflags();
        self.enter_8086(entry, flags, rip)?;
        self.rflags &= !(fl::IF | fl::TF | fl::AC | fl::RF);
        self.mode_changed();
        Ok(())
    }

    /// Push FLAGS, CS and IP and go to the far address in an entry of the 8086's vector table.
    fn enter_8086(&mut self, entry: u32, flags: u64, rip: u64) -> Result<(), Stop> {
        let mut stack = Stack::current(self, 0);
        let cs = self.seg[CS as usize].sel;
        stack.push(self, 2, &[flags, cs.into(), rip])?;
        self.r[4] = stack.sp;
        let s = &mut self.seg[CS as usize];
        s.sel = (entry >> 16) as u16;
        s.base = u64::from(s.sel) << 4;
        self.rip = u64::from(entry & 0xFFFF);
        Ok(())
    }

    /// INT n in v8086 mode with CR4.VME, where the TSS's redirection bitmap leaves the vector to
    /// the 8086 program; false: it does not.
    pub fn interrupt_virtual(&mut self, vector: u8, rip: u64) -> Result<bool, Stop> {
        if self.tr.access & sys_type::WIDE == 0 || self.tr.limit < 0x67 {
            return Ok(false);
        }
        let io_map: u16 = self.ld_sys(self.tr.base.wrapping_add(0x66))?;
        // The bitmap's 32 bytes end where the I/O permissions begin.
        let Some(at) = u32::from(io_map).checked_sub(32).map(|b| b + u32::from(vector >> 3)) else {
            return Ok(false);
        };
        if at > self.tr.limit {
            return Err(self.gp(0));
        }
        let byte: u8 = self.ld_sys(self.tr.base.wrapping_add(at.into()))?;
        if byte >> (vector & 7) & 1 != 0 {
            return Ok(false);
        }
        let entry: u32 = self.ld(u64::from(vector) * 4)?;
        let mut flags = self.get_rflags();
        let mut cleared = fl::TF | fl::RF | fl::IF;
        if self.iopl() < 3 {
            let vif = flags & fl::VIF != 0;
            flags = flags & !fl::IF | fl::IOPL | if vif { fl::IF } else { 0 };
            cleared = fl::TF | fl::RF | fl::VIF;
        }
        self.enter_8086(entry, flags, rip)?;
        self.rflags &= !cleared;
        self.mode_changed();
        Ok(true)
    }

    // -- protected mode ------------------------------------------------------------------------

    fn interrupt_protected(
        &mut self,
        vector: u8,
        kind: Kind,
        error: Option<u32>,
        rip: u64,
    ) -> Result<(), Stop> {
        let ext = kind.ext();
        let idt_error = u32::from(vector) << 3 | 2 | ext;
        let offset = u32::from(vector) * 8;
        if offset + 7 > u32::from(self.idtr.limit) {
            return Err(self.gp(idt_error));
        }
        let at = self.idtr.base.wrapping_add(offset.into());
        let gate = super::seg::Desc { raw: self.ld_sys(at)?, at };
        use sys_type::*;
        let kind_of_gate = match gate.system() {
            Some(t @ (TASK_GATE | INT_GATE16 | TRAP_GATE16 | INT_GATE32 | TRAP_GATE32)) => t,
            _ => return Err(self.gp(idt_error)),
        };
        if kind.is_software() && gate.dpl() < self.cpl {
            return Err(self.gp(idt_error));
        }
        if !gate.present() {
            return Err(self.raise(vec::NP, Some(idt_error)));
        }
        let flags = self.flags_image(vector, kind);
        let sel = gate.gate_selector();
        if kind_of_gate == TASK_GATE {
            let d = self.task_descriptor(sel, vec::GP, ext)?;
            let leaving = Departure { eip: rip, eflags: flags, ext, error };
            return self.task_switch(sel, &d, Switch::Call, &leaving);
        }

        if is_null(sel) {
            return Err(self.gp(ext));
        }
        let cs = self.descriptor(sel, vec::GP, ext)?;
        let v86 = self.v86();
        let inner = !cs.is_conforming() && cs.dpl() < self.cpl;
        // From v8086 mode only level 0 may be entered.
        if !cs.is_code() || cs.dpl() > self.cpl || v86 && !(inner && cs.dpl() == 0) {
            return Err(self.gp(sel_error(sel) | ext));
        }
        if !cs.present() {
            return Err(self.raise(vec::NP, Some(sel_error(sel) | ext)));
        }
        let (size, target) = if kind_of_gate & WIDE != 0 {
            (4, gate.gate_offset())
        } else {
            (2, gate.gate_offset() & 0xFFFF)
        };
        self.check_entry(&cs, target, ext)?;
        let selector = |reg: u8| u64::from(self.seg[reg as usize].sel);
        let data = [selector(GS), selector(FS), selector(DS), selector(ES)];
        let old_stack = [selector(SS), self.r[4]];
        let back = [flags, selector(CS), rip];
        let mut stack =
            if inner { self.inner_stack(cs.dpl(), ext)? } else { Stack::current(self, ext) };
        if v86 {
            stack.push(self, size, &data)?;
        }
        if inner {
            stack.push(self, size, &old_stack)?;
        }
        stack.push(self, size, &back)?;
        if let Some(error) = error {
            stack.push(self, size, &[error.into()])?;
        }
        self.mark_accessed(&cs)?;

        let level = if inner { cs.dpl() } else { self.cpl };
        self.set_cs(sel, &cs, level);
        self.set_stack(&stack);
        if v86 {
            for reg in [ES, DS, FS, GS] {
                self.seg[reg as usize] = null_segment(0);
            }
        }
        self.enter_handler(matches!(kind_of_gate, INT_GATE16 | INT_GATE32));
        self.rip = target;
        self.mode_changed();
        Ok(())
    }

    // -- long mode -----------------------------------------------------------------------------

    fn interrupt_long(
        &mut self,
        vector: u8,
        kind: Kind,
        error: Option<u32>,
        rip: u64,
    ) -> Result<(), Stop> {
        let ext = kind.ext();
        let idt_error = u32::from(vector) << 3 | 2 | ext;
        let offset = u32::from(vector) * 16;
        if offset + 15 > u32::from(self.idtr.limit) {
            return Err(self.gp(idt_error));
        }
        let at = self.idtr.base.wrapping_add(offset.into());
        let gate = super::seg::Desc { raw: self.ld_sys(at)?, at };
        let high: u64 = self.ld_sys(at.wrapping_add(8))?;
        let interrupt_gate = match gate.system() {
            Some(sys_type::INT_GATE32) => true,
            Some(sys_type::TRAP_GATE32) => false,
            _ => return Err(self.gp(idt_error)),
        };
        if kind.is_software() && gate.dpl() < self.cpl {
            return Err(self.gp(idt_error));
        }
        if !gate.present() {
            return Err(self.raise(vec::NP, Some(idt_error)));
        }
        let sel = gate.gate_selector();
        if is_null(sel) {
            return Err(self.gp(ext));
        }
        let cs = self.descriptor(sel, vec::GP, ext)?;
        let inner = !cs.is_conforming() && cs.dpl() < self.cpl;
        let long = cs.access() & (acc::L | acc::DB) == acc::L;
        if !cs.is_code() || cs.dpl() > self.cpl || !long {
            return Err(self.gp(sel_error(sel) | ext));
        }
        if !cs.present() {
            return Err(self.raise(vec::NP, Some(sel_error(sel) | ext)));
        }
        let target = gate.gate_offset() | high << 32;
        if !canonical(target) {
            return Err(self.gp(ext));
        }
        let level = if inner { cs.dpl() } else { self.cpl };
        let ist = gate.raw >> 32 & 7;
        let sp = if ist != 0 {
            self.tss_stack64(0x1C + 8 * ist as u32, ext)?
        } else if inner {
            self.tss_stack64(4 + 8 * u32::from(level), ext)?
        } else {
            self.r[4]
        };
        let ss = self.seg[SS as usize];
        let new_ss = if inner { null_stack(level) } else { ss };
        let mut stack = Stack::long(new_ss, sp & !0xF, level, ext);
        let frame = [
            ss.sel.into(),
            self.r[4],
            self.flags_image(vector, kind),
            self.seg[CS as usize].sel.into(),
            rip,
            error.unwrap_or(0).into(),
        ];
        stack.push(self, 8, &frame[..5 + usize::from(error.is_some())])?;
        self.mark_accessed(&cs)?;
        self.set_cs(sel, &cs, level);
        self.set_stack(&stack);
        self.enter_handler(interrupt_gate);
        self.rip = target;
        self.mode_changed();
        Ok(())
    }
}
