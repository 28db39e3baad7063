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

const HZ: u64 = 1 << 24;
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
            // An expiry that is due but has not been noticed stays, and so does one that has just
            // been; others follow from the comparator.
            let distance = timer.comparator.wrapping_sub(counter);
            let due = timer.due.filter(|&due| due <= ticks || distance == 0 && due - ticks == WRAP);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testplat::{Event, TestPlatform};
    use super::*;
    use crate::platform::DeliveryMode;

    const T0: u64 = TIMER0;
    const T3: u64 = TIMER0 + 3 * TIMER_STEP;
    /// Route to pin 24, interrupts enabled.
    const ON_24: u64 = 24 << 9 | INTERRUPT_ENABLE;

    fn read(p: &TestPlatform, hpet: &Vhpet, register: u64) -> u64 {
        hpet.mmio_read(p, register, 8)
    }

    fn write(p: &TestPlatform, hpet: &Vhpet, register: u64, value: u64) {
        hpet.mmio_write(p, register, 8, value);
    }

    /// Turn the clock to the first nanosecond of `tick`, running timer 0's callouts.
    fn run_to(p: &TestPlatform, hpet: &Vhpet, tick: u64) {
        p.run_until(ticks_to_ns(tick, HZ), Callout::Hpet(0), |p| hpet.callout(p, 0));
    }

    fn pulse(pin: u8) -> Event {
        Event::Pulse(None, Some(pin))
    }

    #[test]
    fn registers() {
        let p = TestPlatform::new(1);
        let hpet = Vhpet::new();
        // Register, value after reset, after writing all ones.
        let table = [
            (CAPABILITIES, 0x038d_7ea4_8086_0701, 0x038d_7ea4_8086_0701),
            (0x008, 0, 0),
            (CONFIGURATION, 0, 1),
            (INTERRUPT_STATUS, 0, 0),
            (0x0e8, 0, 0),
            (T0 + TIMER_CONFIGURATION, 0xff00_0000_0000_8010, 0xff00_0000_0000_fe5e),
            (T0 + TIMER_FSB_ROUTE, 0, u64::MAX),
            (T0 + 0x18, 0, 0),
            (T3 + TIMER_COMPARATOR, 0xffff_ffff, 0xffff_ffff),
            (TIMER0 + 8 * TIMER_STEP, 0, 0),
            (0x3f8, 0, 0),
            (!7, 0, 0),
        ];
        for (register, reset, written) in table {
            assert_eq!(read(&p, &hpet, register), reset, "{register:#x}");
            write(&p, &hpet, register, u64::MAX);
            assert_eq!(read(&p, &hpet, register), written, "{register:#x}");
        }
    }

    #[test]
    fn access_sizes() {
        let p = TestPlatform::new(1);
        let hpet = Vhpet::new();
        for (offset, size, value) in [
            (0, 4, 0x8086_0701),
            (4, 4, 0x038d_7ea4),
            (0, 8, 0x038d_7ea4_8086_0701),
            (4, 8, 0),
            (2, 4, 0),
            (0, 2, 0),
            (0, 1, 0),
        ] {
            assert_eq!(hpet.mmio_read(&p, offset, size), value, "{offset} {size}");
        }
        hpet.mmio_write(&p, T0 + 0x14, 4, 0xfee0_0000);
        hpet.mmio_write(&p, T0 + 0x10, 4, 0x41);
        assert_eq!(read(&p, &hpet, T0 + TIMER_FSB_ROUTE), 0xfee0_0000_0000_0041);
        hpet.mmio_write(&p, T0 + TIMER_COMPARATOR, 4, 5);
        hpet.mmio_write(&p, T0 + TIMER_COMPARATOR + 4, 4, 7);
        assert_eq!(read(&p, &hpet, T0 + TIMER_COMPARATOR), 5);
        hpet.mmio_write(&p, MAIN_COUNTER, 2, 9);
        assert_eq!(read(&p, &hpet, MAIN_COUNTER), 0);
    }

    #[test]
    fn counter_stops_and_goes_on() {
        let p = TestPlatform::new(1);
        let hpet = Vhpet::new();
        write(&p, &hpet, MAIN_COUNTER, 0x1_ffff_fff0);
        p.advance(1_000_000_000);
        assert_eq!(read(&p, &hpet, MAIN_COUNTER), 0xffff_fff0);
        write(&p, &hpet, CONFIGURATION, 1);
        p.advance(1_000_000_000);
        assert_eq!(read(&p, &hpet, MAIN_COUNTER), HZ - 16, "it is 32 bits wide");
        write(&p, &hpet, CONFIGURATION, 0);
        p.advance(1_000_000_000);
        assert_eq!(read(&p, &hpet, MAIN_COUNTER), HZ - 16);
        write(&p, &hpet, CONFIGURATION, 1);
        p.advance(1_000_000_000);
        assert_eq!(read(&p, &hpet, MAIN_COUNTER), 2 * HZ - 16);
    }

    #[test]
    fn one_shot() {
        let p = TestPlatform::new(1);
        let hpet = Vhpet::new();
        write(&p, &hpet, T0, ON_24);
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 1000);
        assert_eq!(p.armed(Callout::Hpet(0)), None, "halted");
        write(&p, &hpet, CONFIGURATION, 1);
        assert_eq!(p.armed(Callout::Hpet(0)), Some(ticks_to_ns(1000, HZ)));
        p.advance(ticks_to_ns(1000, HZ) - 1);
        hpet.callout(&p, 0);
        assert_eq!(p.take(), []);
        run_to(&p, &hpet, HZ);
        assert_eq!(p.take(), [pulse(24)]);
        run_to(&p, &hpet, WRAP + 999);
        assert_eq!(p.take(), []);
        run_to(&p, &hpet, WRAP + 1000);
        assert_eq!(p.take(), [pulse(24)], "the counter has come round");
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 1000);
        run_to(&p, &hpet, WRAP + 2000);
        assert_eq!(p.take(), [pulse(24)], "equal is now");
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 1999);
        run_to(&p, &hpet, 2 * WRAP);
        assert_eq!(p.take(), [], "what is behind waits for the counter to wrap");
    }

    /// As Linux programs it: the comparator with VAL_SET, then the period.
    #[test]
    fn periodic() {
        let p = TestPlatform::new(1);
        let hpet = Vhpet::new();
        write(&p, &hpet, CONFIGURATION, 1);
        run_to(&p, &hpet, 500);
        write(&p, &hpet, T0, ON_24 | PERIODIC | VALUE_SET);
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 1500);
        assert_eq!(read(&p, &hpet, T0) & VALUE_SET, 0);
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 1000);
        assert_eq!(read(&p, &hpet, T0 + TIMER_COMPARATOR), 1500);
        run_to(&p, &hpet, 1500);
        assert_eq!(p.take(), [pulse(24)]);
        assert_eq!(read(&p, &hpet, T0 + TIMER_COMPARATOR), 2500);
        run_to(&p, &hpet, 10 * HZ);
        assert_eq!(p.take().len() as u64, (10 * HZ - 1500) / 1000);
    }

    #[test]
    fn fast_and_late_expiries_coalesce() {
        let p = TestPlatform::new(1);
        let hpet = Vhpet::new();
        write(&p, &hpet, T0, ON_24 | PERIODIC | VALUE_SET);
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 1);
        write(&p, &hpet, CONFIGURATION, 1);
        run_to(&p, &hpet, HZ / 100);
        let pulses = p.take().len();
        assert!((400..=500).contains(&pulses), "{pulses} in 10 ms");
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 0);
        p.advance(5_000_000_000);
        hpet.callout(&p, 0);
        let pulses = p.take().len();
        assert!(pulses <= 2, "one that was due, and one without a period to repeat");
    }

    #[test]
    fn level_interrupts() {
        let p = TestPlatform::new(1);
        let hpet = Vhpet::new();
        let line = |pin, level| Event::Isa(None, Some(pin), level);
        write(&p, &hpet, CONFIGURATION, 1);
        write(&p, &hpet, T0, ON_24 | LEVEL | PERIODIC | VALUE_SET);
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 1000);
        run_to(&p, &hpet, 2500);
        assert_eq!(p.take(), [line(24, true)], "asserted until acknowledged");
        assert_eq!(read(&p, &hpet, INTERRUPT_STATUS), 1);
        write(&p, &hpet, INTERRUPT_STATUS, 0xfe);
        assert_eq!(p.take(), []);
        write(&p, &hpet, INTERRUPT_STATUS, 1);
        assert_eq!(p.take(), [line(24, false)]);
        run_to(&p, &hpet, 3000);
        write(&p, &hpet, T0, 31 << 9 | INTERRUPT_ENABLE | LEVEL);
        assert_eq!(p.take(), [line(24, true), line(24, false), line(31, true)]);
        write(&p, &hpet, T0, 31 << 9 | LEVEL);
        assert_eq!(p.take(), [line(31, false)]);
        write(&p, &hpet, T0, 31 << 9 | INTERRUPT_ENABLE | LEVEL);
        assert_eq!(p.take(), [line(31, true)]);
        write(&p, &hpet, T0, 31 << 9 | INTERRUPT_ENABLE);
        assert_eq!(p.take(), [line(31, false)]);
        assert_eq!(read(&p, &hpet, INTERRUPT_STATUS), 0);
        write(&p, &hpet, T0, ON_24 | LEVEL);
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 3000);
        p.take();
        run_to(&p, &hpet, 3001);
        hpet.reset(&p);
        assert_eq!(p.take(), [line(24, true), line(24, false)]);
    }

    #[test]
    fn routes() {
        let p = TestPlatform::new(1);
        let hpet = Vhpet::new();
        for route in 0..32 {
            write(&p, &hpet, T3, route << 9);
            let expected = if route >= 24 { route } else { 0 };
            assert_eq!((read(&p, &hpet, T3) & ROUTE) >> 9, expected);
        }
        write(&p, &hpet, T0, 2 << 9 | INTERRUPT_ENABLE);
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 10);
        write(&p, &hpet, CONFIGURATION, 1);
        run_to(&p, &hpet, 100);
        assert_eq!(p.take(), []);
    }

    #[test]
    fn message_interrupts() {
        let p = TestPlatform::new(1);
        let hpet = Vhpet::new();
        write(&p, &hpet, T0 + TIMER_FSB_ROUTE, 0xfee0_3004_0000_0141);
        write(&p, &hpet, T0, ON_24 | FSB_ENABLE | LEVEL);
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 10);
        write(&p, &hpet, CONFIGURATION, 1);
        run_to(&p, &hpet, 100);
        let message = Event::Message {
            dest: 3,
            x2: false,
            logical: true,
            mode: DeliveryMode::LowestPriority,
            vector: 0x41,
            level: false,
        };
        assert_eq!(p.take(), [message]);
        assert_eq!(read(&p, &hpet, INTERRUPT_STATUS), 0);
    }

    #[test]
    fn disabled_interrupt_is_silent_and_not_armed() {
        let p = TestPlatform::new(1);
        let hpet = Vhpet::new();
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 10);
        write(&p, &hpet, CONFIGURATION, 1);
        assert_eq!(p.armed(Callout::Hpet(0)), None);
        p.advance(1_000_000);
        write(&p, &hpet, T0, ON_24);
        assert_eq!(p.take(), [], "what expired before is lost");
        assert_eq!(p.armed(Callout::Hpet(0)), Some(ticks_to_ns(WRAP + 10, HZ)));
        write(&p, &hpet, CONFIGURATION, 0);
        assert_eq!(p.armed(Callout::Hpet(0)), None);
    }

    #[test]
    fn restored_timers_go_on() {
        let p = TestPlatform::new(1);
        let hpet = Vhpet::new();
        write(&p, &hpet, T0, ON_24 | LEVEL | PERIODIC | VALUE_SET);
        write(&p, &hpet, T0 + TIMER_COMPARATOR, 1000);
        write(&p, &hpet, CONFIGURATION, 1);
        run_to(&p, &hpet, 1500);
        let other = TestPlatform::new(1);
        other.advance(p.now());
        let copy = Vhpet::new();
        let text = serde_json::to_string(&hpet.save()).unwrap();
        copy.restore(&other, serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(copy.save(), hpet.save());
        assert_eq!(other.take(), [], "the line is the IOAPIC's state, too");
        assert_eq!(other.armed(Callout::Hpet(0)), Some(ticks_to_ns(2000, HZ)));
        write(&other, &copy, INTERRUPT_STATUS, 1);
        assert_eq!(other.take(), [Event::Isa(None, Some(24), false)]);
    }

    type Op = (u8, u64, usize, u64, u64);

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let register = prop_oneof![
            3 => (0u64..0x80).prop_map(|n| n * 8),
            1 => 0u64..0x400,
            1 => any::<u64>(),
        ];
        let value = prop_oneof![any::<u64>(), 0u64..0x10000];
        let size = prop::sample::select(vec![1usize, 4, 8]);
        prop::collection::vec((0u8..4, register, size, value, 0u64..1 << 34), 1..80)
    }

    fn apply(p: &TestPlatform, hpet: &Vhpet, ops: &[Op]) {
        for &(op, register, size, value, ns) in ops {
            match op {
                0 => drop(hpet.mmio_read(p, register, size)),
                1 => hpet.callout(p, value as u8),
                _ => hpet.mmio_write(p, register, size, value),
            }
            p.advance(ns);
        }
    }

    proptest! {
        #[test]
        fn any_sequence_leaves_a_state_that_can_be_restored(ops in ops()) {
            let p = TestPlatform::new(1);
            let hpet = Vhpet::new();
            apply(&p, &hpet, &ops);
            // Lines are asserted and deasserted in turn.
            let mut high = [false; 32];
            for event in p.take() {
                if let Event::Isa(None, Some(pin), level) = event {
                    prop_assert_ne!(high[usize::from(pin)], level);
                    high[usize::from(pin)] = level;
                }
            }
            let copy = Vhpet::new();
            copy.restore(&p, hpet.save()).unwrap();
            prop_assert_eq!(copy.save(), hpet.save());
        }

        #[test]
        fn hostile_states_are_tamed(
            words in prop::collection::vec(any::<u64>(), 40),
            asserted in any::<[Option<u8>; 8]>(),
            due in any::<[Option<u64>; 8]>(),
            now in any::<u64>(),
            ops in ops(),
        ) {
            let p = TestPlatform::new(1);
            p.advance(now >> 8);
            let state = State {
                version: State::VERSION,
                enabled: words[0] & 1 != 0,
                status: words[1] as u32,
                counter: words[2] as u32,
                counter_start: words[3],
                timers: std::array::from_fn(|n| TimerState {
                    configuration: words[4 * n + 4],
                    comparator: words[4 * n + 5] as u32,
                    period: words[4 * n + 6] as u32,
                    fsb_route: words[4 * n + 7],
                    due: due[n],
                    asserted: asserted[n],
                }),
            };
            let hpet = Vhpet::new();
            hpet.restore(&p, state).unwrap();
            let tamed = hpet.save();
            hpet.restore(&p, tamed.clone()).unwrap();
            prop_assert_eq!(hpet.save(), tamed);
            apply(&p, &hpet, &ops);
        }
    }
}
