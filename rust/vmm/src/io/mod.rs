//! In-kernel devices: what bhyve keeps in sys/amd64/vmm/io.
//!
//! A device is a register machine behind one lock; its whole state is a plain value with a
//! `version` that `save` copies out and `restore` takes back.  It keeps no pointer to the VM:
//! each entry point is handed a [`Platform`].
//!
//! # Lock order
//! Interrupts flow one way:
//!
//! ```text
//! vatpit, vhpet, vrtc  ->  vatpic  ->  vioapic  ->  vlapic  ->  a vCPU's mailbox
//! ```
//!
//! A device may hold its lock while it calls a Platform function that ends further down this
//! line (`isa_irq`, `pic_intr`, `apic_message`), so a line's edges reach the next device in the
//! order in which they happened.  Calls that flow the other way or sideways (`eoi_broadcast`,
//! IPIs, and `post_*`, which may reset the caller) are made with no lock held.  The clock, `arm`,
//! `disarm`, `ncpu` and `notify` are leaves: they must never call a device.

use std::borrow::Borrow;
use std::error::Error;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::platform::{DeliveryMode, NotDecoded, Platform};

pub mod vatpic;
pub mod vatpit;
pub mod vhpet;
pub mod vioapic;
pub mod vlapic;
pub mod vpmtmr;
pub mod vrtc;

#[cfg(test)]
pub(crate) mod testplat;

use vlapic::Vlapic;

const NS_PER_SEC: u128 = 1_000_000_000;

/// A guest can program a timer that expires every few nanoseconds and would keep the host busy
/// with nothing else.  A periodic timer is not called back sooner than this after its last
/// expiry (ns); expiries in between coalesce, as they do in an interrupt request register.
const MIN_CALLOUT_PERIOD: u64 = 20_000;

/// A saved state that cannot be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateError {
    pub device: &'static str,
    pub version: u32,
    pub expected: u32,
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, version, expected } = self;
        write!(f, "{device}: saved state has version {version}, this program reads {expected}")
    }
}

impl Error for StateError {}

fn check_version(device: &'static str, version: u32, expected: u32) -> Result<(), StateError> {
    if version == expected { Ok(()) } else { Err(StateError { device, version, expected }) }
}

/// A panic elsewhere must not take the guest's devices with it: their state is plain values.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whole ticks of a clock of `hz` in `ns` nanoseconds.
fn ns_to_ticks(ns: u64, hz: u64) -> u64 {
    u64::try_from(u128::from(ns) * u128::from(hz) / NS_PER_SEC).unwrap_or(u64::MAX)
}

/// The first nanosecond at which `ticks` of a clock of `hz` have passed.
fn ticks_to_ns(ticks: u64, hz: u64) -> u64 {
    u64::try_from((u128::from(ticks) * NS_PER_SEC).div_ceil(u128::from(hz))).unwrap_or(u64::MAX)
}

/// The `size` low bytes of `value`.
fn truncate(value: u64, size: usize) -> u64 {
    if size >= 8 { value } else { value & ((1 << (8 * size)) - 1) }
}

/// A read of `size` bytes from byte-wide ports, as an ISA bus does it: a byte at a time.
/// A port inside the access that nobody decodes reads as ones; `NotDecoded` if all are.
fn read_ports(
    port: u16,
    size: usize,
    mut byte: impl FnMut(u16) -> Option<u8>,
) -> Result<u32, NotDecoded> {
    let mut decoded = false;
    let mut bytes = [0xff; 4];
    for (i, b) in bytes.iter_mut().enumerate().take(size) {
        if let Some(v) = byte(port.wrapping_add(i as u16)) {
            *b = v;
            decoded = true;
        }
    }
    if !decoded {
        return Err(NotDecoded);
    }
    Ok(truncate(u32::from_le_bytes(bytes).into(), size) as u32)
}

/// A write of `size` bytes to byte-wide ports; `byte` says whether it decodes the port.
fn write_ports(
    port: u16,
    size: usize,
    value: u32,
    mut byte: impl FnMut(u16, u8) -> bool,
) -> Result<(), NotDecoded> {
    let mut decoded = false;
    for (i, &b) in value.to_le_bytes().iter().enumerate().take(size) {
        decoded |= byte(port.wrapping_add(i as u16), b);
    }
    if decoded { Ok(()) } else { Err(NotDecoded) }
}

