//! High precision event timers (IA-PC HPET specification 1.0a): a 32-bit counter at 2^24 Hz and
//! eight comparators.  bhyve: sys/amd64/vmm/io/vhpet.c.
//!
//! Every timer is periodic and FSB capable and routes to IOAPIC pins 24 to 31; there is no legacy
//! replacement routing.  A comparator that a guest sets behind the counter waits for the counter
//! to wrap, as it does in hardware.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::{
    MIN_CALLOUT_PERIOD, StateError, check_version, lock, msi_message, ns_to_ticks, ticks_to_ns,
    truncate,
};
use crate::platform::{Callout, Platform};

pub const BASE: u64 = 0xfed0_0000;
/// Bytes of address space.
pub const LEN: u64 = 0x400;

pub const HZ: u64 = 1 << 24;
/// Femtoseconds in a tick.
const PERIOD: u64 = 59_604_644;
const TIMERS: usize = 8;
/// IOAPIC pins that a timer can be routed to.
const ROUTES: u32 = 0xff00_0000;

// Registers (section 2.3.4).
const CAPABILITIES: u64 = 0x000;
const CONFIGURATION: u64 = 0x010;
const INTERRUPT_STATUS: u64 = 0x020;
const MAIN_COUNTER: u64 = 0x0f0;
const TIMER0: u64 = 0x100;
const TIMER_STEP: u64 = 0x20;
// ... of each timer, from its first.
const TIMER_CONFIGURATION: u64 = 0x00;
const TIMER_COMPARATOR: u64 = 0x08;
const TIMER_FSB_ROUTE: u64 = 0x10;

/// Period, vendor, number of the last timer and revision; 32-bit counter, no legacy routing.
const CAPABILITIES_VALUE: u64 = PERIOD << 32 | 0x8086 << 16 | (TIMERS as u64 - 1) << 8 | 1;

const ENABLE: u64 = 1 << 0;

const LEVEL: u64 = 1 << 1;
const INTERRUPT_ENABLE: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const PERIODIC_CAPABLE: u64 = 1 << 4;
const VALUE_SET: u64 = 1 << 6;
const ROUTE: u64 = 0x1f << 9;
const FSB_ENABLE: u64 = 1 << 14;
const FSB_CAPABLE: u64 = 1 << 15;
const TIMER_READ_ONLY: u64 = (ROUTES as u64) << 32 | FSB_CAPABLE | PERIODIC_CAPABLE;
const TIMER_WRITABLE: u64 = LEVEL | INTERRUPT_ENABLE | PERIODIC | VALUE_SET | ROUTE | FSB_ENABLE;

/// Ticks in which the counter comes round.
const WRAP: u64 = 1 << 32;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerState {
    /// Writable bits of the configuration register.
    pub configuration: u64,
    pub comparator: u32,
    /// What a periodic timer adds to the comparator.
    pub period: u32,
    /// Message data and, in the upper half, its address.
    pub fsb_route: u64,
    /// Ticks since `counter_start` at which counter and comparator meet next; none while halted.
    pub due: Option<u64>,
    /// IOAPIC pin that the timer holds asserted.
    pub asserted: Option<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    pub enabled: bool,
    /// General interrupt status register.
    pub status: u32,
    /// The counter held `counter` at `counter_start` (VM clock, ns), and while halted it still
    /// does.
    pub counter: u32,
    pub counter_start: u64,
    pub timers: [TimerState; TIMERS],
}

impl TimerState {
    fn has(&self, bits: u64) -> bool {
        self.configuration & bits == bits
    }

    fn pin(&self) -> Option<u8> {
        let pin = (self.configuration & ROUTE) >> 9;
        (ROUTES & 1 << pin != 0).then_some(pin as u8)
    }
}

impl State {
    pub const VERSION: u32 = 1;

    fn power_on() -> Self {
        Self {
            version: Self::VERSION,
            enabled: false,
            status: 0,
            counter: 0,
            counter_start: 0,
            timers: std::array::from_fn(|_| TimerState {
                comparator: u32::MAX,
                ..TimerState::default()
            }),
        }
    }

    /// Ticks since the counter was started.
    fn ticks(&self, now: u64) -> u64 {
        if self.enabled { ns_to_ticks(now.saturating_sub(self.counter_start), HZ) } else { 0 }
    }

    fn counter(&self, now: u64) -> u32 {
        self.counter.wrapping_add(self.ticks(now) as u32)
    }

    /// Find out when the timer's comparator meets the counter next.
    fn schedule(&mut self, n: usize, now: u64) {
        let (ticks, counter) = (self.ticks(now), self.counter(now));
        let timer = &mut self.timers[n];
        let distance = timer.comparator.wrapping_sub(counter);
        timer.due = self.enabled.then(|| ticks.saturating_add(distance.into()));
    }

    fn schedule_all(&mut self, now: u64) {
        (0..TIMERS).for_each(|n| self.schedule(n, now));
    }

