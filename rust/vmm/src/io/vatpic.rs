//! Pair of 8259A interrupt controllers with ELCR (Intel 8259A datasheet, 231468; PIIX3 for the
//! edge/level registers).  bhyve: sys/amd64/vmm/io/vatpic.c.
//!
//! A line has as many sources as assert it; it is high while one does.  The slave's output is
//! the master's line 2.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use super::{StateError, check_version, lock, read_ports, write_ports};
use crate::platform::{NotDecoded, Platform};

const MASTER: u16 = 0x20;
const SLAVE: u16 = 0xa0;
const ELCR: u16 = 0x4d0;
const ELCR2: u16 = 0x4d1;

const LINES: u8 = 16;
const CASCADE_LINE: u8 = 2;
const CASCADE: u8 = 1 << CASCADE_LINE;

// Initialization command words.
const ICW1_IC4: u8 = 1 << 0;
const ICW1_SINGLE: u8 = 1 << 1;
const ICW1: u8 = 1 << 4;
const ICW2_BASE: u8 = 0xf8;
const ICW4_AEOI: u8 = 1 << 1;
const ICW4_SFNM: u8 = 1 << 4;

// Operation command words.
const OCW2_LEVEL: u8 = 0x07;
const OCW2_EOI: u8 = 1 << 5;
const OCW2_SPECIFIC: u8 = 1 << 6;
const OCW2_ROTATE: u8 = 1 << 7;
const OCW3: u8 = 1 << 3;
const OCW3_RIS: u8 = 1 << 0;
const OCW3_RR: u8 = 1 << 1;
const OCW3_POLL: u8 = 1 << 2;
const OCW3_SMM: u8 = 1 << 5;
const OCW3_ESMM: u8 = 1 << 6;

/// Lines that can be levels; the timer, the keyboard, the cascade, the clock and the coprocessor
/// cannot.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];

/// One 8259A.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipState {
    /// Next initialization command word that port 1 expects; 0: operation.
    pub icw: u8,
    /// The initialization sequence is complete: the chip may raise INT.
    pub ready: bool,
    pub single: bool,
    pub wants_icw4: bool,
    pub aeoi: bool,
    pub sfnm: bool,
    /// Vector of line 0.
    pub base: u8,
    /// IRR, ISR and IMR.
    pub irr: u8,
    pub isr: u8,
    pub imr: u8,
    /// Lines that are high, and those of them that are levels.
    pub lines: u8,
    pub elcr: u8,
    /// Line that has the lowest priority.
    pub lowest: u8,
    pub rotate_on_aeoi: bool,
    pub special_mask: bool,
    pub poll: bool,
    pub read_isr: bool,
}

impl ChipState {
    fn power_on() -> Self {
        Self { lowest: 7, ..Self::default() }
    }

    /// Priority of the most important line in `set`; 0 comes first.
    fn first(&self, set: u8) -> Option<u8> {
        (0..8).find(|rank| set & 1 << self.line_of(*rank) != 0)
    }

    fn line_of(&self, rank: u8) -> u8 {
        (self.lowest + 1 + rank) & 7
    }

