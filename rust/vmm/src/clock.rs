//! Time: the VM's clock, the guest's time-stamp counter, and deadlines.
//!
//! There is one source of time for a VM.  Clock and TSC are two scales of the same count, so
//! they never disagree, and both stand still while the VM is paused.

use std::collections::{BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::platform::Callout;

const NS_PER_S: u64 = 1_000_000_000;

/// Fraction bits of a scale: a factor below 16, as between counters of 63 MHz to 16 GHz.
const SCALE_SHIFT: u32 = 60;

/// A factor as a fixed-point number.
#[derive(Clone, Copy)]
struct Scale(u64);

impl Scale {
    /// `to / from`; `None` where that is not below 16.
    fn new(from: u64, to: u64) -> Option<Scale> {
        let scale = (u128::from(to) << SCALE_SHIFT).checked_div(u128::from(from))?;
        u64::try_from(scale).ok().map(Scale)
    }

    fn floor(self, n: u64) -> u64 {
        ((u128::from(n) * u128::from(self.0)) >> SCALE_SHIFT) as u64
    }

    fn ceil(self, n: u64) -> u64 {
        let product = u128::from(n) * u128::from(self.0);
        u64::try_from(product.div_ceil(1 << SCALE_SHIFT)).unwrap_or(u64::MAX)
    }
}

/// The host's counter that all VM clocks count with.
struct Counter {
    tsc: bool,
    hz: u64,
    start: Instant,
}

impl Counter {
    /// The host's TSC where it can be relied on, else CLOCK_MONOTONIC.
    fn host() -> &'static Counter {
        static HOST: OnceLock<Counter> = OnceLock::new();
        HOST.get_or_init(|| {
            let start = Instant::now();
            match tsc_is_steady().then(|| tsc_frequency(start)).flatten() {
                Some(hz) => Counter { tsc: true, hz, start },
                None => Counter { tsc: false, hz: NS_PER_S, start },
            }
        })
    }

    fn read(&self) -> u64 {
        if self.tsc { rdtsc() } else { self.start.elapsed().as_nanos() as u64 }
    }
}

/// The host's TSC, neither before nor after what the program does around it.
fn rdtsc() -> u64 {
    use std::arch::x86_64::{_mm_lfence, _rdtsc};
    // SAFETY: every x86-64 processor has LFENCE and RDTSC; the kernel does not forbid RDTSC,
    // or `tsc_is_steady` would not have said so.
    unsafe {
        _mm_lfence();
        let tsc = _rdtsc();
        _mm_lfence();
        tsc
    }
}

/// Whether the TSC runs at one rate on all processors: CPUID says invariant, or the kernel
/// itself keeps time with it.
fn tsc_is_steady() -> bool {
    use std::arch::x86_64::__cpuid;
    let invariant =
        __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & 1 << 8 != 0;
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    invariant || std::fs::read_to_string(source).is_ok_and(|s| s.trim() == "tsc")
}

/// Count the TSC against CLOCK_MONOTONIC for 20 ms.  `None` where that makes no sense.
///
/// CPUID leaf 0x15 is no better: many processors leave it empty, and hypervisors scale it.
fn tsc_frequency(start: Instant) -> Option<u64> {
    // A reading of both that was not torn apart by the scheduler.
    let pair = || {
        (0..16)
            .map(|_| {
                let before = rdtsc();
                let ns = start.elapsed().as_nanos() as u64;
                let after = rdtsc();
                (
                    after.wrapping_sub(before),
                    before.wrapping_add(after.wrapping_sub(before) / 2),
                    ns,
                )
            })
            .min_by_key(|(width, ..)| *width)
            .map(|(_, tsc, ns)| (tsc, ns))
    };
    let (tsc0, ns0) = pair()?;
    thread::sleep(Duration::from_millis(20));
    let (tsc1, ns1) = pair()?;
    let hz = u128::from(tsc1.checked_sub(tsc0)?) * u128::from(NS_PER_S)
        / u128::from(ns1.checked_sub(ns0).filter(|ns| *ns > 0)?);
    // Kernels round to kHz as well; a frequency with noise in its last digits helps nobody.
    let hz = u64::try_from(hz).ok()? / 1000 * 1000;
    (100_000_000..=10_000_000_000).contains(&hz).then_some(hz)
}

/// State of a [`Clock`], for save and restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    pub version: u32,
    /// Guest TSC, without any vCPU's TSC_ADJUST.
    pub tsc: u64,
    /// Its frequency; kept over a restore on a host with another.
    pub tsc_hz: u64,
}

