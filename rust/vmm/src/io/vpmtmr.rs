//! ACPI power management timer (ACPI 6.5, 4.8.3.3): 32 bits at 3.579545 MHz.
//! bhyve: sys/amd64/vmm/io/vpmtmr.c.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::{StateError, check_version, lock, ns_to_ticks};
use crate::platform::Platform;

pub const HZ: u64 = 3_579_545;
pub const PORT: u16 = 0x408;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VpmtmrState {
    pub version: u32,
    /// VM clock (ns) at which the timer read 0.
    pub start: u64,
}

impl VpmtmrState {
    pub const VERSION: u32 = 1;
}

pub struct Vpmtmr {
    inner: Mutex<VpmtmrState>,
}

impl Default for Vpmtmr {
    fn default() -> Self {
        Self::new()
    }
}

impl Vpmtmr {
    pub fn new() -> Self {
        Self { inner: Mutex::new(VpmtmrState { version: VpmtmrState::VERSION, start: 0 }) }
    }

    pub fn reset(&self, p: &dyn Platform) {
        lock(&self.inner).start = p.now();
    }

    /// The counter, which wraps every 20 minutes.
    pub fn read(&self, p: &dyn Platform) -> u32 {
        let start = lock(&self.inner).start;
        ns_to_ticks(p.now().saturating_sub(start), HZ) as u32
    }

    pub fn save(&self) -> VpmtmrState {
        lock(&self.inner).clone()
    }

    pub fn restore(&self, p: &dyn Platform, mut state: VpmtmrState) -> Result<(), StateError> {
        check_version("vpmtmr", state.version, VpmtmrState::VERSION)?;
        state.start = state.start.min(p.now());
        *lock(&self.inner) = state;
        Ok(())
    }
}