    /// The line that INT asks for, if any.  `master`: line 2 is the cascade.
    fn requested(&self, master: bool) -> Option<u8> {
        if !self.ready {
            return None;
        }
        let rank = self.first(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.sfnm && master {
            in_service &= !CASCADE;
        }
        let blocked = self.first(in_service).is_some_and(|served| served <= rank);
        (!blocked).then(|| self.line_of(rank))
    }

    fn set_line(&mut self, line: u8, level: bool) {
        let mask = 1 << line;
        let rose = level && self.lines & mask == 0;
        if level {
            self.lines |= mask;
        } else {
            self.lines &= !mask;
        }
        if rose {
            self.irr |= mask;
        } else if !level && self.elcr & mask != 0 {
            self.irr &= !mask;
        }
    }

    fn acknowledge(&mut self, line: u8) {
        let mask = 1 << line;
        if self.elcr & mask == 0 {
            self.irr &= !mask;
        }
        if !self.aeoi {
            self.isr |= mask;
        } else if self.rotate_on_aeoi {
            self.lowest = line;
        }
    }

    /// Port 0: ICW1, OCW2 or OCW3.
    fn write_command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            // ELCR decides what is a level, not LTIM.  Lines keep their level, and a level
            // is seen again; edges need a new one.
            *self = Self {
                icw: 2,
                single: value & ICW1_SINGLE != 0,
                wants_icw4: value & ICW1_IC4 != 0,
                irr: self.lines & self.elcr,
                base: self.base,
                lines: self.lines,
                elcr: self.elcr,
                ..Self::power_on()
            };
        } else if value & OCW3 != 0 {
            if value & OCW3_ESMM != 0 {
                self.special_mask = value & OCW3_SMM != 0;
            }
            if value & OCW3_POLL != 0 {
                self.poll = true;
            } else if value & OCW3_RR != 0 {
                self.read_isr = value & OCW3_RIS != 0;
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let rotate = value & OCW2_ROTATE != 0;
        let specific = value & OCW2_SPECIFIC != 0;
        if value & OCW2_EOI != 0 {
            let line = if specific {
                Some(value & OCW2_LEVEL)
            } else {
                // In special mask mode a masked line is not what the EOI means.
                let masked = if self.special_mask { self.imr } else { 0 };
                self.first(self.isr & !masked).map(|rank| self.line_of(rank))
            };
            if let Some(line) = line {
                self.isr &= !(1 << line);
                if rotate {
                    self.lowest = line;
                }
            }
        } else if !specific {
            self.rotate_on_aeoi = rotate;
        } else if rotate {
            self.lowest = value & OCW2_LEVEL;
        }
    }

    /// Port 1: ICW2-4 or OCW1.
    fn write_data(&mut self, value: u8) {
        match self.icw {
            2 => {
                self.base = value & ICW2_BASE;
                self.icw = if self.single { 4 } else { 3 };
            }
            // The cascade is wired, whatever ICW3 says.
            3 => self.icw = 4,
            4 => {
                // The vector is the 8086's in MCS-80 mode too: no processor here reads a CALL.
                self.aeoi = value & ICW4_AEOI != 0;
                self.sfnm = value & ICW4_SFNM != 0;
                self.icw = 0;
            }
            _ => return self.imr = value,
        }
        if self.icw == 4 && !self.wants_icw4 {
            self.icw = 0;
        }
        self.ready = self.icw == 0;
    }

    /// The answer to a poll command is an acknowledge cycle of its own.
    fn read_poll(&mut self, master: bool) -> u8 {
        self.poll = false;
        match self.requested(master) {
            Some(line) => {
                self.acknowledge(line);
                0x80 | line
            }
            None => 0,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    /// Master and slave.
    pub chips: [ChipState; 2],
    /// How many sources assert each line.
    pub asserted: [u32; LINES as usize],
    /// The master's INT output as the processors have seen it.
    pub intr: bool,
}

impl State {
    pub const VERSION: u32 = 1;

    fn power_on() -> Self {
        Self {
            version: Self::VERSION,
            chips: [ChipState::power_on(), ChipState::power_on()],
            asserted: [0; LINES as usize],
            intr: false,
        }
    }

    /// Chip and line that the next acknowledge cycle serves.
    fn requested(&self) -> Option<(usize, u8)> {
        let line = self.chips[0].requested(true)?;
        if 1 << line != CASCADE {
            return Some((0, line));
        }
        self.chips[1].requested(false).map(|line| (1, line))
    }

    fn vector(&self) -> Option<u8> {
        self.requested().map(|(chip, line)| self.chips[chip].base | line)
    }

    /// Show the slave's output to the master.
    fn cascade(&mut self) {
        let slave = self.chips[1].requested(false).is_some();
        let master = &mut self.chips[0];
        for set in [&mut master.irr, &mut master.lines] {
            *set = *set & !CASCADE | if slave { CASCADE } else { 0 };
        }
    }

    fn acknowledge(&mut self, chip: usize, line: u8) {
        if chip == 1 {
            self.chips[0].acknowledge(CASCADE_LINE);
        }
        self.chips[chip].acknowledge(line);
    }

    fn set_line(&mut self, irq: u8) {
        let (chip, line) = (usize::from(irq >> 3), irq & 7);
        self.chips[chip].set_line(line, self.asserted[usize::from(irq)] != 0);
    }

    fn set_elcr(&mut self, chip: usize, value: u8) {
        let chip_state = &mut self.chips[chip];
        let elcr = value & ELCR_WRITABLE[chip];
        let now_levels = elcr & !chip_state.elcr;
        chip_state.elcr = elcr;
        chip_state.irr = chip_state.irr & !now_levels | chip_state.lines & now_levels;
    }

    fn read_byte(&mut self, port: u16) -> Option<u8> {
        let chip = usize::from(port & !1 == SLAVE || port == ELCR2);
        let state = &mut self.chips[chip];
        Some(match port {
            ELCR | ELCR2 => state.elcr,
            _ if port & !1 != MASTER && port & !1 != SLAVE => return None,
            _ if state.poll => state.read_poll(chip == 0),
            _ if port & 1 != 0 => state.imr,
            _ if state.read_isr => state.isr,
            _ => state.irr,
        })
    }

    fn write_byte(&mut self, port: u16, value: u8) -> bool {
        let chip = usize::from(port & !1 == SLAVE || port == ELCR2);
        match port {
            ELCR | ELCR2 => self.set_elcr(chip, value),
            _ if port & !1 != MASTER && port & !1 != SLAVE => return false,
            _ if port & 1 != 0 => self.chips[chip].write_data(value),
            _ => self.chips[chip].write_command(value),
        }
        true
    }

    /// Make a state from outside one that the pair could have reached.
    fn sanitise(&mut self) {
        // Line 2 has no source but the slave.
        self.asserted[usize::from(CASCADE_LINE)] = 0;
        for (chip, (state, elcr)) in self.chips.iter_mut().zip(ELCR_WRITABLE).enumerate() {
            state.icw = if state.icw <= 4 && state.icw != 1 { state.icw } else { 0 };
            state.ready &= state.icw == 0;
            state.base &= ICW2_BASE;
            state.lowest &= 7;
            state.elcr &= elcr;
            let asserted = &self.asserted[8 * chip..8 * (chip + 1)];
            state.lines =
                asserted.iter().enumerate().fold(0, |set, (i, &n)| set | u8::from(n != 0) << i);
            state.irr = state.irr & !state.elcr | state.lines & state.elcr;
        }
        self.cascade();
        self.intr = self.requested().is_some();
    }
}

pub struct Vatpic {
    inner: Mutex<State>,
    /// 0x100 | vector while INT is high, else 0; written under the lock.
    pending: AtomicU32,
}

impl Default for Vatpic {
    fn default() -> Self {
        Self::new()
    }
}

impl Vatpic {
    pub fn new() -> Self {
        Self { inner: Mutex::new(State::power_on()), pending: AtomicU32::new(0) }
    }

    /// Run `f` on the state and show the processors a change of INT.
    fn enter<R>(&self, p: &dyn Platform, f: impl FnOnce(&mut State) -> R) -> R {
        let mut state = lock(&self.inner);
        let result = f(&mut state);
        self.publish(p, &mut state);
        result
    }

    fn publish(&self, p: &dyn Platform, state: &mut State) {
        state.cascade();
        let vector = state.vector();
        self.pending.store(vector.map_or(0, |v| 0x100 | u32::from(v)), Ordering::SeqCst);
        if state.intr != vector.is_some() {
            state.intr = vector.is_some();
            p.pic_intr(state.intr);
        }
    }

    pub fn reset(&self, p: &dyn Platform) {
        self.enter(p, |s| *s = State { intr: s.intr, ..State::power_on() });
    }

    /// The vector that an acknowledge cycle would read while INT is high.  One atomic load.
    pub fn pending_intr(&self) -> Option<u8> {
        match self.pending.load(Ordering::SeqCst) {
            0 => None,
            pending => Some(pending as u8),
        }
    }

    /// The acknowledge cycle of a processor that takes `vector`, which `pending_intr` offered.
    ///
    /// A request that was withdrawn in between counts as taken, as if the processor had been a
    /// moment earlier.
    pub fn intr_accepted(&self, p: &dyn Platform, vector: u8) {
        self.enter(p, |s| {
            let (base, line) = (vector & ICW2_BASE, vector & 7);
            if s.vector() == Some(vector) {
                let (chip, line) = s.requested().unwrap_or((0, line));
                s.acknowledge(chip, line);
            } else if let Some(chip) = s.chips.iter().position(|c| c.ready && c.base == base) {
                s.acknowledge(chip, line);
            }
            // INT goes low with each acknowledge, so that another request is a new edge.
            if s.intr {
                s.intr = false;
                p.pic_intr(false);
            }
        });
    }

    /// One more (`level`) or one less source asserts `irq` (0-15); others are ignored, and so is
    /// the cascade.
    pub fn set_irq(&self, p: &dyn Platform, irq: u8, level: bool) {
        if level {
            self.assert_irq(p, irq);
        } else {
            self.deassert_irq(p, irq);
        }
    }

    pub fn assert_irq(&self, p: &dyn Platform, irq: u8) {
        if has_source(irq) {
            self.enter(p, |s| {
                let asserted = &mut s.asserted[usize::from(irq)];
                *asserted = asserted.saturating_add(1);
                s.set_line(irq);
            });
        }
    }

    pub fn deassert_irq(&self, p: &dyn Platform, irq: u8) {
        if has_source(irq) {
            self.enter(p, |s| {
                let asserted = &mut s.asserted[usize::from(irq)];
                *asserted = asserted.saturating_sub(1);
                s.set_line(irq);
            });
        }
    }

    pub fn pulse_irq(&self, p: &dyn Platform, irq: u8) {
        self.assert_irq(p, irq);
        self.deassert_irq(p, irq);
    }

    /// What firmware does through ELCR; `NotDecoded` if `irq` cannot be a level.
    pub fn set_irq_trigger(
        &self,
        p: &dyn Platform,
        irq: u8,
        level_triggered: bool,
    ) -> Result<(), NotDecoded> {
        let (chip, mask) = (usize::from(irq >> 3), 1 << (irq & 7));
        if irq >= LINES || ELCR_WRITABLE[chip] & mask == 0 {
            return if level_triggered { Err(NotDecoded) } else { Ok(()) };
        }
        self.enter(p, |s| {
            let elcr = s.chips[chip].elcr;
            s.set_elcr(chip, if level_triggered { elcr | mask } else { elcr & !mask });
        });
        Ok(())
    }

    pub fn read(&self, p: &dyn Platform, port: u16, size: usize) -> Result<u32, NotDecoded> {
        self.enter(p, |s| read_ports(port, size, |port| s.read_byte(port)))
    }

    pub fn write(
        &self,
        p: &dyn Platform,
        port: u16,
        size: usize,
        value: u32,
    ) -> Result<(), NotDecoded> {
        self.enter(p, |s| write_ports(port, size, value, |port, byte| s.write_byte(port, byte)))
    }

    pub fn save(&self) -> State {
        lock(&self.inner).clone()
    }

    /// Take `state` back; values that the pair could not have reached are corrected.
    pub fn restore(&self, p: &dyn Platform, mut state: State) -> Result<(), StateError> {
        check_version("vatpic", state.version, State::VERSION)?;
        state.sanitise();
        let mut inner = lock(&self.inner);
        *inner = state;
        self.publish(p, &mut inner);
        Ok(())
    }
}

fn has_source(irq: u8) -> bool {
    irq < LINES && irq != CASCADE_LINE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testplat::{Event, TestPlatform};
    use super::*;

    fn out(p: &TestPlatform, pic: &Vatpic, port: u16, value: u8) {
        pic.write(p, port, 1, value.into()).unwrap();
    }

    fn inb(p: &TestPlatform, pic: &Vatpic, port: u16) -> u8 {
        pic.read(p, port, 1).unwrap() as u8
    }

    /// The PC's usual set-up: vectors 0x30 and 0x38, everything unmasked.
    fn pic(p: &TestPlatform, icw4: u8) -> Vatpic {
        let pic = Vatpic::new();
        for (port, base, icw3) in [(MASTER, 0x30, 4), (SLAVE, 0x38, 2)] {
            out(p, &pic, port, 0x11);
            out(p, &pic, port + 1, base);
            out(p, &pic, port + 1, icw3);
            out(p, &pic, port + 1, icw4);
        }
        pic
    }

    /// Take interrupts until there are no more.
    fn accept(p: &TestPlatform, pic: &Vatpic) -> Option<u8> {
        let vector = pic.pending_intr()?;
        pic.intr_accepted(p, vector);
        Some(vector)
    }

    const EOI: u8 = 0x20;

    #[test]
    fn initialization_sequences() {
        // ICW1, writes to port 1, ready?, mask after one more write of 0xa5.
        let table: &[(u8, &[u8], bool, u8)] = &[
            (0x11, &[0x30, 4, 1], true, 0xa5),
            (0x11, &[0x30, 4], false, 0),
            (0x10, &[0x30, 4], true, 0xa5),
            (0x13, &[0x30, 1], true, 0xa5),
            (0x12, &[0x30], true, 0xa5),
            (0x1f, &[0x30, 1], true, 0xa5),
        ];
        for (icw1, icws, ready, mask) in table {
            let p = TestPlatform::new(1);
            let pic = Vatpic::new();
            out(&p, &pic, MASTER, *icw1);
            for &icw in *icws {
                out(&p, &pic, MASTER + 1, icw);
            }
            pic.pulse_irq(&p, 1);
            assert_eq!(pic.pending_intr(), ready.then_some(0x31), "{icw1:#x} {icws:x?}");
            out(&p, &pic, MASTER + 1, 0xa5);
            assert_eq!(inb(&p, &pic, MASTER + 1), *mask, "{icw1:#x} {icws:x?}");
        }
    }

    #[test]
    fn silent_before_initialization() {
        let p = TestPlatform::new(1);
        let pic = Vatpic::new();
        pic.assert_irq(&p, 1);
        assert_eq!(pic.pending_intr(), None);
        out(&p, &pic, MASTER + 1, 0xfb);
        assert_eq!(inb(&p, &pic, MASTER + 1), 0xfb, "a probe finds the mask register");
        assert_eq!(inb(&p, &pic, MASTER), 0x02);
        for value in [0x11, 0x30, 4, 1] {
            out(&p, &pic, MASTER + u16::from(value != 0x11), value);
        }
        assert_eq!(pic.pending_intr(), None, "ICW1 clears the edge sense circuit");
    }

    #[test]
    fn fixed_priorities_and_nesting() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 1);
        for irq in [12, 7, 5, 8, 3] {
            pic.pulse_irq(&p, irq);
        }
        assert_eq!(accept(&p, &pic), Some(0x38));
        assert_eq!(pic.pending_intr(), None, "the cascade outranks 3");
        out(&p, &pic, SLAVE, EOI);
        out(&p, &pic, MASTER, EOI);
        assert_eq!(accept(&p, &pic), Some(0x3c));
        out(&p, &pic, SLAVE, EOI);
        out(&p, &pic, MASTER, EOI);
        assert_eq!(accept(&p, &pic), Some(0x33));
        pic.pulse_irq(&p, 1);
        assert_eq!(accept(&p, &pic), Some(0x31), "higher priority interrupts the handler");
        assert_eq!(pic.pending_intr(), None);
        out(&p, &pic, MASTER, EOI);
        assert_eq!(pic.pending_intr(), None);
        out(&p, &pic, MASTER, EOI);
        assert_eq!(accept(&p, &pic), Some(0x35));
        out(&p, &pic, MASTER, 0x65);
        assert_eq!(accept(&p, &pic), Some(0x37), "after a specific EOI");
    }

    #[test]
    fn registers_show_requests_and_service() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 1);
        pic.pulse_irq(&p, 3);
        pic.pulse_irq(&p, 4);
        pic.pulse_irq(&p, 10);
        assert_eq!(inb(&p, &pic, MASTER), 0x1c);
        assert_eq!(inb(&p, &pic, SLAVE), 0x04);
        assert_eq!(accept(&p, &pic), Some(0x3a));
        out(&p, &pic, MASTER, 0x0b);
        out(&p, &pic, SLAVE, 0x0b);
        assert_eq!((inb(&p, &pic, MASTER), inb(&p, &pic, SLAVE)), (0x04, 0x04));
        out(&p, &pic, MASTER, 0x0a);
        assert_eq!(inb(&p, &pic, MASTER), 0x18);
    }

    #[test]
    fn mask_holds_back_and_remembers() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 1);
        out(&p, &pic, MASTER + 1, 0x02);
        pic.pulse_irq(&p, 1);
        assert_eq!(pic.pending_intr(), None);
        out(&p, &pic, MASTER + 1, 0);
        assert_eq!(pic.pending_intr(), Some(0x31));
        pic.pulse_irq(&p, 9);
        out(&p, &pic, MASTER + 1, 0x06);
        assert_eq!(pic.pending_intr(), None);
        out(&p, &pic, MASTER + 1, 0x02);
        assert_eq!(pic.pending_intr(), Some(0x39));
    }

    #[test]
    fn levels_stay_and_edges_do_not() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 3);
        pic.set_irq_trigger(&p, 5, true).unwrap();
        for irq in [4, 5] {
            pic.assert_irq(&p, irq);
        }
        assert_eq!(accept(&p, &pic), Some(0x34));
        assert_eq!(accept(&p, &pic), Some(0x35));
        assert_eq!(accept(&p, &pic), Some(0x35), "a level with automatic EOI comes again");
        pic.assert_irq(&p, 5);
        pic.deassert_irq(&p, 5);
        assert_eq!(pic.pending_intr(), Some(0x35), "one of two sources still asserts it");
        pic.deassert_irq(&p, 5);
        assert_eq!(pic.pending_intr(), None, "a level that falls is no request any more");
        pic.deassert_irq(&p, 4);
        pic.deassert_irq(&p, 4);
        pic.assert_irq(&p, 4);
        assert_eq!(accept(&p, &pic), Some(0x34));
    }

    #[test]
    fn edge_level_control() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 1);
        pic.write(&p, ELCR, 2, 0xffff).unwrap();
        assert_eq!(pic.read(&p, ELCR, 2), Ok(0xdef8));
        for irq in 0..20 {
            let can = irq < 16 && ![0, 1, 2, 8, 13].contains(&irq);
            assert_eq!(pic.set_irq_trigger(&p, irq, true).is_ok(), can, "{irq}");
            assert_eq!(pic.set_irq_trigger(&p, irq, false), Ok(()));
        }
        assert_eq!(pic.read(&p, ELCR, 2), Ok(0));
        pic.assert_irq(&p, 5);
        assert_eq!(accept(&p, &pic), Some(0x35));
        out(&p, &pic, MASTER, EOI);
        assert_eq!(pic.pending_intr(), None);
        pic.set_irq_trigger(&p, 5, true).unwrap();
        assert_eq!(pic.pending_intr(), Some(0x35), "the line is high");
    }

    /// Datasheet, "Automatic Rotation" and "Specific Rotation": OCW2, then who wins of 0 to 7.
    #[test]
    fn rotation() {
        // In service before, OCW2, in service after, lowest priority after.
        let table = [
            (0x10, 0xa0, 0x00, 4),
            (0x14, 0xa0, 0x10, 2),
            (0x14, 0xe4, 0x04, 4),
            (0x14, 0xc3, 0x14, 3),
            (0x14, 0x64, 0x04, 7),
            (0x14, 0x20, 0x10, 7),
            (0x14, 0x40, 0x14, 7),
            (0x00, 0xa0, 0x00, 7),
        ];
        for (before, ocw2, after, lowest) in table {
            let mut chip = ChipState { isr: before, ready: true, ..ChipState::power_on() };
            chip.write_command(ocw2);
            assert_eq!((chip.isr, chip.lowest), (after, lowest), "{ocw2:#x}");
            chip.isr = 0;
            chip.irr = 0xff;
            assert_eq!(chip.requested(true), Some((lowest + 1) & 7));
        }
    }

    #[test]
    fn automatic_eoi_with_rotation() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 3);
        out(&p, &pic, MASTER, 0x80);
        for irq in [3, 4, 5] {
            pic.pulse_irq(&p, irq);
        }
        assert_eq!(accept(&p, &pic), Some(0x33));
        pic.pulse_irq(&p, 3);
        assert_eq!(accept(&p, &pic), Some(0x34));
        assert_eq!(accept(&p, &pic), Some(0x35));
        assert_eq!(accept(&p, &pic), Some(0x33));
        out(&p, &pic, MASTER, 0x00);
        pic.pulse_irq(&p, 4);
        assert_eq!(accept(&p, &pic), Some(0x34));
        assert_eq!(pic.save().chips[0].lowest, 3, "rotation is off");
        out(&p, &pic, MASTER, 0x0b);
        assert_eq!(inb(&p, &pic, MASTER), 0);
    }

    #[test]
    fn special_mask_mode() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 1);
        pic.pulse_irq(&p, 3);
        assert_eq!(accept(&p, &pic), Some(0x33));
        pic.pulse_irq(&p, 6);
        assert_eq!(pic.pending_intr(), None);
        out(&p, &pic, MASTER + 1, 0x08);
        out(&p, &pic, MASTER, 0x68);
        assert_eq!(accept(&p, &pic), Some(0x36), "a masked level does not inhibit others");
        out(&p, &pic, MASTER, 0x0b);
        out(&p, &pic, MASTER, EOI);
        assert_eq!(inb(&p, &pic, MASTER), 0x08, "the EOI means the one that is not masked");
        out(&p, &pic, MASTER, 0x48);
        pic.pulse_irq(&p, 6);
        assert_eq!(pic.pending_intr(), None);
    }

    #[test]
    fn special_fully_nested_mode() {
        for (icw4, nested) in [(0x01, None), (0x11, Some(0x39))] {
            let p = TestPlatform::new(1);
            let pic = pic(&p, icw4);
            pic.pulse_irq(&p, 12);
            assert_eq!(accept(&p, &pic), Some(0x3c));
            pic.pulse_irq(&p, 9);
            assert_eq!(pic.pending_intr(), nested, "{icw4:#x}");
        }
    }

    #[test]
    fn poll_command() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 1);
        out(&p, &pic, MASTER, 0x0c);
        assert_eq!(inb(&p, &pic, MASTER), 0);
        pic.pulse_irq(&p, 4);
        pic.pulse_irq(&p, 10);
        out(&p, &pic, MASTER, 0x0c);
        out(&p, &pic, SLAVE, 0x0c);
        assert_eq!(inb(&p, &pic, MASTER + 1), 0x82, "either port answers a poll");
        assert_eq!(inb(&p, &pic, SLAVE), 0x82);
        assert_eq!(pic.pending_intr(), None);
        assert_eq!(inb(&p, &pic, MASTER), 0x10, "a poll is answered once");
        out(&p, &pic, MASTER, 0x0b);
        assert_eq!(inb(&p, &pic, MASTER), 0x04);
    }

    #[test]
    fn output_follows_requests() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 1);
        pic.pulse_irq(&p, 4);
        pic.pulse_irq(&p, 3);
        assert_eq!(p.take(), [Event::PicIntr(true)]);
        pic.intr_accepted(&p, 0x33);
        assert_eq!(p.take(), [Event::PicIntr(false)]);
        out(&p, &pic, MASTER, EOI);
        assert_eq!(p.take(), [Event::PicIntr(true)]);
        pic.pulse_irq(&p, 1);
        pic.intr_accepted(&p, 0x31);
        assert_eq!(p.take(), [Event::PicIntr(false)]);
        pic.pulse_irq(&p, 0);
        pic.reset(&p);
        assert_eq!(p.take(), [Event::PicIntr(true), Event::PicIntr(false)]);
    }

    #[test]
    fn each_acknowledge_makes_a_new_edge() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 3);
        pic.pulse_irq(&p, 3);
        pic.pulse_irq(&p, 4);
        p.take();
        pic.intr_accepted(&p, 0x33);
        assert_eq!(p.take(), [Event::PicIntr(false), Event::PicIntr(true)]);
    }

    #[test]
    fn withdrawn_request_counts_as_taken() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 1);
        pic.set_irq_trigger(&p, 11, true).unwrap();
        pic.assert_irq(&p, 11);
        let vector = pic.pending_intr().unwrap();
        pic.deassert_irq(&p, 11);
        pic.intr_accepted(&p, vector);
        let state = pic.save();
        assert_eq!((state.chips[0].isr, state.chips[1].isr), (0x04, 0x08));
    }

    #[test]
    fn lines_without_a_source() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 1);
        let before = pic.save();
        for irq in [2, 16, 0xff] {
            pic.assert_irq(&p, irq);
            pic.deassert_irq(&p, irq);
        }
        assert_eq!(pic.save(), before);
    }

    #[test]
    fn wide_accesses_are_bytes() {
        let p = TestPlatform::new(1);
        let pic = pic(&p, 1);
        pic.write(&p, MASTER, 2, 0x5a0b).unwrap();
        assert_eq!(pic.read(&p, MASTER, 4), Ok(0xffff_5a00));
        assert_eq!(pic.read(&p, 0x22, 1), Err(NotDecoded));
        assert_eq!(pic.read(&p, 0x1f, 2), Ok(0x00ff));
        assert_eq!(pic.write(&p, 0x4d2, 4, 0), Err(NotDecoded));
    }

    proptest! {
        #[test]
        fn any_sequence_leaves_a_state_that_can_be_restored(
            ops in prop::collection::vec((0u8..8, 0usize..8, any::<u32>(), 0u8..17), 1..200),
        ) {
            const PORTS: [u16; 8] = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x1f, 0xffff];
            let p = TestPlatform::new(1);
            let pic = pic(&p, 1);
            for (op, port, value, irq) in ops {
                match op {
                    0..=2 => drop(pic.write(&p, PORTS[port], 1 + port % 2, value)),
                    3 => drop(pic.read(&p, PORTS[port], port)),
                    4 => pic.assert_irq(&p, irq),
                    5 => pic.deassert_irq(&p, irq),
                    6 => pic.intr_accepted(&p, value as u8),
                    _ => drop(accept(&p, &pic)),
                }
                let state = pic.save();
                prop_assert_eq!(pic.pending_intr(), state.vector());
                prop_assert_eq!(pic.pending_intr().is_some(), state.intr);
            }
            let copy = Vatpic::new();
            copy.restore(&p, pic.save()).unwrap();
            prop_assert_eq!(copy.save(), pic.save());
            prop_assert_eq!(copy.pending_intr(), pic.pending_intr());
        }

        #[test]
        fn hostile_states_are_tamed(bytes in prop::collection::vec(any::<u8>(), 32)) {
            let p = TestPlatform::new(1);
            let chip = |b: &[u8]| ChipState {
                icw: b[0],
                ready: b[1] & 1 != 0,
                single: b[1] & 2 != 0,
                wants_icw4: b[1] & 4 != 0,
                aeoi: b[1] & 8 != 0,
                sfnm: b[1] & 16 != 0,
                base: b[2],
                irr: b[3],
                isr: b[4],
                imr: b[5],
                lines: b[6],
                elcr: b[7],
                lowest: b[8],
                rotate_on_aeoi: b[9] & 1 != 0,
                special_mask: b[9] & 2 != 0,
                poll: b[9] & 4 != 0,
                read_isr: b[9] & 8 != 0,
            };
            let state = State {
                version: State::VERSION,
                chips: [chip(&bytes), chip(&bytes[10..])],
                asserted: std::array::from_fn(|n| u32::from(bytes[n + 16]) << 24),
                intr: bytes[31] & 1 != 0,
            };
            let pic = Vatpic::new();
            pic.restore(&p, state).unwrap();
            let tamed = pic.save();
            pic.restore(&p, tamed.clone()).unwrap();
            prop_assert_eq!(pic.save(), tamed);
            for irq in 0..16 {
                pic.pulse_irq(&p, irq);
                accept(&p, &pic);
                pic.deassert_irq(&p, irq);
            }
        }
    }
}
