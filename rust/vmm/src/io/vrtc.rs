//! Real-time clock and CMOS memory (Motorola MC146818A datasheet), with the century that ACPI's
//! FADT points to.  bhyve: sys/amd64/vmm/io/vrtc.c.
//!
//! The clock advances with the VM clock.  Nothing runs between accesses: the date and the flags
//! of register C follow from the time that has passed.  Updates happen on second boundaries of
//! the divider chain; a date that does not exist stands still until the guest sets a better one.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::{StateError, check_version, lock, ns_to_ticks, read_ports, ticks_to_ns, write_ports};
use crate::platform::{Callout, NotDecoded, Platform};

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;

/// ISA line, on PIC and IOAPIC.
const IRQ: u8 = 8;

const CELLS: usize = 128;

// Cells with a meaning.
const SECOND: u8 = 0x00;
const SECOND_ALARM: u8 = 0x01;
const MINUTE: u8 = 0x02;
const MINUTE_ALARM: u8 = 0x03;
const HOUR: u8 = 0x04;
const HOUR_ALARM: u8 = 0x05;
const DAY_OF_WEEK: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

const A_UPDATE_IN_PROGRESS: u8 = 0x80;
const A_DIVIDER: u8 = 0x70;
/// The divider chain is held in reset while these two bits are set.
const A_DIVIDER_RESET: u8 = 0x60;
const A_RATE: u8 = 0x0f;
const A_RESET: u8 = 0x20;

const B_SET: u8 = 0x80;
const B_24_HOURS: u8 = 0x02;
const B_BINARY: u8 = 0x04;
const B_RESET: u8 = B_24_HOURS;

/// Flags of register C; their enables in register B are the same bits.
const UPDATE: u8 = 0x10;
const ALARM: u8 = 0x20;
const PERIODIC: u8 = 0x40;
const FLAGS: u8 = UPDATE | ALARM | PERIODIC;
const C_IRQ: u8 = 0x80;

const D_VALID: u8 = 0x80;

const HOUR_PM: u8 = 0x80;
/// An alarm cell with both bits set matches everything.
const ALARM_ANY: u8 = 0xc0;

const SECOND_NS: u64 = 1_000_000_000;
const CRYSTAL_HZ: u64 = 32_768;
/// UIP rises 244 us before an update, which takes 1984 us (datasheet, "Update Cycle").
const UPDATE_NS: u64 = 2_228_000;
/// The first update comes half a second after the divider chain starts.
const DIVIDER_START_NS: u64 = 500_000_000;
const DAY_SECONDS: i64 = 86_400;

/// First and last second of the years that four digits can say.
const FIRST_TIME: i64 = days_from_civil(0, 1, 1) * DAY_SECONDS;
const LAST_TIME: i64 = days_from_civil(10_000, 1, 1) * DAY_SECONDS - 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    pub index: u8,
    /// All cells, 128 of them.  Those of the date are out of date while `time` is set.
    pub cells: Vec<u8>,
    /// Seconds since 1970-01-01 in the clock's own time zone, at `updated`; none while the date
    /// stands still.
    pub time: Option<i64>,
    /// VM clock (ns) of the last update, a second boundary of the divider chain.
    pub updated: u64,
    /// VM clock (ns) until which register C's flags are up to date.
    pub flagged: u64,
}

/// Days from 1970-01-01 to a date of the proleptic Gregorian calendar.
const fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    // Years start in March, so that the leap day is the last one.
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// Year, month and day, the inverse of [`days_from_civil`].
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = (shifted_month + 2) % 12 + 1;
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

fn is_date(cell: u8) -> bool {
    matches!(cell, SECOND | MINUTE | HOUR | DAY_OF_WEEK..=YEAR | CENTURY)
}

impl State {
    pub const VERSION: u32 = 1;

    fn power_on(time: i64, now: u64) -> Self {
        let mut cells = vec![0; CELLS];
        cells[usize::from(REG_A)] = A_RESET;
        cells[usize::from(REG_B)] = B_RESET;
        cells[usize::from(REG_D)] = D_VALID;
        Self {
            version: Self::VERSION,
            index: REG_D,
            cells,
            time: Some(time),
            updated: now,
            flagged: now,
        }
    }

    fn cell(&self, cell: u8) -> u8 {
        self.cells[usize::from(cell)]
    }

    fn cell_mut(&mut self, cell: u8) -> &mut u8 {
        &mut self.cells[usize::from(cell)]
    }