/// What an MSI's address and data say (Intel SDM 3A, 11.11), and the 15-bit destination of
/// CPUID 0x40000001 EAX bit 0, whose upper seven bits are address bits 11:5.
///
/// An address outside 0xFEExxxxx is no interrupt and is dropped.
pub fn msi_message(p: &dyn Platform, addr: u64, data: u32) {
    if addr & !0xf_ffff != 0xfee0_0000 {
        return;
    }
    let extended = (addr >> 5 & 0x7f) as u32;
    let dest = (addr >> 12 & 0xff) as u32 | extended << 8;
    let logical = addr & 1 << 2 != 0;
    let Some(mode) = delivery_mode(data >> 8) else { return };
    p.apic_message(dest, extended != 0, logical, mode, data as u8, data & 1 << 15 != 0);
}

/// The delivery mode in the low three bits of `field`; none for the reserved one.
fn delivery_mode(field: u32) -> Option<DeliveryMode> {
    match field & 7 {
        0 => Some(DeliveryMode::Fixed),
        1 => Some(DeliveryMode::LowestPriority),
        2 => Some(DeliveryMode::Smi),
        4 => Some(DeliveryMode::Nmi),
        5 => Some(DeliveryMode::Init),
        6 => Some(DeliveryMode::StartUp),
        7 => Some(DeliveryMode::ExtInt),
        _ => None,
    }
}

