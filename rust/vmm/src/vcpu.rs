//! A virtual CPU: the processor, its local APIC, and how other threads reach it.
//!
//! One thread at a time is inside [`Vcpu::run`] and holds the processor's lock, but while it
//! waits (suspended, or frozen for someone who wants the registers).  Other threads talk to it
//! through its mailbox ([`Events`]) and never wait for it under a lock that it may want.

use std::cell::Cell;
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};

use serde::{Deserialize, Serialize};

use crate::caps::Caps;
use crate::error::{Error, Result};
use crate::events::{self, Events};
use crate::exit::Exit;
use crate::io::vlapic::Vlapic;
use crate::memory::PROT_WRITE;
use crate::platform::DeliveryMode;
use crate::regs::Reg;
use crate::soft::{Cpu, CpuConfig, CpuState};
use crate::stats::Stats;
use crate::vm::Vm;

/// Code writes kept one by one; beyond that they are merged into pages, of which there are
/// only so many.
const CODE_WRITES: usize = 256;

pub struct Vcpu {
    pub id: u32,
    pub events: Events,
    pub lapic: Vlapic,
    pub stats: Stats,
    /// Page number of the start-up IPI that event SIPI announces.
    pub sipi_vector: AtomicU32,
    /// Ranges (gpa, length) of code that was written; event CODE announces them.
    pub code_writes: Mutex<Vec<(u64, u64)>>,
    /// Bits of [`Caps`].
    pub caps: AtomicU32,
    /// Whether the vCPU's thread executes guest instructions; kept by `soft::safepoint`.
    pub in_guest: AtomicU32,
    /// IA32_TSC_ADJUST: added to the VM's TSC.  Written by the vCPU's thread only.
    pub tsc_adjust: AtomicU64,

    x2apic: AtomicBool,
    cpu: Mutex<Box<Cpu>>,
    /// A thread is inside `run`.
    running: AtomicBool,
    /// How many threads want the processor's lock; event FREEZE is set while it is not 0.
    freezers: Mutex<u32>,
    thawed: Condvar,
    /// Somebody called `kick`; event KICK alone only makes `run` look around.
    kicked: AtomicBool,
    ipi_exits: Mutex<VecDeque<Ipi>>,
    life: Life,
}

/// Where a vCPU stands; which of vmm's CPU sets it is in.
#[derive(Default)]
pub(crate) struct Life {
    pub active: AtomicBool,
    /// In the debug set: suspended by `Vm::suspend_cpu`.
    pub stopped: AtomicBool,
    /// `run` has returned `Exit::Debug` for this suspension.
    pub stop_reported: AtomicBool,
    /// Has executed an instruction since it was reset.
    pub started: AtomicBool,
    /// In HLT with interrupts off.
    pub halted: AtomicBool,
    /// Has noticed that the VM is suspended.
    pub out: AtomicBool,
}

/// An INIT or start-up IPI on its way to userland.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Ipi {
    mode: u8,
    vector: u8,
    dest: Vec<u32>,
}

/// State of a [`Vcpu`], for save and restore.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    pub version: u32,
    cpu: CpuState,
    caps: u32,
    x2apic: bool,
    stopped: bool,
    started: bool,
    halted: bool,
    /// Mailbox bits that are part of the machine's state.
    events: u32,
    sipi_vector: u32,
    tsc_adjust: u64,
    ipi_exits: Vec<Ipi>,
}

const STATE_VERSION: u32 = 1;
const STATE_EVENTS: u32 = events::INTR | events::NMI | events::INIT | events::SIPI;

thread_local! {
    /// The vCPU on whose behalf this thread acts.
    static CURRENT: Cell<*const Vcpu> = const { Cell::new(std::ptr::null()) };
}

/// For its lifetime, IPIs from this thread come from a vCPU.
pub(crate) struct Acting<'a> {
    outer: *const Vcpu,
    vcpu: PhantomData<&'a Vcpu>,
}

impl<'a> Acting<'a> {
    pub fn new(vcpu: &'a Vcpu) -> Acting<'a> {
        Acting { outer: CURRENT.replace(vcpu), vcpu: PhantomData }
    }
}

impl Drop for Acting<'_> {
    fn drop(&mut self) {
        CURRENT.set(self.outer);
    }
}

/// The processor, held still: while this exists the vCPU executes nothing.
pub struct Frozen<'a> {
    // Declared, so dropped, before the hold: the vCPU must find the lock free when it thaws.
    cpu: MutexGuard<'a, Box<Cpu>>,
    _hold: Option<Hold<'a>>,
    vcpu: &'a Vcpu,
}

