//! 8254 interval timer (Intel 8254 datasheet, 231164) and port 0x61 (NMI status and control).
//! bhyve: sys/amd64/vmm/io/vatpit.c.
//!
//! Nothing runs between accesses: a counter's value and its OUT pin follow from the tick at which
//! its count was loaded.  Each rising edge of counter 0's OUT is a pulse on PIC line 0 and IOAPIC
//! pin 2; edges that come faster than callouts coalesce.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::{
    MIN_CALLOUT_PERIOD, StateError, check_version, lock, ns_to_ticks, read_ports, ticks_to_ns,
    write_ports,
};
use crate::platform::{Callout, NotDecoded, Platform};

/// Input clock of the three counters.
pub const HZ: u64 = 1_193_182;

pub const COUNTER0: u16 = 0x40;
const COUNTER2: u16 = 0x42;
pub const CONTROL: u16 = 0x43;
pub const NMISC: u16 = 0x61;

/// ISA line and IOAPIC pin of counter 0.
const PIC_IRQ: u8 = 0;
const IOAPIC_PIN: u8 = 2;

const CONTROL_BCD: u8 = 1 << 0;
const READ_BACK: u8 = 3;
const READ_BACK_NO_STATUS: u8 = 1 << 4;
const READ_BACK_NO_COUNT: u8 = 1 << 5;
const STATUS_NULL_COUNT: u8 = 1 << 6;
const STATUS_OUT: u8 = 1 << 7;

const ACCESS_LOW: u8 = 1;
const ACCESS_HIGH: u8 = 2;
const ACCESS_BOTH: u8 = 3;

const NMISC_GATE2: u8 = 1 << 0;
/// Gate 2, speaker, and the enables of parity and channel check.
const NMISC_WRITABLE: u8 = 0x0f;
const NMISC_REFRESH: u8 = 1 << 4;
const NMISC_OUT2: u8 = 1 << 5;
/// Memory refresh requests, of which each toggles the bit (ns).
const REFRESH_PERIOD: u64 = 15_085;

// Modes (datasheet, "Mode Definitions").
const TERMINAL_COUNT: u8 = 0;
const ONE_SHOT: u8 = 1;
const RATE_GENERATOR: u8 = 2;
const SQUARE_WAVE: u8 = 3;
const SOFTWARE_STROBE: u8 = 4;
const HARDWARE_STROBE: u8 = 5;

/// A count that waits for the end of the running cycle, or of half of one in mode 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextCount {
    pub count: u32,
    pub tick: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterState {
    pub mode: u8,
    pub bcd: bool,
    /// Read/write field of the control word: low byte, high byte or both.
    pub access: u8,
    /// Low byte of a count whose high byte is still to come.
    pub write_low: Option<u8>,
    /// The next read is of the high byte.
    pub read_high: bool,
    pub latched_count: Option<u16>,
    pub latched_status: Option<u8>,
    /// The count last written has not been loaded yet.
    pub null_count: bool,
    pub gate: bool,
    /// Count in the counter when it was loaded, 1 to 0x10000; 0 before that.
    pub count: u32,
    /// Tick at which it was loaded.
    pub start: i64,
    /// Ticks counted when the gate went low; it is low for as long as this is set.
    pub stopped: Option<i64>,
    /// Count for the next trigger of modes 1 and 5.
    pub armed: u32,
    pub next: Option<NextCount>,
}

impl CounterState {
    fn power_on(gate: bool) -> Self {
        Self {
            mode: SQUARE_WAVE,
            bcd: false,
            access: ACCESS_BOTH,
            write_low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
            null_count: true,
            gate,
            count: 0,
            start: 0,
            stopped: None,
            armed: 0,
            next: None,
        }
    }

    fn modulus(&self) -> i64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn elapsed(&self, tick: i64) -> i64 {
        self.stopped.unwrap_or(tick.saturating_sub(self.start)).max(0)
    }

    fn out(&self, tick: i64) -> bool {
        let (count, elapsed) = (i64::from(self.count), self.elapsed(tick));
        if count == 0 {
            return self.mode != TERMINAL_COUNT;
        }
        match self.mode {
            TERMINAL_COUNT | ONE_SHOT => elapsed >= count,
            RATE_GENERATOR => self.stopped.is_some() || elapsed % count != count - 1,
            SQUARE_WAVE => self.stopped.is_some() || elapsed % count < (count + 1) / 2,
            SOFTWARE_STROBE.. => elapsed != count,
        }
    }

