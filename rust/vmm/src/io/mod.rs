//! In-kernel devices: what bhyve keeps in sys/amd64/vmm/io.
//!
//! A device is a register machine behind one lock; its whole state is a plain value with a
//! `version` that `save` copies out and `restore` takes back.  It keeps no pointer to the VM:
//! each entry point is handed a [`Platform`].
//!
//! # Lock order
//! Interrupts flow one way:
//!
//! ```text
//! vatpit, vhpet, vrtc  ->  vatpic  ->  vioapic  ->  vlapic  ->  a vCPU's mailbox
//! ```
//!
//! A device may hold its lock while it calls a Platform function that ends further down this
//! line (`isa_irq`, `pic_intr`, `apic_message`), so a line's edges reach the next device in the
//! order in which they happened.  Calls that flow the other way or sideways (`eoi_broadcast`,
//! IPIs, and `post_*`, which may reset the caller) are made with no lock held.  The clock, `arm`,
//! `disarm`, `ncpu` and `notify` are leaves: they must never call a device.

use std::borrow::Borrow;
use std::error::Error;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::platform::{DeliveryMode, NotDecoded, Platform};

pub mod vatpic;
pub mod vatpit;
pub mod vhpet;
pub mod vioapic;
pub mod vlapic;
pub mod vpmtmr;
pub mod vrtc;

#[cfg(test)]
pub(crate) mod testplat;

use vlapic::Vlapic;

const NS_PER_SEC: u128 = 1_000_000_000;

/// A guest can program a timer that expires every few nanoseconds and would keep the host busy
/// with nothing else.  A periodic timer is not called back sooner than this after its last
/// expiry (ns); expiries in between coalesce, as they do in an interrupt request register.
const MIN_CALLOUT_PERIOD: u64 = 20_000;

/// A saved state that cannot be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateError {
    pub device: &'static str,
    pub version: u32,
    pub expected: u32,
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, version, expected } = self;
        write!(f, "{device}: saved state has version {version}, this program reads {expected}")
    }
}

impl Error for StateError {}

fn check_version(device: &'static str, version: u32, expected: u32) -> Result<(), StateError> {
    if version == expected { Ok(()) } else { Err(StateError { device, version, expected }) }
}

/// A panic elsewhere must not take the guest's devices with it: their state is plain values.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whole ticks of a clock of `hz` in `ns` nanoseconds.
fn ns_to_ticks(ns: u64, hz: u64) -> u64 {
    u64::try_from(u128::from(ns) * u128::from(hz) / NS_PER_SEC).unwrap_or(u64::MAX)
}

/// The first nanosecond at which `ticks` of a clock of `hz` have passed.
fn ticks_to_ns(ticks: u64, hz: u64) -> u64 {
    u64::try_from((u128::from(ticks) * NS_PER_SEC).div_ceil(u128::from(hz))).unwrap_or(u64::MAX)
}

/// The `size` low bytes of `value`.
fn truncate(value: u64, size: usize) -> u64 {
    if size >= 8 { value } else { value & ((1 << (8 * size)) - 1) }
}

/// A read of `size` bytes from byte-wide ports, as an ISA bus does it: a byte at a time.
/// A port inside the access that nobody decodes reads as ones; `NotDecoded` if all are.
fn read_ports(
    port: u16,
    size: usize,
    mut byte: impl FnMut(u16) -> Option<u8>,
) -> Result<u32, NotDecoded> {
    let mut decoded = false;
    let mut bytes = [0xff; 4];
    for (i, b) in bytes.iter_mut().enumerate().take(size) {
        if let Some(v) = byte(port.wrapping_add(i as u16)) {
            *b = v;
            decoded = true;
        }
    }
    if !decoded {
        return Err(NotDecoded);
    }
    Ok(truncate(u32::from_le_bytes(bytes).into(), size) as u32)
}

/// A write of `size` bytes to byte-wide ports; `byte` says whether it decodes the port.
fn write_ports(
    port: u16,
    size: usize,
    value: u32,
    mut byte: impl FnMut(u16, u8) -> bool,
) -> Result<(), NotDecoded> {
    let mut decoded = false;
    for (i, &b) in value.to_le_bytes().iter().enumerate().take(size) {
        decoded |= byte(port.wrapping_add(i as u16), b);
    }
    if decoded { Ok(()) } else { Err(NotDecoded) }
}

/// What an MSI's address and data say (Intel SDM 3A, 11.11), and the 15-bit destination of
/// CPUID 0x40000001 EAX bit 0, whose upper seven bits are address bits 11:5.
///
/// An address outside 0xFEExxxxx is no interrupt and is dropped.
pub fn msi_message(p: &dyn Platform, addr: u64, data: u32) {
    if addr & !0xf_ffff != 0xfee0_0000 {
        return;
    }
    let extended = (addr >> 5 & 0x7f) as u32;
    let dest = (addr >> 12 & 0xff) as u32 | extended << 8;
    let logical = addr & 1 << 2 != 0;
    let Some(mode) = delivery_mode(data >> 8) else { return };
    p.apic_message(dest, extended != 0, logical, mode, data as u8, data & 1 << 15 != 0);
}

/// The delivery mode in the low three bits of `field`; none for the reserved one.
fn delivery_mode(field: u32) -> Option<DeliveryMode> {
    match field & 7 {
        0 => Some(DeliveryMode::Fixed),
        1 => Some(DeliveryMode::LowestPriority),
        2 => Some(DeliveryMode::Smi),
        4 => Some(DeliveryMode::Nmi),
        5 => Some(DeliveryMode::Init),
        6 => Some(DeliveryMode::StartUp),
        7 => Some(DeliveryMode::ExtInt),
        _ => None,
    }
}

/// [`Platform::apic_message`] for a machine whose local APICs are `lapics`: every one that the
/// destination names gets the message, or, with lowest priority, the one that is least busy.
#[allow(clippy::too_many_arguments)] // the message's fields, in apic_message's order
pub fn route_message<L: Borrow<Vlapic>>(
    p: &dyn Platform,
    lapics: &[L],
    dest: u32,
    dest_x2: bool,
    logical: bool,
    mode: DeliveryMode,
    vector: u8,
    level: bool,
) {
    let named = lapics.iter().map(Borrow::borrow).filter(|l| l.matches(dest, dest_x2, logical));
    if mode == DeliveryMode::LowestPriority {
        if let Some(lapic) = named.min_by_key(|l| l.priority()) {
            lapic.deliver(p, mode, vector, level);
        }
    } else {
        named.for_each(|lapic| lapic.deliver(p, mode, vector, level));
    }
}
