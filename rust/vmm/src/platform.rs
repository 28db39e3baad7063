//! What an in-kernel device may ask of the machine around it.
//!
//! Devices keep no pointer to the VM: each entry point is handed a [`Platform`].  So a device
//! is a plain register machine whose whole state can be saved, and a test can drive it with a
//! clock of its own.

use serde::{Deserialize, Serialize};

/// A deadline that a device has asked for.  The machine calls the device's `callout` once the
/// VM clock has passed it; a device tolerates a call that comes after it has changed its mind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Callout {
    /// Local APIC timer of a vCPU.
    LapicTimer(u32),
    /// 8254 channel 0.
    PitChannel0,
    /// HPET comparator 0-7.
    Hpet(u8),
    /// MC146818 periodic, alarm or update tick.
    Rtc,
}

/// Delivery modes of an APIC message (Intel SDM 3A, 11.6.1 and 11.11.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DeliveryMode {
    Fixed = 0,
    LowestPriority = 1,
    Smi = 2,
    Reserved = 3,
    Nmi = 4,
    Init = 5,
    StartUp = 6,
    ExtInt = 7,
}

/// Access to a port or register that the device does not decode; hardware answers with all ones
/// and ignores writes, and so does the dispatcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotDecoded;

pub trait Platform: Send + Sync {
    /// Nanoseconds of the VM clock.  Monotonic; stands still while the VM is paused.
    fn now(&self) -> u64;

    /// Guest TSC frequency in Hz.
    fn tsc_hz(&self) -> u64;

    /// Value of the guest's time-stamp counter on `vcpu` (with IA32_TSC_ADJUST) right now.
    fn tsc(&self, vcpu: u32) -> u64;

    /// The VM clock's value in nanoseconds at which the TSC of `vcpu` will read `tsc`.
    fn tsc_to_ns(&self, vcpu: u32, tsc: u64) -> u64;

    /// Host wall clock: seconds and nanoseconds since 1970-01-01 UTC.
    fn wall_clock(&self) -> (i64, u32);

    /// Call back at `at` (VM clock, ns), replacing an earlier deadline of the same callout.
    fn arm(&self, callout: Callout, at: u64);

    fn disarm(&self, callout: Callout);

    /// Something that `vcpu` must look at before its next instruction: an interrupt in its local
    /// APIC or at the PIC.  Wakes it from HLT.
    fn notify(&self, vcpu: u32);

    fn post_nmi(&self, vcpu: u32);
    fn post_init(&self, vcpu: u32);
    /// Start-up IPI; `vector` is the 4 KiB page where the vCPU starts in real mode.
    fn post_sipi(&self, vcpu: u32, vector: u8);

    /// Number of vCPUs that exist.
    fn ncpu(&self) -> u32;

    /// Deliver an interrupt message to local APICs: from an IOAPIC pin, an MSI or an IPI.
    /// `dest` is 8 bits (xAPIC), or 32 with `dest_x2`; 0xFF / 0xFFFF_FFFF is broadcast.
    fn apic_message(
        &self,
        dest: u32,
        dest_x2: bool,
        logical: bool,
        mode: DeliveryMode,
        vector: u8,
        level: bool,
    );

    /// A local APIC saw EOI for a level-triggered vector.
    fn eoi_broadcast(&self, vector: u8);

    /// Level of an ISA interrupt line: to the PIC (0-15) and to an IOAPIC pin, or only to one.
    fn isa_irq(&self, atpic_irq: Option<u8>, ioapic_pin: Option<u8>, level: bool);

    /// A rising and a falling edge on the same lines.
    fn isa_pulse(&self, atpic_irq: Option<u8>, ioapic_pin: Option<u8>) {
        self.isa_irq(atpic_irq, ioapic_pin, true);
        self.isa_irq(atpic_irq, ioapic_pin, false);
    }

    /// The PIC's INTR output changed: it is wired to LINT0 of all local APICs (ExtINT).
    fn pic_intr(&self, level: bool);
}