    /// What the counter holds.  One that was never loaded counts all the same: nobody knows what
    /// firmware left in it, but it moves.
    fn value(&self, tick: i64) -> u16 {
        let modulus = self.modulus();
        let (count, elapsed) = (i64::from(self.count), self.elapsed(tick));
        let value = match self.mode {
            _ if count == 0 => modulus - tick.rem_euclid(modulus),
            RATE_GENERATOR => count - elapsed % count,
            SQUARE_WAVE => {
                // It counts down by two, in each half of the cycle.
                let (phase, high) = (elapsed % count, (count + 1) / 2);
                let phase = if phase < high { phase } else { phase - high };
                (count & !1) - 2 * phase
            }
            _ => (count - elapsed).rem_euclid(modulus),
        };
        let value = (value % modulus) as u16;
        if self.bcd { to_bcd(value) } else { value }
    }

    /// The first tick after `tick` at which OUT goes high on its own.
    fn next_rise(&self, tick: i64) -> Option<i64> {
        let count = i64::from(self.count);
        if count == 0 || self.stopped.is_some() {
            return None;
        }
        let rise = match self.mode {
            TERMINAL_COUNT | ONE_SHOT => self.start.saturating_add(count),
            RATE_GENERATOR | SQUARE_WAVE => {
                let cycles = tick.saturating_sub(self.start).max(0) / count;
                self.start.saturating_add((cycles + 1).saturating_mul(count))
            }
            SOFTWARE_STROBE.. => self.start.saturating_add(count + 1),
        };
        (rise > tick).then_some(rise)
    }

    fn load(&mut self, count: u32, start: i64) {
        self.count = count;
        self.start = start;
        self.stopped = None;
        self.next = None;
        self.null_count = false;
    }

    /// Load the waiting count if its time has come.
    fn advance(&mut self, tick: i64) {
        let Some(NextCount { count, tick: at }) = self.next else { return };
        if at > tick || self.stopped.is_some() {
            return;
        }
        let high = (i64::from(self.count) + 1) / 2;
        let cycle = i64::from(self.count).max(1);
        let falls = self.mode == SQUARE_WAVE && at.saturating_sub(self.start) % cycle == high;
        // A square wave that falls here goes on with the low half of the new cycle.
        let start = if falls { at - (i64::from(count) + 1) / 2 } else { at };
        self.load(count, start);
    }

    fn write_count(&mut self, value: u16, tick: i64) {
        let count = match (if self.bcd { from_bcd(value) } else { value.into() }, self.mode) {
            (0, _) => self.modulus() as u32,
            // A cycle of one tick does not exist.
            (1, RATE_GENERATOR | SQUARE_WAVE) => 2,
            (count, _) => count,
        };
        self.null_count = true;
        match self.mode {
            ONE_SHOT | HARDWARE_STROBE => self.armed = count,
            RATE_GENERATOR | SQUARE_WAVE if self.count != 0 => {
                self.advance(tick);
                let (cycle, elapsed) = (i64::from(self.count), self.elapsed(tick));
                let (phase, high) = (elapsed % cycle, (cycle + 1) / 2);
                let left = match self.mode {
                    SQUARE_WAVE if phase < high => high - phase,
                    _ => cycle - phase,
                };
                self.next = Some(NextCount { count, tick: tick.saturating_add(left) });
            }
            _ => {
                self.load(count, tick + 1);
                if !self.gate {
                    self.stopped = Some(0);
                }
            }
        }
    }

    fn write_byte(&mut self, byte: u8, tick: i64) {
        match (self.access, self.write_low) {
            (ACCESS_LOW, _) => self.write_count(byte.into(), tick),
            (ACCESS_HIGH, _) => self.write_count(u16::from(byte) << 8, tick),
            (_, None) => {
                self.write_low = Some(byte);
                // The first byte stops a count in mode 0, and OUT is low.
                if self.mode == TERMINAL_COUNT {
                    self.count = 0;
                }
            }
            (_, Some(low)) => {
                self.write_low = None;
                self.write_count(u16::from_le_bytes([low, byte]), tick);
            }
        }
    }

