//! fuzz-guest [SECONDS [SEED]]: hostile guests.  Random bytes run with every privilege in every mode; the
//! program ends with status 0 unless the VMM panics (101), or does not come back from the guest
//! within ten seconds of being asked to (1).

use difftest::Mode;
use difftest::generate::{Rng, instruction};
use std::process::{ExitCode, exit};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use vmm::exit::Exit;
use vmm::regs::{Reg, SegDesc};
use vmm::soft::translate::NEVER;
use vmm::vcpu::Vcpu;
use vmm::vm::Vm;

const MEMORY: u64 = 1 << 20;
const MODES: [&str; 6] = ["real", "v86", "prot16", "prot32", "compat", "long"];
/// How long one guest runs.
const SLICE: Duration = Duration::from_millis(30);

/// Random memory: noise, instructions, and small numbers that make plausible descriptors.
fn fill(rng: &mut Rng, vm: &Vm) {
    let mut bytes = Vec::with_capacity(MEMORY as usize);
    while bytes.len() < MEMORY as usize {
        match rng.below(4) {
            0 => bytes.extend(rng.word().to_le_bytes()),
            1 => bytes.extend((rng.word() & rng.word() & rng.word()).to_le_bytes()),
            _ => {
                let mode = if rng.below(2) == 0 { Mode::Long } else { Mode::Compat };
                bytes.extend(instruction(rng, mode).unwrap_or_default());
            }
        }
    }
    bytes.truncate(MEMORY as usize);
    vm.mem.write(0, &bytes).expect("inside memory");
}

/// Identity page tables of the first 2 MiB, in 4 KiB pages with random permissions.
fn page_tables(rng: &mut Rng, vm: &Vm) {
    let put = |at: u64, v: u64| vm.mem.write(at, &v.to_le_bytes()).expect("inside memory");
    put(0x1000, 0x2007);
    put(0x2000, 0x3007);
    put(0x3000, 0x4007);
    for i in 0..512 {
        let flags = if rng.below(8) == 0 { rng.word() & 0x8000_0000_0000_01FF } else { 7 };
        let to = if rng.below(16) == 0 { rng.below(512) } else { i };
        put(0x4000 + 8 * i, to << 12 | flags);
    }
}

fn set_up(rng: &mut Rng, vm: &Vm, v: &Vcpu, mode: &str) {
    fill(rng, vm);
    v.with_cpu(|c| {
        c.reset();
        let (cs, data, cr0, cr4, efer) = match mode {
            "real" => (0x9B, 0x93, 0x30, 0x200, 0),
            "v86" => (0xF3, 0xF3, 0x31, 0x201, 0),
            "prot16" => (0x9B, 0x93, 0x31, 0x200, 0),
            "prot32" => (0xC09B, 0xC093, 0x31, 0x600, 0),
            "compat" => (0xC09B, 0xC093, 0x8001_0031, 0x4_0620, 0xD01),
            _ => (0xA09B, 0xC093, 0x8001_0031, 0x4_0620, 0xD01),
        };
        let user = if mode != "real" && mode != "v86" && rng.below(2) == 0 { 0x60 } else { 0 };
        c.set_reg(Reg::Cr3, 0x1000);
        c.set_reg(Reg::Cr4, cr4);
        c.set_reg(Reg::Efer, efer);
        c.set_reg(Reg::Cr0, cr0);
        let limit = |a: u32| if a & 0x8000 != 0 { u32::MAX } else { 0xFFFF };
        for r in [Reg::Es, Reg::Ss, Reg::Ds, Reg::Fs, Reg::Gs] {
            let sel = rng.below(0x10000);
            c.set_reg(r, sel);
            let base = if data & 0x8000 != 0 { 0 } else { sel << 4 & 0xF_0000 };
            c.set_desc(r, SegDesc { base, limit: limit(data), access: data | user });
        }
        c.set_reg(Reg::Cs, 0x8);
        c.set_desc(Reg::Cs, SegDesc { base: 0, limit: limit(cs), access: cs | user });
        c.set_desc(Reg::Gdtr, SegDesc { base: rng.below(MEMORY), limit: 0xFFFF, access: 0 });
        c.set_desc(Reg::Idtr, SegDesc { base: rng.below(MEMORY), limit: 0xFFFF, access: 0 });
        let base = rng.below(MEMORY);
        c.set_desc(Reg::Tr, SegDesc { base, limit: 0x2067, access: 0x8B });
        c.set_reg(Reg::Tr, 0x40);
        for r in Reg::ALL.iter().take(15).filter(|r| !matches!(r, Reg::Cr0 | Reg::Cr3 | Reg::Cr4)) {
            c.set_reg(*r, if rng.below(2) == 0 { rng.below(MEMORY) } else { rng.word() });
        }
        c.set_reg(Reg::Rsp, rng.below(MEMORY));
        c.set_reg(Reg::Rip, rng.below(0x10000));
        let vm86 = if mode == "v86" { 0x2_0000 } else { 0 };
        c.set_reg(Reg::Rflags, rng.word() & 0x3ED5 | vm86 | 2);
    });
    if efer_mode(mode) {
        page_tables(rng, vm);
    }
}