    fn set(&self) -> bool {
        self.cell(REG_B) & B_SET != 0
    }

    fn divider_runs(&self) -> bool {
        self.cell(REG_A) & A_DIVIDER_RESET != A_DIVIDER_RESET
    }

    /// Updates happen.
    fn updates(&self) -> bool {
        self.divider_runs() && !self.set()
    }

    // ---- the date in cells -------------------------------------------------------------------

    fn encode(&self, value: i64) -> u8 {
        let value = value as u8;
        if self.cell(REG_B) & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    /// A number in `low..=high`, or none.
    fn decode(&self, value: u8, low: i64, high: i64) -> Option<i64> {
        let number = if self.cell(REG_B) & B_BINARY != 0 {
            value
        } else if value >> 4 <= 9 && value & 0xf <= 9 {
            (value >> 4) * 10 + (value & 0xf)
        } else {
            return None;
        };
        Some(i64::from(number)).filter(|number| (low..=high).contains(number))
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.cell(REG_B) & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { HOUR_PM } else { 0 };
        pm | self.encode((hour + 11) % 12 + 1)
    }

    fn decode_hour(&self, value: u8) -> Option<i64> {
        if self.cell(REG_B) & B_24_HOURS != 0 {
            return self.decode(value, 0, 23);
        }
        let hour = self.decode(value & !HOUR_PM, 1, 12)? % 12;
        Some(if value & HOUR_PM != 0 { hour + 12 } else { hour })
    }

    /// Write the running date into its cells.
    fn store_date(&mut self) {
        let Some(time) = self.time else { return };
        let (days, second) = (time.div_euclid(DAY_SECONDS), time.rem_euclid(DAY_SECONDS));
        let (year, month, day) = civil_from_days(days);
        for (cell, value) in [
            (SECOND, self.encode(second % 60)),
            (MINUTE, self.encode(second / 60 % 60)),
            (HOUR, self.encode_hour(second / 3600)),
            // 1970-01-01 was a Thursday; Sunday is 1.
            (DAY_OF_WEEK, self.encode((days + 4).rem_euclid(7) + 1)),
            (DAY, self.encode(day)),
            (MONTH, self.encode(month)),
            (YEAR, self.encode(year.rem_euclid(100))),
            (CENTURY, self.encode(year.div_euclid(100))),
        ] {
            *self.cell_mut(cell) = value;
        }
    }

    /// The date in the cells, if it is one.  The day of the week does not matter.
    fn load_date(&self) -> Option<i64> {
        let year =
            100 * self.decode(self.cell(CENTURY), 0, 99)? + self.decode(self.cell(YEAR), 0, 99)?;
        let month = self.decode(self.cell(MONTH), 1, 12)?;
        let day = self.decode(self.cell(DAY), 1, 31)?;
        let days = days_from_civil(year, month, day);
        if civil_from_days(days) != (year, month, day) {
            return None;
        }
        let hour = self.decode_hour(self.cell(HOUR))?;
        let minute = self.decode(self.cell(MINUTE), 0, 59)?;
        let second = self.decode(self.cell(SECOND), 0, 59)?;
        Some(days * DAY_SECONDS + hour * 3600 + minute * 60 + second)
    }

    // ---- the passing of time -----------------------------------------------------------------

    /// Periodic interrupts come every 2^n ticks of the crystal (datasheet, table 5).
    fn periodic_shift(&self) -> Option<u32> {
        let rate = u32::from(self.cell(REG_A) & A_RATE);
        match rate {
            _ if !self.divider_runs() => None,
            0 => None,
            1..=2 => Some(rate + 6),
            _ => Some(rate - 1),
        }
    }

    /// Periods since the last second boundary, which is also one of every period.
    fn periods(&self, at: u64, shift: u32) -> u64 {
        ns_to_ticks(at.saturating_sub(self.updated), CRYSTAL_HZ) >> shift
    }

    /// True if the alarm matches second `time`.
    fn alarm_matches(&self, time: i64) -> bool {
        let second = time.rem_euclid(DAY_SECONDS);
        [
            (SECOND_ALARM, self.encode(second % 60)),
            (MINUTE_ALARM, self.encode(second / 60 % 60)),
            (HOUR_ALARM, self.encode_hour(second / 3600)),
        ]
        .into_iter()
        .all(|(alarm, value)| {
            let alarm = self.cell(alarm);
            alarm & ALARM_ANY == ALARM_ANY || alarm == value
        })
    }

    /// Let everything up to `now` happen.  True if the interrupt line has risen.
    fn advance(&mut self, now: u64) -> bool {
        let mut flags = 0;
        if let Some(shift) = self.periodic_shift()
            && self.periods(now, shift) != self.periods(self.flagged, shift)
        {
            flags |= PERIODIC;
        }
        self.flagged = now;
        let seconds = now.saturating_sub(self.updated) / SECOND_NS;
        if self.divider_runs() && seconds != 0 {
            self.updated += seconds * SECOND_NS;
            if !self.set() {
                flags |= UPDATE;
                flags |= self.update(seconds);
            }
        }
        self.raise(flags)
    }

    /// Advance the date; returns the alarm flag if it matched on the way.
    fn update(&mut self, seconds: u64) -> u8 {
        let Some(time) = self.time else { return 0 };
        let seconds = seconds as i64;
        let time = time + seconds;
        // Alarms repeat after a day, so that is as far back as there is to look.
        let alarm = (0..seconds.min(DAY_SECONDS)).any(|ago| self.alarm_matches(time - ago));
        self.time = Some(wrap_time(time));
        if alarm { ALARM } else { 0 }
    }

    /// Set flags of register C.  True if the interrupt line has risen.
    fn raise(&mut self, flags: u8) -> bool {
        let enabled = self.cell(REG_B);
        let flags = (self.cell(REG_C) | flags) & FLAGS;
        let irq = if flags & enabled != 0 { C_IRQ } else { 0 };
        let was = std::mem::replace(self.cell_mut(REG_C), flags | irq);
        irq != 0 && was & C_IRQ == 0
    }

    /// Ask for a callout at the next event that would raise the interrupt line.
    fn arm(&self, p: &dyn Platform) {
        let enabled = self.cell(REG_B);
        let idle = self.cell(REG_C) & C_IRQ == 0;
        let tick = (enabled & (UPDATE | ALARM) != 0 && self.updates() && idle)
            .then(|| self.updated.saturating_add(SECOND_NS));
        let shift = self.periodic_shift().filter(|_| enabled & PERIODIC != 0 && idle);
        let period = shift.map(|shift| {
            let next = (self.periods(self.flagged, shift) + 1) << shift;
            self.updated.saturating_add(ticks_to_ns(next, CRYSTAL_HZ))
        });
        match tick.into_iter().chain(period).min() {
            Some(at) => p.arm(Callout::Rtc, at),
            None => p.disarm(Callout::Rtc),
        }
    }

    fn read_cell(&mut self, cell: u8, now: u64) -> u8 {
        match cell {
            REG_A => {
                let due = now.saturating_sub(self.updated) >= SECOND_NS - UPDATE_NS;
                let uip = if self.updates() && due { A_UPDATE_IN_PROGRESS } else { 0 };
                self.cell(REG_A) | uip
            }
            REG_C => std::mem::take(self.cell_mut(REG_C)),
            _ => {
                if is_date(cell) {
                    self.store_date();
                }
                self.cell(cell)
            }
        }
    }

    /// Write a cell; true if the interrupt line has risen.
    fn write_cell(&mut self, cell: u8, value: u8, now: u64) -> bool {
        match cell {
            REG_A => {
                let ran = self.divider_runs();
                *self.cell_mut(REG_A) = value & (A_DIVIDER | A_RATE);
                if !ran && self.divider_runs() {
                    self.updated = now.saturating_sub(SECOND_NS - DIVIDER_START_NS);
                    self.flagged = now;
                }
            }
            REG_B => {
                self.store_date();
                let was_set = self.set();
                *self.cell_mut(REG_B) = if value & B_SET != 0 { value & !UPDATE } else { value };
                match (was_set, self.set()) {
                    (_, true) => self.time = None,
                    (true, false) => self.time = self.load_date(),
                    (false, false) => {}
                }
                return self.raise(0);
            }
            REG_C | REG_D => {}
            _ if is_date(cell) => {
                self.store_date();
                *self.cell_mut(cell) = value;
                if !self.set() {
                    self.time = self.load_date();
                }
            }
            _ => *self.cell_mut(cell) = value,
        }
        false
    }
}

/// The clock goes from 9999 to 0000.
fn wrap_time(time: i64) -> i64 {
    FIRST_TIME + time.wrapping_sub(FIRST_TIME).rem_euclid(LAST_TIME - FIRST_TIME + 1)
}

pub struct Vrtc {
    inner: Mutex<State>,
}

impl Default for Vrtc {
    fn default() -> Self {
        Self::new()
    }
}

impl Vrtc {
    /// A clock that shows 1970-01-01; `reset` sets it to the host's time.
    pub fn new() -> Self {
        Self { inner: Mutex::new(State::power_on(0, 0)) }
    }