    /// Let the timers that are due by now expire.  True for those that do.
    fn advance(&mut self, p: &dyn Platform, now: u64) -> [bool; TIMERS] {
        let ticks = self.ticks(now);
        let mut expired = [false; TIMERS];
        for (n, expired) in expired.iter_mut().enumerate() {
            let Some(due) = self.timers[n].due.filter(|&due| due <= ticks) else { continue };
            *expired = true;
            let timer = &mut self.timers[n];
            let step = match timer.period {
                period if timer.has(PERIODIC) && period != 0 => period.into(),
                _ => WRAP,
            };
            let steps = (ticks - due) / step + 1;
            timer.due = Some(due.saturating_add(steps.saturating_mul(step)));
            timer.comparator = timer.comparator.wrapping_add(steps.wrapping_mul(step) as u32);
            self.interrupt(p, n);
        }
        expired
    }

    fn interrupt(&mut self, p: &dyn Platform, n: usize) {
        let timer = &self.timers[n];
        if !timer.has(INTERRUPT_ENABLE) {
            return;
        }
        if timer.has(FSB_ENABLE) {
            msi_message(p, timer.fsb_route >> 32, timer.fsb_route as u32);
        } else if timer.has(LEVEL) {
            self.status |= 1 << n;
            self.drive(p, n);
        } else if let Some(pin) = timer.pin() {
            p.isa_pulse(None, Some(pin));
        }
    }

    /// Bring the timer's line to where its registers want it.
    fn drive(&mut self, p: &dyn Platform, n: usize) {
        let level = self.status & 1 << n != 0;
        let timer = &mut self.timers[n];
        let active = level && timer.has(LEVEL | INTERRUPT_ENABLE) && !timer.has(FSB_ENABLE);
        let wanted = timer.pin().filter(|_| active);
        if timer.asserted != wanted {
            if let Some(pin) = timer.asserted {
                p.isa_irq(None, Some(pin), false);
            }
            if let Some(pin) = wanted {
                p.isa_irq(None, Some(pin), true);
            }
            timer.asserted = wanted;
        }
    }

    /// Ask for a callout at the timer's next expiry, if it would interrupt.
    fn arm(&self, p: &dyn Platform, n: usize, expired: bool) {
        let timer = &self.timers[n];
        let callout = Callout::Hpet(n as u8);
        match timer.due.filter(|_| timer.has(INTERRUPT_ENABLE)) {
            Some(due) => {
                let soonest = if expired { p.now() + MIN_CALLOUT_PERIOD } else { 0 };
                let at = self.counter_start.saturating_add(ticks_to_ns(due, HZ));
                p.arm(callout, at.max(soonest));
            }
            None => p.disarm(callout),
        }
    }

