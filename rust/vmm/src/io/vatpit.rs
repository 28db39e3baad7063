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
const HZ: u64 = 1_193_182;

const COUNTER0: u16 = 0x40;
const COUNTER2: u16 = 0x42;
const CONTROL: u16 = 0x43;
const NMISC: u16 = 0x61;

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
                    self.stopped = None;
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testplat::{Event, TestPlatform};
    use super::*;

    const PULSE: Event = Event::Pulse(Some(PIC_IRQ), Some(IOAPIC_PIN));

    fn out(p: &TestPlatform, pit: &Vatpit, port: u16, value: u8) {
        pit.write(p, port, 1, value.into()).unwrap();
    }

    fn inb(p: &TestPlatform, pit: &Vatpit, port: u16) -> u8 {
        pit.read(p, port, 1).unwrap() as u8
    }

    /// Turn the clock to `tick` of the input clock, running callouts.
    fn run_to(p: &TestPlatform, pit: &Vatpit, tick: u64) {
        p.run_until(ticks_to_ns(tick, HZ), Callout::PitChannel0, |p| pit.callout(p));
    }

    /// Latch and read both bytes of a counter.
    fn count(p: &TestPlatform, pit: &Vatpit, counter: u16) -> u16 {
        out(p, pit, CONTROL, (counter as u8) << 6);
        let low = inb(p, pit, COUNTER0 + counter);
        u16::from_le_bytes([low, inb(p, pit, COUNTER0 + counter)])
    }

    fn program(p: &TestPlatform, pit: &Vatpit, counter: u8, control: u8, count: u16) {
        out(p, pit, CONTROL, counter << 6 | control);
        for byte in count.to_le_bytes() {
            out(p, pit, COUNTER0 + u16::from(counter), byte);
        }
    }

    fn out2(p: &TestPlatform, pit: &Vatpit) -> bool {
        inb(p, pit, NMISC) & NMISC_OUT2 != 0
    }

    /// Datasheet, "Mode Definitions": OUT and count of counter 2 at ticks after the count is
    /// loaded, which takes one tick.
    #[test]
    fn modes() {
        // Control word, count, (tick, OUT, count).
        type Samples<'a> = &'a [(u64, bool, u16)];
        let table: &[(u8, u16, Samples)] = &[
            (0x30, 4, &[(0, false, 4), (3, false, 1), (4, true, 0), (5, true, 0xffff)]),
            (0x31, 0x12, &[(0, false, 0x12), (3, false, 9), (12, true, 0), (13, true, 0x9999)]),
            (0x32, 4, &[(0, true, 0), (9, true, 0)]),
            (0x34, 3, &[(0, true, 3), (1, true, 2), (2, false, 1), (3, true, 3), (5, false, 1)]),
            (0x36, 4, &[(0, true, 4), (1, true, 2), (2, false, 4), (3, false, 2), (4, true, 4)]),
            (0x36, 5, &[(0, true, 4), (2, true, 0), (3, false, 4), (4, false, 2), (5, true, 4)]),
            (0x38, 3, &[(0, true, 3), (2, true, 1), (3, false, 0), (4, true, 0xffff)]),
            (0x3a, 3, &[(0, true, 0), (3, true, 0)]),
            (0x3e, 4, &[(2, false, 4), (4, true, 4)]),
        ];
        for &(control, initial, samples) in table {
            for &(tick, level, value) in samples {
                let p = TestPlatform::new(1);
                let pit = Vatpit::new();
                out(&p, &pit, NMISC, NMISC_GATE2);
                program(&p, &pit, 2, control, initial);
                run_to(&p, &pit, tick + 1);
                assert_eq!(out2(&p, &pit), level, "{control:#x} {initial} OUT at {tick}");
                let triggered = !matches!(control >> 1 & 7, 1 | 5);
                if triggered {
                    assert_eq!(count(&p, &pit, 2), value, "{control:#x} {initial} at {tick}");
                }
            }
        }
    }

    #[test]
    fn full_count() {
        let p = TestPlatform::new(1);
        let pit = Vatpit::new();
        program(&p, &pit, 0, 0x34, 0);
        run_to(&p, &pit, 2);
        assert_eq!(count(&p, &pit, 0), 0xffff);
        program(&p, &pit, 0, 0x35, 0);
        run_to(&p, &pit, 4);
        assert_eq!(count(&p, &pit, 0), 0x9999);
    }

    /// Rising edges of counter 0 in the first 1000 ticks: (control, count, edges, first).
    #[test]
    fn interrupts() {
        let table = [
            (0x30, 100, 1, Some(101)),
            (0x32, 100, 0, None),
            (0x34, 100, 9, Some(101)),
            (0x36, 100, 9, Some(101)),
            (0x36, 101, 9, Some(102)),
            (0x38, 100, 1, Some(102)),
            (0x3a, 100, 0, None),
        ];
        for (control, count, edges, first) in table {
            let p = TestPlatform::new(1);
            let pit = Vatpit::new();
            program(&p, &pit, 0, control, count);
            let armed = p.armed(Callout::PitChannel0);
            assert_eq!(armed, first.map(|tick| ticks_to_ns(tick, HZ)), "{control:#x}");
            run_to(&p, &pit, 1000);
            assert_eq!(p.take(), vec![PULSE; edges], "{control:#x} {count}");
        }
    }

    #[test]
    fn long_run_does_not_drift() {
        let p = TestPlatform::new(1);
        let pit = Vatpit::new();
        program(&p, &pit, 0, 0x34, 11_932);
        run_to(&p, &pit, 100 * HZ + 1);
        assert_eq!(p.take().len() as u64, 100 * HZ / 11_932);
    }

    #[test]
    fn fast_edges_coalesce() {
        let p = TestPlatform::new(1);
        let pit = Vatpit::new();
        program(&p, &pit, 0, 0x34, 1);
        run_to(&p, &pit, HZ / 100);
        let pulses = p.take().len();
        assert!((400..=500).contains(&pulses), "{pulses} in 10 ms");
    }

    #[test]
    fn new_count_waits_for_the_cycle() {
        let p = TestPlatform::new(1);
        let pit = Vatpit::new();
        program(&p, &pit, 0, 0x34, 1000);
        run_to(&p, &pit, 501);
        for byte in 200u16.to_le_bytes() {
            out(&p, &pit, COUNTER0, byte);
        }
        assert_eq!(count(&p, &pit, 0), 500);
        out(&p, &pit, CONTROL, 0xe2);
        assert_eq!(inb(&p, &pit, COUNTER0), 0xf4, "null count: not loaded yet");
        run_to(&p, &pit, 1001);
        assert_eq!(p.take(), [PULSE]);
        out(&p, &pit, CONTROL, 0xe2);
        assert_eq!(inb(&p, &pit, COUNTER0), 0xb4);
        run_to(&p, &pit, 1401);
        assert_eq!(p.take(), [PULSE, PULSE]);
    }

    #[test]
    fn square_wave_changes_at_half_a_cycle() {
        let p = TestPlatform::new(1);
        let pit = Vatpit::new();
        out(&p, &pit, NMISC, NMISC_GATE2);
        program(&p, &pit, 2, 0x36, 1000);
        run_to(&p, &pit, 101);
        for byte in 200u16.to_le_bytes() {
            out(&p, &pit, COUNTER2, byte);
        }
        for (tick, level) in [(500, true), (501, false), (600, false), (601, true), (701, false)] {
            run_to(&p, &pit, tick);
            assert_eq!(out2(&p, &pit), level, "{tick}");
        }
    }

    #[test]
    fn control_word_can_raise_out() {
        let p = TestPlatform::new(1);
        let pit = Vatpit::new();
        out(&p, &pit, CONTROL, 0x30);
        assert_eq!(p.take(), []);
        out(&p, &pit, CONTROL, 0x34);
        assert_eq!(p.take(), [PULSE], "OUT is low in mode 0 and high in mode 2");
    }

    #[test]
    fn first_byte_stops_mode_0() {
        let p = TestPlatform::new(1);
        let pit = Vatpit::new();
        program(&p, &pit, 0, 0x30, 100);
        run_to(&p, &pit, 50);
        out(&p, &pit, COUNTER0, 10);
        run_to(&p, &pit, 500);
        assert_eq!(p.take(), []);
        out(&p, &pit, COUNTER0, 0);
        run_to(&p, &pit, 511);
        assert_eq!(p.take(), [PULSE]);
    }

    #[test]
    fn gate_of_counter_2() {
        // Mode, OUT while the gate is low, and at ticks after it has risen again at 100 ticks,
        // 40 of 60 having passed.
        type Samples<'a> = &'a [(u64, bool)];
        let table: &[(u8, bool, Samples)] = &[
            (0x30, false, &[(19, false), (20, true)]),
            (0x32, true, &[(1, false), (60, false), (61, true)]),
            (0x34, true, &[(1, true), (60, false), (61, true)]),
            (0x36, true, &[(1, true), (30, true), (31, false), (61, true)]),
            (0x38, true, &[(19, true), (20, false), (21, true)]),
            (0x3a, true, &[(1, true), (61, false), (62, true)]),
        ];
        for &(control, low, samples) in table {
            for &(tick, level) in samples {
                let p = TestPlatform::new(1);
                let pit = Vatpit::new();
                out(&p, &pit, NMISC, NMISC_GATE2);
                program(&p, &pit, 2, control, 60);
                run_to(&p, &pit, 41);
                out(&p, &pit, NMISC, 0);
                run_to(&p, &pit, 100);
                assert_eq!(out2(&p, &pit), low, "{control:#x}");
                out(&p, &pit, NMISC, NMISC_GATE2);
                run_to(&p, &pit, 100 + tick);
                assert_eq!(out2(&p, &pit), level, "{control:#x} at {tick}");
            }
        }
    }

    #[test]
    fn access_modes() {
        // Read/write field, bytes written, count, bytes read of count 0x1234.
        let table: &[(u8, &[u8], u32)] =
            &[(1, &[0x34], 0x34), (2, &[0x12], 0x1200), (3, &[0x34, 0x12], 0x1234)];
        for &(access, bytes, expected) in table {
            let p = TestPlatform::new(1);
            let pit = Vatpit::new();
            out(&p, &pit, CONTROL, access << 4 | 4);
            for &byte in bytes {
                out(&p, &pit, COUNTER0, byte);
            }
            assert_eq!(pit.save().counters[0].count, expected);
            out(&p, &pit, CONTROL, 0);
            let read: Vec<_> = bytes.iter().map(|_| inb(&p, &pit, COUNTER0)).collect();
            assert_eq!(read, bytes);
            assert_eq!(pit.save().counters[0].latched_count, None);
        }
    }

    #[test]
    fn latches_hold_until_read() {
        let p = TestPlatform::new(1);
        let pit = Vatpit::new();
        program(&p, &pit, 0, 0x34, 0x5000);
        run_to(&p, &pit, 0x101);
        out(&p, &pit, CONTROL, 0x00);
        run_to(&p, &pit, 0x201);
        out(&p, &pit, CONTROL, 0x00);
        assert_eq!([inb(&p, &pit, COUNTER0), inb(&p, &pit, COUNTER0)], [0x00, 0x4f]);
        assert_eq!(count(&p, &pit, 0), 0x4e00);
    }

    #[test]
    fn read_back() {
        let p = TestPlatform::new(1);
        let pit = Vatpit::new();
        program(&p, &pit, 0, 0x34, 0x5000);
        program(&p, &pit, 2, 0x31, 0x50);
        run_to(&p, &pit, 0x11);
        out(&p, &pit, CONTROL, 0xca);
        assert_eq!(inb(&p, &pit, COUNTER0), 0xb4, "status comes first");
        assert_eq!([inb(&p, &pit, COUNTER0), inb(&p, &pit, COUNTER0)], [0xf0, 0x4f]);
        assert_eq!(inb(&p, &pit, COUNTER2), 0x31);
        out(&p, &pit, CONTROL, 0xe0);
        assert_eq!(pit.save().counters[0].latched_status, None, "no counter was named");
    }

    #[test]
    fn counter_that_was_never_loaded_moves() {
        let p = TestPlatform::new(1);
        let pit = Vatpit::new();
        run_to(&p, &pit, 1);
        let first = count(&p, &pit, 0);
        run_to(&p, &pit, 101);
        assert_eq!(first - count(&p, &pit, 0), 100);
        assert_eq!(p.armed(Callout::PitChannel0), None);
    }

    #[test]
    fn port_61() {
        let p = TestPlatform::new(1);
        let pit = Vatpit::new();
        out(&p, &pit, NMISC, 0xff);
        assert_eq!(inb(&p, &pit, NMISC) & !(NMISC_REFRESH | NMISC_OUT2), 0x0f);
        let mut toggles = 0;
        let mut last = false;
        for _ in 0..1000 {
            let bit = inb(&p, &pit, NMISC) & NMISC_REFRESH != 0;
            toggles += u32::from(bit != last);
            last = bit;
            p.advance(1000);
        }
        assert_eq!(toggles, 1_000_000 / REFRESH_PERIOD as u32);
        assert_eq!(inb(&p, &pit, CONTROL), 0xff);
        assert_eq!(pit.read(&p, 0x44, 1), Err(NotDecoded));
    }

    #[test]
    fn restored_timer_goes_on() {
        let p = TestPlatform::new(1);
        let pit = Vatpit::new();
        program(&p, &pit, 0, 0x34, 1000);
        run_to(&p, &pit, 2500);
        p.take();
        let other = TestPlatform::new(1);
        other.advance(p.now());
        let copy = Vatpit::new();
        let text = serde_json::to_string(&pit.save()).unwrap();
        copy.restore(&other, serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(copy.save(), pit.save());
        run_to(&other, &copy, 5002);
        assert_eq!(other.take(), [PULSE; 3]);
    }

    fn counter_state() -> impl Strategy<Value = CounterState> {
        let flags = any::<[bool; 4]>();
        let bytes = any::<[u8; 2]>();
        let latches = any::<(Option<u8>, Option<u16>, Option<u8>)>();
        let counting = any::<(u32, i64, Option<i64>, u32, Option<(u32, i64)>)>();
        (flags, bytes, latches, counting).prop_map(
            |(flags, [mode, access], (write_low, latched_count, latched_status), counting)| {
                let (count, start, stopped, armed, next) = counting;
                let [bcd, read_high, null_count, gate] = flags;
                CounterState {
                    mode,
                    bcd,
                    access,
                    write_low,
                    read_high,
                    latched_count,
                    latched_status,
                    null_count,
                    gate,
                    count,
                    start,
                    stopped,
                    armed,
                    next: next.map(|(count, tick)| NextCount { count, tick }),
                }
            },
        )
    }

    type Op = (bool, u16, usize, u32, u64);

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let ports = prop::sample::select(vec![0x3f, 0x40, 0x41, 0x42, 0x43, 0x61]);
        let op = (any::<bool>(), ports, 1usize..5, any::<u32>(), 0u64..20_000_000);
        prop::collection::vec(op, 1..100)
    }

    fn apply(p: &TestPlatform, pit: &Vatpit, ops: &[Op]) {
        for &(write, port, size, value, ns) in ops {
            if write {
                let _ = pit.write(p, port, size, value);
            } else {
                let _ = pit.read(p, port, size);
            }
            // A clock that jumps over callouts must do no harm, either.
            if ns % 2 == 0 {
                p.advance(ns);
            } else {
                p.run_until(p.now() + ns, Callout::PitChannel0, |p| pit.callout(p));
            }
        }
    }

    proptest! {
        #[test]
        fn any_sequence_leaves_a_state_that_can_be_restored(ops in ops()) {
            let p = TestPlatform::new(1);
            let pit = Vatpit::new();
            apply(&p, &pit, &ops);
            let copy = Vatpit::new();
            copy.restore(&p, pit.save()).unwrap();
            prop_assert_eq!(copy.save(), pit.save());
        }

        #[test]
        fn hostile_states_are_tamed(
            counters in [counter_state(), counter_state(), counter_state()],
            nmisc in any::<u8>(),
            next_rise in any::<Option<i64>>(),
            now in any::<u64>(),
            ops in ops(),
        ) {
            let p = TestPlatform::new(1);
            p.advance(now >> 8);
            let pit = Vatpit::new();
            let state = State { version: State::VERSION, counters, nmisc, next_rise };
            pit.restore(&p, state).unwrap();
            apply(&p, &pit, &ops);
        }
    }
}