    /// As after a battery change, but with the host's time (UTC).
    pub fn reset(&self, p: &dyn Platform) {
        let mut state = lock(&self.inner);
        let (seconds, ns) = p.wall_clock();
        let second_began = p.now().saturating_sub(ns.into());
        *state = State::power_on(wrap_time(seconds), second_began);
        state.arm(p);
    }

    /// Run `f`, which says whether the interrupt line has risen, on a state that is up to date.
    fn enter<R>(&self, p: &dyn Platform, f: impl FnOnce(&mut State, u64) -> (R, bool)) -> R {
        let mut state = lock(&self.inner);
        let now = p.now();
        let rose = state.advance(now);
        let (result, rose_again) = f(&mut state, now);
        if rose || rose_again {
            p.isa_pulse(Some(IRQ), Some(IRQ));
        }
        state.arm(p);
        result
    }

    pub fn read(&self, p: &dyn Platform, port: u16, size: usize) -> Result<u32, NotDecoded> {
        self.enter(p, |s, now| {
            let result = read_ports(port, size, |port| match port {
                // The index cannot be read back.
                INDEX => Some(0xff),
                DATA => Some(s.read_cell(s.index, now)),
                _ => None,
            });
            (result, false)
        })
    }

    pub fn write(
        &self,
        p: &dyn Platform,
        port: u16,
        size: usize,
        value: u32,
    ) -> Result<(), NotDecoded> {
        self.enter(p, |s, now| {
            let mut rose = false;
            let result = write_ports(port, size, value, |port, byte| {
                match port {
                    // Bit 7 gates NMI, which this machine does not.
                    INDEX => s.index = byte & (CELLS as u8 - 1),
                    DATA => rose |= s.write_cell(s.index, byte, now),
                    _ => return false,
                }
                true
            });
            (result, rose)
        })
    }

