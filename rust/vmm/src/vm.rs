//! A virtual machine: its memory, vCPUs and in-kernel devices, and how they reach each other.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use serde::{Deserialize, Serialize};

use crate::clock::{self, Clock, ClockState, Timers};
use crate::error::{Error, Result};
use crate::events;
use crate::exit::SuspendHow;
use crate::io::vatpic::Vatpic;
use crate::io::vatpit::Vatpit;
use crate::io::vhpet::Vhpet;
use crate::io::vioapic::Vioapic;
use crate::io::vpmtmr::Vpmtmr;
use crate::io::vrtc::Vrtc;
use crate::io::{self, StateError};
use crate::memory::GuestMemory;
use crate::platform::{Callout, DeliveryMode, NotDecoded, Platform};
use crate::soft::CpuConfig;
use crate::soft::safepoint::Exclusive;
use crate::vcpu::{Acting, Frozen, Vcpu};

/// xAPIC ids are 8 bits, and 255 is broadcast.
pub const MAXCPUS: u32 = 255;

const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;
const HPET: u64 = 0xfed0_0000;
const APIC_SIZE: u64 = 0x1000;
const HPET_SIZE: u64 = 0x400;

/// How vCPUs make up packages, cores and threads; CPUID shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    pub sockets: u16,
    pub cores: u16,
    pub threads: u16,
    pub maxcpus: u16,
}

pub struct Vm {
    pub mem: GuestMemory,
    pub clock: Arc<Clock>,
    pub timers: Timers,
    /// By id.
    pub vcpus: Vec<Arc<Vcpu>>,
    /// For bringing all vCPUs to an instruction boundary.
    pub exclusive: Exclusive,
    pub ioapic: Vioapic,
    pub pic: Vatpic,
    pub pit: Vatpit,
    pub hpet: Vhpet,
    pub pmtmr: Vpmtmr,
    pub rtc: Vrtc,
    topology: Mutex<Topology>,
    /// `SuspendHow` as a number.
    suspend: AtomicU32,
    /// Held by whoever changes the memory map, the topology or a vCPU's place in the CPU sets.
    change: Mutex<()>,
}

/// State of the clock and the in-kernel devices, for save and restore.
#[derive(Serialize, Deserialize)]
pub struct DeviceState {
    pub version: u32,
    clock: ClockState,
    vlapic: Vec<io::vlapic::State>,
    vioapic: io::vioapic::State,
    vatpic: io::vatpic::State,
    vatpit: io::vatpit::State,
    vhpet: io::vhpet::State,
    vpmtmr: io::vpmtmr::State,
    vrtc: io::vrtc::State,
}

const STATE_VERSION: u32 = 1;

impl From<StateError> for Error {
    fn from(error: StateError) -> Error {
        Error::Invalid(error.to_string())
    }
}

impl Vm {
    /// A VM without memory whose `maxcpus` vCPUs are in power-on state and not active.
    ///
    /// # Errors
    /// `Invalid` unless `maxcpus` is 1 to [`MAXCPUS`]; `Host` without address space or threads.
    pub fn new(maxcpus: u32) -> Result<Arc<Vm>> {
        if !(1..=MAXCPUS).contains(&maxcpus) {
            return Err(Error::Invalid(format!("a VM has 1 to {MAXCPUS} vCPUs, not {maxcpus}")));
        }
        let topology =
            Topology { sockets: maxcpus as u16, cores: 1, threads: 1, maxcpus: maxcpus as u16 };
        let vcpus: Vec<_> = (0..maxcpus)
            .map(|id| Arc::new(Vcpu::new(&config(topology, maxcpus, true), id)))
            .collect();

        let mem = GuestMemory::new()?;
        let watchers = vcpus.clone();
        mem.set_code_watcher(move |gpa, len| {
            watchers.iter().for_each(|vcpu| vcpu.code_written(gpa, len));
        });

        let clock = Arc::new(Clock::new());
        let target = Arc::new(OnceLock::<Weak<Vm>>::new());
        let fire = {
            let target = Arc::clone(&target);
            move |callout| {
                if let Some(vm) = target.get().and_then(Weak::upgrade) {
                    vm.callout(callout);
                }
            }
        };
        let timers = Timers::start(Arc::clone(&clock), fire)?;

        let vm = Arc::new(Vm {
            mem,
            clock,
            timers,
            vcpus,
            exclusive: Exclusive::default(),
            ioapic: Vioapic::new(),
            pic: Vatpic::new(),
            pit: Vatpit::new(),
            hpet: Vhpet::new(),
            pmtmr: Vpmtmr::new(),
            rtc: Vrtc::new(),
            topology: Mutex::new(topology),
            suspend: AtomicU32::new(SuspendHow::None as u32),
            change: Mutex::default(),
        });
        // Before any device can arm a timer.
        let first = target.set(Arc::downgrade(&vm)).is_ok();
        debug_assert!(first);
        vm.reset_devices();
        Ok(vm)
    }

