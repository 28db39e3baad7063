//! Paging, the software TLB, and every access of an instruction to memory.
//!
//! Intel SDM 3A chapter 4.  The TLB has banks of entries: for each address space that is remembered
//! one for each kind of right.  An entry holds a linear page for reads and one for writes; the distance
//! of an access from it decides at once about presence, permission and page crossing.  Whatever is
//! unusual (devices, pages with decoded code, watchpoints, alignment checks) simply never gets a tag
//! and takes the slow path.

use super::int::Int;
use super::op::*;
use super::state::*;
use crate::exit::Exit;
use crate::memory::{CODE, DIRTY, PRESENT, WRITABLE};
use std::sync::atomic::{AtomicU64, Ordering};

pub const PAGE: u64 = 4096;
pub const PAGE_MASK: u64 = !(PAGE - 1);

pub const TLB_ENTRIES: usize = 1024;
const CODE_ENTRIES: usize = 256;
/// Address-space numbers share a code tag with the page number.  The last one stays unused so
/// that an empty entry (all ones) matches nothing.
const MAX_ASID: u64 = 0xFFE;
/// The number of code pages that all address spaces share (CR4.PGE, SDM 3A, 4.10.2.4).
const GLOBAL: u64 = 0;
/// Address spaces that are remembered; Linux uses six PCIDs.
const PCID_SLOTS: usize = 6;

/// Data banks: user, supervisor, supervisor that SMAP keeps from user pages, and one that is
/// never filled, for when every access must be looked at.
const BANK_USER: usize = 0;
const BANK_SUPER: usize = 1;
const BANK_SMAP: usize = 2;
const BANK_NONE: usize = 3;

/// Kinds of right that have banks; `BANK_NONE` has one for all address spaces.
const KINDS: usize = 3;
const BANKS: usize = PCID_SLOTS * KINDS + 1;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Entry {
    /// Linear page that may be read.
    pub rtag: u64,
    /// Linear page that may be written.
    pub wtag: u64,
    /// Host address of the page.
    pub host: u64,
    gpa: u64,
}

/// What translated code uses of an entry.
pub const RTAG: usize = std::mem::offset_of!(Entry, rtag);
pub const WTAG: usize = std::mem::offset_of!(Entry, wtag);
pub const HOST: usize = std::mem::offset_of!(Entry, host);
pub const ENTRY_SHIFT: u8 = size_of::<Entry>().trailing_zeros() as u8;

impl Entry {
    /// What matches nothing that is looked for at index `i`: a page of another index.
    fn empty(i: usize) -> Entry {
        let tag = no_page(i);
        Entry { rtag: tag, wtag: tag, host: 0, gpa: 0 }
    }
}

fn no_page(i: usize) -> u64 {
    ((i % TLB_ENTRIES) as u64 ^ 1) << 12
}

/// Bits of a filter of pages that may have write tags.
const WRITTEN_BITS: usize = 1 << 16;

#[derive(Clone, Copy)]
struct CodeEntry {
    tag: u64,
    gpa: u64,
}

pub struct Tlb {
    /// `BANKS` times `TLB_ENTRIES`.
    entries: Box<[Entry]>,
    /// Banks with anything in them.
    used: [bool; BANKS],
    /// Which of the remembered address spaces is the present one.
    slot: usize,
    /// Physical pages, by their low bits, that may have got a write tag.
    written: Box<[u64; WRITTEN_BITS / 64]>,
    code: [[CodeEntry; CODE_ENTRIES]; 2],
    next_asid: u64,
    pcids: [(u16, u64); PCID_SLOTS],
    pcid_victim: usize,
    /// Linear range that large-page translations have been split from: INVLPG inside it must
    /// drop more than one entry.
    large: Option<(u64, u64)>,
    /// Staging for an access that has no single host address.
    bounce: [u8; 64],
    pending: Pending,
}

/// What `commit` still has to do for the pointer that `wptr` gave.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pending {
    Nothing,
    /// Written in place, on a page with translated code.
    Code {
        gpa: u64,
        len: u64,
    },
    /// Written to the bounce buffer.
    Bounce {
        lin: u64,
        len: u64,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Read,
    Write,
    Fetch,
}

/// Whose right counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Right {
    /// The current privilege level's, EFLAGS.AC considered.
    Current,
    /// The processor's own accesses to tables: supervisor whatever the CPL; SMAP applies.
    System,
}

/// A translation that succeeded.
#[derive(Clone, Copy)]
struct Mapped {
    gpa: u64,
    /// Size of the page that maps it, bytes.
    size: u64,
    /// Writes need no further walk: allowed for the walking privilege, and dirty already.
    write: bool,
    /// All address spaces have it.
    global: bool,
}

/// #PF error code bits (SDM 3A, 4.7).
mod pf {
    pub const P: u32 = 1 << 0;
    pub const W: u32 = 1 << 1;
    pub const U: u32 = 1 << 2;
    pub const RSVD: u32 = 1 << 3;
    pub const I: u32 = 1 << 4;
}

mod pte {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
    pub const ADDR: u64 = 0x000F_FFFF_FFFF_F000;
}

/// Physical address bits that the guest is shown.
pub const MAXPHYADDR: u32 = 40;
const RSVD_ADDR: u64 = pte::ADDR & !((1 << MAXPHYADDR) - 1);

impl Default for Tlb {
    fn default() -> Self {
        Tlb {
            entries: (0..BANKS * TLB_ENTRIES).map(Entry::empty).collect(),
            used: [false; BANKS],
            slot: 0,
            written: Box::new([0; WRITTEN_BITS / 64]),
            code: [[CodeEntry { tag: u64::MAX, gpa: 0 }; CODE_ENTRIES]; 2],
            next_asid: 1,
            pcids: [(0, 0); PCID_SLOTS],
            pcid_victim: 0,
            large: None,
            bounce: [0; 64],
            pending: Pending::Nothing,
        }
    }
}