/// [`Platform::apic_message`] for a machine whose local APICs are `lapics`: every one that the
/// destination names gets the message, or, with lowest priority, the one that is least busy.
#[allow(clippy::too_many_arguments)] // the message's fields, in apic_message's order
pub fn route_message<L: Borrow<Vlapic>>(
    p: &dyn Platform,
    lapics: &[L],
    dest: u32,
    dest_x2: bool,
    logical: bool,
    mode: DeliveryMode,
    vector: u8,
    level: bool,
) {
    let named = lapics.iter().map(Borrow::borrow).filter(|l| l.matches(dest, dest_x2, logical));
    if mode == DeliveryMode::LowestPriority {
        if let Some(lapic) = named.min_by_key(|l| l.priority()) {
            lapic.deliver(p, mode, vector, level);
        }
    } else {
        named.for_each(|lapic| lapic.deliver(p, mode, vector, level));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::testplat::{Event, TestPlatform};
    use super::vatpic::Vatpic;
    use super::vatpit::Vatpit;
    use super::vhpet::Vhpet;
    use super::vioapic::Vioapic;
    use super::vrtc::Vrtc;
    use super::*;
    use crate::platform::Callout;

    /// All the devices, wired as a PC wires them.
    struct Board {
        base: TestPlatform,
        lapics: Vec<Vlapic>,
        ioapic: Vioapic,
        pic: Vatpic,
        pit: Vatpit,
        hpet: Vhpet,
        rtc: Vrtc,
    }

    const SVR: u64 = 0xf0;
    const EOI: u64 = 0xb0;
    const LDR: u64 = 0xd0;
    const ICR: u64 = 0x300;

    impl Board {
        fn new(ncpu: u32) -> Self {
            let board = Self {
                base: TestPlatform::new(ncpu),
                lapics: (0..ncpu).map(Vlapic::new).collect(),
                ioapic: Vioapic::new(),
                pic: Vatpic::new(),
                pit: Vatpit::new(),
                hpet: Vhpet::new(),
                rtc: Vrtc::new(),
            };
            board.lapics.iter().for_each(|lapic| lapic.reset(&board));
            board.rtc.reset(&board);
            board
        }

        fn enable_apics(&self) {
            for (id, lapic) in self.lapics.iter().enumerate() {
                lapic.mmio_write(self, SVR, 4, 0x1ff);
                lapic.mmio_write(self, LDR, 4, 0x100_0000 << id);
            }
        }

        fn route(&self, pin: u64, entry: u64) {
            for (index, half) in [(0x11, entry >> 32), (0x10, entry & 0xffff_ffff)] {
                self.ioapic.mmio_write(self, 0, 4, index + 2 * pin);
                self.ioapic.mmio_write(self, 0x10, 4, half);
            }
        }

        fn init_pic(&self) {
            for (port, value) in [
                (0x20, 0x11),
                (0x21, 0x30),
                (0x21, 4),
                (0x21, 1),
                (0xa0, 0x11),
                (0xa1, 0x38),
                (0xa1, 2),
                (0xa1, 1),
            ] {
                self.pic.write(self, port, 1, value).unwrap();
            }
        }

        fn start_pit(&self, count: u16) {
            let [low, high] = count.to_le_bytes();
            for (port, value) in [(0x43, 0x34), (0x40, low), (0x40, high)] {
                self.pit.write(self, port, 1, value.into()).unwrap();
            }
        }

        fn run(&self, ns: u64) {
            let at = self.base.now() + ns;
            self.base.run_until(at, Callout::PitChannel0, |_| self.pit.callout(self));
        }

        fn pending(&self) -> Vec<Option<u8>> {
            self.lapics.iter().map(Vlapic::pending_intr).collect()
        }
    }

    impl Platform for Board {
        fn now(&self) -> u64 {
            self.base.now()
        }

        fn tsc_hz(&self) -> u64 {
            self.base.tsc_hz()
        }

        fn tsc(&self, vcpu: u32) -> u64 {
            self.base.tsc(vcpu)
        }

        fn tsc_to_ns(&self, vcpu: u32, tsc: u64) -> u64 {
            self.base.tsc_to_ns(vcpu, tsc)
        }

        fn wall_clock(&self) -> (i64, u32) {
            self.base.wall_clock()
        }

        fn arm(&self, callout: Callout, at: u64) {
            self.base.arm(callout, at);
        }

        fn disarm(&self, callout: Callout) {
            self.base.disarm(callout);
        }

        fn notify(&self, vcpu: u32) {
            self.base.notify(vcpu);
        }

        fn post_nmi(&self, vcpu: u32) {
            self.base.post_nmi(vcpu);
        }

        fn post_init(&self, vcpu: u32) {
            self.lapics[vcpu as usize].init_reset(self);
            self.base.post_init(vcpu);
        }

        fn post_sipi(&self, vcpu: u32, vector: u8) {
            self.base.post_sipi(vcpu, vector);
        }

        fn ncpu(&self) -> u32 {
            self.base.ncpu()
        }

        fn apic_message(
            &self,
            dest: u32,
            dest_x2: bool,
            logical: bool,
            mode: DeliveryMode,
            vector: u8,
            level: bool,
        ) {
            route_message(self, &self.lapics, dest, dest_x2, logical, mode, vector, level);
        }

        fn eoi_broadcast(&self, vector: u8) {
            self.ioapic.process_eoi(self, vector);
        }

        fn isa_irq(&self, atpic_irq: Option<u8>, ioapic_pin: Option<u8>, level: bool) {
            if let Some(irq) = atpic_irq {
                self.pic.set_irq(self, irq, level);
            }
            if let Some(pin) = ioapic_pin {
                self.ioapic.set_irq(self, pin, level);
            }
        }

        fn pic_intr(&self, level: bool) {
            self.lapics.iter().for_each(|lapic| lapic.lint(self, 0, level));
            self.ioapic.set_irq(self, 0, level);
        }
    }

    #[test]
    fn timer_interrupt_before_any_apic_is_enabled() {
        let board = Board::new(2);
        board.init_pic();
        board.start_pit(11_932);
        board.run(100_000_000);
        assert_eq!(board.pic.pending_intr(), Some(0x30));
        assert!(board.lapics[0].accepts_extint());
        assert!(!board.lapics[1].accepts_extint());
        assert_eq!(board.base.take(), [Event::Notify(0)]);
        for _ in 0..3 {
            board.pic.intr_accepted(&board, 0x30);
            board.pic.write(&board, 0x20, 1, 0x20).unwrap();
            assert_eq!(board.pic.pending_intr(), None);
            board.run(10_100_000);
            assert_eq!(board.pic.pending_intr(), Some(0x30));
            assert_eq!(board.base.take(), [Event::Notify(0)]);
        }
    }

    #[test]
    fn timer_interrupt_through_the_ioapic() {
        let board = Board::new(2);
        board.enable_apics();
        board.route(2, 1 << 56 | 0x51);
        board.start_pit(11_932);
        board.run(10_100_000);
        assert_eq!(board.pending(), [None, Some(0x51)]);
        assert_eq!(board.pic.pending_intr(), None, "nobody has set up the PIC");
    }

    #[test]
    fn pic_through_the_ioapic() {
        let board = Board::new(1);
        board.enable_apics();
        board.init_pic();
        board.route(0, 0x700);
        assert!(!board.lapics[0].accepts_extint());
        board.start_pit(11_932);
        board.run(10_100_000);
        assert!(board.lapics[0].accepts_extint());
        board.pic.intr_accepted(&board, 0x30);
        assert!(!board.lapics[0].accepts_extint());
        board.pic.write(&board, 0x20, 1, 0x20).unwrap();
        board.run(10_100_000);
        assert!(board.lapics[0].accepts_extint(), "each interrupt is an edge");
    }

    #[test]
    fn level_interrupt_comes_again_until_it_is_served() {
        let board = Board::new(2);
        board.enable_apics();
        board.route(20, 1 << 56 | 0x8061);
        let lapic = &board.lapics[1];
        board.ioapic.assert_irq(&board, 20);
        for _ in 0..3 {
            assert_eq!(lapic.pending_intr(), Some(0x61));
            lapic.intr_accepted(&board, 0x61);
            assert_eq!(lapic.pending_intr(), None);
            lapic.mmio_write(&board, EOI, 4, 0);
        }
        lapic.intr_accepted(&board, 0x61);
        board.ioapic.deassert_irq(&board, 20);
        lapic.mmio_write(&board, EOI, 4, 0);
        assert_eq!(lapic.pending_intr(), None);
    }

    #[test]
    fn interprocessor_interrupts_arrive() {
        // Low half of ICR with destination 2 (vCPU 2, or logical vCPU 1); who gets it of four.
        let table = [
            (0x0_0041, [false, false, true, false]),
            (0x0_0841, [false, true, false, false]),
            (0x4_0041, [false, true, false, false]),
            (0x8_0041, [true; 4]),
            (0xc_0041, [true, false, true, true]),
        ];
        for (icr, receives) in table {
            let board = Board::new(4);
            board.enable_apics();
            let sender = &board.lapics[1];
            sender.mmio_write(&board, ICR + 0x10, 4, 2 << 24);
            sender.mmio_write(&board, ICR, 4, icr);
            let expected = receives.map(|receives| receives.then_some(0x41));
            assert_eq!(board.pending(), expected, "{icr:#x}");
        }
    }

    #[test]
    fn init_and_startup_reach_the_others() {
        let board = Board::new(3);
        board.enable_apics();
        board.lapics[0].mmio_write(&board, ICR, 4, 0xc_4500);
        board.lapics[0].mmio_write(&board, ICR, 4, 0xc_4608);
        let expected = [Event::Init(1), Event::Init(2), Event::Sipi(1, 8), Event::Sipi(2, 8)];
        assert_eq!(board.base.take_deliveries(), expected);
        assert_eq!(board.lapics[1].mmio_read(&board, SVR, 4), 0xff);
    }

    #[test]
    fn lowest_priority_goes_to_the_least_busy() {
        let board = Board::new(3);
        board.enable_apics();
        board.lapics[0].set_cr8(&board, 8);
        board.lapics[1].set_cr8(&board, 4);
        board.lapics[2].set_cr8(&board, 6);
        msi_message(&board, 0xfee0_7004, 0x0191);
        assert_eq!(board.pending(), [None, Some(0x91), None]);
        msi_message(&board, 0xfee0_7004, 0x0192);
        assert_eq!(board.pending(), [None, Some(0x91), Some(0x92)], "the first is busy now");
        msi_message(&board, 0xfee0_5004, 0x01a1);
        assert_eq!(board.pending(), [Some(0xa1), Some(0x91), Some(0x92)]);
        board.lapics.iter().for_each(|lapic| lapic.mmio_write(&board, SVR, 4, 0xff));
        msi_message(&board, 0xfee0_7004, 0x01f1);
        assert_eq!(board.pending(), [Some(0xa1), Some(0x91), Some(0x92)], "nobody takes it");
    }

    #[test]
    fn message_signalled_interrupts() {
        let message = |dest, x2, logical, mode, vector, level| {
            Some(Event::Message { dest, x2, logical, mode, vector, level })
        };
        use DeliveryMode::{ExtInt, Fixed, LowestPriority, Nmi};
        let table = [
            (0xfee0_0000, 0x0041, message(0, false, false, Fixed, 0x41, false)),
            (0xfeef_f000, 0x4041, message(0xff, false, false, Fixed, 0x41, false)),
            (0xfee1_200c, 0xc141, message(0x12, false, true, LowestPriority, 0x41, true)),
            (0xfee0_1000, 0x0400, message(1, false, false, Nmi, 0, false)),
            (0xfee0_1000, 0x0700, message(1, false, false, ExtInt, 0, false)),
            (0xfee0_1020, 0x0041, message(0x101, true, false, Fixed, 0x41, false)),
            (0xfeef_ffe0, 0x0041, message(0x7fff, true, false, Fixed, 0x41, false)),
            (0xfee0_0000, 0x0341, None),
            (0xfed0_0000, 0x0041, None),
            (0x1_fee0_0000, 0x0041, None),
        ];
        for (addr, data, expected) in table {
            let p = TestPlatform::new(1);
            msi_message(&p, addr, data);
            assert_eq!(p.take(), Vec::from_iter(expected), "{addr:#x} {data:#x}");
        }
    }

    #[test]
    fn ticks_and_nanoseconds() {
        for hz in [32_768, 1_193_182, 3_579_545, 1 << 24, 1 << 27, 3_000_000_000] {
            for ticks in [0, 1, 2, hz - 1, hz, hz * 1000 + 1, 1 << 40] {
                let ns = ticks_to_ns(ticks, hz);
                assert!(ns_to_ticks(ns, hz) >= ticks);
                assert!(ns == 0 || ns_to_ticks(ns - 1, hz) < ticks.max(1));
            }
        }
        assert_eq!(ticks_to_ns(u64::MAX, 1), u64::MAX);
        assert_eq!(ns_to_ticks(u64::MAX, u64::MAX), u64::MAX);
    }

    /// Every path that takes two locks, from several threads at once.
    #[test]
    fn no_deadlock() {
        const ROUNDS: u64 = 3000;
        let board = Arc::new(Board::new(3));
        board.enable_apics();
        board.init_pic();
        board.route(2, 0xff << 56 | 0x51);
        board.route(20, 1 << 56 | 0x8061);
        for lapic in &board.lapics {
            lapic.mmio_write(&*board, 0x350, 4, 0x8071);
        }
        let (done, finished) = mpsc::channel();
        for id in 0..5 {
            let (board, done) = (Arc::clone(&board), done.clone());
            thread::spawn(move || {
                for round in 0..ROUNDS {
                    match id {
                        0..3 => {
                            let lapic = &board.lapics[id];
                            lapic.mmio_write(&*board, ICR, 4, 0x8_0081 + ((round % 3) << 18));
                            // Not until there are no more: levels come back for as long as
                            // another thread holds them.
                            for _ in 0..4 {
                                if let Some(vector) = lapic.pending_intr() {
                                    lapic.intr_accepted(&*board, vector);
                                    lapic.mmio_write(&*board, EOI, 4, 0);
                                }
                            }
                        }
                        3 => {
                            board.ioapic.assert_irq(&*board, 20);
                            board.start_pit(2);
                            board.base.advance(1000);
                            board.pit.callout(&*board);
                            board.ioapic.deassert_irq(&*board, 20);
                        }
                        _ => {
                            board.pic.pulse_irq(&*board, (round % 16) as u8);
                            if let Some(vector) = board.pic.pending_intr() {
                                board.pic.intr_accepted(&*board, vector);
                            }
                            board.pic.write(&*board, 0x20, 1, 0x20).unwrap();
                            board.pic.write(&*board, 0xa0, 1, 0x20).unwrap();
                        }
                    }
                }
                done.send(()).unwrap();
            });
        }
        for _ in 0..5 {
            finished.recv_timeout(Duration::from_secs(60)).expect("devices have deadlocked");
        }
    }

    proptest! {
        /// A guest that writes anything anywhere.
        #[test]
        fn hostile_guest(
            ops in prop::collection::vec((0u8..8, any::<u32>(), any::<u64>()), 1..150),
        ) {
            const PORTS: [u16; 14] = [
                0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x70, 0x71,
                0x408,
            ];
            let board = Board::new(2);
            board.enable_apics();
            board.init_pic();
            for (op, place, value) in ops {
                let port = PORTS[place as usize % PORTS.len()];
                let size = 1 << (place >> 28 & 3);
                let lapic = &board.lapics[place as usize >> 12 & 1];
                match op {
                    0 | 1 => {
                        let value = value as u32;
                        let _ = board.pic.write(&board, port, size, value);
                        let _ = board.pit.write(&board, port, size, value);
                        let _ = board.rtc.write(&board, port, size, value);
                    }
                    2 => {
                        let _ = board.pic.read(&board, port, size);
                        let _ = board.pit.read(&board, port, size);
                        let _ = board.rtc.read(&board, port, size);
                    }
                    3 => lapic.mmio_write(&board, u64::from(place & 0x3f) << 4, 4, value),
                    4 => {
                        let index = value >> 40 & 0x3f;
                        board.ioapic.mmio_write(&board, 0, 4, index);
                        board.ioapic.mmio_write(&board, 0x10, 4, value);
                    }
                    5 => board.hpet.mmio_write(&board, u64::from(place & 0x7f) << 3, 8, value),
                    6 => {
                        if let Some(vector) = lapic.pending_intr() {
                            lapic.intr_accepted(&board, vector);
                        }
                        if let Some(vector) = board.pic.pending_intr() {
                            board.pic.intr_accepted(&board, vector);
                        }
                    }
                    _ => {
                        board.base.advance(value >> 28);
                        board.pit.callout(&board);
                        board.rtc.callout(&board);
                        (0..8).for_each(|n| board.hpet.callout(&board, n));
                        board.lapics.iter().for_each(|lapic| lapic.callout(&board));
                    }
                }
            }
        }
    }
}