    pub fn callout(&self, p: &dyn Platform) {
        self.enter(p, |_, _| ((), false));
    }

    /// bhyve's `vm_rtc_read`: any of the 128 cells, without side effects.
    pub fn nvram_read(&self, p: &dyn Platform, offset: u8) -> Result<u8, NotDecoded> {
        if usize::from(offset) >= CELLS {
            return Err(NotDecoded);
        }
        self.enter(p, |s, now| {
            let value = if offset == REG_C { s.cell(offset) } else { s.read_cell(offset, now) };
            (Ok(value), false)
        })
    }

    /// bhyve's `vm_rtc_write`: memory cells only, neither the clock's nor the century.
    pub fn nvram_write(&self, _p: &dyn Platform, offset: u8, value: u8) -> Result<(), NotDecoded> {
        if offset <= REG_D || offset == CENTURY || usize::from(offset) >= CELLS {
            return Err(NotDecoded);
        }
        *lock(&self.inner).cell_mut(offset) = value;
        Ok(())
    }

    /// Seconds since 1970-01-01 that the clock shows; -1 if that is no date.
    pub fn gettime(&self, p: &dyn Platform) -> i64 {
        self.enter(p, |s, _| (s.time.or_else(|| s.load_date()).unwrap_or(-1), false))
    }

    /// Set the clock to `seconds` since 1970-01-01; a new second begins now.  `NotDecoded` for a
    /// year that has no four digits.
    pub fn settime(&self, p: &dyn Platform, seconds: i64) -> Result<(), NotDecoded> {
        if !(FIRST_TIME..=LAST_TIME).contains(&seconds) {
            return Err(NotDecoded);
        }
        self.enter(p, |s, now| {
            s.time = Some(seconds);
            s.updated = now;
            if s.set() {
                s.store_date();
                s.time = None;
            }
            (Ok(()), false)
        })
    }

    pub fn save(&self) -> State {
        lock(&self.inner).clone()
    }