impl Frozen<'_> {
    /// VM_REG_*; the task priority (TPR) is the local APIC's, as CR8 shows it.
    pub fn get_register(&self, reg: Reg) -> u64 {
        if reg == Reg::Tpr { self.vcpu.lapic.cr8().into() } else { self.cpu.get_reg(reg) }
    }

    pub fn set_register(&mut self, vm: &Vm, reg: Reg, value: u64) {
        if reg == Reg::Tpr {
            self.vcpu.lapic.set_cr8(vm, value as u8 & 0xf);
        } else {
            self.cpu.set_reg(reg, value);
        }
    }

    /// Walk the guest's page tables as supervisor; `None` where nothing is mapped, or not with
    /// the permission `prot` (PROT_*).
    pub fn translate(&mut self, vm: &Vm, gla: u64, prot: u32) -> Option<u64> {
        self.cpu.attach(vm, self.vcpu);
        self.cpu.gla2gpa(gla, prot & PROT_WRITE != 0)
    }

    /// Put another processor in place of this one.
    fn replace(&mut self, cpu: Box<Cpu>) {
        // The old one's blocks are registered with the VM.
        self.cpu.drop_blocks();
        *self.cpu = cpu;
    }
}

impl Deref for Frozen<'_> {
    type Target = Cpu;

    fn deref(&self) -> &Cpu {
        &self.cpu
    }
}

impl DerefMut for Frozen<'_> {
    fn deref_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }
}

/// A claim on the processor's lock that the vCPU's thread respects.
struct Hold<'a>(&'a Vcpu);

impl<'a> Hold<'a> {
    fn new(vcpu: &'a Vcpu) -> Hold<'a> {
        let mut freezers = lock(&vcpu.freezers);
        *freezers += 1;
        vcpu.events.post(events::FREEZE);
        Hold(vcpu)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut freezers = lock(&self.0.freezers);
        *freezers -= 1;
        if *freezers == 0 {
            self.0.events.take(events::FREEZE);
            self.0.thawed.notify_all();
        }
    }
}

/// Clears `running`, also when the engine panics.
struct Running<'a>(&'a Vcpu);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.store(false, Ordering::Release);
    }
}