    fn reset_devices(&self) {
        self.timers.disarm_all();
        for vcpu in &self.vcpus {
            vcpu.lapic.reset(self);
        }
        self.ioapic.reset(self);
        self.pic.reset(self);
        self.pit.reset(self);
        self.hpet.reset(self);
        self.pmtmr.reset(self);
        self.rtc.reset(self);
    }

    /// As newly created, with the same memory map; RAM is zeroed.
    ///
    /// # Errors
    /// `Busy` while a vCPU runs.
    pub fn reinit(&self) -> Result<()> {
        let _change = self.changing();
        if let Some(vcpu) = self.vcpus.iter().find(|v| v.is_running()) {
            return Err(Error::Busy(format!("vCPU {} is running", vcpu.id)));
        }
        self.vcpus.iter().for_each(|v| v.reinit());
        self.reset_devices();
        self.mem.clear_sysmem()?;
        self.suspend.store(SuspendHow::None as u32, Ordering::SeqCst);
        Ok(())
    }

    pub fn vcpu(&self, id: u32) -> Result<&Arc<Vcpu>> {
        self.vcpus.get(id as usize).ok_or_else(|| {
            Error::Invalid(format!("there is no vCPU {id}, only 0 to {}", self.vcpus.len() - 1))
        })
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // -- memory --------------------------------------------------------------------------------

    /// Hold all vCPUs still.  The caller holds `change`, so no two threads do this crosswise.
    fn freeze_all(&self) -> Vec<Frozen<'_>> {
        self.vcpus.iter().map(|vcpu| vcpu.freeze()).collect()
    }

    /// Change the memory map while no vCPU looks, and have all of them look anew.
    fn remap(&self, change: impl FnOnce(&GuestMemory) -> Result<()>) -> Result<()> {
        let _change = self.changing();
        let mut cpus = self.freeze_all();
        change(&self.mem)?;
        for cpu in &mut cpus {
            cpu.flush_tlb();
            cpu.drop_blocks();
        }
        Ok(())
    }

    /// [`GuestMemory::map`]
    pub fn mmap_memseg(
        &self,
        gpa: u64,
        segid: i32,
        offset: u64,
        length: u64,
        prot: u32,
    ) -> Result<()> {
        self.remap(|mem| mem.map(gpa, segid, offset, length, prot))
    }

    /// [`GuestMemory::unmap`]
    pub fn munmap_memseg(&self, gpa: u64, length: u64) -> Result<()> {
        self.remap(|mem| mem.unmap(gpa, length))
    }

    /// [`GuestMemory::dirty_pages`]
    pub fn dirty_pages(&self, gpa: u64, length: u64, clear: bool) -> Result<Vec<u8>> {
        if !clear {
            return self.mem.dirty_pages(gpa, length, false);
        }
        let _change = self.changing();
        let mut cpus = self.freeze_all();
        let log = self.mem.dirty_pages(gpa, length, true)?;
        // A translation for writing says that its page has been marked.
        cpus.iter_mut().for_each(|cpu| cpu.flush_tlb());
        Ok(log)
    }

    // -- topology ------------------------------------------------------------------------------