    /// Take `state` back; values that the clock could not have reached are corrected.
    pub fn restore(&self, p: &dyn Platform, mut state: State) -> Result<(), StateError> {
        check_version("vrtc", state.version, State::VERSION)?;
        let now = p.now();
        state.index &= CELLS as u8 - 1;
        state.cells.resize(CELLS, 0);
        *state.cell_mut(REG_A) &= A_DIVIDER | A_RATE;
        *state.cell_mut(REG_D) = D_VALID;
        state.time = state.time.map(wrap_time).filter(|_| !state.set());
        state.flagged = state.flagged.min(now);
        state.updated = state.updated.min(state.flagged);
        let mut inner = lock(&self.inner);
        *inner = state;
        inner.raise(0);
        inner.arm(p);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testplat::{Event, TestPlatform};
    use super::*;

    const PULSE: Event = Event::Pulse(Some(IRQ), Some(IRQ));
    const ALL_DATE: [u8; 8] = [SECOND, MINUTE, HOUR, DAY_OF_WEEK, DAY, MONTH, YEAR, CENTURY];

    fn set(p: &TestPlatform, rtc: &Vrtc, cell: u8, value: u8) {
        rtc.write(p, INDEX, 1, cell.into()).unwrap();
        rtc.write(p, DATA, 1, value.into()).unwrap();
    }

    fn get(p: &TestPlatform, rtc: &Vrtc, cell: u8) -> u8 {
        rtc.write(p, INDEX, 1, cell.into()).unwrap();
        rtc.read(p, DATA, 1).unwrap() as u8
    }

    fn date(p: &TestPlatform, rtc: &Vrtc) -> [u8; 8] {
        ALL_DATE.map(|cell| get(p, rtc, cell))
    }

    /// A clock at 2023-11-14 22:13:20 UTC, a Tuesday.
    fn rtc(p: &TestPlatform) -> Vrtc {
        let rtc = Vrtc::new();
        rtc.reset(p);
        rtc
    }

    fn run(p: &TestPlatform, rtc: &Vrtc, ns: u64) {
        p.run_until(p.now() + ns, Callout::Rtc, |p| rtc.callout(p));
    }

    #[test]
    fn after_reset() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        assert_eq!(rtc.read(&p, DATA, 1), Ok(0x80), "the index is that of register D");
        assert_eq!(rtc.read(&p, INDEX, 1), Ok(0xff));
        assert_eq!([REG_A, REG_B, REG_C, REG_D].map(|r| get(&p, &rtc, r)), [0x20, 0x02, 0, 0x80]);
        assert_eq!(date(&p, &rtc), [0x20, 0x13, 0x22, 3, 0x14, 0x11, 0x23, 0x20]);
        assert_eq!(rtc.gettime(&p), TestPlatform::WALL);
    }

    #[test]
    fn formats() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        // Register B; hour cell at 22, 0, 12, 11 and 23 o'clock.
        let table = [
            (0x02, [0x22, 0x00, 0x12, 0x11, 0x23]),
            (0x06, [22, 0, 12, 11, 23]),
            (0x00, [0x90, 0x12, 0x92, 0x11, 0x91]),
            (0x04, [0x8a, 12, 0x8c, 11, 0x8b]),
        ];
        for (reg_b, cells) in table {
            set(&p, &rtc, REG_B, reg_b);
            for (hour, cell) in [22, 0, 12, 11, 23].into_iter().zip(cells) {
                let midnight = TestPlatform::WALL / DAY_SECONDS * DAY_SECONDS;
                rtc.settime(&p, midnight + hour * 3600).unwrap();
                assert_eq!(get(&p, &rtc, HOUR), cell, "{reg_b:#x} {hour}");
                set(&p, &rtc, HOUR, cell);
                assert_eq!(rtc.gettime(&p), midnight + hour * 3600);
            }
        }
    }