    fn read(&self, register: u64, now: u64) -> u64 {
        match register {
            CAPABILITIES => CAPABILITIES_VALUE,
            CONFIGURATION => self.enabled.into(),
            INTERRUPT_STATUS => self.status.into(),
            MAIN_COUNTER => self.counter(now).into(),
            TIMER0.. => {
                let n = ((register - TIMER0) / TIMER_STEP) as usize;
                let Some(timer) = self.timers.get(n) else { return 0 };
                match (register - TIMER0) % TIMER_STEP {
                    TIMER_CONFIGURATION => timer.configuration | TIMER_READ_ONLY,
                    TIMER_COMPARATOR => timer.comparator.into(),
                    TIMER_FSB_ROUTE => timer.fsb_route,
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// Write the bits in `lanes` of a register.
    fn write(&mut self, p: &dyn Platform, register: u64, lanes: u64, value: u64, now: u64) {
        let merged = self.read(register, now) & !lanes | value & lanes;
        match register {
            CONFIGURATION => {
                let enabled = merged & ENABLE != 0;
                if enabled != self.enabled {
                    self.counter = self.counter(now);
                    self.counter_start = now;
                    self.enabled = enabled;
                    self.schedule_all(now);
                }
            }
            INTERRUPT_STATUS => {
                self.status &= !((value & lanes) as u32);
                (0..TIMERS).for_each(|n| self.drive(p, n));
            }
            MAIN_COUNTER => {
                self.counter = merged as u32;
                self.counter_start = now;
                self.schedule_all(now);
            }
            TIMER0.. => {
                let n = ((register - TIMER0) / TIMER_STEP) as usize;
                if n < TIMERS {
                    let register = (register - TIMER0) % TIMER_STEP;
                    self.write_timer(p, n, register, lanes, merged, now);
                }
            }
            _ => {}
        }
    }

    fn write_timer(
        &mut self,
        p: &dyn Platform,
        n: usize,
        register: u64,
        lanes: u64,
        value: u64,
        now: u64,
    ) {
        let timer = &mut self.timers[n];
        match register {
            TIMER_CONFIGURATION => {
                timer.configuration = value & TIMER_WRITABLE;
                // A route that does not exist reads back as none (section 2.3.8).
                if timer.pin().is_none() {
                    timer.configuration &= !ROUTE;
                }
                if !timer.has(LEVEL) {
                    self.status &= !(1 << n);
                }
                self.drive(p, n);
            }
            // Comparators are 32 bits wide; the upper half of the register is not there.
            TIMER_COMPARATOR if lanes as u32 == 0 => {}
            TIMER_COMPARATOR => {
                let value = value as u32;
                if timer.has(PERIODIC) {
                    timer.period = value;
                }
                if !timer.has(PERIODIC) || timer.has(VALUE_SET) {
                    timer.comparator = value;
                    timer.configuration &= !VALUE_SET;
                    self.schedule(n, now);
                }
            }
            TIMER_FSB_ROUTE => timer.fsb_route = value,
            _ => {}
        }
    }
}

pub struct Vhpet {
    inner: Mutex<State>,
}

impl Default for Vhpet {
    fn default() -> Self {
        Self::new()
    }
}

impl Vhpet {
    pub fn new() -> Self {
        Self { inner: Mutex::new(State::power_on()) }
    }

    /// Run `f` on a state in which everything due has expired, and ask for the callouts that
    /// the new state needs.
    fn enter<R>(&self, p: &dyn Platform, f: impl FnOnce(&mut State, u64) -> R) -> R {
        let mut state = lock(&self.inner);
        let now = p.now();
        let expired = state.advance(p, now);
        let before: [_; TIMERS] = std::array::from_fn(|n| {
            let timer = &state.timers[n];
            (timer.due, timer.has(INTERRUPT_ENABLE), state.counter_start)
        });
        let result = f(&mut state, now);
        for n in 0..TIMERS {
            let timer = &state.timers[n];
            let after = (timer.due, timer.has(INTERRUPT_ENABLE), state.counter_start);
            if expired[n] || after != before[n] {
                state.arm(p, n, expired[n]);
            }
        }
        result
    }

    pub fn reset(&self, p: &dyn Platform) {
        let mut state = lock(&self.inner);
        state.status = 0;
        for n in 0..TIMERS {
            state.drive(p, n);
        }
        *state = State::power_on();
        for n in 0..TIMERS {
            state.arm(p, n, false);
        }
    }

    /// Read 4 or 8 aligned bytes; the specification allows no other access, and they read 0.
    pub fn mmio_read(&self, p: &dyn Platform, offset: u64, size: usize) -> u64 {
        let Some(shift) = lane_shift(offset, size) else { return 0 };
        self.enter(p, |s, now| truncate(s.read(offset & !7, now) >> shift, size))
    }

    /// Write 4 or 8 aligned bytes; other writes are ignored.
    pub fn mmio_write(&self, p: &dyn Platform, offset: u64, size: usize, value: u64) {
        let Some(shift) = lane_shift(offset, size) else { return };
        self.enter(p, |s, now| {
            let lanes = truncate(u64::MAX, size) << shift;
            s.write(p, offset & !7, lanes, value << shift, now);
        });
    }

    /// Comparator `n`'s deadline, or any other moment, has come.
    pub fn callout(&self, p: &dyn Platform, n: u8) {
        let mut state = lock(&self.inner);
        let expired = state.advance(p, p.now());
        for (timer, expired) in expired.into_iter().enumerate() {
            if expired || timer == usize::from(n) {
                state.arm(p, timer, expired);
            }
        }
    }

    pub fn save(&self) -> State {
        lock(&self.inner).clone()
    }

    /// Take `state` back; values that the device could not have reached are corrected.
    pub fn restore(&self, p: &dyn Platform, mut state: State) -> Result<(), StateError> {
        check_version("vhpet", state.version, State::VERSION)?;
        let now = p.now();
        state.counter_start = state.counter_start.min(now);
        state.status &= (1 << TIMERS) - 1;
        let (ticks, counter) = (state.ticks(now), state.counter(now));
        for (n, timer) in state.timers.iter_mut().enumerate() {
            timer.configuration &= TIMER_WRITABLE;
            if timer.pin().is_none() {
                timer.configuration &= !ROUTE;
            }
            if !timer.has(LEVEL) {
                state.status &= !(1 << n);
            }
            timer.asserted = timer.asserted.filter(|&pin| pin < 32 && ROUTES & 1 << pin != 0);
            // An expiry that is due but has not been noticed stays; others follow from the
            // comparator.
            let distance = timer.comparator.wrapping_sub(counter);
            let due = timer.due.filter(|&due| due <= ticks);
            timer.due = state.enabled.then(|| due.unwrap_or(ticks.saturating_add(distance.into())));
        }
        let mut inner = lock(&self.inner);
        *inner = state;
        for n in 0..TIMERS {
            inner.drive(p, n);
            inner.arm(p, n, false);
        }
        Ok(())
    }
}

/// Bits below the access in its 64-bit register; none if it is not 4 or 8 aligned bytes.
fn lane_shift(offset: u64, size: usize) -> Option<u64> {
    match size {
        4 if offset & 3 == 0 => Some(8 * (offset & 4)),
        8 if offset & 7 == 0 => Some(0),
        _ => None,
    }
}