/// The lock of `mutex`; state behind our locks is whole at every step, so a panic under one
/// does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vcpu {
    pub(crate) fn new(config: &CpuConfig, id: u32) -> Vcpu {
        Vcpu {
            id,
            events: Events::default(),
            lapic: Vlapic::new(id),
            stats: Stats::default(),
            sipi_vector: AtomicU32::new(0),
            code_writes: Mutex::default(),
            caps: AtomicU32::new(Caps::FIXED.bits()),
            in_guest: AtomicU32::new(0),
            tsc_adjust: AtomicU64::new(0),
            x2apic: AtomicBool::new(config.x2apic),
            cpu: Mutex::new(Cpu::new(id, config)),
            running: AtomicBool::new(false),
            freezers: Mutex::new(0),
            thawed: Condvar::new(),
            kicked: AtomicBool::new(false),
            ipi_exits: Mutex::default(),
            life: Life::default(),
        }
    }

    pub(crate) fn life(&self) -> &Life {
        &self.life
    }

    /// Run the guest until userland must act.
    ///
    /// # Errors
    /// `Invalid` while the vCPU is not active, `Busy` while another thread runs it.
    pub fn run(&self, vm: &Vm) -> Result<Exit> {
        if !self.life.active.load(Ordering::Acquire) {
            return Err(Error::Invalid(format!("vCPU {} is not active", self.id)));
        }
        if self.running.swap(true, Ordering::Acquire) {
            return Err(Error::Busy(format!("vCPU {} runs in another thread", self.id)));
        }
        let _running = Running(self);
        let _acting = Acting::new(self);
        let start = vm.clock.now();
        let exit = self.run_until_exit(vm);
        self.stats.runtime_ns.add(vm.clock.now().saturating_sub(start));
        self.stats.exits_userspace.inc();
        match exit {
            Exit::Mmio { .. } => self.stats.mmio.inc(),
            Exit::Pause => self.stats.pause.inc(),
            _ => {}
        }
        Ok(exit)
    }

    fn run_until_exit(&self, vm: &Vm) -> Exit {
        let mut cpu = lock(&self.cpu);
        loop {
            let pending = self.events.peek();
            if pending & events::RETURN != 0 {
                drop(cpu);
                if let Some(exit) = self.attend(vm, pending) {
                    return exit;
                }
                cpu = lock(&self.cpu);
            } else {
                // Left over where nobody waited for it; the engine would look at it after each block.
                self.events.take(pending & events::RESUME);
                self.life.started.store(true, Ordering::Relaxed);
                if let Some(exit) = cpu.run(vm, self) {
                    return exit;
                }
            }
        }
    }

    /// See to one of `events::RETURN`, without the processor's lock.
    fn attend(&self, vm: &Vm, pending: u32) -> Option<Exit> {
        if pending & events::FREEZE != 0 {
            self.wait_thaw();
            None
        } else if pending & events::KICK != 0 {
            self.events.take(events::KICK);
            self.next_ipi()
                .or_else(|| self.kicked.swap(false, Ordering::SeqCst).then_some(Exit::Bogus))
        } else if pending & events::SUSPEND != 0 {
            self.wait_all_out(vm)
        } else if self.life.stop_reported.swap(true, Ordering::SeqCst) {
            self.events.wait(events::KICK | events::SUSPEND | events::RESUME, None);
            self.events.take(events::RESUME);
            None
        } else {
            Some(Exit::Debug)
        }
    }

    fn wait_thaw(&self) {
        let mut freezers = lock(&self.freezers);
        while *freezers != 0 {
            freezers = self.thawed.wait(freezers).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// bhyve: a suspended VM is reported once every active vCPU has left the guest.
    fn wait_all_out(&self, vm: &Vm) -> Option<Exit> {
        self.life.out.store(true, Ordering::SeqCst);
        loop {
            let how = vm.suspended()?;
            if vm.all_out() {
                // The others may have looked before we were out.
                vm.vcpus.iter().for_each(|v| v.events.post(events::RESUME));
                return Some(Exit::Suspended { how });
            }
            if self.events.wait(events::KICK | events::RESUME, None) & events::KICK != 0 {
                return None;
            }
            self.events.take(events::RESUME);
        }
    }

    /// Make a `run` that is under way, or the next one, return `Exit::Bogus`.
    pub fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.events.post(events::KICK);
    }

    /// Hold the processor still.  The caller must not be inside `run` of any vCPU.
    pub fn freeze(&self) -> Frozen<'_> {
        let hold = Hold::new(self);
        Frozen { cpu: lock(&self.cpu), _hold: Some(hold), vcpu: self }
    }

    /// `freeze`, if that needs no waiting: the vCPU is not in the guest.
    pub fn try_freeze(&self) -> Option<Frozen<'_>> {
        let cpu = match self.cpu.try_lock() {
            Ok(cpu) => cpu,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Frozen { cpu, _hold: None, vcpu: self })
    }

    /// Do something to the processor; a running vCPU pauses for as long as it takes.
    pub fn with_cpu<R>(&self, act: impl FnOnce(&mut Frozen<'_>) -> R) -> R {
        act(&mut self.freeze())
    }

    /// Power-on state of the processor; the local APIC and the capabilities stay as they are.
    pub fn reset(&self) {
        let mut cpu = self.freeze();
        cpu.reset();
        self.not_started();
    }

    /// What INIT leaves of the processor, for a start-up IPI that comes now: MTRRs and other
    /// MSRs, x87 and vector registers stay.
    pub fn init(&self) {
        let mut cpu = self.freeze();
        cpu.init();
        cpu.wait_sipi = false;
        self.not_started();
    }

    fn not_started(&self) {
        self.life.started.store(false, Ordering::Relaxed);
        self.life.halted.store(false, Ordering::Relaxed);
    }

    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    // -- capabilities --------------------------------------------------------------------------

    pub fn has_cap(&self, cap: Caps) -> bool {
        self.caps.load(Ordering::Relaxed) & cap.bits() != 0
    }

    /// # Errors
    /// `Invalid` when `cap` is one that cannot be switched off.
    pub fn set_cap(&self, cap: Caps, on: bool) -> Result<()> {
        if !on && Caps::FIXED.contains(cap) {
            return Err(Error::Invalid("this processor always has the capability".into()));
        }
        // Frozen: an engine looks at capabilities when it is entered.
        let _cpu = self.freeze();
        if on {
            self.caps.fetch_or(cap.bits(), Ordering::SeqCst);
        } else {
            self.caps.fetch_and(!cap.bits(), Ordering::SeqCst);
        }
        Ok(())
    }

    /// Whether the local APIC starts in x2APIC mode and CPUID shows it.
    pub fn x2apic(&self) -> bool {
        self.x2apic.load(Ordering::Relaxed)
    }

    pub fn set_x2apic(&self, vm: &Vm, on: bool) -> Result<()> {
        self.x2apic.store(on, Ordering::Relaxed);
        self.lapic.set_x2apic_state(vm, on);
        self.configure(&vm.cpu_config(self))
    }

    /// Make the processor again with another topology or APIC mode, in the same state.
    pub(crate) fn configure(&self, config: &CpuConfig) -> Result<()> {
        let mut frozen = self.freeze();
        let state = frozen.save();
        let mut cpu = Cpu::new(self.id, config);
        cpu.restore(state).map_err(Error::Invalid)?;
        frozen.replace(cpu);
        Ok(())
    }

    /// The counters of processor and local APIC, by the names that bhyvectl prints.
    pub fn all_stats(&self) -> Vec<(String, u64)> {
        let own = self.stats.snapshot().into_iter().map(|(name, n)| (name.to_owned(), n));
        let apic = self.lapic.stats();
        let named = [
            ("EOI without any in-service interrupt", apic.spurious_eoi),
            ("error interrupts generated by vlapic", apic.error_intr),
            ("timer interrupts generated by vlapic", apic.timer_intr),
            ("corrected machine check interrupts", apic.cmc_intr),
        ];
        let lvts = apic.lvts.iter().enumerate();
        own.chain(named.map(|(name, n)| (name.to_owned(), n)))
            .chain(lvts.map(|(i, n)| (format!("lvts triggered[{i}]"), *n)))
            .collect()
    }

    // -- IPIs to userland ----------------------------------------------------------------------

    /// Queue an INIT or start-up IPI to `dest` as an exit of the vCPU for which this thread acts.
    /// False where there is none or it has not the capability.
    pub(crate) fn exit_with_ipi(mode: DeliveryMode, vector: u8, dest: u32) -> bool {
        let current = CURRENT.get();
        // SAFETY: set by `Acting`, which borrows the vCPU on this thread's stack; null otherwise.
        let Some(sender) = (unsafe { current.as_ref() }) else { return false };
        if !sender.has_cap(Caps::IPI_EXIT) {
            return false;
        }
        sender.stats.ipi.inc();
        let mode = mode as u8;
        let mut queue = lock(&sender.ipi_exits);
        match queue.back_mut() {
            // One ICR write to several vCPUs arrives here once for each.
            Some(ipi) if (ipi.mode, ipi.vector) == (mode, vector) && !ipi.dest.contains(&dest) => {
                ipi.dest.push(dest);
            }
            _ => queue.push_back(Ipi { mode, vector, dest: vec![dest] }),
        }
        sender.events.post(events::KICK);
        true
    }

    fn next_ipi(&self) -> Option<Exit> {
        let Ipi { mode, vector, dest } = lock(&self.ipi_exits).pop_front()?;
        // There may be more, or a kick behind it.
        self.events.post(events::KICK);
        Some(Exit::Ipi { mode, vector, dest })
    }

    // -- code ----------------------------------------------------------------------------------

    /// Bytes that this vCPU may have decoded were written.
    pub fn code_written(&self, gpa: u64, len: u64) {
        let mut writes = lock(&self.code_writes);
        writes.push((gpa, len));
        if writes.len().is_power_of_two() && writes.len() > CODE_WRITES {
            merge_pages(&mut writes);
        }
        drop(writes);
        self.events.post(events::CODE);
    }

    // -- state ---------------------------------------------------------------------------------

    pub fn save(&self) -> VcpuState {
        let cpu = self.freeze();
        VcpuState {
            version: STATE_VERSION,
            cpu: cpu.save(),
            caps: self.caps.load(Ordering::Relaxed),
            x2apic: self.x2apic(),
            stopped: self.life.stopped.load(Ordering::Relaxed),
            started: self.life.started.load(Ordering::Relaxed),
            halted: self.life.halted.load(Ordering::Relaxed),
            events: self.events.peek() & STATE_EVENTS,
            sipi_vector: self.sipi_vector.load(Ordering::Relaxed),
            tsc_adjust: self.tsc_adjust.load(Ordering::Relaxed),
            ipi_exits: lock(&self.ipi_exits).iter().cloned().collect(),
        }
    }

    /// Take on a saved state.  The vCPU's APIC is restored with the devices.
    pub fn restore(&self, vm: &Vm, state: VcpuState) -> Result<()> {
        if state.version != STATE_VERSION {
            return Err(Error::Invalid(format!(
                "vCPU state has version {}, not {STATE_VERSION}",
                state.version
            )));
        }
        self.x2apic.store(state.x2apic, Ordering::Relaxed);
        let config = vm.cpu_config(self);
        let mut frozen = self.freeze();
        let mut cpu = Cpu::new(self.id, &config);
        cpu.restore(state.cpu).map_err(Error::Invalid)?;
        frozen.replace(cpu);
        self.caps.store(state.caps | Caps::FIXED.bits(), Ordering::Relaxed);
        self.life.started.store(state.started, Ordering::Relaxed);
        self.life.halted.store(state.halted, Ordering::Relaxed);
        self.sipi_vector.store(state.sipi_vector, Ordering::Relaxed);
        self.tsc_adjust.store(state.tsc_adjust, Ordering::Relaxed);
        *lock(&self.ipi_exits) = state.ipi_exits.into();
        self.events.take(STATE_EVENTS);
        // KICK: look for IPIs; no more than a glance where there are none.
        self.events.post(state.events & STATE_EVENTS | events::KICK);
        self.set_stopped(state.stopped);
        Ok(())
    }

    pub(crate) fn set_stopped(&self, stop: bool) {
        if stop {
            self.life.stop_reported.store(false, Ordering::SeqCst);
            self.life.stopped.store(true, Ordering::SeqCst);
            self.events.post(events::STOP);
        } else {
            self.life.stopped.store(false, Ordering::SeqCst);
            self.events.take(events::STOP);
            self.events.post(events::RESUME);
        }
    }

    /// As newly created, for `Vm::reinit`.
    pub(crate) fn reinit(&self, vm: &Vm) -> Result<()> {
        self.set_x2apic(vm, false)?;
        self.reset();
        let mut cpu = self.freeze();
        cpu.flush_tlb();
        cpu.drop_blocks();
        self.caps.store(Caps::FIXED.bits(), Ordering::Relaxed);
        self.tsc_adjust.store(0, Ordering::Relaxed);
        lock(&self.ipi_exits).clear();
        lock(&self.code_writes).clear();
        self.kicked.store(false, Ordering::Relaxed);
        self.events.take(!events::FREEZE);
        let life = &self.life;
        for flag in [&life.active, &life.stopped, &life.stop_reported, &life.out] {
            flag.store(false, Ordering::SeqCst);
        }
        self.stats.reset();
        Ok(())
    }
}

