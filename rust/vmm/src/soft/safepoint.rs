//! Bringing all vCPUs of a VM to an instruction boundary.
//!
//! Two things need it: taking the write permission for a page that is about to hold decoded code
//! (other vCPUs have it in their TLBs), and a locked operation that the host cannot do in one
//! piece (across pages, or on a device).  Both are rare.
//!
//! Every vCPU that executes guest code has its `in_guest` word set to 1; it is 0 while it is
//! outside of `Cpu::run`, or parked here, or asleep.  The one that wants the others still takes the VM's
//! exclusive lock, asks each to stop and waits until its word is 0.  A vCPU that waits for the
//! lock counts as still, so two who want it at once do not wait for each other.

use super::Cpu;
use crate::events;
use crate::memory::CODE;
use std::sync::atomic::Ordering;

impl Cpu {
    /// From here on this vCPU may hold translations and be in the middle of an instruction.
    pub(super) fn enter_guest(&mut self) {
        loop {
            self.vcpu().in_guest.store(1, Ordering::SeqCst);
            if !self.vm().exclusive.wanted_by_other(self.id) {
                break;
            }
            self.vcpu().in_guest.store(0, Ordering::SeqCst);
            self.vm().exclusive.wait_free(self.id);
        }
        let epoch = self.vm().exclusive.epoch();
        if epoch != self.epoch {
            self.epoch = epoch;
            self.flush_tlb();
        }
    }

    pub(super) fn leave_guest(&mut self) {
        self.vcpu().in_guest.store(0, Ordering::SeqCst);
    }

    /// A `SAFEPOINT` event: stand still for as long as somebody asks for it.
    pub(super) fn rest(&mut self) {
        self.leave_guest();
        self.enter_guest();
    }

    /// Stop the other vCPUs at an instruction boundary until `end_exclusive`.
    pub(super) fn begin_exclusive(&mut self) {
        if self.exclusive {
            return;
        }
        self.vcpu().in_guest.store(0, Ordering::SeqCst);
        self.vm().exclusive.acquire(self.id);
        self.vcpu().in_guest.store(1, Ordering::SeqCst);
        for v in &self.vm().vcpus {
            if v.id == self.id {
                continue;
            }
            v.events.post(events::SAFEPOINT);
            while v.in_guest.load(Ordering::SeqCst) != 0 {
                std::hint::spin_loop();
                std::thread::yield_now();
            }
        }
        self.exclusive = true;
    }

    pub(super) fn end_exclusive(&mut self) {
        if self.exclusive {
            self.exclusive = false;
            self.vm().exclusive.release();
        }
    }

    /// Make writes to a physical page take the slow path on every vCPU, from now until its flag
    /// is cleared.  On return, every write that went the fast way has been done.
    pub(super) fn protect_code_page(&mut self, gpa: u64) {
        if self.page_flags(gpa) & CODE == 0 {
            let alone = self.vm().vcpus.len() == 1;
            if !alone {
                self.begin_exclusive();
                self.epoch = self.vm().exclusive.next_epoch();
            }
            self.vm().mem.set_code(gpa);
            if !alone {
                self.end_exclusive();
            }
        }
        self.tlb.protect(gpa);
    }
}