/// How the host's count becomes the guest's.  Written under `Clock::change`, read by anyone.
#[derive(Default)]
struct Origin {
    /// Odd while the rest is being changed.
    sequence: AtomicU64,
    /// The host's count at which the guest's was `tsc`; `STOPPED` while paused.
    host: AtomicU64,
    tsc: AtomicU64,
    /// Guest ticks for each host tick (`Scale`).
    scale: AtomicU64,
    tsc_hz: AtomicU64,
    /// Nanoseconds for each guest tick (`Scale`).
    ns_scale: AtomicU64,
}

/// In place of a host count: no counter reaches it.
const STOPPED: u64 = u64::MAX;

/// The clock of a VM; starts at 0 and runs.
pub struct Clock {
    origin: Origin,
    change: Mutex<()>,
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock {
    pub fn new() -> Clock {
        let clock = Clock { origin: Origin::default(), change: Mutex::default() };
        let hz = Counter::host().hz;
        clock.set_frequency(hz).expect("a host counter has 100 MHz to 10 GHz");
        clock.update(|_| (0, true));
        clock
    }

    /// The guest's TSC when the host's counter reads `count`.
    fn at(&self, count: u64) -> u64 {
        let o = &self.origin;
        let tsc = o.tsc.load(Ordering::Relaxed);
        match o.host.load(Ordering::Relaxed) {
            STOPPED => tsc,
            // Two processors' counters may differ by less than anyone can tell.
            host => {
                let scale = Scale(o.scale.load(Ordering::Relaxed));
                tsc.wrapping_add(scale.floor(count.saturating_sub(host)))
            }
        }
    }

    /// Guest TSC: (its value now, nanoseconds for a tick).
    fn sample(&self) -> (u64, Scale) {
        let o = &self.origin;
        loop {
            let sequence = o.sequence.load(Ordering::Acquire);
            let tsc = self.at(Counter::host().read());
            let ns_scale = Scale(o.ns_scale.load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            if sequence & 1 == 0 && sequence == o.sequence.load(Ordering::Relaxed) {
                return (tsc, ns_scale);
            }
            std::hint::spin_loop();
        }
    }

    /// Go on from the (TSC, running) that `next` makes of the present TSC.
    fn update(&self, next: impl FnOnce(u64) -> (u64, bool)) {
        let _changing = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let o = &self.origin;
        o.sequence.fetch_add(1, Ordering::SeqCst);
        // Counted after readers were turned away: none of them has seen a later time.
        let count = Counter::host().read();
        let (tsc, run) = next(self.at(count));
        o.tsc.store(tsc, Ordering::Relaxed);
        o.host.store(if run { count } else { STOPPED }, Ordering::Relaxed);
        o.sequence.fetch_add(1, Ordering::SeqCst);
    }

    fn set_frequency(&self, tsc_hz: u64) -> Result<()> {
        let scales = Scale::new(Counter::host().hz, tsc_hz).zip(Scale::new(tsc_hz, NS_PER_S));
        let Some((scale, ns_scale)) = scales else {
            return Err(Error::Invalid(format!("a TSC of {tsc_hz} Hz cannot be kept here")));
        };
        let _changing = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let o = &self.origin;
        o.sequence.fetch_add(1, Ordering::SeqCst);
        o.scale.store(scale.0, Ordering::SeqCst);
        o.ns_scale.store(ns_scale.0, Ordering::SeqCst);
        o.tsc_hz.store(tsc_hz, Ordering::SeqCst);
        o.sequence.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Nanoseconds since the VM was made, less the time it was paused.
    pub fn now(&self) -> u64 {
        let (tsc, ns) = self.sample();
        ns.floor(tsc)
    }

    /// The guest's time-stamp counter, without any vCPU's TSC_ADJUST.
    pub fn tsc(&self) -> u64 {
        self.sample().0
    }

    pub fn tsc_hz(&self) -> u64 {
        self.origin.tsc_hz.load(Ordering::Relaxed)
    }

    /// The value of `now()` from which on `tsc()` is at least `tsc`.
    pub fn tsc_to_ns(&self, tsc: u64) -> u64 {
        Scale(self.origin.ns_scale.load(Ordering::Relaxed)).ceil(tsc)
    }

    /// Stand still.  Nothing happens when the clock stands already.
    pub fn pause(&self) {
        self.update(|tsc| (tsc, false));
    }

    /// Go on from where `pause` stopped.
    pub fn resume(&self) {
        self.update(|tsc| (tsc, true));
    }

    pub fn is_paused(&self) -> bool {
        self.origin.host.load(Ordering::Relaxed) == STOPPED
    }

    pub fn save(&self) -> ClockState {
        ClockState { version: 1, tsc: self.tsc(), tsc_hz: self.tsc_hz() }
    }

    /// Take on a saved time; runs on if it runs now.
    pub fn restore(&self, state: &ClockState) -> Result<()> {
        if state.version != 1 {
            return Err(Error::Invalid(format!(
                "clock state has version {}, not 1",
                state.version
            )));
        }
        let run = !self.is_paused();
        self.set_frequency(state.tsc_hz)?;
        self.update(|_| (state.tsc, run));
        Ok(())
    }
}

/// Host wall clock: seconds and nanoseconds since 1970-01-01 UTC.
pub fn wall_clock() -> (i64, u32) {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => (since.as_secs() as i64, since.subsec_nanos()),
        Err(before) => (-(before.duration().as_secs() as i64) - 1, 0),
    }
}

#[derive(Default)]
struct Queue {
    by_time: BTreeSet<(u64, Callout)>,
    at: HashMap<Callout, u64>,
    /// A callout is under way.
    firing: bool,
    stop: bool,
}

impl Queue {
    fn remove(&mut self, callout: Callout) -> bool {
        let Some(at) = self.at.remove(&callout) else { return false };
        self.by_time.remove(&(at, callout))
    }
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    fired: Condvar,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Deadlines on a VM's clock, and the thread that waits for them.
pub struct Timers {
    shared: Arc<Shared>,
}

impl Timers {
    /// Start the thread.  `fire` is called on it, with no lock held, for each callout whose time
    /// has come; the callout is disarmed then and may be armed again.
    pub fn start(clock: Arc<Clock>, fire: impl Fn(Callout) + Send + 'static) -> Result<Timers> {
        let shared = Arc::<Shared>::default();
        let thread_s = Arc::clone(&shared);
        thread::Builder::new()
            .name("vm timers".into())
            .spawn(move || run_timers(&thread_s, &clock, fire))
            .map_err(|cause| Error::Host { what: "cannot start a thread".into(), cause })?;
        Ok(Timers { shared })
    }

    /// Fire `callout` at `at` (ns of the clock) and at no other time.
    pub fn arm(&self, callout: Callout, at: u64) {
        let mut queue = self.shared.queue();
        queue.remove(callout);
        queue.by_time.insert((at, callout));
        queue.at.insert(callout, at);
        // The thread sleeps till the first deadline; another one need not wake it.
        let first = queue.by_time.first() == Some(&(at, callout));
        drop(queue);
        if first {
            self.shared.changed.notify_one();
        }
    }

    /// Forget `callout`; it may be firing just now.
    pub fn disarm(&self, callout: Callout) {
        self.shared.queue().remove(callout);
    }

    pub fn disarm_all(&self) {
        let mut queue = self.shared.queue();
        queue.by_time.clear();
        queue.at.clear();
    }

    /// The clock was paused, resumed or set.
    pub fn clock_changed(&self) {
        // Taking the lock makes sure that the thread is asleep or has yet to read the clock.
        drop(self.shared.queue());
        self.shared.changed.notify_one();
    }

    /// Wait for a callout that is under way: once the clock is paused, none follows.
    ///
    /// Not from a callout, nor with a lock held that one may want.
    pub fn settle(&self) {
        let mut queue = self.shared.queue();
        while queue.firing {
            queue = self.shared.fired.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Number of deadlines waiting.
    pub fn armed(&self) -> usize {
        self.shared.queue().at.len()
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        // Not joined: the thread itself may hold the last reference to the VM for a moment.
        self.shared.queue().stop = true;
        self.shared.changed.notify_one();
    }
}

fn run_timers(shared: &Shared, clock: &Clock, fire: impl Fn(Callout)) {
    // SAFETY: PR_SET_TIMERSLACK only concerns this thread; without it deadlines are 50 µs late.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    let mut queue = shared.queue();
    while !queue.stop {
        let wait = |queue| shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        let Some(&(at, callout)) = queue.by_time.first() else {
            queue = wait(queue);
            continue;
        };
        if clock.is_paused() {
            queue = wait(queue);
            continue;
        }
        let now = clock.now();
        if at > now {
            let left = Duration::from_nanos(at - now);
            let woken = shared.changed.wait_timeout(queue, left);
            queue = woken.unwrap_or_else(PoisonError::into_inner).0;
            continue;
        }
        queue.remove(callout);
        queue.firing = true;
        drop(queue);
        // A defect in one device (the panic hook has told of it) must not stop all others' time.
        let _ = catch_unwind(AssertUnwindSafe(|| fire(callout)));
        queue = shared.queue();
        queue.firing = false;
        shared.fired.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc::{self, Receiver};

    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    /// Ticks that `read` counted over some time, and that time's least and greatest length (ns),
    /// whenever the scheduler let us look.
    fn count(read: impl Fn() -> u64) -> (u64, u64, u64) {
        let ns = |from: Instant| from.elapsed().as_nanos() as u64;
        let outer = Instant::now();
        let start = read();
        let inner = Instant::now();
        thread::sleep(Duration::from_millis(100));
        let least = ns(inner);
        (read() - start, least, ns(outer))
    }

    /// 0.1 %: how well 20 ms of counting can calibrate a busy host.
    fn about(ticks: u64, least: u64, most: u64) -> bool {
        (least - least / 1000..=most + most / 1000).contains(&ticks)
    }

    #[test]
    fn it_keeps_the_host_s_time() {
        let clock = Clock::new();
        let (passed, least, most) = count(|| clock.now());
        assert!(about(passed, least, most), "{passed} ns, host {least} to {most} ns");
    }

    #[test]
    fn tsc_and_clock_are_one() {
        let clock = Clock::new();
        let tsc = clock.tsc();
        let ns = clock.now();
        let later = clock.tsc();
        assert!(clock.tsc_to_ns(tsc) <= ns + 1);
        assert!(ns <= clock.tsc_to_ns(later));
        clock.pause();
        assert!(clock.tsc_to_ns(clock.tsc()).abs_diff(clock.now()) <= 1);
    }

    #[test]
    fn it_stands_still_while_paused() {
        let clock = Clock::new();
        let host = Instant::now();
        clock.pause();
        let (now, tsc) = (clock.now(), clock.tsc());
        thread::sleep(Duration::from_millis(30));
        assert_eq!((clock.now(), clock.tsc()), (now, tsc));
        clock.pause();
        assert_eq!(clock.tsc(), tsc);
        clock.resume();
        let resumed = clock.now();
        let running = host.elapsed().as_nanos() as u64 - 30 * MS;
        assert!(resumed >= now && resumed - now <= running + MS, "the pause does not count");
        thread::sleep(Duration::from_millis(1));
        assert!(clock.now() > resumed);
    }

    #[test]
    fn no_thread_sees_it_go_back() {
        let clock = Clock::new();
        let (latest, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let before = latest.load(Ordering::SeqCst);
                        let tsc = clock.tsc();
                        assert!(tsc >= before, "{tsc} after {before}");
                        latest.fetch_max(tsc, Ordering::SeqCst);
                    }
                });
            }
            for _ in 0..2000 {
                clock.pause();
                clock.resume();
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn a_restored_clock_goes_on_at_its_own_rate() {
        let clock = Clock::new();
        let state = ClockState { version: 1, tsc: 1 << 40, tsc_hz: 1_500_000_000 };
        clock.restore(&state).unwrap();
        assert!(clock.tsc() >= 1 << 40);
        let (ticks, least, most) = count(|| clock.tsc());
        assert!(about(ticks, least * 3 / 2, most * 3 / 2), "{ticks} ticks in {least} to {most} ns");
        clock.pause();
        let saved = clock.save();
        let other = Clock::new();
        other.pause();
        other.restore(&saved).unwrap();
        assert_eq!((other.save(), other.now()), (saved, clock.now()));
    }

    #[test]
    fn a_state_that_makes_no_sense_is_refused() {
        let clock = Clock::new();
        for (version, tsc_hz) in [(2, 1 << 30), (1, 0), (1, 1), (1, u64::MAX)] {
            let state = ClockState { version, tsc: 0, tsc_hz };
            assert_eq!(clock.restore(&state).unwrap_err().errno(), libc::EINVAL);
        }
    }

    proptest! {
        #[test]
        fn a_deadline_in_ns_is_never_early(tsc in 0..u64::MAX >> 8, hz in 200_000_000..9_000_000_000_u64) {
            let scale = Scale::new(hz, NS_PER_S).unwrap();
            let at = scale.ceil(tsc);
            prop_assert!(scale.floor(tsc) <= at && at <= scale.floor(tsc) + 1);
            // The tick before is not there yet, unless it falls into the same nanosecond.
            prop_assert!(tsc == 0 || scale.floor(tsc - 1) <= at);
        }
    }

    fn timers(clock: &Arc<Clock>) -> (Timers, Receiver<(Callout, u64)>) {
        let (send, fired) = mpsc::channel();
        let fire_clock = Arc::clone(clock);
        let timers = Timers::start(Arc::clone(clock), move |callout| {
            send.send((callout, fire_clock.now())).unwrap();
        });
        (timers.unwrap(), fired)
    }

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn deadlines_fire_in_order_and_not_early() {
        let clock = Arc::new(Clock::new());
        let (timers, fired) = timers(&clock);
        clock.pause();
        let now = clock.now();
        timers.arm(Callout::Rtc, now + 30 * MS);
        timers.arm(Callout::LapicTimer(3), now + 10 * MS);
        timers.arm(Callout::PitChannel0, now);
        clock.resume();
        timers.clock_changed();
        for (callout, at) in
            [(Callout::PitChannel0, 0), (Callout::LapicTimer(3), 10), (Callout::Rtc, 30)]
        {
            let (which, when) = fired.recv_timeout(SOON).unwrap();
            assert_eq!(which, callout);
            assert!(when >= now + at * MS);
        }
        assert_eq!(timers.armed(), 0);
    }

    #[test]
    fn arming_again_replaces_and_disarming_forgets() {
        let clock = Arc::new(Clock::new());
        let (timers, fired) = timers(&clock);
        clock.pause();
        let now = clock.now();
        timers.arm(Callout::Hpet(0), now + 5 * MS);
        timers.arm(Callout::Hpet(0), now + 40 * MS);
        timers.arm(Callout::Hpet(1), now + 10 * MS);
        timers.disarm(Callout::Hpet(1));
        clock.resume();
        timers.clock_changed();
        let (which, when) = fired.recv_timeout(SOON).unwrap();
        assert_eq!(which, Callout::Hpet(0));
        assert!(when >= now + 40 * MS);
        timers.arm(Callout::Rtc, now + 3_600_000 * MS);
        timers.disarm_all();
        assert_eq!(timers.armed(), 0);
    }

    #[test]
    fn a_paused_clock_fires_nothing() {
        let clock = Arc::new(Clock::new());
        let (timers, fired) = timers(&clock);
        clock.pause();
        timers.clock_changed();
        timers.arm(Callout::Rtc, clock.now() + MS);
        assert!(fired.recv_timeout(Duration::from_millis(30)).is_err());
        clock.resume();
        timers.clock_changed();
        assert_eq!(fired.recv_timeout(SOON).unwrap().0, Callout::Rtc);
    }

    #[test]
    fn a_paused_clock_does_not_fire_what_is_due_either() {
        let clock = Arc::new(Clock::new());
        let (timers, fired) = timers(&clock);
        clock.pause();
        timers.arm(Callout::Rtc, 0);
        assert!(fired.recv_timeout(Duration::from_millis(30)).is_err());
        assert_eq!(timers.armed(), 1);
        clock.resume();
        timers.clock_changed();
        assert_eq!(fired.recv_timeout(SOON).unwrap().0, Callout::Rtc);
    }

    #[test]
    fn settling_waits_for_what_is_under_way() {
        let clock = Arc::new(Clock::new());
        let done = Arc::new(AtomicBool::new(false));
        let (send, begun) = mpsc::channel();
        let timers = {
            let done = Arc::clone(&done);
            Timers::start(Arc::clone(&clock), move |_| {
                send.send(()).unwrap();
                thread::sleep(Duration::from_millis(30));
                done.store(true, Ordering::SeqCst);
            })
        };
        let timers = timers.unwrap();
        timers.arm(Callout::Rtc, 0);
        begun.recv_timeout(SOON).unwrap();
        clock.pause();
        timers.settle();
        assert!(done.load(Ordering::SeqCst));
        timers.settle();
    }

    #[test]
    fn a_device_that_panics_does_not_stop_time() {
        let clock = Arc::new(Clock::new());
        let (send, fired) = mpsc::channel();
        let timers = Timers::start(Arc::clone(&clock), move |callout| match callout {
            Callout::Rtc => panic!("a defect, on purpose"),
            other => send.send(other).unwrap(),
        });
        let timers = timers.unwrap();
        timers.arm(Callout::Rtc, 0);
        timers.arm(Callout::PitChannel0, clock.now() + 2 * MS);
        assert_eq!(fired.recv_timeout(SOON), Ok(Callout::PitChannel0));
    }

    #[test]
    fn the_thread_ends_with_its_owner() {
        let clock = Arc::new(Clock::new());
        let (timers, fired) = timers(&clock);
        timers.arm(Callout::Rtc, u64::MAX);
        drop(timers);
        assert!(fired.recv_timeout(SOON).is_err_and(|e| e == mpsc::RecvTimeoutError::Disconnected));
    }
}