impl Tlb {
    fn clear_bank(&mut self, bank: usize) {
        if std::mem::take(&mut self.used[bank]) {
            let entries = &mut self.entries[bank * TLB_ENTRIES..][..TLB_ENTRIES];
            for (i, e) in entries.iter_mut().enumerate() {
                *e = Entry::empty(i);
            }
        }
    }

    /// Forget the data translations of one remembered address space.
    fn clear_slot(&mut self, slot: usize) {
        for kind in 0..KINDS {
            self.clear_bank(slot * KINDS + kind);
        }
    }

    fn clear_data(&mut self) {
        for slot in 0..PCID_SLOTS {
            self.clear_slot(slot);
        }
        self.written.fill(0);
    }

    fn clear_code(&mut self) {
        for bank in &mut self.code {
            bank.fill(CodeEntry { tag: u64::MAX, gpa: 0 });
        }
    }

    /// Index in `entries` of the first of a bank.
    fn bank(&self, kind: usize) -> usize {
        let bank = if kind == BANK_NONE { BANKS - 1 } else { self.slot * KINDS + kind };
        bank * TLB_ENTRIES
    }

    /// Drop write permission for one physical page: code lives there now.
    pub fn protect(&mut self, gpa: u64) {
        let bit = (gpa >> 12) as usize % WRITTEN_BITS;
        if self.written[bit / 64] >> (bit % 64) & 1 == 0 {
            return;
        }
        for (bank, entries) in self.entries.chunks_mut(TLB_ENTRIES).enumerate() {
            if self.used[bank] {
                for (i, e) in entries.iter_mut().enumerate() {
                    if e.gpa == gpa {
                        e.wtag = no_page(i);
                    }
                }
            }
        }
    }
}

#[inline(always)]
pub fn canonical(lin: u64) -> bool {
    (lin as i64) << 16 >> 16 == lin as i64
}

impl Cpu {
    // -- address spaces ------------------------------------------------------------------------

    fn new_asid(&mut self) -> u64 {
        if self.tlb.next_asid > MAX_ASID {
            self.tlb.clear_data();
            self.tlb.clear_code();
            self.cache.flush_jumps();
            self.tlb.pcids = [(0, 0); PCID_SLOTS];
            self.tlb.next_asid = 1;
        }
        let n = self.tlb.next_asid;
        self.tlb.next_asid += 1;
        n
    }

    fn pcid(&self) -> u16 {
        if self.cr4 & cr4::PCIDE != 0 { (self.cr3 & 0xFFF) as u16 } else { 0 }
    }

    /// Forget every translation, of all address spaces, global ones too.
    pub fn flush_tlb(&mut self) {
        self.tlb.pcids = [(0, 0); PCID_SLOTS];
        self.tlb.large = None;
        self.tlb.clear_data();
        self.tlb.clear_code();
        self.cache.flush_jumps();
        let asid = self.new_asid();
        self.tlb.pcids[0] = (self.pcid(), asid);
        self.tlb.pcid_victim = 1;
        self.enter_space(0, asid);
    }

    fn enter_space(&mut self, slot: usize, asid: u64) {
        self.tlb.slot = slot;
        self.asid = asid;
        self.cache.enter_space(asid);
        self.point_at_bank();
    }

    /// The bank's address, which every access starts from.
    fn point_at_bank(&mut self) {
        self.bank_at = &raw mut self.tlb.entries[self.tlb.bank(self.bank)];
    }

    /// CR3 was written: enter its address space, keeping its old translations if `keep`.
    pub fn switch_space(&mut self, keep: bool) {
        let pcid = self.pcid();
        let slot = self.tlb.pcids.iter().position(|&(p, a)| a != 0 && p == pcid);
        if let Some(i) = slot
            && keep
        {
            self.enter_space(i, self.tlb.pcids[i].1);
            return;
        }
        let asid = self.new_asid();
        let found = self.tlb.pcids.iter().position(|&(p, a)| a != 0 && p == pcid);
        let i = found.unwrap_or_else(|| {
            self.tlb.pcid_victim = (self.tlb.pcid_victim + 1) % PCID_SLOTS;
            self.tlb.pcid_victim
        });
        self.tlb.pcids[i] = (pcid, asid);
        self.tlb.clear_slot(i);
        self.enter_space(i, asid);
    }

    /// Forget the translations of one PCID (INVPCID).
    pub fn flush_pcid(&mut self, pcid: u16) {
        if pcid == self.pcid() {
            self.switch_space(false);
        } else {
            for s in &mut self.tlb.pcids {
                if s.0 == pcid {
                    *s = (0, 0);
                }
            }
        }
    }

    /// INVLPG: forget one page in all address spaces.
    pub fn flush_page(&mut self, lin: u64) {
        if self.tlb.large.is_some_and(|(lo, hi)| lin >= lo && lin <= hi) {
            self.flush_tlb();
            return;
        }
        let i = (lin >> 12) as usize;
        for bank in self.tlb.entries.chunks_mut(TLB_ENTRIES) {
            bank[i % TLB_ENTRIES] = Entry::empty(i);
        }
        for bank in &mut self.tlb.code {
            bank[i % CODE_ENTRIES].tag = u64::MAX;
        }
        self.cache.flush_jumps_to(lin);
    }

