//! I/O APIC with 32 pins (Intel 82093AA datasheet, 290566).  bhyve: sys/amd64/vmm/io/vioapic.c.
//!
//! A pin has as many sources as assert it; it is high while one does.  Polarity is stored and
//! means nothing: a source says "asserted", not "high".  An edge at a masked pin is lost, a level
//! is looked at again when the pin is unmasked.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::{StateError, check_version, delivery_mode, lock, truncate};
use crate::platform::{DeliveryMode, Platform};

pub const BASE: u64 = 0xfec0_0000;
/// Bytes of address space.
pub const LEN: u64 = 0x1000;
const PINS: usize = 32;

const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;

// Indirect registers (section 3.2).
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const REDIRECTION_FIRST: u8 = 0x10;
const REDIRECTION_LAST: u8 = REDIRECTION_FIRST + 2 * PINS as u8 - 1;

const ID_WRITABLE: u32 = 0xf << 24;
const VERSION_VALUE: u32 = (PINS as u32 - 1) << 16 | 0x11;

// Redirection table entry (section 3.2.4).
const RTE_LOGICAL: u64 = 1 << 11;
const RTE_REMOTE_IRR: u64 = 1 << 14;
const RTE_LEVEL: u64 = 1 << 15;
const RTE_MASKED: u64 = 1 << 16;
/// All but the read-only bits, with the extended destination of CPUID 0x40000001 in 55:49.
const RTE_WRITABLE: u64 = 0xfffe_0000_0001_afff;
const RTE_RESET: u64 = RTE_MASKED;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    pub id: u32,
    /// Index register.
    pub ioregsel: u8,
    /// Redirection table.
    pub rte: [u64; PINS],
    /// How many sources assert each pin.
    pub asserted: [u32; PINS],
}

impl State {
    pub const VERSION: u32 = 1;

    fn power_on() -> Self {
        Self {
            version: Self::VERSION,
            id: 0,
            ioregsel: 0,
            rte: [RTE_RESET; PINS],
            asserted: [0; PINS],
        }
    }

    /// Send the pin's message.  Only fixed and lowest-priority interrupts can be levels; they
    /// wait for an EOI before they are sent again.
    fn send(&mut self, p: &dyn Platform, pin: usize) {
        let rte = self.rte[pin];
        let mode = match delivery_mode((rte >> 8) as u32) {
            None | Some(DeliveryMode::StartUp) => return,
            Some(mode) => mode,
        };
        let fixed = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        let level = fixed && rte & RTE_LEVEL != 0;
        if level {
            self.rte[pin] |= RTE_REMOTE_IRR;
        }
        let extended = (rte >> 49 & 0x7f) as u32;
        let dest = (rte >> 56) as u32 | extended << 8;
        p.apic_message(dest, extended != 0, rte & RTE_LOGICAL != 0, mode, rte as u8, level);
    }

    /// The source's edge; for a level this is the moment to look at it first.
    fn rise(&mut self, p: &dyn Platform, pin: usize) {
        let rte = self.rte[pin];
        if rte & RTE_LEVEL != 0 {
            self.evaluate(p, pin);
        } else if rte & RTE_MASKED == 0 {
            self.send(p, pin);
        }
    }

    /// Send a level that is asserted and not waiting for its EOI.
    fn evaluate(&mut self, p: &dyn Platform, pin: usize) {
        let blocked = RTE_MASKED | RTE_REMOTE_IRR;
        if self.asserted[pin] != 0 && self.rte[pin] & (RTE_LEVEL | blocked) == RTE_LEVEL {
            self.send(p, pin);
        }
    }

    fn assert(&mut self, p: &dyn Platform, pin: usize) {
        self.asserted[pin] = self.asserted[pin].saturating_add(1);
        if self.asserted[pin] == 1 {
            self.rise(p, pin);
        }
    }

    fn deassert(&mut self, pin: usize) {
        self.asserted[pin] = self.asserted[pin].saturating_sub(1);
    }