fn efer_mode(mode: &str) -> bool {
    matches!(mode, "compat" | "long")
}

/// Answer what the guest asks for, until its time is up or its life has ended.
fn drive(rng: &mut Rng, vm: &Arc<Vm>, v: &Vcpu) -> &'static str {
    let end = Instant::now() + SLICE;
    loop {
        match v.run(vm).expect("run") {
            Exit::Inout { value: None, .. } | Exit::Mmio { value: None, .. } => {
                v.with_cpu(|c| c.complete(rng.word()));
            }
            Exit::Rdmsr { .. } | Exit::Wrmsr { .. } => {
                v.with_cpu(|c| c.inject_exception(13, Some(0), true));
            }
            Exit::Suspended { .. } => return "ended",
            _ => {}
        }
        if Instant::now() > end {
            return "time";
        }
    }
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let mut number = |d: u64| args.next().and_then(|a| a.parse().ok()).unwrap_or(d);
    let limit = Duration::from_secs(number(60));
    let first = number(1);
    let start = Instant::now();
    let mut counts = [[0u64; 2]; MODES.len()];
    let mut retired = 0;
    let mut seed = first;
    while start.elapsed() < limit {
        let mut rng = Rng(seed);
        let n = (seed % MODES.len() as u64) as usize;
        let vm = Vm::new(1).expect("a VM");
        // Every other one of each mode.
        let translated = seed / MODES.len() as u64 % 2 == 1;
        vm.set_translate_after(if translated { 1 } else { NEVER });
        vm.mem.create_segment(0, "sysmem", MEMORY, None).expect("memory");
        vm.mmap_memseg(0, 0, 0, MEMORY, 7).expect("mapping at 0");
        vm.activate_cpu(0).expect("vCPU 0");
        let v = vm.vcpu(0).expect("vCPU 0").clone();
        set_up(&mut rng, &vm, &v, MODES[n]);
        let done = Arc::new(AtomicBool::new(false));
        let dog = {
            let (v, done) = (v.clone(), done.clone());
            thread::spawn(move || {
                let began = Instant::now();
                while !done.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(5));
                    if began.elapsed() > SLICE {
                        v.kick();
                    }
                    if began.elapsed() > Duration::from_secs(10) {
                        eprintln!("fuzz-guest: seed {seed} ({}) does not come back", MODES[n]);
                        exit(1);
                    }
                }
            })
        };
        let how = drive(&mut rng, &vm, &v);
        done.store(true, Ordering::SeqCst);
        dog.join().expect("the watchdog");
        counts[n][usize::from(how == "ended")] += 1;
        retired += v.stats.instructions.get();
        seed += 1;
    }
    println!("{} guests, {retired} instructions (seeds {first} to {})", seed - first, seed - 1);
    for (m, [time, ended]) in MODES.iter().zip(counts) {
        println!("  {m:8} {time} ran on, {ended} ended (triple fault or halt)");
    }
    ExitCode::SUCCESS
}