    pub fn topology(&self) -> Topology {
        *self.topology.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// `Invalid` when a number is 0 or the product is more than the VM's maxcpus; `maxcpus` is
    /// 0, or the VM's.
    pub fn set_topology(&self, sockets: u16, cores: u16, threads: u16, maxcpus: u16) -> Result<()> {
        let all = self.vcpus.len() as u64;
        let product = u64::from(sockets) * u64::from(cores) * u64::from(threads);
        if product == 0 || product > all || maxcpus != 0 && u64::from(maxcpus) != all {
            return Err(Error::Invalid(format!(
                "{sockets} sockets of {cores} cores with {threads} threads do not fit {all} vCPUs"
            )));
        }
        let _change = self.changing();
        *self.topology.lock().unwrap_or_else(PoisonError::into_inner) =
            Topology { sockets, cores, threads, maxcpus: all as u16 };
        self.vcpus.iter().try_for_each(|vcpu| vcpu.configure(&self.cpu_config(vcpu)))
    }

    pub(crate) fn cpu_config(&self, vcpu: &Vcpu) -> CpuConfig {
        config(self.topology(), self.vcpus.len() as u32, vcpu.x2apic())
    }

    // -- CPU sets ------------------------------------------------------------------------------

    /// # Errors
    /// `Busy` when the vCPU is active already.
    pub fn activate_cpu(&self, id: u32) -> Result<()> {
        let vcpu = self.vcpu(id)?;
        let _change = self.changing();
        if vcpu.life().active.swap(true, Ordering::SeqCst) {
            return Err(Error::Busy(format!("vCPU {id} is active already")));
        }
        Ok(())
    }

    /// Have the vCPU's run return `Exit::Debug` and then wait until it is resumed.
    ///
    /// # Errors
    /// `Invalid` when the vCPU is not active.
    pub fn suspend_cpu(&self, id: u32) -> Result<()> {
        let vcpu = self.vcpu(id)?;
        let _change = self.changing();
        if !vcpu.life().active.load(Ordering::SeqCst) {
            return Err(Error::Invalid(format!("vCPU {id} is not active")));
        }
        if !vcpu.life().stopped.load(Ordering::SeqCst) {
            vcpu.set_stopped(true);
        }
        Ok(())
    }

    /// # Errors
    /// `Invalid` when the vCPU is not suspended.
    pub fn resume_cpu(&self, id: u32) -> Result<()> {
        let vcpu = self.vcpu(id)?;
        let _change = self.changing();
        if !vcpu.life().stopped.load(Ordering::SeqCst) {
            return Err(Error::Invalid(format!("vCPU {id} is not suspended")));
        }
        vcpu.set_stopped(false);
        Ok(())
    }

    pub fn suspend_all_cpus(&self) {
        for id in self.active_cpus() {
            self.suspend_cpu(id).expect("an active vCPU can be suspended");
        }
    }

    pub fn resume_all_cpus(&self) {
        let _change = self.changing();
        for vcpu in self.vcpus.iter().filter(|v| v.life().stopped.load(Ordering::SeqCst)) {
            vcpu.set_stopped(false);
        }
    }

    fn cpu_set(&self, member: impl Fn(&Vcpu) -> bool) -> Vec<u32> {
        self.vcpus.iter().filter(|v| member(v)).map(|v| v.id).collect()
    }

    pub fn active_cpus(&self) -> Vec<u32> {
        self.cpu_set(|v| v.life().active.load(Ordering::SeqCst))
    }

    /// Suspended one by one (`suspend_cpu`).
    pub fn debug_cpus(&self) -> Vec<u32> {
        self.cpu_set(|v| v.life().stopped.load(Ordering::SeqCst))
    }

    /// Those that have noticed the end of the VM's life.
    pub fn suspended_cpus(&self) -> Vec<u32> {
        self.cpu_set(|v| v.life().out.load(Ordering::SeqCst))
    }

    // -- the end of a life ---------------------------------------------------------------------

    /// End the VM's life: every vCPU's run returns `Exit::Suspended`.
    ///
    /// # Errors
    /// `Already` when it has ended; `Invalid` for `SuspendHow::None`.
    pub fn suspend(&self, how: SuspendHow) -> Result<()> {
        if how == SuspendHow::None {
            return Err(Error::Invalid("a VM is suspended for a reason (1-5)".into()));
        }
        let none = SuspendHow::None as u32;
        let (set, seen) = (Ordering::SeqCst, Ordering::SeqCst);
        if let Err(old) = self.suspend.compare_exchange(none, how as u32, set, seen) {
            return Err(Error::Already(format!("the VM is suspended already (reason {old})")));
        }
        self.vcpus.iter().for_each(|v| v.events.post(events::SUSPEND));
        Ok(())
    }

    /// Why the VM's life has ended; `None` while it lasts.
    pub fn suspended(&self) -> Option<SuspendHow> {
        let how = SuspendHow::from_number(self.suspend.load(Ordering::SeqCst)).ok()?;
        (how != SuspendHow::None).then_some(how)
    }

    /// Whether every active vCPU has noticed that.
    pub(crate) fn all_out(&self) -> bool {
        self.vcpus
            .iter()
            .map(|v| v.life())
            .all(|l| l.out.load(Ordering::SeqCst) || !l.active.load(Ordering::SeqCst))
    }

    /// The vCPU sleeps in HLT (`Some`: whether interrupts can wake it) or has woken.
    ///
    /// Ends the VM's life when nobody is left who could wake anybody: every active vCPU halted
    /// with interrupts off, or parked and never started.
    pub fn set_halted(&self, id: u32, halted: Option<bool>) {
        let deaf = halted == Some(false);
        let life = self.vcpus[id as usize].life();
        life.halted.store(deaf, Ordering::SeqCst);
        let hopeless = |v: &Arc<Vcpu>| {
            let l = v.life();
            !l.active.load(Ordering::SeqCst)
                || l.halted.load(Ordering::SeqCst)
                || l.stopped.load(Ordering::SeqCst) && !l.started.load(Ordering::SeqCst)
        };
        if deaf && self.vcpus.iter().all(hopeless) {
            // A reason that came first stands.
            let _ = self.suspend(SuspendHow::Halt);
        }
    }

    // -- in-kernel devices, as a vCPU reaches them ---------------------------------------------

    /// IN from a port of an in-kernel device; `None`: it is userland's.
    pub fn port_read(&self, _vcpu: u32, port: u16, size: u8) -> Option<u32> {
        let size = usize::from(size);
        let value = match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.pic.read(self, port, size),
            0x40..=0x43 | 0x61 => self.pit.read(self, port, size),
            0x70 | 0x71 => self.rtc.read(self, port, size),
            0x408 => self.pmtmr.read(self, port, size),
            _ => return None,
        };
        Some(value.unwrap_or_else(|NotDecoded| (ones(size)) as u32))
    }