    fn read(&self) -> u32 {
        match self.ioregsel {
            ID | ARBITRATION => self.id,
            VERSION => VERSION_VALUE,
            index @ REDIRECTION_FIRST..=REDIRECTION_LAST => {
                let index = index - REDIRECTION_FIRST;
                (self.rte[usize::from(index / 2)] >> (32 * (index & 1))) as u32
            }
            _ => 0,
        }
    }

    fn write(&mut self, p: &dyn Platform, value: u32) {
        match self.ioregsel {
            ID => self.id = value & ID_WRITABLE,
            index @ REDIRECTION_FIRST..=REDIRECTION_LAST => {
                let index = index - REDIRECTION_FIRST;
                let (pin, shift) = (usize::from(index / 2), 32 * (index & 1));
                let written = u64::from(value) << shift;
                let kept = self.rte[pin] & !(RTE_WRITABLE & 0xffff_ffff << shift);
                self.rte[pin] = kept | written & RTE_WRITABLE;
                // An edge has no EOI to wait for.  Kernels clear a stuck remote IRR this way.
                if self.rte[pin] & RTE_LEVEL == 0 {
                    self.rte[pin] &= !RTE_REMOTE_IRR;
                }
                self.evaluate(p, pin);
            }
            _ => {}
        }
    }
}

pub struct Vioapic {
    inner: Mutex<State>,
}

impl Default for Vioapic {
    fn default() -> Self {
        Self::new()
    }
}

impl Vioapic {
    pub fn new() -> Self {
        Self { inner: Mutex::new(State::power_on()) }
    }

    pub fn reset(&self, _p: &dyn Platform) {
        *lock(&self.inner) = State::power_on();
    }

    pub fn pincount(&self) -> u32 {
        PINS as u32
    }

    /// One more (`level`) or one less source asserts `pin`.  Pins that do not exist are ignored.
    pub fn set_irq(&self, p: &dyn Platform, pin: u8, level: bool) {
        if level {
            self.assert_irq(p, pin);
        } else {
            self.deassert_irq(p, pin);
        }
    }

    pub fn assert_irq(&self, p: &dyn Platform, pin: u8) {
        if usize::from(pin) < PINS {
            lock(&self.inner).assert(p, pin.into());
        }
    }

    pub fn deassert_irq(&self, _p: &dyn Platform, pin: u8) {
        if usize::from(pin) < PINS {
            lock(&self.inner).deassert(pin.into());
        }
    }

    pub fn pulse_irq(&self, p: &dyn Platform, pin: u8) {
        if usize::from(pin) < PINS {
            let mut state = lock(&self.inner);
            state.assert(p, pin.into());
            state.deassert(pin.into());
        }
    }

    /// Local APICs have seen the EOI of level-triggered `vector`.
    pub fn process_eoi(&self, p: &dyn Platform, vector: u8) {
        let mut state = lock(&self.inner);
        for pin in 0..PINS {
            let rte = state.rte[pin];
            if rte & RTE_REMOTE_IRR != 0 && rte as u8 == vector {
                state.rte[pin] &= !RTE_REMOTE_IRR;
                state.evaluate(p, pin);
            }
        }
    }

    /// Read `size` bytes at `offset`.  Bytes of the two registers can be read on their own; what
    /// lies elsewhere reads 0.
    pub fn mmio_read(&self, _p: &dyn Platform, offset: u64, size: usize) -> u64 {
        let state = lock(&self.inner);
        let value = match offset & !3 {
            IOREGSEL => state.ioregsel.into(),
            IOWIN => state.read(),
            _ => 0,
        };
        truncate(u64::from(value) >> (8 * (offset & 3)), size)
    }

    /// Write `size` bytes at `offset`; a part of IOWIN changes that part of the register.
    pub fn mmio_write(&self, p: &dyn Platform, offset: u64, size: usize, value: u64) {
        let mut state = lock(&self.inner);
        let shift = 8 * (offset & 3);
        match offset & !3 {
            IOREGSEL if shift == 0 => state.ioregsel = value as u8,
            IOWIN => {
                let lanes = (truncate(u64::MAX, size) << shift) as u32;
                let kept = state.read() & !lanes;
                state.write(p, kept | (value << shift) as u32 & lanes);
            }
            _ => {}
        }
    }

