//! ACPI power management timer (ACPI 6.5, 4.8.3.3): 32 bits at 3.579545 MHz.
//! bhyve: sys/amd64/vmm/io/vpmtmr.c.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::{StateError, check_version, lock, ns_to_ticks, read_ports};
use crate::platform::{NotDecoded, Platform};

const HZ: u64 = 3_579_545;
const PORT: u16 = 0x408;

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

#[cfg(test)]
mod tests {
    use super::super::testplat::TestPlatform;
    use super::*;

    #[test]
    fn counts_at_its_frequency_and_wraps() {
        let p = TestPlatform::new(1);
        let timer = Vpmtmr::new();
        p.advance(1_000_000_000);
        assert_eq!(timer.value(&p), 3_579_545);
        // 2^32 ticks and one more.
        p.advance(1_199_864_031_881 - 1_000_000_000 + 280);
        assert_eq!(timer.value(&p), 1);
        timer.reset(&p);
        assert_eq!(timer.value(&p), 0);
    }

    #[test]
    fn narrow_reads() {
        let p = TestPlatform::new(1);
        let timer = Vpmtmr::new();
        p.advance(10_000_000_000);
        let value = timer.value(&p);
        assert_eq!(timer.read(&p, PORT, 4), Ok(value));
        assert_eq!(timer.read(&p, PORT, 2), Ok(value & 0xffff));
        assert_eq!(timer.read(&p, PORT + 2, 1), Ok(value >> 16 & 0xff));
        assert_eq!(timer.read(&p, PORT + 3, 2), Ok(0xff00 | value >> 24));
        assert_eq!(timer.read(&p, PORT + 4, 1), Err(NotDecoded));
        assert_eq!(timer.read(&p, PORT - 1, 1), Err(NotDecoded));
    }

    #[test]
    fn restored_timer_goes_on() {
        let p = TestPlatform::new(1);
        let timer = Vpmtmr::new();
        p.advance(5_000_000_000);
        timer.reset(&p);
        p.advance(1_000_000_000);
        let copy = Vpmtmr::new();
        copy.restore(&p, timer.save()).unwrap();
        assert_eq!(copy.value(&p), 3_579_545);
        copy.restore(&p, State { start: u64::MAX, ..timer.save() }).unwrap();
        assert_eq!(copy.value(&p), 0);
        assert!(copy.restore(&p, State { version: 0, ..timer.save() }).is_err());
    }
}