    #[test]
    fn calendar() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        // Seconds before and date after a second has passed, with the day of the week.
        let table = [
            (951_782_399, [0, 0, 0, 3, 0x29, 0x02, 0x00, 0x20]),
            (951_868_799, [0, 0, 0, 4, 0x01, 0x03, 0x00, 0x20]),
            (4_107_542_399, [0, 0, 0, 2, 0x01, 0x03, 0x00, 0x21]),
            (946_684_799, [0, 0, 0, 7, 0x01, 0x01, 0x00, 0x20]),
            (-1, [0, 0, 0, 5, 0x01, 0x01, 0x70, 0x19]),
            (LAST_TIME, [0, 0, 0, 7, 0x01, 0x01, 0x00, 0x00]),
        ];
        for (before, after) in table {
            rtc.settime(&p, before).unwrap();
            p.advance(SECOND_NS);
            assert_eq!(date(&p, &rtc), after, "{before}");
        }
        assert!(rtc.settime(&p, LAST_TIME + 1).is_err());
        assert!(rtc.settime(&p, FIRST_TIME - 1).is_err());
    }

    #[test]
    fn setting_the_clock() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        p.advance(SECOND_NS / 4);
        set(&p, &rtc, REG_B, B_SET | B_24_HOURS);
        p.advance(10 * SECOND_NS);
        assert_eq!(get(&p, &rtc, SECOND), 0x20, "SET stops updates");
        assert_eq!(get(&p, &rtc, REG_A), 0x20);
        for (cell, value) in ALL_DATE.into_iter().zip([0x58, 0x59, 0x23, 1, 0x31, 0x12, 0x99, 0x19])
        {
            set(&p, &rtc, cell, value);
        }
        set(&p, &rtc, REG_B, B_24_HOURS);
        p.advance(SECOND_NS / 2);
        assert_eq!(get(&p, &rtc, SECOND), 0x58);
        p.advance(SECOND_NS / 4);
        assert_eq!(get(&p, &rtc, SECOND), 0x59, "the divider chain has kept its phase");
        p.advance(SECOND_NS);
        assert_eq!(date(&p, &rtc), [0, 0, 0, 7, 0x01, 0x01, 0x00, 0x20]);
    }

    #[test]
    fn divider_reset_starts_half_a_second_before_an_update() {
        let p = TestPlatform::new(1);
        p.advance(5 * SECOND_NS + 123);
        let rtc = rtc(&p);
        set(&p, &rtc, REG_A, 0x70);
        p.advance(3 * SECOND_NS);
        assert_eq!(get(&p, &rtc, SECOND), 0x20);
        set(&p, &rtc, REG_A, 0x26);
        p.advance(SECOND_NS / 2 - 1);
        assert_eq!(get(&p, &rtc, SECOND), 0x20);
        p.advance(1);
        assert_eq!(get(&p, &rtc, SECOND), 0x21);
    }

    #[test]
    fn impossible_date_stands_still() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        for (cell, bad, good) in [
            (MONTH, 0x13, 0x11),
            (DAY, 0x31, 0x14),
            (DAY, 0x00, 0x14),
            (HOUR, 0x24, 0x22),
            (MINUTE, 0x60, 0x13),
            (SECOND, 0x7a, 0x20),
            (YEAR, 0xa0, 0x23),
            (CENTURY, 0x1f, 0x20),
        ] {
            set(&p, &rtc, cell, bad);
            p.advance(3 * SECOND_NS);
            assert_eq!(get(&p, &rtc, cell), bad, "{cell}");
            assert_eq!(rtc.gettime(&p), -1);
            set(&p, &rtc, cell, good);
            set(&p, &rtc, SECOND, 0x20);
            assert_eq!(rtc.gettime(&p), TestPlatform::WALL, "{cell}");
        }
    }

    #[test]
    fn update_in_progress() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        for (at, uip) in [
            (0, false),
            (SECOND_NS - UPDATE_NS - 1, false),
            (SECOND_NS - UPDATE_NS, true),
            (SECOND_NS - 1, true),
            (SECOND_NS, false),
        ] {
            p.advance(at - p.now());
            assert_eq!(get(&p, &rtc, REG_A) & A_UPDATE_IN_PROGRESS != 0, uip, "{at}");
        }
    }

    #[test]
    fn flags_rise_without_interrupts() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        set(&p, &rtc, REG_A, 0x26);
        p.advance(976_563);
        assert_eq!(get(&p, &rtc, REG_C), PERIODIC);
        assert_eq!(get(&p, &rtc, REG_C), 0, "a read clears it");
        p.advance(SECOND_NS);
        assert_eq!(get(&p, &rtc, REG_C), PERIODIC | UPDATE);
        for alarm in [SECOND_ALARM, MINUTE_ALARM, HOUR_ALARM] {
            set(&p, &rtc, alarm, 0xff);
        }
        p.advance(SECOND_NS);
        assert_eq!(get(&p, &rtc, REG_C), PERIODIC | UPDATE | ALARM);
        assert_eq!(p.take(), []);
        assert_eq!(p.armed(Callout::Rtc), None);
    }

    #[test]
    fn update_interrupt() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        set(&p, &rtc, REG_B, B_24_HOURS | UPDATE);
        assert_eq!(p.armed(Callout::Rtc), Some(SECOND_NS));
        run(&p, &rtc, 5 * SECOND_NS);
        assert_eq!(p.take(), [PULSE], "the line stays until register C is read");
        assert_eq!(get(&p, &rtc, REG_C), C_IRQ | UPDATE);
        run(&p, &rtc, SECOND_NS);
        assert_eq!(p.take(), [PULSE]);
        set(&p, &rtc, REG_B, B_SET | B_24_HOURS | UPDATE);
        assert_eq!(get(&p, &rtc, REG_B), B_SET | B_24_HOURS, "SET clears UIE");
    }

    #[test]
    fn enabling_an_interrupt_whose_flag_is_set() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        p.advance(SECOND_NS);
        set(&p, &rtc, REG_B, B_24_HOURS | UPDATE);
        assert_eq!(p.take(), [PULSE]);
    }

    #[test]
    fn periodic_rates() {
        // Rate, interrupts in a second.
        let table = [(1, 256), (2, 128), (3, 8192), (6, 1024), (10, 64), (15, 2)];
        for (rate, hz) in table {
            let p = TestPlatform::new(1);
            let rtc = rtc(&p);
            set(&p, &rtc, REG_A, 0x20 | rate);
            set(&p, &rtc, REG_B, B_24_HOURS | PERIODIC);
            let mut flags = 0;
            p.run_until(3 * SECOND_NS, Callout::Rtc, |p| {
                rtc.callout(p);
                flags |= get(p, &rtc, REG_C);
            });
            assert_eq!(p.take().len(), 3 * hz, "rate {rate}");
            assert_eq!(flags & !UPDATE, C_IRQ | PERIODIC);
        }
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        set(&p, &rtc, REG_B, B_24_HOURS | PERIODIC);
        assert_eq!(p.armed(Callout::Rtc), None, "rate 0 is off");
    }

    #[test]
    fn alarms() {
        // Hour, minute and second cells; seconds until the first and until the next alarm, from
        // 22:13:20.
        let table = [
            (0x22, 0x13, 0x25, 5, 86_400),
            (0x22, 0x13, 0xff, 1, 1),
            (0xff, 0xc0, 0x10, 50, 60),
            (0xc5, 0x10, 0x00, 3400, 3600),
            (0x00, 0x00, 0x00, 6400, 86_400),
        ];
        for (hour, minute, second, first, next) in table {
            let p = TestPlatform::new(1);
            let rtc = rtc(&p);
            set(&p, &rtc, HOUR_ALARM, hour);
            set(&p, &rtc, MINUTE_ALARM, minute);
            set(&p, &rtc, SECOND_ALARM, second);
            set(&p, &rtc, REG_B, B_24_HOURS | ALARM);
            for seconds in [first, next] {
                run(&p, &rtc, seconds * SECOND_NS - 1);
                assert_eq!(p.take(), [], "{hour:#x}:{minute:#x}:{second:#x}");
                run(&p, &rtc, 1);
                assert_eq!(p.take(), [PULSE], "{hour:#x}:{minute:#x}:{second:#x}");
                assert_eq!(get(&p, &rtc, REG_C), C_IRQ | ALARM | UPDATE);
            }
        }
    }

    #[test]
    fn alarm_seen_late() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        set(&p, &rtc, HOUR_ALARM, 0x22);
        set(&p, &rtc, MINUTE_ALARM, 0x13);
        for (second, days, flag) in [(0x20, 0, 0), (0x20, 1, ALARM), (0x60, 7, 0), (0x21, 9, ALARM)]
        {
            set(&p, &rtc, SECOND_ALARM, second);
            p.advance((days * 86_400 + 10) * SECOND_NS);
            rtc.settime(&p, TestPlatform::WALL).unwrap();
            assert_eq!(get(&p, &rtc, REG_C) & ALARM, flag, "{second:#x} {days}");
        }
    }

    #[test]
    fn memory_cells() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        for offset in 0..=0xff {
            let memory = matches!(offset, 0x0e..=0x31 | 0x33..=0x7f);
            assert_eq!(rtc.nvram_write(&p, offset, offset).is_ok(), memory, "{offset:#x}");
            assert_eq!(rtc.nvram_read(&p, offset).is_ok(), offset < 0x80);
            if memory {
                assert_eq!(rtc.nvram_read(&p, offset), Ok(offset));
                assert_eq!(get(&p, &rtc, offset), offset);
            }
        }
        assert_eq!(rtc.nvram_read(&p, CENTURY), Ok(0x20));
        p.advance(SECOND_NS);
        assert_eq!(rtc.nvram_read(&p, REG_C), Ok(UPDATE));
        assert_eq!(get(&p, &rtc, REG_C), UPDATE, "looking does not clear it");
        set(&p, &rtc, REG_C, 0xff);
        set(&p, &rtc, REG_D, 0);
        assert_eq!((get(&p, &rtc, REG_C), get(&p, &rtc, REG_D)), (0, 0x80));
    }

    #[test]
    fn index_and_data_in_one_access() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        rtc.write(&p, INDEX, 2, 0x5ac0).unwrap();
        assert_eq!(rtc.read(&p, DATA, 1), Ok(0x5a), "bit 7 of the index is the NMI gate");
        assert_eq!(rtc.read(&p, INDEX, 4), Ok(0xffff_5aff));
        assert_eq!(rtc.read(&p, 0x72, 1), Err(NotDecoded));
    }

    #[test]
    fn restored_clock_goes_on() {
        let p = TestPlatform::new(1);
        let rtc = rtc(&p);
        set(&p, &rtc, REG_B, B_24_HOURS | UPDATE);
        set(&p, &rtc, 0x40, 0x77);
        p.advance(SECOND_NS / 2);
        let other = TestPlatform::new(1);
        other.advance(p.now());
        let copy = Vrtc::new();
        let text = serde_json::to_string(&rtc.save()).unwrap();
        copy.restore(&other, serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(copy.save(), rtc.save());
        run(&other, &copy, SECOND_NS / 2);
        assert_eq!(other.take(), [PULSE]);
        assert_eq!(copy.gettime(&other), TestPlatform::WALL + 1);
        assert_eq!(get(&other, &copy, 0x40), 0x77);
    }

    type Op = (u8, u16, usize, u32, u64);

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let value = prop_oneof![
            // An index and a value that it takes.
            (0u32..14, any::<u8>()).prop_map(|(cell, value)| cell | u32::from(value) << 8),
            any::<u32>(),
        ];
        let ns = prop_oneof![0..SECOND_NS, 0..200_000 * SECOND_NS];
        prop::collection::vec((0u8..6, 0x6fu16..0x73, 1usize..5, value, ns), 1..60)
    }

    fn apply(p: &TestPlatform, rtc: &Vrtc, ops: &[Op]) {
        for &(op, port, size, value, ns) in ops {
            match op {
                0 => drop(rtc.read(p, port, size)),
                1 => drop(rtc.read(p, DATA, 1)),
                2 => drop(rtc.write(p, INDEX, 2, value)),
                3 => drop(rtc.write(p, port, size, value)),
                4 => rtc.callout(p),
                _ => drop(rtc.settime(p, i64::from(value as i32) << 8)),
            }
            p.advance(ns);
        }
    }

    proptest! {
        #[test]
        fn any_time_reads_back(time in FIRST_TIME..=LAST_TIME, formats in 0u8..4) {
            let p = TestPlatform::new(1);
            let rtc = rtc(&p);
            set(&p, &rtc, REG_B, formats << 1);
            rtc.settime(&p, time).unwrap();
            let cells = date(&p, &rtc);
            set(&p, &rtc, REG_B, B_SET | formats << 1);
            for (cell, value) in ALL_DATE.into_iter().zip(cells) {
                set(&p, &rtc, cell, value);
            }
            set(&p, &rtc, REG_B, formats << 1);
            prop_assert_eq!(rtc.gettime(&p), time);
        }

        #[test]
        fn any_sequence_leaves_a_state_that_can_be_restored(ops in ops()) {
            let p = TestPlatform::new(1);
            let rtc = rtc(&p);
            apply(&p, &rtc, &ops);
            let copy = Vrtc::new();
            copy.restore(&p, rtc.save()).unwrap();
            prop_assert_eq!(copy.save(), rtc.save());
        }

        #[test]
        fn hostile_states_are_tamed(
            index in any::<u8>(),
            cells in prop::collection::vec(any::<u8>(), 0..200),
            time in any::<Option<i64>>(),
            updated in any::<u64>(),
            flagged in any::<u64>(),
            now in any::<u64>(),
            ops in ops(),
        ) {
            let p = TestPlatform::new(1);
            p.advance(now >> 8);
            let rtc = Vrtc::new();
            let state = State { version: State::VERSION, index, cells, time, updated, flagged };
            rtc.restore(&p, state).unwrap();
            let tamed = rtc.save();
            rtc.restore(&p, tamed.clone()).unwrap();
            prop_assert_eq!(rtc.save(), tamed);
            apply(&p, &rtc, &ops);
        }
    }
}