    pub fn save(&self) -> State {
        lock(&self.inner).clone()
    }

    /// Take `state` back; bits that no register has are dropped.
    pub fn restore(&self, _p: &dyn Platform, mut state: State) -> Result<(), StateError> {
        check_version("vioapic", state.version, State::VERSION)?;
        state.id &= ID_WRITABLE;
        for rte in &mut state.rte {
            *rte &= RTE_WRITABLE | RTE_REMOTE_IRR;
            if *rte & RTE_LEVEL == 0 {
                *rte &= !RTE_REMOTE_IRR;
            }
        }
        *lock(&self.inner) = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testplat::{Event, TestPlatform};
    use super::*;

    fn set(p: &TestPlatform, ioapic: &Vioapic, index: u8, value: u32) {
        ioapic.mmio_write(p, IOREGSEL, 4, index.into());
        ioapic.mmio_write(p, IOWIN, 4, value.into());
    }

    fn get(p: &TestPlatform, ioapic: &Vioapic, index: u8) -> u32 {
        ioapic.mmio_write(p, IOREGSEL, 4, index.into());
        ioapic.mmio_read(p, IOWIN, 4) as u32
    }

    /// Program a pin for APIC 3.
    fn route(p: &TestPlatform, ioapic: &Vioapic, pin: u8, low: u64) {
        set(p, ioapic, 0x11 + 2 * pin, 3 << 24);
        set(p, ioapic, 0x10 + 2 * pin, low as u32);
    }

    fn fixed(vector: u8, level: bool) -> Event {
        let mode = DeliveryMode::Fixed;
        Event::Message { dest: 3, x2: false, logical: false, mode, vector, level }
    }

    #[test]
    fn registers() {
        let p = TestPlatform::new(1);
        let ioapic = Vioapic::new();
        // Index, value after reset, after writing all ones.
        let table = [
            (0x00, 0, 0x0f00_0000),
            (0x01, 0x001f_0011, 0x001f_0011),
            (0x02, 0x0f00_0000, 0x0f00_0000),
            (0x03, 0, 0),
            (0x0f, 0, 0),
            (0x10, 0x1_0000, 0x1_afff),
            (0x11, 0, 0xfffe_0000),
            (0x4e, 0x1_0000, 0x1_afff),
            (0x4f, 0, 0xfffe_0000),
            (0x50, 0, 0),
            (0xff, 0, 0),
        ];
        for (index, reset, written) in table {
            assert_eq!(get(&p, &ioapic, index), reset, "{index:#x}");
            set(&p, &ioapic, index, 0xffff_ffff);
            assert_eq!(get(&p, &ioapic, index), written, "{index:#x}");
            assert_eq!(ioapic.mmio_read(&p, IOREGSEL, 4), u64::from(index));
        }
        assert_eq!(ioapic.pincount(), 32);
    }

    #[test]
    fn narrow_accesses() {
        let p = TestPlatform::new(1);
        let ioapic = Vioapic::new();
        ioapic.mmio_write(&p, 0, 1, 0xff01);
        assert_eq!(ioapic.mmio_read(&p, 0x12, 1), 0x1f);
        assert_eq!(ioapic.mmio_read(&p, 0x12, 2), 0x1f);
        assert_eq!(ioapic.mmio_read(&p, 0x10, 8), 0x1f_0011);
        ioapic.mmio_write(&p, 0, 1, 0x10);
        ioapic.mmio_write(&p, 0x10, 1, 0x42);
        ioapic.mmio_write(&p, 0x11, 1, 0x81);
        ioapic.mmio_write(&p, 0x10, 2, 0xa943);
        assert_eq!(ioapic.mmio_read(&p, 0x10, 4), 0x1_a943);
        for offset in [0x04, 0x14, 0x20, 0x40, 0xffc] {
            ioapic.mmio_write(&p, offset, 4, 0xffff_ffff);
            assert_eq!(ioapic.mmio_read(&p, offset, 4), 0, "{offset:#x}");
        }
        ioapic.mmio_write(&p, 1, 1, 0xff);
        assert_eq!(ioapic.mmio_read(&p, 0, 4), 0x10, "IOREGSEL is 8 bits wide");
    }

    #[test]
    fn edges() {
        let p = TestPlatform::new(1);
        let ioapic = Vioapic::new();
        ioapic.pulse_irq(&p, 4);
        route(&p, &ioapic, 4, 0x44);
        assert_eq!(p.take(), [], "an edge at a masked pin is lost");
        ioapic.assert_irq(&p, 4);
        ioapic.assert_irq(&p, 4);
        assert_eq!(p.take(), [fixed(0x44, false)], "a second source makes no edge");
        ioapic.deassert_irq(&p, 4);
        ioapic.pulse_irq(&p, 4);
        assert_eq!(p.take(), [], "one source holds the pin");
        ioapic.deassert_irq(&p, 4);
        ioapic.deassert_irq(&p, 4);
        ioapic.pulse_irq(&p, 4);
        ioapic.set_irq(&p, 4, true);
        assert_eq!(p.take(), [fixed(0x44, false); 2]);
        route(&p, &ioapic, 4, RTE_MASKED | 0x44);
        route(&p, &ioapic, 4, 0x44);
        assert_eq!(p.take(), [], "unmasking is no edge");
    }

    #[test]
    fn levels() {
        let p = TestPlatform::new(1);
        let ioapic = Vioapic::new();
        route(&p, &ioapic, 9, RTE_MASKED | RTE_LEVEL | 0x59);
        ioapic.assert_irq(&p, 9);
        assert_eq!(p.take(), []);
        route(&p, &ioapic, 9, RTE_LEVEL | 0x59);
        assert_eq!(p.take(), [fixed(0x59, true)], "a level shows when it is unmasked");
        assert_eq!(get(&p, &ioapic, 0x10 + 18), (RTE_LEVEL | RTE_REMOTE_IRR | 0x59) as u32);
        ioapic.deassert_irq(&p, 9);
        ioapic.assert_irq(&p, 9);
        assert_eq!(p.take(), [], "it waits for its EOI");
        ioapic.process_eoi(&p, 0x58);
        assert_eq!(p.take(), [], "somebody else's");
        ioapic.process_eoi(&p, 0x59);
        assert_eq!(p.take(), [fixed(0x59, true)], "still asserted");
        ioapic.deassert_irq(&p, 9);
        ioapic.process_eoi(&p, 0x59);
        assert_eq!(p.take(), []);
        assert_eq!(get(&p, &ioapic, 0x10 + 18), (RTE_LEVEL | 0x59) as u32);
        ioapic.pulse_irq(&p, 9);
        assert_eq!(p.take(), [fixed(0x59, true)]);
    }

    #[test]
    fn level_held_back_by_the_mask_comes_after_eoi() {
        let p = TestPlatform::new(1);
        let ioapic = Vioapic::new();
        route(&p, &ioapic, 9, RTE_LEVEL | 0x59);
        ioapic.assert_irq(&p, 9);
        route(&p, &ioapic, 9, RTE_MASKED | RTE_LEVEL | 0x59);
        p.take();
        ioapic.process_eoi(&p, 0x59);
        assert_eq!(p.take(), []);
        route(&p, &ioapic, 9, RTE_LEVEL | 0x59);
        assert_eq!(p.take(), [fixed(0x59, true)]);
    }

    #[test]
    fn switching_to_edge_clears_remote_irr() {
        let p = TestPlatform::new(1);
        let ioapic = Vioapic::new();
        route(&p, &ioapic, 9, RTE_LEVEL | 0x59);
        ioapic.assert_irq(&p, 9);
        p.take();
        set(&p, &ioapic, 0x10 + 18, (RTE_MASKED | 0x59) as u32);
        set(&p, &ioapic, 0x10 + 18, (RTE_LEVEL | 0x59) as u32);
        assert_eq!(p.take(), [fixed(0x59, true)]);
    }

    #[test]
    fn message_fields() {
        let p = TestPlatform::new(1);
        let ioapic = Vioapic::new();
        // Upper and lower half of the entry; destination, 32 bits?, logical?, mode, level?
        let table = [
            (0x0300_0000, 0x0041, Some((3, false, false, DeliveryMode::Fixed, false))),
            (0xff00_0000, 0x0841, Some((0xff, false, true, DeliveryMode::Fixed, false))),
            (0x0300_0000, 0x8141, Some((3, false, false, DeliveryMode::LowestPriority, true))),
            (0x0300_0000, 0x0241, Some((3, false, false, DeliveryMode::Smi, false))),
            (0x0300_0000, 0x8441, Some((3, false, false, DeliveryMode::Nmi, false))),
            (0x0300_0000, 0x8541, Some((3, false, false, DeliveryMode::Init, false))),
            (0x0300_0000, 0x8741, Some((3, false, false, DeliveryMode::ExtInt, false))),
            (0x0300_0000, 0x0341, None),
            (0x0300_0000, 0x0641, None),
            (0x0304_0000, 0x0041, Some((0x203, true, false, DeliveryMode::Fixed, false))),
        ];
        for (high, low, expected) in table {
            set(&p, &ioapic, 0x11, high);
            set(&p, &ioapic, 0x10, low);
            ioapic.pulse_irq(&p, 0);
            let events = expected.map(|(dest, x2, logical, mode, level)| Event::Message {
                dest,
                x2,
                logical,
                mode,
                vector: 0x41,
                level,
            });
            assert_eq!(p.take(), Vec::from_iter(events), "{high:#x} {low:#x}");
            ioapic.process_eoi(&p, 0x41);
        }
    }

    #[test]
    fn pins_that_do_not_exist() {
        let p = TestPlatform::new(1);
        let ioapic = Vioapic::new();
        let before = ioapic.save();
        for pin in [32, 0xff] {
            ioapic.assert_irq(&p, pin);
            ioapic.pulse_irq(&p, pin);
            ioapic.deassert_irq(&p, pin);
        }
        assert_eq!(ioapic.save(), before);
        ioapic.deassert_irq(&p, 1);
        assert_eq!(ioapic.save(), before, "nobody asserts it");
    }

    #[test]
    fn reset_forgets_everything() {
        let p = TestPlatform::new(1);
        let ioapic = Vioapic::new();
        route(&p, &ioapic, 9, RTE_LEVEL | 0x59);
        ioapic.assert_irq(&p, 9);
        ioapic.reset(&p);
        assert_eq!(ioapic.save(), Vioapic::new().save());
    }

    proptest! {
        #[test]
        fn any_sequence_leaves_a_state_that_can_be_restored(
            ops in prop::collection::vec((0u8..7, any::<u64>(), 0usize..17, 0u8..40), 1..200),
        ) {
            let p = TestPlatform::new(1);
            let ioapic = Vioapic::new();
            for (op, value, size, pin) in ops {
                match op {
                    0 => ioapic.mmio_write(&p, IOREGSEL, 4, u64::from(pin) + 8),
                    1 => ioapic.mmio_write(&p, IOWIN, 4, value),
                    2 => ioapic.mmio_write(&p, value >> 40, size, value),
                    3 => drop(ioapic.mmio_read(&p, value, size)),
                    4 => ioapic.assert_irq(&p, pin),
                    5 => ioapic.deassert_irq(&p, pin),
                    _ => ioapic.process_eoi(&p, value as u8),
                }
                let state = ioapic.save();
                for pin in 0..PINS {
                    // No level is forgotten: an asserted one is masked, or waits for its EOI, or
                    // has a mode that is never a level.
                    let (rte, asserted) = (state.rte[pin], state.asserted[pin] != 0);
                    let waits = rte & (RTE_MASKED | RTE_REMOTE_IRR) != 0;
                    let level = rte & RTE_LEVEL != 0 && rte & 0x600 == 0;
                    prop_assert!(!(asserted && level) || waits, "pin {} {:#x}", pin, rte);
                }
            }
            let copy = Vioapic::new();
            copy.restore(&p, ioapic.save()).unwrap();
            prop_assert_eq!(copy.save(), ioapic.save());
        }
    }
}
