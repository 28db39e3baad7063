//! ACPI power management timer (ACPI 6.5, 4.8.3.3): 32 bits at 3.579545 MHz.
//! bhyve: sys/amd64/vmm/io/vpmtmr.c.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::{StateError, check_version, lock, ns_to_ticks, read_ports};
use crate::platform::{NotDecoded, Platform};

pub const HZ: u64 = 3_579_545;
pub const PORT: u16 = 0x408;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    /// VM clock (ns) at which the timer read 0.
    pub start: u64,
}

impl State {
    pub const VERSION: u32 = 1;
}

pub struct Vpmtmr {
    inner: Mutex<State>,
}

impl Default for Vpmtmr {
    fn default() -> Self {
        Self::new()
    }
}

impl Vpmtmr {
    pub fn new() -> Self {
        Self { inner: Mutex::new(State { version: State::VERSION, start: 0 }) }
    }

    pub fn reset(&self, p: &dyn Platform) {
        lock(&self.inner).start = p.now();
    }

    /// The counter, which wraps every 20 minutes.
    pub fn value(&self, p: &dyn Platform) -> u32 {
        let start = lock(&self.inner).start;
        ns_to_ticks(p.now().saturating_sub(start), HZ) as u32
    }

    /// Read `size` bytes of the register's four.  It cannot be written.
    pub fn read(&self, p: &dyn Platform, port: u16, size: usize) -> Result<u32, NotDecoded> {
        let bytes = self.value(p).to_le_bytes();
        read_ports(port, size, |port| bytes.get(usize::from(port.checked_sub(PORT)?)).copied())
    }

    pub fn save(&self) -> State {
        lock(&self.inner).clone()
    }

    pub fn restore(&self, p: &dyn Platform, mut state: State) -> Result<(), StateError> {
        check_version("vpmtmr", state.version, State::VERSION)?;
        state.start = state.start.min(p.now());
        *lock(&self.inner) = state;
        Ok(())
    }
}