    fn read_byte(&mut self, tick: i64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.value(tick)).to_le_bytes();
        let byte = match self.access {
            ACCESS_LOW => low,
            ACCESS_HIGH => high,
            _ => {
                self.read_high = !self.read_high;
                if self.read_high {
                    return low;
                }
                high
            }
        };
        self.latched_count = None;
        byte
    }

    fn latch_count(&mut self, tick: i64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(tick));
        }
    }

    fn latch_status(&mut self, tick: i64) {
        if self.latched_status.is_none() {
            let out = if self.out(tick) { STATUS_OUT } else { 0 };
            let null = if self.null_count { STATUS_NULL_COUNT } else { 0 };
            self.latched_status =
                Some(out | null | self.access << 4 | self.mode << 1 | u8::from(self.bcd));
        }
    }

    fn control(&mut self, value: u8) {
        let mode = match value >> 1 & 7 {
            // Bit 2 of the field does not matter in modes 2 and 3.
            mode @ 6..=7 => mode - 4,
            mode => mode,
        };
        *self = Self {
            mode,
            bcd: value & CONTROL_BCD != 0,
            access: value >> 4 & 3,
            ..Self::power_on(self.gate)
        };
    }

    fn set_gate(&mut self, gate: bool, tick: i64) {
        if gate == self.gate {
            return;
        }
        self.advance(tick);
        self.gate = gate;
        match self.mode {
            ONE_SHOT | HARDWARE_STROBE => {
                if gate && self.armed != 0 {
                    self.load(self.armed, tick + 1);
                }
            }
            _ if self.count == 0 => {}
            _ if !gate => self.stopped = Some(self.elapsed(tick)),
            RATE_GENERATOR | SQUARE_WAVE => {
                let count = self.next.map_or(self.count, |next| next.count);
                self.load(count, tick + 1);
            }
            _ => {
                self.start = tick.saturating_sub(self.elapsed(tick));
                self.stopped = None;
            }
        }
    }

    fn sanitise(&mut self, tick: i64) {
        self.mode = self.mode.min(HARDWARE_STROBE);
        if !(ACCESS_LOW..=ACCESS_BOTH).contains(&self.access) {
            self.access = ACCESS_BOTH;
        }
        let most = self.modulus() as u32;
        let least = u32::from(matches!(self.mode, RATE_GENERATOR | SQUARE_WAVE)) + 1;
        let valid = |count: u32| if count == 0 { 0 } else { count.clamp(least, most) };
        self.count = valid(self.count);
        self.armed = valid(self.armed);
        self.start = self.start.clamp(-0x1_0000, tick.saturating_add(1));
        let stops = !matches!(self.mode, ONE_SHOT | HARDWARE_STROBE);
        self.stopped = match self.stopped {
            _ if self.gate || !stops || self.count == 0 => None,
            ticks => Some(ticks.unwrap_or(0).max(0)),
        };
        if let Some(next) = &mut self.next {
            next.count = next.count.clamp(least, most);
            next.tick = next.tick.clamp(self.start, tick.saturating_add(most.into()));
        }
    }
}

fn to_bcd(value: u16) -> u16 {
    (0..4).fold(0, |bcd, digit| bcd | (value / 10u16.pow(digit) % 10) << (4 * digit))
}

/// Digits above 9 count for what they are, as they do in the counter.
fn from_bcd(bcd: u16) -> u32 {
    (0..4)
        .map(|digit| u32::from(bcd >> (4 * digit) & 0xf) * 10u32.pow(digit))
        .sum::<u32>()
        .min(10_000)
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    pub counters: [CounterState; 3],
    /// Writable bits of port 0x61.
    pub nmisc: u8,
    /// Tick of counter 0's next rising edge.
    pub next_rise: Option<i64>,
}

impl State {
    pub const VERSION: u32 = 1;

    fn power_on() -> Self {
        Self {
            version: Self::VERSION,
            counters: [true, true, false].map(CounterState::power_on),
            nmisc: 0,
            next_rise: None,
        }
    }

    /// Bring the counters to `tick`; true if counter 0's OUT has risen on the way.
    fn advance(&mut self, tick: i64) -> bool {
        let [counter0, others @ ..] = &mut self.counters;
        others.iter_mut().for_each(|counter| counter.advance(tick));
        let mut rose = false;
        if let Some(at) = counter0.next.map(|next| next.tick).filter(|&at| at <= tick) {
            rose |= self.next_rise.is_some_and(|rise| rise <= at);
            counter0.advance(at);
            self.next_rise = counter0.next_rise(at);
        }
        if self.next_rise.is_some_and(|rise| rise <= tick) {
            rose = true;
            self.next_rise = counter0.next_rise(tick);
        }
        rose
    }

    fn arm(&self, p: &dyn Platform, fired: bool) {
        let reload = self.counters[0].next.map(|next| next.tick);
        let due = [self.next_rise, reload].into_iter().flatten().min();
        match due {
            Some(tick) => {
                let soonest = if fired { p.now() + MIN_CALLOUT_PERIOD } else { 0 };
                let at = ticks_to_ns(u64::try_from(tick).unwrap_or(0), HZ).max(soonest);
                p.arm(Callout::PitChannel0, at);
            }
            None => p.disarm(Callout::PitChannel0),
        }
    }

