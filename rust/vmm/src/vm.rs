//! A virtual machine: its memory, vCPUs and in-kernel devices, and how they reach each other.

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use serde::{Deserialize, Serialize};

use crate::clock::{self, Clock, ClockState, Timers};
use crate::error::{Error, Result};
use crate::events::{self, Happenings};
use crate::exit::SuspendHow;
use crate::io::vatpic::Vatpic;
use crate::io::vatpit::Vatpit;
use crate::io::vhpet::Vhpet;
use crate::io::vioapic::Vioapic;
use crate::io::vlapic::LVT_CMCI;
use crate::io::vpmtmr::Vpmtmr;
use crate::io::vrtc::Vrtc;
use crate::io::{self, StateError};
use crate::memory::GuestMemory;
use crate::platform::{Callout, DeliveryMode, NotDecoded, Platform};
use crate::soft::CpuConfig;
use crate::soft::safepoint::Exclusive;
use crate::soft::translate;
use crate::vcpu::{Acting, Frozen, Vcpu};

/// xAPIC ids are 8 bits, and 255 is broadcast.
pub const MAXCPUS: u32 = 255;

const LAPIC: u64 = io::vlapic::BASE;
const IOAPIC: u64 = io::vioapic::BASE;
const HPET: u64 = io::vhpet::BASE;
const APIC_SIZE: u64 = io::vlapic::LEN;
const HPET_SIZE: u64 = io::vhpet::LEN;

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
    /// That a vCPU goes to sleep in HLT.
    pub halts: Happenings,
    pub ioapic: Vioapic,
    pub pic: Vatpic,
    pub pit: Vatpit,
    pub hpet: Vhpet,
    pub pmtmr: Vpmtmr,
    pub rtc: Vrtc,
    /// Runs of a block before it is translated; `translate::NEVER`: none is.
    translate_after: AtomicU16,
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
            .map(|id| Arc::new(Vcpu::new(&config(topology, maxcpus, false), id)))
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
            halts: Happenings::default(),
            ioapic: Vioapic::new(),
            pic: Vatpic::new(),
            pit: Vatpit::new(),
            hpet: Vhpet::new(),
            pmtmr: Vpmtmr::new(),
            translate_after: AtomicU16::new(translate::WARM),
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
        self.vcpus.iter().try_for_each(|v| v.reinit(self))?;
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

    /// Translate blocks of 64-bit code after so many runs: `translate::WARM` unless this is called,
    /// `translate::NEVER` for none.  vCPUs notice when they run next.
    pub fn set_translate_after(&self, runs: u16) {
        self.translate_after.store(runs, Ordering::Relaxed);
    }

    pub(crate) fn translate_after(&self) -> u16 {
        self.translate_after.load(Ordering::Relaxed)
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
        if halted.is_some() {
            self.halts.happen();
        }
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
        Some(value.unwrap_or_else(|NotDecoded| ones(size) as u32))
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
        self.vcpus[vcpu as usize].stats.mmio.inc();
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
        self.vcpus[vcpu as usize].stats.mmio.inc();
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

    /// Trigger entry `lvt` of a local APIC's vector table (0 LINT0, 1 LINT1, 2 timer, 3 error,
    /// 4 performance, 5 thermal, 6 CMCI), or, for vCPU -1, of every active one.
    pub fn lapic_local_irq(&self, vcpu: i32, lvt: u32) -> Result<()> {
        if lvt > LVT_CMCI {
            return Err(Error::Invalid(format!("{lvt} is not an entry of the LVT (0-{LVT_CMCI})")));
        }
        match u32::try_from(vcpu) {
            Ok(id) => self.vcpu(id)?.lapic.local_irq(self, lvt),
            Err(_) if vcpu == -1 => self
                .active_cpus()
                .iter()
                .for_each(|id| self.vcpus[*id as usize].lapic.local_irq(self, lvt)),
            Err(_) => return Err(Error::Invalid(format!("there is no vCPU {vcpu}"))),
        }
        Ok(())
    }

    /// Make a line of the PIC level or edge triggered.
    ///
    /// # Errors
    /// `Invalid` for a level on the lines 0, 1, 2, 8 and 13, which are edges by construction.
    pub fn isa_set_irq_trigger(&self, line: u8, level: bool) -> Result<()> {
        self.pic.set_irq_trigger(self, line, level).map_err(|NotDecoded| {
            Error::Invalid(format!("line {line} of the PIC cannot be level-triggered"))
        })
    }

    // -- time ----------------------------------------------------------------------------------

    /// Have time stand still: on return no in-kernel device acts of itself.
    pub fn pause_clock(&self) {
        self.clock.pause();
        self.timers.clock_changed();
        self.timers.settle();
    }

    pub fn resume_clock(&self) {
        self.clock.resume();
        self.timers.clock_changed();
    }

    /// A byte of the RTC's memory.
    ///
    /// # Errors
    /// `Invalid` for an offset beyond 127.
    pub fn rtc_read(&self, offset: u32) -> Result<u8> {
        self.rtc.nvram_read(self, rtc_cell(offset)?).map_err(|NotDecoded| rtc_refuses(offset))
    }

    /// # Errors
    /// `Invalid` for an offset that holds time or control, or lies beyond 127.
    pub fn rtc_write(&self, offset: u32, value: u8) -> Result<()> {
        let written = self.rtc.nvram_write(self, rtc_cell(offset)?, value);
        written.map_err(|NotDecoded| rtc_refuses(offset))
    }

    /// Set the RTC's clock to `secs` after 1970-01-01 UTC.
    ///
    /// # Errors
    /// `Invalid` for a time that its registers cannot show.
    pub fn rtc_settime(&self, secs: i64) -> Result<()> {
        let set = self.rtc.settime(self, secs);
        set.map_err(|NotDecoded| Error::Invalid(format!("the RTC cannot show {secs} s after 1970")))
    }

    /// The HPET's capabilities and id register.
    pub fn hpet_capabilities(&self) -> u64 {
        self.hpet.mmio_read(self, 0, 8)
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

fn rtc_cell(offset: u32) -> Result<u8> {
    u8::try_from(offset).map_err(|_| rtc_refuses(offset))
}

fn rtc_refuses(offset: u32) -> Error {
    Error::Invalid(format!("the RTC has no such memory cell: {offset:#x}"))
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
            self.pic.set_irq(self, irq, level);
        }
        if let Some(pin) = ioapic_pin {
            self.ioapic.set_irq(self, pin, level);
        }
    }

    fn pic_intr(&self, level: bool) {
        for vcpu in &self.vcpus {
            vcpu.lapic.lint(self, 0, level);
        }
        // bhyve: INTR is wired to IOAPIC pin 0 as well, for kernels that route it from there.
        self.ioapic.set_irq(self, 0, level);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::caps::Caps;
    use crate::exit::Exit;
    use crate::regs::{Reg, SegDesc};

    const LIMIT: Duration = Duration::from_secs(20);
    const RWX: u32 = 7;

    /// `jmp $`
    const SPIN: &[u8] = b"\xeb\xfe";
    /// `cli; hlt; jmp` back to the HLT
    const HALT: &[u8] = b"\xfa\xf4\xeb\xfd";
    /// `sti; hlt; jmp` back to the HLT
    const IDLE: &[u8] = b"\xfb\xf4\xeb\xfd";
    /// `inc eax; jmp` back
    const COUNT: &[u8] = b"\x66\x40\xeb\xfc";

    /// 1 MiB of RAM; every vCPU is active and starts real-mode `code` at 0x1000.
    fn machine(maxcpus: u32, code: &[u8]) -> Arc<Vm> {
        let vm = Vm::new(maxcpus).unwrap();
        vm.mem.create_segment(0, "", 1 << 20, None).unwrap();
        vm.mmap_memseg(0, 0, 0, 1 << 20, RWX).unwrap();
        vm.mem.write(0x1000, code).unwrap();
        for vcpu in &vm.vcpus {
            start_at(vcpu, 0x1000);
            vm.activate_cpu(vcpu.id).unwrap();
        }
        vm
    }

    fn start_at(vcpu: &Vcpu, rip: u64) {
        vcpu.reset();
        vcpu.with_cpu(|cpu| {
            cpu.set_reg(Reg::Cs, 0);
            cpu.set_desc(Reg::Cs, SegDesc { base: 0, limit: 0xffff, access: 0x9b });
            cpu.set_reg(Reg::Rip, rip);
        });
    }

    /// Run a vCPU in a thread of its own until it is suspended for good; its exits, in order.
    fn spawn(vm: &Arc<Vm>, id: u32) -> mpsc::Receiver<Exit> {
        let (send, exits) = mpsc::channel();
        let vm = Arc::clone(vm);
        thread::spawn(move || {
            loop {
                let exit = vm.vcpus[id as usize].run(&vm).unwrap();
                let last = matches!(exit, Exit::Suspended { .. });
                if send.send(exit).is_err() || last {
                    return;
                }
            }
        });
        exits
    }

    fn end(vm: &Vm, exits: &[mpsc::Receiver<Exit>]) {
        vm.suspend(SuspendHow::Destroy).unwrap();
        for exits in exits {
            let last = exits.iter().last();
            assert_eq!(last, Some(Exit::Suspended { how: SuspendHow::Destroy }));
        }
    }

    fn next(exits: &mpsc::Receiver<Exit>) -> Exit {
        exits.recv_timeout(LIMIT).expect("the vCPU does not come back")
    }

    fn rax(vm: &Vm) -> u64 {
        vm.vcpus[0].with_cpu(|cpu| cpu.get_reg(Reg::Rax))
    }

    #[test]
    fn a_kick_is_never_lost() {
        let vm = machine(1, SPIN);
        vm.vcpus[0].kick();
        vm.vcpus[0].kick();
        assert_eq!(vm.vcpus[0].run(&vm).unwrap(), Exit::Bogus, "kicked before it ran");
        let exits = spawn(&vm, 0);
        for _ in 0..500 {
            vm.vcpus[0].kick();
            assert_eq!(next(&exits), Exit::Bogus);
        }
        end(&vm, &[exits]);
    }

    #[test]
    fn a_kick_ends_every_sleep() {
        let vm = machine(2, HALT);
        vm.mem.write(0x2000, IDLE).unwrap();
        start_at(&vm.vcpus[1], 0x2000);
        let exits = [spawn(&vm, 0), spawn(&vm, 1)];
        for _ in 0..200 {
            for (vcpu, exits) in vm.vcpus.iter().zip(&exits) {
                vcpu.kick();
                assert_eq!(next(exits), Exit::Bogus);
            }
        }
        end(&vm, &exits);
    }

    #[test]
    fn registers_of_a_running_vcpu_can_be_read_and_set() {
        let vm = machine(1, COUNT);
        let exits = spawn(&vm, 0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        rax(&vm);
                    }
                });
            }
        });
        // A busy host may take its time; a vCPU that is stuck runs into the test's own limit.
        let before = rax(&vm);
        while rax(&vm) == before {
            thread::sleep(Duration::from_millis(5));
        }
        vm.vcpus[0].with_cpu(|cpu| {
            cpu.set_reg(Reg::Rax, 0x1234_0000_0000);
            let rax = cpu.get_reg(Reg::Rax);
            thread::sleep(Duration::from_millis(5));
            assert_eq!(cpu.get_reg(Reg::Rax), rax, "held still");
        });
        end(&vm, &[exits]);
    }

    #[test]
    fn a_suspended_vcpu_says_so_once_and_waits() {
        let vm = machine(1, COUNT);
        vm.suspend_cpu(0).unwrap();
        assert_eq!(vm.debug_cpus(), [0]);
        assert_eq!(vm.vcpus[0].run(&vm).unwrap(), Exit::Debug);
        let exits = spawn(&vm, 0);
        assert!(exits.recv_timeout(Duration::from_millis(50)).is_err());
        let still = rax(&vm);
        vm.vcpus[0].kick();
        assert_eq!(next(&exits), Exit::Bogus);
        assert_eq!(rax(&vm), still);

        for _ in 0..50 {
            vm.resume_cpu(0).unwrap();
            vm.suspend_cpu(0).unwrap();
            assert_eq!(next(&exits), Exit::Debug);
        }
        vm.resume_all_cpus();
        assert!(vm.debug_cpus().is_empty());
        assert_eq!(vm.resume_cpu(0).unwrap_err().errno(), libc::EINVAL);
        end(&vm, &[exits]);
    }

    #[test]
    fn the_end_is_told_when_all_are_out() {
        let vm = machine(3, SPIN);
        vm.suspend_cpu(2).unwrap();
        let exits = [spawn(&vm, 0), spawn(&vm, 2)];
        assert_eq!(next(&exits[1]), Exit::Debug);
        vm.suspend(SuspendHow::Poweroff).unwrap();
        let again = vm.suspend(SuspendHow::Reset).unwrap_err();
        assert_eq!(again.errno(), libc::EALREADY);
        assert!(exits[0].recv_timeout(Duration::from_millis(50)).is_err(), "vCPU 1 is missing");
        assert_eq!(vm.suspended(), Some(SuspendHow::Poweroff));
        let last = Exit::Suspended { how: SuspendHow::Poweroff };
        assert_eq!(vm.vcpus[1].run(&vm).unwrap(), last);
        assert_eq!([next(&exits[0]), next(&exits[1])], [last.clone(), last.clone()]);
        assert_eq!(vm.suspended_cpus(), [0, 1, 2]);
        assert_eq!(vm.vcpus[1].run(&vm).unwrap(), last, "and remains so");
    }

    #[test]
    fn when_all_sleep_with_interrupts_off_the_vm_has_halted() {
        let vm = machine(2, HALT);
        let exits = [spawn(&vm, 0), spawn(&vm, 1)];
        for exits in &exits {
            assert_eq!(next(exits), Exit::Suspended { how: SuspendHow::Halt });
        }
    }

    #[test]
    fn a_parked_vcpu_cannot_wake_anybody() {
        let vm = machine(2, HALT);
        vm.suspend_cpu(1).unwrap();
        let parked = spawn(&vm, 1);
        assert_eq!(next(&parked), Exit::Debug);
        for exits in [spawn(&vm, 0), parked] {
            assert_eq!(next(&exits), Exit::Suspended { how: SuspendHow::Halt });
        }
    }

    #[test]
    fn an_idle_vcpu_is_not_a_halt() {
        let vm = machine(1, IDLE);
        let exits = spawn(&vm, 0);
        assert!(exits.recv_timeout(Duration::from_millis(100)).is_err());
        assert_eq!(vm.suspended(), None);
        end(&vm, &[exits]);
    }

    #[test]
    fn only_active_vcpus_run_and_one_thread_each() {
        let vm = machine(1, SPIN);
        assert_eq!(vm.activate_cpu(0).unwrap_err().errno(), libc::EBUSY);
        let exits = spawn(&vm, 0);
        while !vm.vcpus[0].is_running() {
            thread::yield_now();
        }
        assert_eq!(vm.vcpus[0].run(&vm).unwrap_err().errno(), libc::EBUSY);
        assert_eq!(vm.reinit().unwrap_err().errno(), libc::EBUSY);
        end(&vm, &[exits]);

        let vm = Vm::new(2).unwrap();
        assert_eq!(vm.vcpus[1].run(&vm).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(vm.suspend_cpu(1).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(vm.activate_cpu(2).unwrap_err().errno(), libc::EINVAL);
        for maxcpus in [0, MAXCPUS + 1] {
            assert_eq!(Vm::new(maxcpus).err().unwrap().errno(), libc::EINVAL);
        }
    }

    #[test]
    fn memory_can_be_remapped_under_running_vcpus() {
        let vm = machine(2, SPIN);
        vm.mem.create_segment(9, "framebuffer", 0x1_0000, None).unwrap();
        let exits = [spawn(&vm, 0), spawn(&vm, 1)];
        thread::scope(|scope| {
            for bar in [0xc000_0000, 0xd000_0000] {
                let vm = &vm;
                scope.spawn(move || {
                    for _ in 0..50 {
                        vm.mmap_memseg(bar, 9, 0, 0x1_0000, RWX).unwrap();
                        vm.mem.store(bar, 1_u8).unwrap();
                        vm.dirty_pages(bar, 0x1000, true).unwrap();
                        vm.munmap_memseg(bar, 0x1_0000).unwrap();
                    }
                });
            }
        });
        assert_eq!(vm.mem.maps().len(), 1);
        end(&vm, &exits);
    }

    #[test]
    fn a_reinitialised_vm_is_as_new() {
        let vm = machine(1, SPIN);
        vm.mem.write(0x8000, b"old").unwrap();
        let cmos = vm.rtc_read(0x34).unwrap();
        vm.rtc_write(0x34, !cmos).unwrap();
        vm.vcpus[0].set_x2apic(&vm, true).unwrap();
        let exits = spawn(&vm, 0);
        end(&vm, &[exits]);
        while vm.vcpus[0].is_running() {
            thread::yield_now();
        }
        vm.reinit().unwrap();
        assert_eq!((vm.suspended(), vm.active_cpus()), (None, vec![]));
        assert_eq!(vm.mem.load::<u8>(0x8000), Some(0));
        assert!(!vm.vcpus[0].x2apic());
        assert_eq!(vm.mem.maps().len(), 1);
        vm.activate_cpu(0).unwrap();
        vm.mem.write(0x1000, SPIN).unwrap();
        start_at(&vm.vcpus[0], 0x1000);
        let exits = spawn(&vm, 0);
        end(&vm, &[exits]);
    }

    #[test]
    fn topology_has_to_fit() {
        let vm = Vm::new(8).unwrap();
        vm.set_topology(2, 2, 2, 0).unwrap();
        let topology = Topology { sockets: 2, cores: 2, threads: 2, maxcpus: 8 };
        assert_eq!(vm.topology(), topology);
        for (sockets, cores, threads, maxcpus) in
            [(0, 1, 1, 0), (3, 3, 1, 0), (1, 1, 1, 4), (u16::MAX, u16::MAX, u16::MAX, 0)]
        {
            let refused = vm.set_topology(sockets, cores, threads, maxcpus);
            assert_eq!(refused.unwrap_err().errno(), libc::EINVAL);
        }
        assert_eq!(vm.topology(), topology);
    }

    /// Local APIC registers, xAPIC offsets.
    const SVR: u64 = LAPIC + 0xf0;
    const ICR_LOW: u64 = LAPIC + 0x300;
    const ICR_HIGH: u64 = LAPIC + 0x310;

    /// Send an IPI from vCPU 0: the low word of the ICR and the destination's id.
    fn send_ipi(vm: &Vm, icr: u64, dest: u64) {
        vm.kernemu_write(0, SVR, 4, 0x1ff).unwrap();
        vm.kernemu_write(0, ICR_HIGH, 4, dest << 24).unwrap();
        vm.kernemu_write(0, ICR_LOW, 4, icr).unwrap();
    }

    #[test]
    fn init_and_start_up_ipis_exit_on_the_sender() {
        let vm = machine(3, SPIN);
        vm.vcpus[0].set_cap(Caps::IPI_EXIT, true).unwrap();
        // INIT to all but self, then a start-up IPI to vCPU 2 (and one more) at page 0x9a.
        send_ipi(&vm, 0xc_4500, 0);
        send_ipi(&vm, 0x4600 | 0x9a, 2);
        send_ipi(&vm, 0x4600 | 0x9a, 2);
        vm.vcpus[0].kick();
        let run = || vm.vcpus[0].run(&vm).unwrap();
        assert_eq!(run(), Exit::Ipi { mode: 5, vector: 0, dest: vec![1, 2] });
        let sipi = Exit::Ipi { mode: 6, vector: 0x9a, dest: vec![2] };
        assert_eq!([run(), run()], [sipi.clone(), sipi]);
        assert_eq!(run(), Exit::Bogus, "the kick comes behind them");
        assert_eq!(vm.vcpus[1].events.peek() & (events::INIT | events::SIPI), 0);
    }

    #[test]
    fn without_the_capability_they_go_to_the_target() {
        let vm = machine(2, SPIN);
        send_ipi(&vm, 0x4500, 1);
        send_ipi(&vm, 0x4600 | 0x9a, 1);
        let target = &vm.vcpus[1];
        assert_eq!(
            target.events.peek() & (events::INIT | events::SIPI),
            events::INIT | events::SIPI
        );
        assert_eq!(target.sipi_vector.load(Ordering::Relaxed), 0x9a);
    }

    #[test]
    fn capabilities_are_set_but_for_the_fixed_ones() {
        let vm = Vm::new(1).unwrap();
        let vcpu = &vm.vcpus[0];
        vcpu.set_cap(Caps::HALT_EXIT, true).unwrap();
        assert!(vcpu.has_cap(Caps::HALT_EXIT) && vcpu.has_cap(Caps::UNRESTRICTED_GUEST));
        vcpu.set_cap(Caps::HALT_EXIT, false).unwrap();
        assert!(!vcpu.has_cap(Caps::HALT_EXIT));
        let refused = vcpu.set_cap(Caps::UNRESTRICTED_GUEST, false);
        assert_eq!(refused.unwrap_err().errno(), libc::EINVAL);
    }

    #[test]
    fn a_saved_vm_goes_on_in_another() {
        let vm = machine(2, COUNT);
        vm.suspend_cpu(1).unwrap();
        vm.vcpus[0].set_cap(Caps::IPI_EXIT, true).unwrap();
        vm.set_topology(1, 2, 1, 0).unwrap();
        send_ipi(&vm, 0x4500, 1);
        vm.post_nmi(1);
        vm.ioapic.assert_irq(&*vm, 4);
        let exits = spawn(&vm, 0);
        assert_eq!(next(&exits), Exit::Ipi { mode: 5, vector: 0, dest: vec![1] });
        while rax(&vm) == 0 {
            thread::yield_now();
        }
        vm.vcpus[0].kick();
        assert_eq!(next(&exits), Exit::Bogus);
        vm.suspend_cpu(0).unwrap();
        assert_eq!(next(&exits), Exit::Debug);
        vm.pause_clock();
        let devices = serde_json::to_value(vm.save_devices()).unwrap();
        let cpus: Vec<_> =
            vm.vcpus.iter().map(|v| serde_json::to_value(v.save()).unwrap()).collect();

        let copy = machine(2, COUNT);
        copy.pause_clock();
        copy.restore_devices(serde_json::from_value(devices.clone()).unwrap()).unwrap();
        for (vcpu, state) in copy.vcpus.iter().zip(&cpus) {
            vcpu.restore(&copy, serde_json::from_value(state.clone()).unwrap()).unwrap();
        }
        assert_eq!(serde_json::to_value(copy.save_devices()).unwrap(), devices);
        for (vcpu, state) in copy.vcpus.iter().zip(&cpus) {
            assert_eq!(serde_json::to_value(vcpu.save()).unwrap(), *state);
        }
        assert_eq!(copy.debug_cpus(), [0, 1]);
        assert_ne!(copy.vcpus[1].events.peek() & events::NMI, 0);
        let counted = rax(&copy);
        assert_eq!(counted, rax(&vm));

        copy.resume_clock();
        copy.resume_cpu(0).unwrap();
        let copy_exits = [spawn(&copy, 0), spawn(&copy, 1)];
        while rax(&copy) == counted {
            thread::yield_now();
        }
        end(&copy, &copy_exits);
        vm.suspend(SuspendHow::Destroy).unwrap();

        let mut other = devices;
        other["version"] = 99.into();
        let refused = copy.restore_devices(serde_json::from_value(other).unwrap());
        assert_eq!(refused.unwrap_err().errno(), libc::EINVAL);
    }

    #[test]
    fn in_kernel_ports_and_pages_are_the_devices() {
        let vm = Vm::new(1).unwrap();
        assert_eq!(vm.port_read(0, 0x3f8, 1), None);
        assert!(!vm.port_write(0, 0x80, 1, 0));
        assert!(vm.port_write(0, 0x21, 1, 0xfb));
        assert_eq!(vm.port_read(0, 0x21, 1), Some(0xfb));
        assert!(vm.port_read(0, 0x408, 4).is_some());
        assert_eq!(vm.mmio_read(0, LAPIC + 0x30, 4), Some(0x0006_0010));
        assert!(vm.mmio_write(0, IOAPIC, 4, 1));
        assert_eq!(vm.mmio_read(0, IOAPIC + 0x10, 4), Some(0x001f_0011));
        assert_eq!(vm.mmio_read(0, HPET + 4, 4), Some(59_604_644));
        assert_eq!(vm.hpet_capabilities() >> 32, 59_604_644);
        for gpa in [0, HPET + HPET_SIZE, LAPIC + APIC_SIZE, u64::MAX] {
            assert_eq!(vm.mmio_read(0, gpa, 4), None);
            assert!(!vm.mmio_write(0, gpa, 4, 0));
            assert_eq!(vm.kernemu_read(0, gpa, 4).unwrap_err().errno(), libc::EINVAL);
        }
        assert_eq!(vm.lapic_local_irq(0, 7).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(vm.lapic_local_irq(1, 0).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(vm.rtc_read(128).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(vm.isa_set_irq_trigger(8, true).unwrap_err().errno(), libc::EINVAL);
    }

    #[test]
    fn a_local_apic_timer_reaches_its_vcpu() {
        let vm = machine(1, SPIN);
        vm.kernemu_write(0, SVR, 4, 0x1ff).unwrap();
        vm.kernemu_write(0, LAPIC + 0x320, 4, 0x40).unwrap();
        vm.kernemu_write(0, LAPIC + 0x380, 4, 10_000).unwrap();
        let vcpu = &vm.vcpus[0];
        assert_eq!(vcpu.events.wait(events::INTR, Some(LIMIT)), events::INTR);
        assert_eq!(vcpu.lapic.pending_intr(), Some(0x40));
    }

    #[test]
    fn a_tsc_deadline_that_has_passed_is_now() {
        let vm = Vm::new(1).unwrap();
        vm.vcpus[0].tsc_adjust.store(1 << 50, Ordering::Relaxed);
        assert!(vm.tsc(0) >= 1 << 50);
        assert!(vm.tsc_to_ns(0, 1 << 49) <= vm.now());
        let second = vm.tsc_to_ns(0, vm.tsc(0) + vm.tsc_hz());
        assert!(second.abs_diff(vm.now() + 1_000_000_000) < 500_000_000);
        vm.vcpus[0].tsc_adjust.store(1_u64.wrapping_neg(), Ordering::Relaxed);
        assert_eq!(vm.tsc_to_ns(0, u64::MAX), vm.clock.tsc_to_ns(u64::MAX));
    }

    #[test]
    fn the_vm_goes_when_its_owners_do() {
        let vm = Vm::new(1).unwrap();
        vm.arm(Callout::Rtc, 0);
        let gone = Arc::downgrade(&vm);
        drop(vm);
        let start = std::time::Instant::now();
        while gone.upgrade().is_some() {
            assert!(start.elapsed() < LIMIT);
            thread::yield_now();
        }
    }
}
