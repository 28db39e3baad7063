//! Bringing all vCPUs of a VM to an instruction boundary, and which pages hold decoded code.
//!
//! Two things need all others to stand still: taking the write permission for a page that is
//! about to hold decoded code (other vCPUs have it in their TLBs), and a locked operation that the
//! host cannot do in one piece (across pages).  Both are rare.
//!
//! A vCPU that executes guest code has its `in_guest` word set; the word is 0 while it is outside
//! of `Cpu::run`, asleep in HLT, or waiting here.  Who wants the others still takes the VM's
//! [`Exclusive`] lock, posts SAFEPOINT to each and waits until its word is 0.  A vCPU that waits
//! for the lock counts as still, so two who want it at once do not wait for each other.

use super::Cpu;
use crate::events;
use crate::memory::CODE;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

/// The lock of a VM under which at most one vCPU runs.
#[derive(Default)]
pub struct Exclusive {
    taken: Mutex<bool>,
    freed: Condvar,
    /// What `taken` says, for a look without the lock.
    busy: AtomicBool,
    /// Counts the times that write permissions were taken away.
    epoch: AtomicU64,
    /// Physical pages with decoded code, and on how many vCPUs.  Changed under the exclusive lock.
    pages: Mutex<HashMap<u64, u32>>,
}

impl Exclusive {
    fn acquire(&self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken {
            taken = self.freed.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken = true;
        self.busy.store(true, Ordering::SeqCst);
    }

    fn release(&self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        *taken = false;
        self.busy.store(false, Ordering::SeqCst);
        self.freed.notify_all();
    }

    fn wait_free(&self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken {
            taken = self.freed.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Cpu {
    /// From here on this vCPU may hold translations and be in the middle of an instruction.
    pub(super) fn enter_guest(&mut self) {
        loop {
            self.vcpu().in_guest.store(1, Ordering::SeqCst);
            if !self.vm().exclusive.busy.load(Ordering::SeqCst) {
                break;
            }
            self.vcpu().in_guest.store(0, Ordering::SeqCst);
            self.vm().exclusive.wait_free();
        }
        let epoch = self.vm().exclusive.epoch.load(Ordering::SeqCst);
        if epoch != self.epoch {
            self.epoch = epoch;
            self.flush_tlb();
        }
    }

    pub(super) fn leave_guest(&mut self) {
        self.vcpu().in_guest.store(0, Ordering::SeqCst);
    }

    /// Stop the other vCPUs at an instruction boundary until `end_exclusive`.
    pub(super) fn begin_exclusive(&mut self) {
        if self.exclusive {
            return;
        }
        self.leave_guest();
        self.vm().exclusive.acquire();
        self.vcpu().in_guest.store(1, Ordering::SeqCst);
        for v in &self.vm().vcpus {
            if v.id == self.id {
                continue;
            }
            v.events.post(events::SAFEPOINT);
            while v.in_guest.load(Ordering::SeqCst) != 0 {
                std::thread::yield_now();
            }
        }
        self.exclusive = true;
        let epoch = self.vm().exclusive.epoch.load(Ordering::SeqCst);
        if epoch != self.epoch {
            self.epoch = epoch;
            self.flush_tlb();
        }
    }

    pub(super) fn end_exclusive(&mut self) {
        if self.exclusive {
            self.exclusive = false;
            self.vm().exclusive.release();
        }
    }

    /// Make writes to a physical page take the slow path on every vCPU, for as long as this one
    /// has blocks there.  On return, every write that went the fast way has been done.
    pub(super) fn protect_code_page(&mut self, gpa: u64) {
        let nested = self.exclusive;
        self.begin_exclusive();
        let vm = self.vm();
        let mut pages = vm.exclusive.pages.lock().unwrap_or_else(PoisonError::into_inner);
        *pages.entry(gpa >> 12).or_insert(0) += 1;
        drop(pages);
        let word = vm.mem.page_flag_word(gpa >> 12);
        if word.fetch_or(CODE, Ordering::SeqCst) & CODE == 0 {
            self.epoch = self.vm().exclusive.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        }
        if !nested {
            self.end_exclusive();
        }
        self.tlb.protect(gpa & !0xFFF);
    }

    /// This vCPU has no blocks left in these pages; where nobody has, writes are fast again.
    /// Only between blocks; also from outside of `run`, with the vCPU frozen.
    pub(super) fn release_code_pages(&mut self, gone: impl IntoIterator<Item = u64>) {
        let inside = self.vcpu().in_guest.load(Ordering::SeqCst);
        self.begin_exclusive();
        let vm = self.vm();
        let mut pages = vm.exclusive.pages.lock().unwrap_or_else(PoisonError::into_inner);
        for page in gone {
            if let Some(n) = pages.get_mut(&page) {
                *n -= 1;
                if *n == 0 {
                    pages.remove(&page);
                    vm.mem.page_flag_word(page).fetch_and(!CODE, Ordering::SeqCst);
                }
            }
        }
        drop(pages);
        self.end_exclusive();
        self.vcpu().in_guest.store(inside, Ordering::SeqCst);
    }
}
