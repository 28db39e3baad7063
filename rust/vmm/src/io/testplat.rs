//! A machine for device tests: a clock that the test turns, and a record of what devices asked.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{ns_to_ticks, ticks_to_ns};
use crate::platform::{Callout, DeliveryMode, Platform};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Notify(u32),
    Nmi(u32),
    Init(u32),
    Sipi(u32, u8),
    Message { dest: u32, x2: bool, logical: bool, mode: DeliveryMode, vector: u8, level: bool },
    Eoi(u8),
    Isa(Option<u8>, Option<u8>, bool),
    Pulse(Option<u8>, Option<u8>),
    PicIntr(bool),
}

pub(crate) struct TestPlatform {
    now: AtomicU64,
    pub ncpu: u32,
    events: Mutex<Vec<Event>>,
    armed: Mutex<BTreeMap<Callout, u64>>,
}

impl TestPlatform {
    pub const TSC_HZ: u64 = 1_000_000_000;
    pub const WALL: i64 = 1_700_000_000;

    pub fn new(ncpu: u32) -> Self {
        Self { now: 0.into(), ncpu, events: Mutex::default(), armed: Mutex::default() }
    }

    /// What devices have asked for since the last call.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    /// The same without wake-ups, which say nothing about what a guest sees.
    pub fn take_deliveries(&self) -> Vec<Event> {
        let mut events = self.take();
        events.retain(|e| !matches!(e, Event::Notify(_)));
        events
    }

    pub fn armed(&self, callout: Callout) -> Option<u64> {
        self.armed.lock().unwrap().get(&callout).copied()
    }

    pub fn advance(&self, ns: u64) {
        self.now.fetch_add(ns, Ordering::SeqCst);
    }

    /// Turn the clock to `at`, running `callout` whenever it is due on the way.
    pub fn run_until(&self, at: u64, callout: Callout, mut run: impl FnMut(&Self)) {
        while let Some(due) = self.armed(callout).filter(|&due| due <= at) {
            self.armed.lock().unwrap().remove(&callout);
            self.now.fetch_max(due, Ordering::SeqCst);
            run(self);
        }
        self.now.fetch_max(at, Ordering::SeqCst);
    }

    fn record(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }
}

impl Platform for TestPlatform {
    fn now(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }

    fn tsc_hz(&self) -> u64 {
        Self::TSC_HZ
    }

    fn tsc(&self, _vcpu: u32) -> u64 {
        ns_to_ticks(self.now(), Self::TSC_HZ)
    }

    fn tsc_to_ns(&self, _vcpu: u32, tsc: u64) -> u64 {
        ticks_to_ns(tsc, Self::TSC_HZ)
    }

    fn wall_clock(&self) -> (i64, u32) {
        (Self::WALL, 0)
    }

    fn arm(&self, callout: Callout, at: u64) {
        self.armed.lock().unwrap().insert(callout, at);
    }

    fn disarm(&self, callout: Callout) {
        self.armed.lock().unwrap().remove(&callout);
    }

    fn notify(&self, vcpu: u32) {
        self.record(Event::Notify(vcpu));
    }

    fn post_nmi(&self, vcpu: u32) {
        self.record(Event::Nmi(vcpu));
    }

    fn post_init(&self, vcpu: u32) {
        self.record(Event::Init(vcpu));
    }

    fn post_sipi(&self, vcpu: u32, vector: u8) {
        self.record(Event::Sipi(vcpu, vector));
    }

    fn ncpu(&self) -> u32 {
        self.ncpu
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
        self.record(Event::Message { dest, x2: dest_x2, logical, mode, vector, level });
    }

    fn eoi_broadcast(&self, vector: u8) {
        self.record(Event::Eoi(vector));
    }

    fn isa_irq(&self, atpic_irq: Option<u8>, ioapic_pin: Option<u8>, level: bool) {
        self.record(Event::Isa(atpic_irq, ioapic_pin, level));
    }

    fn isa_pulse(&self, atpic_irq: Option<u8>, ioapic_pin: Option<u8>) {
        self.record(Event::Pulse(atpic_irq, ioapic_pin));
    }

    fn pic_intr(&self, level: bool) {
        self.record(Event::PicIntr(level));
    }
}
