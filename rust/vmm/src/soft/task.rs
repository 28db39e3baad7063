//! Hardware task switches (Intel SDM 3A, chapter 8; not in long mode).

use super::Cpu;
use super::decode::Next;
use super::mmu::Right;
use super::op::*;
use super::seg::{Desc, Stack, is_null, null_segment, rpl, sel_error, sys_type, v86_segment};
use super::state::*;

/// What asks for a task switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Switch {
    Jump,
    /// CALL, or an interrupt or exception through a task gate: the new task is nested.
    Call,
    /// IRET from a nested task.
    Iret,
}

/// What the old task leaves behind, and what the new one finds on its stack.
pub struct Departure {
    pub eip: u64,
    pub eflags: u64,
    /// EXT bit for the error codes of the switch itself.
    pub ext: u32,
    /// Error code of the exception that goes through a task gate.
    pub error: Option<u32>,
}

/// Where a TSS has its fields: 32-bit (SDM 3A, figure 8-2) or 16-bit (figure 8-10).
struct Layout {
    /// Width of EIP, EFLAGS and the general registers, which follow each other.
    word: usize,
    eip: usize,
    /// ES, CS, SS, DS and, in a 32-bit one, FS and GS.
    segments: usize,
    segment_count: usize,
    ldt: usize,
    /// Smallest limit.
    limit: u32,
}

const TSS32: Layout =
    Layout { word: 4, eip: 0x20, segments: 0x48, segment_count: 6, ldt: 0x60, limit: 0x67 };
const TSS16: Layout =
    Layout { word: 2, eip: 0x0E, segments: 0x22, segment_count: 4, ldt: 0x2A, limit: 0x2B };
const CR3: usize = 0x1C;
/// The debug trap bit of a 32-bit TSS.
const TRAP: usize = 0x64;
const TSS_BYTES: usize = 0x68;
/// DR6: trap on a task switch.
const DR6_BT: u64 = 1 << 15;
/// DR7: breakpoints of one task only.
const DR7_LOCAL: u64 = 0x155;

impl Layout {
    fn of(kind: u32) -> &'static Layout {
        if kind & sys_type::WIDE != 0 { &TSS32 } else { &TSS16 }
    }

    fn get(&self, tss: &[u8; TSS_BYTES], at: usize) -> u64 {
        let mut b = [0; 8];
        b[..self.word].copy_from_slice(&tss[at..at + self.word]);
        u64::from_le_bytes(b)
    }

    fn put(&self, tss: &mut [u8; TSS_BYTES], at: usize, v: u64) {
        tss[at..at + self.word].copy_from_slice(&v.to_le_bytes()[..self.word]);
    }

    /// Offset of general register `i`.
    fn general(&self, i: usize) -> usize {
        self.eip + (2 + i) * self.word
    }

    fn selector(&self, i: usize) -> usize {
        self.segments + i * self.word
    }
}

fn get16(tss: &[u8; TSS_BYTES], at: usize) -> u16 {
    u16::from_le_bytes([tss[at], tss[at + 1]])
}

impl Cpu {
    /// Descriptor of a TSS that a task gate names: available and present.
    pub fn task_descriptor(&mut self, sel: u16, vector: u8, ext: u32) -> Result<Desc, Stop> {
        if sel & 4 == 0 && !is_null(sel) {
            let d = self.descriptor(sel, vector, ext)?;
            if matches!(d.system(), Some(sys_type::TSS16 | sys_type::TSS32)) {
                if d.present() {
                    return Ok(d);
                }
                return Err(self.raise(vec::NP, Some(sel_error(sel) | ext)));
            }
        }
        Err(self.raise(vector, Some(sel_error(sel) | ext)))
    }

    /// Task switch by an instruction.
    pub fn switch_task(&mut self, sel: u16, d: &Desc, how: Switch) -> Result<Next, Stop> {
        let leaving =
            Departure { eip: self.next_rip, eflags: self.get_rflags(), ext: 0, error: None };
        self.task_switch(sel, d, how, &leaving)?;
        self.next_rip = self.rip;
        Ok(Next::Break)
    }