    fn control(&mut self, value: u8, tick: i64) {
        match value >> 6 {
            READ_BACK => {
                for (i, counter) in self.counters.iter_mut().enumerate() {
                    if value & 2 << i != 0 {
                        if value & READ_BACK_NO_STATUS == 0 {
                            counter.latch_status(tick);
                        }
                        if value & READ_BACK_NO_COUNT == 0 {
                            counter.latch_count(tick);
                        }
                    }
                }
            }
            n if value >> 4 & 3 == 0 => self.counters[usize::from(n)].latch_count(tick),
            n => self.counters[usize::from(n)].control(value),
        }
    }

    fn write_byte(&mut self, port: u16, value: u8, tick: i64) -> bool {
        match port {
            COUNTER0..=COUNTER2 => {
                self.counters[usize::from(port - COUNTER0)].write_byte(value, tick);
            }
            CONTROL => self.control(value, tick),
            NMISC => {
                self.nmisc = value & NMISC_WRITABLE;
                self.counters[2].set_gate(value & NMISC_GATE2 != 0, tick);
            }
            _ => return false,
        }
        true
    }

    fn read_byte(&mut self, port: u16, tick: i64, now: u64) -> Option<u8> {
        Some(match port {
            COUNTER0..=COUNTER2 => self.counters[usize::from(port - COUNTER0)].read_byte(tick),
            // The control word cannot be read; the chip leaves the bus alone.
            CONTROL => 0xff,
            NMISC => {
                let refresh = (now / REFRESH_PERIOD) & 1 != 0;
                let out2 = self.counters[2].out(tick);
                self.nmisc
                    | if refresh { NMISC_REFRESH } else { 0 }
                    | if out2 { NMISC_OUT2 } else { 0 }
            }
            _ => return None,
        })
    }
}

pub struct Vatpit {
    inner: Mutex<State>,
}

impl Default for Vatpit {
    fn default() -> Self {
        Self::new()
    }
}

fn tick(now: u64) -> i64 {
    i64::try_from(ns_to_ticks(now, HZ)).unwrap_or(i64::MAX)
}

impl Vatpit {
    pub fn new() -> Self {
        Self { inner: Mutex::new(State::power_on()) }
    }

    pub fn reset(&self, p: &dyn Platform) {
        let mut state = lock(&self.inner);
        *state = State::power_on();
        state.arm(p, false);
    }

    pub fn read(&self, p: &dyn Platform, port: u16, size: usize) -> Result<u32, NotDecoded> {
        let mut state = lock(&self.inner);
        let now = p.now();
        let tick = tick(now);
        if state.advance(tick) {
            p.isa_pulse(Some(PIC_IRQ), Some(IOAPIC_PIN));
            state.arm(p, true);
        }
        read_ports(port, size, |port| state.read_byte(port, tick, now))
    }

    pub fn write(
        &self,
        p: &dyn Platform,
        port: u16,
        size: usize,
        value: u32,
    ) -> Result<(), NotDecoded> {
        let mut state = lock(&self.inner);
        let tick = tick(p.now());
        let fired = state.advance(tick);
        let was_high = state.counters[0].out(tick);
        let before = state.counters[0].clone();
        let result =
            write_ports(port, size, value, |port, byte| state.write_byte(port, byte, tick));
        if fired || !was_high && state.counters[0].out(tick) {
            p.isa_pulse(Some(PIC_IRQ), Some(IOAPIC_PIN));
        }
        if fired || before != state.counters[0] {
            state.next_rise = state.counters[0].next_rise(tick);
            state.arm(p, false);
        }
        result
    }

    pub fn callout(&self, p: &dyn Platform) {
        let mut state = lock(&self.inner);
        let fired = state.advance(tick(p.now()));
        if fired {
            p.isa_pulse(Some(PIC_IRQ), Some(IOAPIC_PIN));
        }
        state.arm(p, fired);
    }

    pub fn save(&self) -> State {
        lock(&self.inner).clone()
    }

    /// Take `state` back; values that the timer could not have reached are corrected.
    pub fn restore(&self, p: &dyn Platform, mut state: State) -> Result<(), StateError> {
        check_version("vatpit", state.version, State::VERSION)?;
        let tick = tick(p.now());
        state.nmisc &= NMISC_WRITABLE;
        for (n, counter) in state.counters.iter_mut().enumerate() {
            counter.gate = n != 2 || state.nmisc & NMISC_GATE2 != 0;
            counter.sanitise(tick);
        }
        // An edge that is due but has not been noticed stays; others follow from the counter.
        if state.next_rise.is_none_or(|rise| rise > tick) {
            state.next_rise = state.counters[0].next_rise(tick);
        }
        let mut inner = lock(&self.inner);
        *inner = state;
        inner.arm(p, false);
        Ok(())
    }
}