    /// Anything that decides about address computation, privilege or decoding has changed.
    pub fn mode_changed(&mut self) {
        self.choose_bank();
        let vector = self.cr0 & (cr0::EM | cr0::TS) == 0
            && self.cr4 & (cr4::OSFXSR | cr4::OSXSAVE) == cr4::OSFXSR | cr4::OSXSAVE
            && self.xcr0 & 6 == 6;
        if self.code64() {
            let (fs, gs) = (self.seg[FS as usize].base, self.seg[GS as usize].base);
            self.seg_base = [0, 0, 0, 0, fs, gs];
            self.sp_mask = u64::MAX;
            self.cache.set_mode(64, true, true, vector);
            return;
        }
        for i in 0..6 {
            self.seg_base[i] = self.seg[i].base;
        }
        self.sp_mask =
            if self.seg[SS as usize].access & acc::DB != 0 { 0xFFFF_FFFF } else { 0xFFFF };
        let flat = |s: &Seg, rw: u32| {
            s.base == 0
                && s.limit == u32::MAX
                && s.access & (acc::UNUSABLE | acc::P | rw) == acc::P | rw
                && (s.access & acc::CODE != 0 || s.access & acc::EXPAND_DOWN == 0)
        };
        let all_flat = self.protected()
            && flat(&self.seg[CS as usize], acc::RW)
            && [DS, ES, SS].iter().all(|&s| {
                let s = &self.seg[s as usize];
                flat(s, acc::RW) && s.access & acc::CODE == 0
            });
        self.cache.set_mode(self.code_bits(), self.sp_mask != 0xFFFF, all_flat, vector);
    }

    /// What decides about the right to access data has changed: CPL, AC, SMAP, breakpoints.
    pub fn choose_bank(&mut self) {
        let watch = self.dr7 & 0xFF != 0 && (0..4).any(|i| self.dr7 >> (16 + 4 * i) & 3 != 0);
        let align = self.cr0 & cr0::AM != 0 && self.rflags & fl::AC != 0 && self.cpl == 3;
        self.bank = if watch || align {
            BANK_NONE
        } else if self.cpl == 3 {
            BANK_USER
        } else if self.cr4 & cr4::SMAP != 0 && self.rflags & fl::AC == 0 {
            BANK_SMAP
        } else {
            BANK_SUPER
        };
        self.point_at_bank();
    }

    /// Run `f` with the rights to data of another privilege level (the stack that an interrupt
    /// or a call through a gate switches to).  Alignment is not checked.
    pub fn as_cpl<R>(&mut self, cpl: u8, f: impl FnOnce(&mut Self) -> R) -> R {
        let (own, ac) = (self.cpl, self.rflags & fl::AC);
        if cpl == own && (cpl != 3 || ac == 0) {
            return f(self);
        }
        self.cpl = cpl;
        if cpl == 3 {
            self.rflags &= !fl::AC;
        }
        self.choose_bank();
        let r = f(self);
        self.cpl = own;
        self.rflags |= ac;
        self.choose_bank();
        r
    }

    /// Run `f` with the processor's own right (`Right::System`) in the place of the current one.
    pub fn as_system<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> R {
        let (own, ac) = (self.cpl, self.rflags & fl::AC);
        self.cpl = 0;
        self.rflags &= !fl::AC;
        self.choose_bank();
        let r = f(self);
        self.cpl = own;
        self.rflags |= ac;
        self.choose_bank();
        r
    }

    // -- page walk -----------------------------------------------------------------------------

    /// The 64 (or 32) bits of a page-table entry; absent memory reads as all ones.
    fn pte_word(&self, gpa: u64) -> Option<*mut u8> {
        let page = gpa >> 12;
        if page >= self.mem_pages || self.page_flags(gpa) & PRESENT == 0 {
            return None;
        }
        // SAFETY: inside the reservation, whose size `mem_pages` tells.
        Some(unsafe { self.mem_base.add(gpa as usize) })
    }

    /// Flags of the physical page; 0 outside of memory.
    #[inline(always)]
    pub fn page_flags(&self, gpa: u64) -> u8 {
        if gpa >> 12 >= self.mem_pages {
            return 0;
        }
        // SAFETY: one byte for each of `mem_pages` pages.
        unsafe { (*self.mem_flags.add((gpa >> 12) as usize)).load(Ordering::Relaxed) }
    }

    fn set_page_flags(&self, gpa: u64, bits: u8) {
        if gpa >> 12 < self.mem_pages {
            // SAFETY: as in `page_flags`.
            unsafe { (*self.mem_flags.add((gpa >> 12) as usize)).fetch_or(bits, Ordering::SeqCst) };
        }
    }

    /// Set accessed and dirty bits in an entry, as one atomic step; false: it changed meanwhile.
    fn mark(&self, gpa: u64, wide: bool, old: u64, bits: u64) -> bool {
        if old & bits == bits {
            return true;
        }
        let Some(p) = self.pte_word(gpa) else { return true };
        if self.page_flags(gpa) & WRITABLE == 0 {
            return true;
        }
        self.set_page_flags(gpa, DIRTY);
        // SAFETY: inside guest memory; entries are naturally aligned.
        unsafe {
            if wide {
                let a = &*p.cast::<AtomicU64>();
                a.compare_exchange(old, old | bits, Ordering::SeqCst, Ordering::SeqCst).is_ok()
            } else {
                let a = &*p.cast::<std::sync::atomic::AtomicU32>();
                let (o, n) = (old as u32, (old | bits) as u32);
                a.compare_exchange(o, n, Ordering::SeqCst, Ordering::SeqCst).is_ok()
            }
        }
    }

    pub(super) fn read_pte(&self, gpa: u64, wide: bool) -> u64 {
        match self.pte_word(gpa) {
            None if wide => u64::MAX,
            None => 0xFFFF_FFFF,
            // SAFETY: inside guest memory; aligned, so it does not cross its end.
            Some(p) => unsafe { if wide { u64::load(p) } else { u64::from(u32::load(p)) } },
        }
    }