    /// OUT; false: the port is userland's.
    pub fn port_write(&self, _vcpu: u32, port: u16, size: u8, value: u32) -> bool {
        let size = usize::from(size);
        // Hardware ignores what it does not decode.
        let _ = match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.pic.write(self, port, size, value),
            0x40..=0x43 | 0x61 => self.pit.write(self, port, size, value),
            0x70 | 0x71 => self.rtc.write(self, port, size, value),
            0x408 => Ok(()),
            _ => return false,
        };
        true
    }

    /// Read 1 to 8 bytes from an in-kernel device's page; `None`: it is userland's.
    pub fn mmio_read(&self, vcpu: u32, gpa: u64, size: u8) -> Option<u64> {
        let size = usize::from(size);
        let value = if (LAPIC..LAPIC + APIC_SIZE).contains(&gpa) {
            self.vcpus[vcpu as usize].lapic.mmio_read(self, gpa - LAPIC, size)
        } else if (IOAPIC..IOAPIC + APIC_SIZE).contains(&gpa) {
            self.ioapic.mmio_read(self, gpa - IOAPIC, size)
        } else if (HPET..HPET + HPET_SIZE).contains(&gpa) {
            self.hpet.mmio_read(self, gpa - HPET, size)
        } else {
            return None;
        };
        Some(value)
    }

    /// Write 1 to 8 bytes; false: the address is userland's.
    pub fn mmio_write(&self, vcpu: u32, gpa: u64, size: u8, value: u64) -> bool {
        let size = usize::from(size);
        if (LAPIC..LAPIC + APIC_SIZE).contains(&gpa) {
            self.vcpus[vcpu as usize].lapic.mmio_write(self, gpa - LAPIC, size, value);
        } else if (IOAPIC..IOAPIC + APIC_SIZE).contains(&gpa) {
            self.ioapic.mmio_write(self, gpa - IOAPIC, size, value);
        } else if (HPET..HPET + HPET_SIZE).contains(&gpa) {
            self.hpet.mmio_write(self, gpa - HPET, size, value);
        } else {
            return false;
        }
        true
    }

    /// `mmio_read` on behalf of a vCPU that is not running.
    ///
    /// # Errors
    /// `Invalid` when no in-kernel device has the address.
    pub fn kernemu_read(&self, vcpu: u32, gpa: u64, size: u8) -> Result<u64> {
        let _acting = Acting::new(self.vcpu(vcpu)?);
        self.mmio_read(vcpu, gpa, size).ok_or_else(|| not_kernemu(gpa))
    }

    /// `mmio_write` on behalf of a vCPU that is not running.
    pub fn kernemu_write(&self, vcpu: u32, gpa: u64, size: u8, value: u64) -> Result<()> {
        let _acting = Acting::new(self.vcpu(vcpu)?);
        if self.mmio_write(vcpu, gpa, size, value) { Ok(()) } else { Err(not_kernemu(gpa)) }
    }

    /// The time for which a device asked has come.
    fn callout(&self, callout: Callout) {
        match callout {
            Callout::LapicTimer(vcpu) => {
                if let Some(vcpu) = self.vcpus.get(vcpu as usize) {
                    vcpu.lapic.callout(self);
                }
            }
            Callout::PitChannel0 => self.pit.callout(self),
            Callout::Hpet(timer) => self.hpet.callout(self, timer),
            Callout::Rtc => self.rtc.callout(self),
        }
    }

    // -- interrupts ----------------------------------------------------------------------------

    /// Interrupt message (MSI) that a device writes to `addr`.
    pub fn lapic_msi(&self, addr: u64, msg: u64) {
        io::msi_message(self, addr, msg as u32);
    }

    // -- time ----------------------------------------------------------------------------------

    pub fn pause_clock(&self) {
        self.clock.pause();
        self.timers.clock_changed();
    }

    pub fn resume_clock(&self) {
        self.clock.resume();
        self.timers.clock_changed();
    }

    // -- state ---------------------------------------------------------------------------------

    /// Time and devices; consistent when the vCPUs are at rest and the clock is paused.
    pub fn save_devices(&self) -> DeviceState {
        DeviceState {
            version: STATE_VERSION,
            clock: self.clock.save(),
            vlapic: self.vcpus.iter().map(|v| v.lapic.save()).collect(),
            vioapic: self.ioapic.save(),
            vatpic: self.pic.save(),
            vatpit: self.pit.save(),
            vhpet: self.hpet.save(),
            vpmtmr: self.pmtmr.save(),
            vrtc: self.rtc.save(),
        }
    }

    /// # Errors
    /// `Invalid` for a state of another version or number of vCPUs.
    pub fn restore_devices(&self, state: DeviceState) -> Result<()> {
        if state.version != STATE_VERSION || state.vlapic.len() != self.vcpus.len() {
            return Err(Error::Invalid(format!(
                "device state of version {} with {} vCPUs; this VM reads {STATE_VERSION} with {}",
                state.version,
                state.vlapic.len(),
                self.vcpus.len()
            )));
        }
        self.timers.disarm_all();
        self.clock.restore(&state.clock)?;
        for (vcpu, lapic) in self.vcpus.iter().zip(state.vlapic) {
            vcpu.lapic.restore(self, lapic)?;
        }
        self.ioapic.restore(self, state.vioapic)?;
        self.pic.restore(self, state.vatpic)?;
        self.pit.restore(self, state.vatpit)?;
        self.hpet.restore(self, state.vhpet)?;
        self.pmtmr.restore(self, state.vpmtmr)?;
        self.rtc.restore(self, state.vrtc)?;
        self.timers.clock_changed();
        Ok(())
    }
}