    /// Switch to the task of TSS `sel`; `rip` is then the new task's.
    ///
    /// An exception is returned only while the old task still stands.  Later ones belong to the
    /// new task and are left in `injected`, to be delivered before its first instruction.
    pub fn task_switch(
        &mut self,
        sel: u16,
        d: &Desc,
        how: Switch,
        leaving: &Departure,
    ) -> Result<(), Stop> {
        let ext = leaving.ext;
        let new = Layout::of(d.access());
        let old = Layout::of(self.tr.access);
        if d.limit() < new.limit {
            return Err(self.raise(vec::TS, Some(sel_error(sel) | ext)));
        }
        if self.tr.limit < old.limit {
            return Err(self.raise(vec::TS, Some(sel_error(self.tr.sel) | ext)));
        }

        // Everything that may fault, before anything is written.
        let mut tss = [0; TSS_BYTES];
        let new_bytes = new.limit as usize + 1;
        self.read_lin(d.base(), &mut tss[..new_bytes], Right::System)?;
        let mut state = [0; TSS_BYTES];
        let old_end = old.selector(old.segment_count);
        self.probe_write(self.tr.base + old.eip as u64, (old_end - old.eip) as u64, Right::System)?;
        let old_at = self.gdtr.base.wrapping_add(u64::from(self.tr.sel & 0xFFF8));
        self.probe_write(d.at.wrapping_add(5), 1, Right::System)?;
        if how == Switch::Call {
            self.probe_write(d.base(), 2, Right::System)?;
        } else {
            self.probe_write(old_at.wrapping_add(5), 1, Right::System)?;
        }

        let nt = if how == Switch::Iret { fl::NT } else { 0 };
        old.put(&mut state, old.eip, leaving.eip);
        old.put(&mut state, old.eip + old.word, leaving.eflags & !nt);
        for i in 0..8 {
            old.put(&mut state, old.general(i), self.r[i]);
        }
        // The upper halves of the selectors' slots are reserved and stay as they are.
        let general = old.eip..old.selector(0);
        let at = self.tr.base;
        self.write_lin(at + general.start as u64, &state[general.clone()], Right::System)?;
        for i in 0..old.segment_count {
            self.st_sys(at + old.selector(i) as u64, self.seg[i].sel)?;
        }
        if how == Switch::Call {
            self.st_sys(d.base(), self.tr.sel)?;
        } else {
            self.set_busy(&Desc { raw: 0, at: old_at }, false)?;
        }
        if how != Switch::Iret {
            self.set_busy(d, true)?;
        }

        // The new task.
        let s = d.segment(sel);
        self.tr = Seg { access: s.access | sys_type::BUSY, ..s };
        self.cr0 |= cr0::TS;
        self.mode_changed();
        self.dr7 &= !DR7_LOCAL;
        self.rip = new.get(&tss, new.eip);
        let mut eflags = new.get(&tss, new.eip + new.word);
        if how == Switch::Call {
            eflags |= fl::NT;
        }
        for i in 0..8 {
            self.r[i] = new.get(&tss, new.general(i));
        }
        let selector = |i| if i < new.segment_count { get16(&tss, new.selector(i)) } else { 0 };
        for i in 0..6 {
            self.seg[i] = null_segment(selector(i));
        }
        let ldt = get16(&tss, new.ldt);
        self.ldtr = null_segment(ldt);
        let v86 = eflags & fl::VM != 0;
        self.cpl = if v86 { 3 } else { rpl(selector(CS as usize)) };
        self.set_rflags(eflags);

        let trap = new.word == 4 && tss[TRAP] & 1 != 0;
        let cr3 = (new.word == 4).then(|| new.get(&tss, CR3));
        let loaded = self.load_task(cr3, ldt, selector, leaving.error, new.word as u64);
        self.mode_changed();
        match loaded {
            Ok(()) if trap => {
                self.injected = Some(Exc { vector: vec::DB, error: None, payload: DR6_BT });
            }
            Ok(()) => {}
            Err(_) => {
                let Exc { vector, error, payload } = self.exc;
                let error = if vector == vec::PF { error } else { error.map(|e| e | ext) };
                self.injected = Some(Exc { vector, error, payload });
            }
        }
        Ok(())
    }

    /// What of a task switch may fault in the new task: address space, LDT, segments, and the
    /// push of an error code.
    fn load_task(
        &mut self,
        cr3: Option<u64>,
        ldt: u16,
        selector: impl Fn(usize) -> u16,
        error: Option<u32>,
        word: u64,
    ) -> Result<(), Stop> {
        if let Some(cr3) = cr3
            && self.cr0 & cr0::PG != 0
        {
            self.load_cr3(cr3)?;
        }
        let ts = |cpu: &mut Cpu, sel| Err(cpu.raise(vec::TS, Some(sel_error(sel))));
        if !is_null(ldt) {
            if ldt & 4 != 0 {
                return ts(self, ldt);
            }
            let d = self.descriptor(ldt, vec::TS, 0)?;
            if d.system() != Some(sys_type::LDT) || !d.present() {
                return ts(self, ldt);
            }
            self.ldtr = d.segment(ldt);
        }
        if self.v86() {
            for i in 0..6 {
                self.seg[i] = v86_segment(selector(i));
            }
        } else {
            let cs = selector(CS as usize);
            let level = rpl(cs);
            if is_null(cs) {
                return ts(self, cs);
            }
            let code = self.descriptor(cs, vec::TS, 0)?;
            let allowed =
                if code.is_conforming() { code.dpl() <= level } else { code.dpl() == level };
            if !code.is_code() || !allowed {
                return ts(self, cs);
            }
            if !code.present() {
                return Err(self.raise(vec::NP, Some(sel_error(cs))));
            }
            let ss = selector(SS as usize);
            if is_null(ss) {
                return ts(self, ss);
            }
            self.seg[SS as usize] = self.stack_segment(ss, level, vec::TS, 0)?;
            self.mark_accessed(&code)?;
            self.set_cs(cs, &code, level);
            for reg in [ES, DS, FS, GS] {
                self.seg[reg as usize] = self.data_segment(selector(reg as usize), vec::TS)?;
            }
            self.check_entry(&code, self.rip, 0)?;
        }
        if let Some(error) = error {
            self.mode_changed();
            let mut stack = Stack::current(self, 0);
            stack.push(self, word, &[error.into()])?;
            self.r[4] = stack.sp;
        }
        Ok(())
    }
}