    /// Walk the page tables.  Err is the #PF error code.
    fn walk(&self, lin: u64, access: Access, user: bool, ac: bool) -> Result<Mapped, u32> {
        loop {
            if let Some(r) = self.walk_once(lin, access, user, ac) {
                return r;
            }
        }
    }

    /// None: an entry changed under the walk.
    fn walk_once(
        &self,
        lin: u64,
        acs: Access,
        user: bool,
        ac: bool,
    ) -> Option<Result<Mapped, u32>> {
        let code = (if user { pf::U } else { 0 })
            | (if acs == Access::Write { pf::W } else { 0 })
            | (if acs == Access::Fetch && (self.efer & efer::NXE != 0 || self.cr4 & cr4::SMEP != 0)
            {
                pf::I
            } else {
                0
            });
        let long = self.long_mode();
        let wide = self.cr4 & cr4::PAE != 0 || long;
        let nxe = self.efer & efer::NXE != 0;
        let (mut table, mut shift) = if long {
            (self.cr3 & pte::ADDR, 39)
        } else if wide {
            let e = self.pdpte[(lin >> 30 & 3) as usize];
            if e & pte::P == 0 {
                return Some(Err(code));
            }
            (e & pte::ADDR, 21)
        } else {
            (self.cr3 & 0xFFFF_F000, 22)
        };
        let index_bits = if wide { 9 } else { 10 };
        let mut write = true;
        let mut us = true;
        let mut nx = false;
        // Entries above the leaf, whose accessed bits are set once the access is known to be legal
        // to that depth; the architecture lets them be set early.
        loop {
            let i = lin >> shift & ((1 << index_bits) - 1);
            let at = table + i * if wide { 8 } else { 4 };
            let e = self.read_pte(at, wide);
            if e & pte::P == 0 {
                return Some(Err(code));
            }
            let leaf = shift == 12
                || e & pte::PS != 0
                    && (shift == 21 || shift == 30 || shift == 22 && self.cr4 & cr4::PSE != 0);
            let mut bad = 0;
            if wide {
                bad |= e & RSVD_ADDR;
                if !nxe {
                    bad |= e & pte::NX;
                }
                if shift == 39 {
                    bad |= e & pte::PS;
                }
                if leaf && shift > 12 {
                    bad |= e & ((1 << shift) - 1) & 0xF_FFFF_E000;
                }
                if !long {
                    bad |= e & 0x7FF0_0000_0000_0000;
                }
            } else if leaf && shift == 22 {
                // PSE-36: bits 20:13 are address bits 39:32, bit 21 is reserved.
                bad |= e & 1 << 21;
            }
            if bad != 0 {
                return Some(Err(code | pf::RSVD | pf::P));
            }
            write &= e & pte::W != 0;
            us &= e & pte::U != 0;
            nx |= nxe && e & pte::NX != 0 && wide;
            if !leaf {
                if !self.mark(at, wide, e, pte::A) {
                    return None;
                }
                table = e & if wide { pte::ADDR } else { 0xFFFF_F000 };
                shift -= index_bits;
                continue;
            }
            let denied = match acs {
                Access::Fetch => nx || user && !us || !user && us && self.cr4 & cr4::SMEP != 0,
                Access::Read => user && !us || !user && us && self.cr4 & cr4::SMAP != 0 && !ac,
                Access::Write => {
                    user && !(us && write)
                        || !user
                            && (us && self.cr4 & cr4::SMAP != 0 && !ac
                                || !write && self.cr0 & cr0::WP != 0)
                }
            };
            if denied {
                return Some(Err(code | pf::P));
            }
            let dirty = acs == Access::Write;
            if !self.mark(at, wide, e, pte::A | if dirty { pte::D } else { 0 }) {
                return None;
            }
            let size = 1u64 << shift;
            let page = if !wide && shift == 22 {
                e & 0xFFC0_0000 | (e >> 13 & 0xFF) << 32
            } else if wide {
                e & pte::ADDR & !(size - 1)
            } else {
                e & 0xFFFF_F000
            };
            let may_write = if user { write } else { write || self.cr0 & cr0::WP == 0 };
            return Some(Ok(Mapped {
                gpa: page | lin & (size - 1),
                size,
                write: may_write && (dirty || e & pte::D != 0),
                global: e & pte::G != 0 && self.cr4 & cr4::PGE != 0,
            }));
        }
    }

    /// Translate for the processor's present state; raises #PF.
    fn translate(&mut self, lin: u64, access: Access, right: Right) -> Result<Mapped, Stop> {
        if self.cr0 & cr0::PG == 0 {
            let gpa = lin & 0xFFFF_FFFF;
            return Ok(Mapped { gpa, size: PAGE, write: true, global: false });
        }
        let user = self.cpl == 3 && right == Right::Current;
        let ac = self.rflags & fl::AC != 0 && right == Right::Current;
        match self.walk(lin, access, user, ac) {
            Ok(m) => Ok(m),
            Err(code) => {
                self.exc = Exc { vector: vec::PF, error: Some(code), payload: lin };
                Err(Stop::Exception)
            }
        }
    }

    /// Physical address of a linear one for the supervisor, without side effects on the guest
    /// other than accessed bits (gdb, bhyvectl).
    pub fn gla2gpa(&mut self, lin: u64, write: bool) -> Option<u64> {
        if self.cr0 & cr0::PG == 0 {
            return Some(lin & 0xFFFF_FFFF);
        }
        if self.long_mode() && !canonical(lin) {
            return None;
        }
        let access = if write { Access::Write } else { Access::Read };
        self.walk(lin, access, false, true).ok().map(|m| m.gpa)
    }