fn config(topology: Topology, ncpu: u32, x2apic: bool) -> CpuConfig {
    CpuConfig {
        ncpu,
        sockets: topology.sockets.into(),
        cores: topology.cores.into(),
        threads: topology.threads.into(),
        x2apic,
    }
}

fn not_kernemu(gpa: u64) -> Error {
    Error::Invalid(format!("no in-kernel device at {gpa:#x}"))
}

fn ones(size: usize) -> u64 {
    u64::MAX >> (64 - 8 * size.clamp(1, 8))
}

impl Platform for Vm {
    fn now(&self) -> u64 {
        self.clock.now()
    }

    fn tsc_hz(&self) -> u64 {
        self.clock.tsc_hz()
    }

    fn tsc(&self, vcpu: u32) -> u64 {
        let adjust = self.vcpus[vcpu as usize].tsc_adjust.load(Ordering::Relaxed);
        self.clock.tsc().wrapping_add(adjust)
    }

    fn tsc_to_ns(&self, vcpu: u32, tsc: u64) -> u64 {
        let base = self.clock.tsc();
        let adjust = self.vcpus[vcpu as usize].tsc_adjust.load(Ordering::Relaxed);
        // What the counter has passed is due now, wherever the guest has set it to.
        let left = tsc.saturating_sub(base.wrapping_add(adjust));
        self.clock.tsc_to_ns(base.saturating_add(left))
    }

