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