    /// Bank that data accesses with `right` may fill and use; None: none.
    fn fill_bank(&self, right: Right) -> Option<usize> {
        match right {
            Right::Current if self.bank == BANK_NONE => None,
            Right::Current => Some(self.bank),
            Right::System => Some(self.system_bank()),
        }
    }

    fn fill(&mut self, lin: u64, m: &Mapped, right: Right) {
        let flags = self.page_flags(m.gpa);
        if flags & PRESENT == 0 {
            return;
        }
        let Some(bank) = self.fill_bank(right) else { return };
        if m.size > PAGE {
            let lo = lin & !(m.size - 1);
            let hi = lo + (m.size - 1);
            self.tlb.large = Some(match self.tlb.large {
                None => (lo, hi),
                Some((l, h)) => (l.min(lo), h.max(hi)),
            });
        }
        let page = lin & PAGE_MASK;
        let gpa = m.gpa & PAGE_MASK;
        let fast_write = m.write && flags & (WRITABLE | DIRTY | CODE) == WRITABLE | DIRTY;
        if fast_write {
            let bit = (gpa >> 12) as usize % WRITTEN_BITS;
            self.tlb.written[bit / 64] |= 1 << (bit % 64);
        }
        let first = self.tlb.bank(bank);
        self.tlb.used[first / TLB_ENTRIES] = true;
        let i = (lin >> 12) as usize % TLB_ENTRIES;
        self.tlb.entries[first + i] = Entry {
            rtag: page,
            wtag: if fast_write { page } else { no_page(i) },
            host: (self.mem_base as u64).wrapping_add(gpa),
            gpa,
        };
    }

    /// Checks that come before paging: canonical form, alignment.
    fn check_linear(&mut self, lin: u64, len: u64, right: Right) -> Result<(), Stop> {
        if self.long_mode() && !(canonical(lin) && canonical(lin.wrapping_add(len - 1))) {
            self.exc = Exc { vector: vec::GP, error: Some(0), payload: NON_CANONICAL };
            return Err(Stop::Exception);
        }
        // A flat segment ends at 4 GiB.
        if !self.code64()
            && right == Right::Current
            && lin <= 0xFFFF_FFFF
            && lin + (len - 1) > 0xFFFF_FFFF
            && self.cache.mode & super::block::mode::FLAT != 0
        {
            self.exc = Exc { vector: vec::GP, error: Some(0), payload: NON_CANONICAL };
            return Err(Stop::Exception);
        }
        if self.bank == BANK_NONE
            && right == Right::Current
            && self.cpl == 3
            && self.cr0 & cr0::AM != 0
            && self.rflags & fl::AC != 0
            && matches!(len, 2 | 4 | 8)
            && lin & (len - 1) != 0
        {
            return Err(self.raise(vec::AC, Some(0)));
        }
        Ok(())
    }

    /// Data breakpoints (SDM 3B, 17.2.4): remembered, and delivered as a trap after the
    /// instruction.
    fn watch(&mut self, lin: u64, len: u64, write: bool) {
        if self.bank != BANK_NONE {
            return;
        }
        for i in 0..4 {
            if self.dr7 >> (2 * i) & 3 == 0 {
                continue;
            }
            let hit_kind = match self.dr7 >> (16 + 4 * i) & 3 {
                1 => write,
                3 => true,
                _ => false,
            };
            let size = [1, 2, 8, 4][(self.dr7 >> (18 + 4 * i) & 3) as usize];
            let at = self.dr[i] & !(size - 1);
            if hit_kind && lin < at.wrapping_add(size) && at < lin.wrapping_add(len) {
                self.watch_hits |= 1 << i;
            }
        }
    }

    // -- accesses ------------------------------------------------------------------------------

    #[inline(always)]
    fn entry(&self, lin: u64) -> &Entry {
        // SAFETY: `bank_at` is the first of a bank's entries, and the index is masked.
        unsafe { &*self.bank_at.add((lin >> 12) as usize % TLB_ENTRIES) }
    }

    /// Load from a linear address with the current privilege.
    #[inline(always)]
    pub fn ld<T: Int>(&mut self, lin: u64) -> Result<T, Stop> {
        let e = self.entry(lin);
        let at = lin.wrapping_sub(e.rtag);
        if at <= PAGE - T::SIZE {
            // SAFETY: a tag is only set for a page of guest memory, and the access stays in it.
            return Ok(unsafe { T::load((e.host + at) as *const u8) });
        }
        self.ld_slow(lin)
    }

    /// Store to a linear address with the current privilege.
    #[inline(always)]
    pub fn st<T: Int>(&mut self, lin: u64, v: T) -> Result<(), Stop> {
        let e = self.entry(lin);
        let at = lin.wrapping_sub(e.wtag);
        if at <= PAGE - T::SIZE {
            // SAFETY: as in `ld`; the page is writable.
            unsafe { T::store((e.host + at) as *mut u8, v) };
            return Ok(());
        }
        self.st_slow(lin, v)
    }

    #[cold]
    #[inline(never)]
    fn ld_slow<T: Int>(&mut self, lin: u64) -> Result<T, Stop> {
        let mut b = [0; 8];
        self.read_lin(lin, &mut b[..T::SIZE as usize], Right::Current)?;
        Ok(T::from_u64(u64::from_le_bytes(b)))
    }

    #[cold]
    #[inline(never)]
    fn st_slow<T: Int>(&mut self, lin: u64, v: T) -> Result<(), Stop> {
        self.write_lin(lin, &v.to_u64().to_le_bytes()[..T::SIZE as usize], Right::Current)
    }

