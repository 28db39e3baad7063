//! The mailbox of a vCPU: what other threads want it to notice before its next instruction.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The local APIC or the PIC may have an interrupt.
pub const INTR: u32 = 1 << 0;
pub const NMI: u32 = 1 << 1;
pub const INIT: u32 = 1 << 2;
pub const SIPI: u32 = 1 << 3;
/// Return from `run` with `Exit::Bogus`.
pub const KICK: u32 = 1 << 4;
/// The VM has been suspended for a reason (reset, power-off, ...).
pub const SUSPEND: u32 = 1 << 5;
/// Somebody wants this vCPU's registers: let go of them for a moment.
pub const FREEZE: u32 = 1 << 6;
/// Somebody waits for this vCPU to reach an instruction boundary (`soft::safepoint`).
pub const SAFEPOINT: u32 = 1 << 7;
/// Guest code was written: drop the blocks named in the vCPU's invalidation list.
pub const CODE: u32 = 1 << 8;
/// The vCPU was suspended with `Vm::suspend_cpu`.
pub const STOP: u32 = 1 << 9;
/// The suspension that STOP announced is over.
pub const RESUME: u32 = 1 << 10;

/// What makes an engine give up control to `Vcpu::run`, also out of HLT.
pub const RETURN: u32 = KICK | SUSPEND | FREEZE | STOP;

/// Bits posted by any thread, read by the vCPU's own thread at each block boundary.
///
/// A post is never lost: the bit is set before the sleeper's lock is taken, and the sleeper tests
/// the bits under that lock.
#[derive(Default)]
pub struct Events {
    bits: AtomicU32,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Events {
    /// Set `bits` and wake the vCPU if it sleeps.
    pub fn post(&self, bits: u32) {
        let old = self.bits.fetch_or(bits, Ordering::SeqCst);
        if old & bits != bits {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }

    pub fn peek(&self) -> u32 {
        self.bits.load(Ordering::Relaxed)
    }

    /// Clear `bits` and return those of them that were set.
    pub fn take(&self, bits: u32) -> u32 {
        self.bits.fetch_and(!bits, Ordering::SeqCst) & bits
    }

    /// The word that `post` sets, for an engine that polls it.
    pub fn word(&self) -> &AtomicU32 {
        &self.bits
    }

    /// Sleep until one of `mask` is set or `limit` has passed; returns the bits of `mask` set.
    pub fn wait(&self, mask: u32, limit: Option<Duration>) -> u32 {
        let deadline = limit.map(|d| Instant::now() + d);
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let set = self.bits.load(Ordering::SeqCst) & mask;
            if set != 0 {
                return set;
            }
            guard = match deadline {
                None => self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    let Some(left) = at.checked_duration_since(Instant::now()) else { return 0 };
                    self.wake.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}
/// A count of something that goes on happening, and threads that wait for the next time.
#[derive(Default)]
pub struct Happenings {
    count: AtomicU64,
    waiting: AtomicU32,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Happenings {
    /// It happens.
    pub fn happen(&self) {
        // A waiter announces itself, then reads the count: one of the two sees the other.
        self.count.fetch_add(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) != 0 {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }

    /// Sleep until the count is not `seen` or `limit` has passed; returns the count.
    pub fn wait(&self, seen: u64, limit: Duration) -> u64 {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |_: &mut ()| self.count.load(Ordering::SeqCst) == seen;
        drop(self.wake.wait_timeout_while(guard, limit, same));
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.count.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn who_waits_for_the_next_time_sees_it() {
        let halts = Arc::new(Happenings::default());
        let long = Duration::from_secs(60);
        assert_eq!(halts.wait(0, Duration::from_millis(1)), 0);
        halts.happen();
        assert_eq!(halts.wait(0, long), 1);
        let waiter = {
            let halts = Arc::clone(&halts);
            thread::spawn(move || halts.wait(1, long))
        };
        while halts.waiting.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        halts.happen();
        assert_eq!(waiter.join().unwrap(), 2);
    }
}