/// Widen ranges to whole pages and join those that touch.
fn merge_pages(ranges: &mut Vec<(u64, u64)>) {
    use crate::memory::PAGE_SIZE;
    let mut pages: Vec<(u64, u64)> = ranges
        .iter()
        .map(|&(gpa, len)| (gpa & !(PAGE_SIZE - 1), (gpa + len.max(1)).next_multiple_of(PAGE_SIZE)))
        .collect();
    pages.sort_unstable();
    ranges.clear();
    for (start, end) in pages {
        match ranges.last_mut() {
            Some((gpa, len)) if start <= *gpa + *len => *len = (*len).max(end - *gpa),
            _ => ranges.push((start, end - start)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::PAGE_SIZE;

    fn covers(ranges: &[(u64, u64)], gpa: u64, len: u64) -> bool {
        ranges.iter().any(|&(start, n)| start <= gpa && gpa + len <= start + n)
    }

    proptest! {
        #[test]
        fn merged_ranges_are_few_and_miss_nothing(
            ranges in prop::collection::vec((0..64_u64 << 12, 1..9000_u64), 0..200)
        ) {
            let mut merged = ranges.clone();
            merge_pages(&mut merged);
            for &(gpa, len) in &ranges {
                prop_assert!(covers(&merged, gpa, len));
            }
            for &(gpa, len) in &merged {
                prop_assert!(len > 0 && (gpa | len).is_multiple_of(PAGE_SIZE));
            }
            for pair in merged.windows(2) {
                prop_assert!(pair[0].0 + pair[0].1 < pair[1].0);
            }
        }
    }

    #[test]
    fn code_writes_do_not_pile_up() {
        let vm = Vm::new(1).unwrap();
        let vcpu = &vm.vcpus[0];
        for n in 0..100_000 {
            vcpu.code_written(0x1000 + n % 0x3000, 1);
        }
        let writes = lock(&vcpu.code_writes);
        assert!(writes.len() <= 2 * CODE_WRITES, "{}", writes.len());
        assert!((0..0x3000).all(|n| covers(&writes, 0x1000 + n, 1)));
        assert_ne!(vcpu.events.peek() & events::CODE, 0);
    }
}