    /// Load with the processor's own right (descriptor tables, TSS, IDT).
    pub fn ld_sys<T: Int>(&mut self, lin: u64) -> Result<T, Stop> {
        let first = self.tlb.bank(self.system_bank());
        let e = &self.tlb.entries[first + (lin >> 12) as usize % TLB_ENTRIES];
        let at = lin.wrapping_sub(e.rtag);
        if at <= PAGE - T::SIZE {
            // SAFETY: as in `ld`.
            return Ok(unsafe { T::load((e.host + at) as *const u8) });
        }
        let mut b = [0; 8];
        self.read_lin(lin, &mut b[..T::SIZE as usize], Right::System)?;
        Ok(T::from_u64(u64::from_le_bytes(b)))
    }

    /// Store with the processor's own right.
    pub fn st_sys<T: Int>(&mut self, lin: u64, v: T) -> Result<(), Stop> {
        self.write_lin(lin, &v.to_u64().to_le_bytes()[..T::SIZE as usize], Right::System)
    }

    fn system_bank(&self) -> usize {
        if self.cr4 & cr4::SMAP != 0 { BANK_SMAP } else { BANK_SUPER }
    }

    /// Addresses wrap at 4 GiB outside of IA-32e mode.
    fn wrap(&self, lin: u64) -> u64 {
        if self.long_mode() { lin } else { lin & 0xFFFF_FFFF }
    }

    /// Read any number of bytes; nothing is read if part of it faults.  One aligned access of
    /// up to 8 bytes inside a page is one host access.
    pub fn read_lin(&mut self, lin: u64, out: &mut [u8], right: Right) -> Result<(), Stop> {
        let len = out.len() as u64;
        self.check_linear(lin, len, right)?;
        self.watch(lin, len, false);
        let mut done = 0;
        while done < out.len() {
            let at = self.wrap(lin.wrapping_add(done as u64));
            let n = ((PAGE - (at & (PAGE - 1))) as usize).min(out.len() - done);
            let m = self.translate(at, Access::Read, right)?;
            self.fill(at, &m, right);
            self.read_phys(m.gpa, &mut out[done..done + n])?;
            done += n;
        }
        Ok(())
    }

    /// Write any number of bytes; nothing is written if part of it faults.
    pub fn write_lin(&mut self, lin: u64, data: &[u8], right: Right) -> Result<(), Stop> {
        self.probe_write(lin, data.len() as u64, right)?;
        self.watch(lin, data.len() as u64, true);
        let mut done = 0;
        while done < data.len() {
            let at = self.wrap(lin.wrapping_add(done as u64));
            let n = ((PAGE - (at & (PAGE - 1))) as usize).min(data.len() - done);
            let m = self.translate(at, Access::Write, right)?;
            self.write_phys(m.gpa, &data[done..done + n])?;
            self.fill(at, &m, right);
            done += n;
        }
        Ok(())
    }

    /// Raise what a write to this range would raise.
    pub fn probe_write(&mut self, lin: u64, len: u64, right: Right) -> Result<(), Stop> {
        self.check_linear(lin, len, right)?;
        let mut at = lin;
        let end = lin.wrapping_add(len);
        loop {
            self.translate(self.wrap(at), Access::Write, right)?;
            let next = (at & PAGE_MASK).wrapping_add(PAGE);
            if end.wrapping_sub(at) <= next.wrapping_sub(at) {
                return Ok(());
            }
            at = next;
        }
    }

    /// Read inside one physical page.
    fn read_phys(&mut self, gpa: u64, out: &mut [u8]) -> Result<(), Stop> {
        if self.page_flags(gpa) & PRESENT == 0 {
            return self.device_read(gpa, out);
        }
        // SAFETY: the page is guest memory and the access stays in it.
        unsafe {
            let p = self.mem_base.add(gpa as usize);
            match out.len() {
                1 => out[0] = u8::load(p),
                2 => out.copy_from_slice(&u16::load(p).to_le_bytes()),
                4 => out.copy_from_slice(&u32::load(p).to_le_bytes()),
                8 => out.copy_from_slice(&u64::load(p).to_le_bytes()),
                n => std::ptr::copy_nonoverlapping(p, out.as_mut_ptr(), n),
            }
        }
        Ok(())
    }

    /// Write inside one physical page.
    fn write_phys(&mut self, gpa: u64, data: &[u8]) -> Result<(), Stop> {
        let flags = self.page_flags(gpa);
        if flags & (PRESENT | WRITABLE) != PRESENT | WRITABLE {
            return self.device_write(gpa, data);
        }
        self.set_page_flags(gpa, DIRTY);
        // SAFETY: the page is writable guest memory and the access stays in it.
        unsafe {
            let p = self.mem_base.add(gpa as usize);
            match *data {
                [a] => u8::store(p, a),
                [a, b] => u16::store(p, u16::from_le_bytes([a, b])),
                [a, b, c, d] => u32::store(p, u32::from_le_bytes([a, b, c, d])),
                [a, b, c, d, e, f, g, h] => {
                    u64::store(p, u64::from_le_bytes([a, b, c, d, e, f, g, h]));
                }
                _ => std::ptr::copy_nonoverlapping(data.as_ptr(), p, data.len()),
            }
        }
        // Read again: another vCPU may have decoded from the page since.
        if self.page_flags(gpa) & CODE != 0 {
            self.code_written(gpa, data.len() as u64);
        }
        Ok(())
    }

    /// An access that no memory answers, in the pieces a bus would make of it.
    fn device_read(&mut self, gpa: u64, out: &mut [u8]) -> Result<(), Stop> {
        let mut done = 0;
        while done < out.len() {
            let at = gpa + done as u64;
            let n = bus_width(at, out.len() - done);
            let v = self.mmio_read(at, n as u8)?;
            out[done..done + n].copy_from_slice(&v.to_le_bytes()[..n]);
            done += n;
        }
        Ok(())
    }