    fn wall_clock(&self) -> (i64, u32) {
        clock::wall_clock()
    }

    fn arm(&self, callout: Callout, at: u64) {
        self.timers.arm(callout, at);
    }

    fn disarm(&self, callout: Callout) {
        self.timers.disarm(callout);
    }

    fn notify(&self, vcpu: u32) {
        self.vcpus[vcpu as usize].events.post(events::INTR);
    }

    fn post_nmi(&self, vcpu: u32) {
        self.vcpus[vcpu as usize].events.post(events::NMI);
    }

    fn post_init(&self, vcpu: u32) {
        if !Vcpu::exit_with_ipi(DeliveryMode::Init, 0, vcpu) {
            self.vcpus[vcpu as usize].events.post(events::INIT);
        }
    }

    fn post_sipi(&self, vcpu: u32, vector: u8) {
        if !Vcpu::exit_with_ipi(DeliveryMode::StartUp, vector, vcpu) {
            let vcpu = &self.vcpus[vcpu as usize];
            vcpu.sipi_vector.store(vector.into(), Ordering::Relaxed);
            vcpu.events.post(events::SIPI);
        }
    }

    fn ncpu(&self) -> u32 {
        self.vcpus.len() as u32
    }

    fn apic_message(
        &self,
        dest: u32,
        dest_x2: bool,
        logical: bool,
        mode: DeliveryMode,
        vector: u8,
        level: bool,
    ) {
        let lapics: Vec<_> = self.vcpus.iter().map(|v| &v.lapic).collect();
        io::route_message(self, &lapics, dest, dest_x2, logical, mode, vector, level);
    }

    fn eoi_broadcast(&self, vector: u8) {
        self.ioapic.process_eoi(self, vector);
    }

    fn isa_irq(&self, atpic_irq: Option<u8>, ioapic_pin: Option<u8>, level: bool) {
        if let Some(irq) = atpic_irq {
            if level { self.pic.assert_irq(self, irq) } else { self.pic.deassert_irq(self, irq) }
        }
        if let Some(pin) = ioapic_pin {
            if level {
                self.ioapic.assert_irq(self, pin)
            } else {
                self.ioapic.deassert_irq(self, pin)
            }
        }
    }

    fn pic_intr(&self, level: bool) {
        for vcpu in &self.vcpus {
            vcpu.lapic.lint(self, 0, level);
        }
    }
}