    fn device_write(&mut self, gpa: u64, data: &[u8]) -> Result<(), Stop> {
        let mut done = 0;
        while done < data.len() {
            let at = gpa + done as u64;
            let n = bus_width(at, data.len() - done);
            let mut b = [0; 8];
            b[..n].copy_from_slice(&data[done..done + n]);
            self.mmio_write(at, n as u8, u64::from_le_bytes(b))?;
            done += n;
        }
        Ok(())
    }

    fn mmio_read(&mut self, gpa: u64, size: u8) -> Result<u64, Stop> {
        if let Some(v) = self.vm().mmio_read(self.id, gpa, size) {
            return Ok(v);
        }
        self.replayed(gpa, size, false, None, |_| Exit::Mmio { gpa, size, value: None })
    }

    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) -> Result<(), Stop> {
        if self.vm().mmio_write(self.id, gpa, size, value) {
            return Ok(());
        }
        let exit = |v| Exit::Mmio { gpa, size, value: v };
        self.replayed(gpa, size, false, Some(value), exit).map(|_| ())
    }

    /// The answer userland gave to this access when the instruction ran before; else go and ask.
    pub fn replayed(
        &mut self,
        addr: u64,
        size: u8,
        port: bool,
        write: Option<u64>,
        exit: impl FnOnce(Option<u64>) -> Exit,
    ) -> Result<u64, Stop> {
        if let Some(r) = self.replay.get(self.replay_pos) {
            self.replay_pos += 1;
            return Ok(r.value);
        }
        self.asked = Some(Replay { addr, size, port, write: write.is_some(), value: 0 });
        Err(self.leave(exit(write)))
    }

    // -- read-modify-write ---------------------------------------------------------------------

    /// A pointer through which the operand at `lin` may be read and then written; `commit`
    /// must follow when it is not the fast kind.
    #[inline(always)]
    pub fn wptr<T: Int>(&mut self, lin: u64) -> Result<*mut u8, Stop> {
        let e = self.entry(lin);
        let at = lin.wrapping_sub(e.wtag);
        if at <= PAGE - T::SIZE {
            return Ok((e.host + at) as *mut u8);
        }
        self.wptr_slow(lin, T::SIZE, false)
    }

    /// As `wptr`, for an atomic operation: until `commit` no other vCPU sees a half of it.
    #[inline(always)]
    pub fn wptr_locked<T: Int>(&mut self, lin: u64) -> Result<*mut u8, Stop> {
        let e = self.entry(lin);
        let at = lin.wrapping_sub(e.wtag);
        if at <= PAGE - T::SIZE {
            return Ok((e.host + at) as *mut u8);
        }
        self.wptr_slow(lin, T::SIZE, true)
    }

    /// `len` is at most 64.
    #[cold]
    #[inline(never)]
    pub fn wptr_slow(&mut self, lin: u64, len: u64, locked: bool) -> Result<*mut u8, Stop> {
        self.check_linear(lin, len, Right::Current)?;
        self.watch(lin, len, true);
        let crosses = (lin ^ lin.wrapping_add(len - 1)) & PAGE_MASK != 0;
        if !crosses {
            let m = self.translate(lin, Access::Write, Right::Current)?;
            let flags = self.page_flags(m.gpa);
            if flags & (PRESENT | WRITABLE) == PRESENT | WRITABLE {
                self.set_page_flags(m.gpa, DIRTY);
                self.fill(lin, &m, Right::Current);
                if self.page_flags(m.gpa) & CODE != 0 {
                    self.tlb.pending = Pending::Code { gpa: m.gpa, len };
                    self.pending_commit = true;
                }
                // SAFETY: the page is guest memory; the access stays in it.
                return Ok(unsafe { self.mem_base.add(m.gpa as usize) });
            }
        } else {
            self.probe_write(lin, len, Right::Current)?;
        }
        let mut buf = [0; 64];
        self.read_lin(lin, &mut buf[..len as usize], Right::Current)?;
        if locked && crosses {
            self.begin_exclusive();
            if let Err(s) = self.read_lin(lin, &mut buf[..len as usize], Right::Current) {
                self.end_exclusive();
                return Err(s);
            }
        }
        self.tlb.bounce = buf;
        self.tlb.pending = Pending::Bounce { lin, len };
        self.pending_commit = true;
        Ok(self.tlb.bounce.as_mut_ptr())
    }

    /// Finish what `wptr` began, after the write through its pointer.
    #[inline(always)]
    pub fn commit(&mut self) -> Result<(), Stop> {
        if self.pending_commit { self.commit_slow() } else { Ok(()) }
    }

    #[cold]
    #[inline(never)]
    fn commit_slow(&mut self) -> Result<(), Stop> {
        self.pending_commit = false;
        match std::mem::replace(&mut self.tlb.pending, Pending::Nothing) {
            Pending::Nothing => Ok(()),
            Pending::Code { gpa, len } => {
                self.code_written(gpa, len);
                Ok(())
            }
            Pending::Bounce { lin, len } => {
                let buf = self.tlb.bounce;
                let r = self.write_lin(lin, &buf[..len as usize], Right::Current);
                self.end_exclusive();
                r
            }
        }
    }

    /// Host address of `size` bytes at `lin` if the TLB has all of them as plain memory.
    #[inline(always)]
    pub fn direct(&self, lin: u64, size: u64, write: bool) -> Option<*mut u8> {
        let e = self.entry(lin);
        let at = lin.wrapping_sub(if write { e.wtag } else { e.rtag });
        (at <= PAGE - size).then(|| (e.host + at) as *mut u8)
    }

    /// Host address of `len` bytes at `lin`, and how many of them (at least 1) lie in its page,
    /// if it is plain memory that may be accessed so; for string instructions and vectors.
    pub fn span(&mut self, lin: u64, write: bool) -> Result<Option<*mut u8>, Stop> {
        let e = *self.entry(lin);
        let at = lin.wrapping_sub(if write { e.wtag } else { e.rtag });
        if at < PAGE {
            return Ok(Some((e.host + at) as *mut u8));
        }
        if self.bank == BANK_NONE {
            return Ok(None);
        }
        self.check_linear(lin, 1, Right::Current)?;
        let access = if write { Access::Write } else { Access::Read };
        let m = self.translate(lin, access, Right::Current)?;
        let flags = self.page_flags(m.gpa);
        if write {
            if flags & (PRESENT | WRITABLE | CODE) != PRESENT | WRITABLE {
                return Ok(None);
            }
            self.set_page_flags(m.gpa, DIRTY);
        } else if flags & PRESENT == 0 {
            return Ok(None);
        }
        self.fill(lin, &m, Right::Current);
        // SAFETY: inside guest memory.
        Ok(Some(unsafe { self.mem_base.add(m.gpa as usize) }))
    }

    // -- code ----------------------------------------------------------------------------------

    /// Physical address of the instruction byte at `lin`; raises #PF, #GP.
    #[inline(always)]
    pub fn fetch_gpa(&mut self, lin: u64) -> Result<u64, Stop> {
        let bank = usize::from(self.cpl == 3);
        let e = &self.tlb.code[bank][(lin >> 12) as usize % CODE_ENTRIES];
        let page = lin & PAGE_MASK;
        if e.tag == page | self.asid || e.tag == page | GLOBAL {
            return Ok(e.gpa | lin & (PAGE - 1));
        }
        self.fetch_slow(lin)
    }

    #[cold]
    #[inline(never)]
    fn fetch_slow(&mut self, lin: u64) -> Result<u64, Stop> {
        if self.long_mode() && !canonical(lin) {
            return Err(self.gp(0));
        }
        let m = self.translate(lin, Access::Fetch, Right::Current)?;
        if m.size > PAGE {
            let lo = lin & !(m.size - 1);
            let hi = lo + (m.size - 1);
            let old = self.tlb.large.unwrap_or((lo, hi));
            self.tlb.large = Some((old.0.min(lo), old.1.max(hi)));
        }
        let bank = usize::from(self.cpl == 3);
        let space = if m.global { GLOBAL } else { self.asid };
        self.tlb.code[bank][(lin >> 12) as usize % CODE_ENTRIES] =
            CodeEntry { tag: lin & PAGE_MASK | space, gpa: m.gpa & PAGE_MASK };
        Ok(m.gpa)
    }

    /// Is the code page of `lin`, which was fetched from last, the same in all address spaces?
    pub fn is_global(&self, lin: u64) -> bool {
        let bank = usize::from(self.cpl == 3);
        let e = &self.tlb.code[bank][(lin >> 12) as usize % CODE_ENTRIES];
        e.tag == lin & PAGE_MASK | GLOBAL
    }

    // -- operands ------------------------------------------------------------------------------

    /// Effective address (the offset in its segment) of an op's memory operand.
    #[inline(always)]
    pub fn ea(&self, op: &Op) -> u64 {
        // SAFETY: `base` and `index` are below 18 by construction.
        let (b, i) = unsafe {
            (*self.r.get_unchecked(op.base as usize), *self.r.get_unchecked(op.index as usize))
        };
        b.wrapping_add(i << op.scale).wrapping_add(op.disp) & op.amask
    }

    /// Linear address of an op's memory operand of `size` bytes; raises #GP or #SS.
    #[inline(always)]
    pub fn lin(&mut self, op: &Op, size: u64, write: bool) -> Result<u64, Stop> {
        let ea = self.ea(op);
        if op.flags & F_CHECK != 0 {
            return self.lin_checked(op.seg, ea, size, write);
        }
        // SAFETY: `seg` is below 6 by construction.
        Ok(unsafe { *self.seg_base.get_unchecked(op.seg as usize) }.wrapping_add(ea))
    }

    /// Linear address of `size` bytes at `ea` in segment `seg`, with limit and type checks
    /// (SDM 3A, 5.3-5.5); in 64-bit mode only the base counts.
    #[inline(never)]
    pub fn lin_checked(&mut self, seg: u8, ea: u64, size: u64, write: bool) -> Result<u64, Stop> {
        let s = self.seg[seg as usize];
        if self.code64() {
            return Ok(self.seg_base[seg as usize].wrapping_add(ea));
        }
        let last = ea.wrapping_add(size - 1);
        let bad = if s.access & (acc::UNUSABLE | acc::P) != acc::P {
            true
        } else if s.access & acc::CODE != 0 {
            // Code is never writable, and readable only if it says so; except in real mode and
            // v8086 mode, where the segment registers have no types that count.
            self.protected() && (write || s.access & acc::RW == 0) || last > u64::from(s.limit)
        } else if write && s.access & acc::RW == 0 {
            true
        } else if s.access & acc::EXPAND_DOWN != 0 {
            let top = if s.access & acc::DB != 0 { 0xFFFF_FFFF } else { 0xFFFF };
            ea <= u64::from(s.limit) || last > top
        } else {
            last > u64::from(s.limit)
        };
        if bad {
            return Err(self.raise(if seg == SS { vec::SS } else { vec::GP }, Some(0)));
        }
        Ok(s.base.wrapping_add(ea) & 0xFFFF_FFFF)
    }
}

/// `Exc::payload` of a #GP that becomes #SS when the stack segment was used: beyond the canonical
/// addresses, or beyond the end of a flat segment.
pub const NON_CANONICAL: u64 = 1;

/// The largest naturally aligned access that fits.
fn bus_width(gpa: u64, len: usize) -> usize {
    let mut n = 8;
    while n > len || gpa & (n as u64 - 1) != 0 {
        n /= 2;
    }
    n
}
