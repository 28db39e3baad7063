//! fuzz-cpu [SECONDS [SEED]]: random instruction sequences against the host until the time is up.
//!
//! Prints each disagreement with what is needed to see it again, and at the end how many
//! instructions and cases were tried.  Exit status 1 when there was a disagreement.

use difftest::generate;
use difftest::guest::Guest;
use difftest::native::Native;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vmm::soft::translate::NEVER;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let mut number = |default: u64| args.next().and_then(|a| a.parse().ok()).unwrap_or(default);
    let limit = Duration::from_secs(number(60));
    let first = number(1);
    let mut native = match Native::new() {
        Ok(n) => n,
        Err(e) => {
            eprintln!("fuzz-cpu: cannot trace a child process: {e}");
            return ExitCode::from(2);
        }
    };
    let mut stages = [Guest::new(NEVER), Guest::new(0)];
    let start = Instant::now();
    let (mut cases, mut instructions, mut bad) = (0u64, 0u64, 0u64);
    let mut kinds: BTreeMap<String, u64> = BTreeMap::new();
    let mut seed = first;
    while start.elapsed() < limit {
        let case = generate::mixed(seed);
        let mode = case.mode;
        let listing = case.listing();
        instructions += listing.lines().count() as u64;
        let host = match native.run(&case) {
            Ok(h) => h,
            Err(e) => {
                eprintln!("seed {seed}: {e}\n{listing}");
                return ExitCode::from(2);
            }
        };
        // Of two stages, in turn.
        let ours = stages[(seed % 2) as usize].run(&case);
        let differences = case.compare(&host, &ours);
        if !differences.is_empty() {
            bad += 1;
            let kind = listing
                .lines()
                .next()
                .and_then(|l| l.split_whitespace().nth(2))
                .unwrap_or("?")
                .to_string();
            let n = kinds.entry(kind).or_default();
            *n += 1;
            if *n <= 2 {
                println!("seed {seed} {mode:?}\n{listing}  {}\n", differences.join("\n  "));
            }
        }
        cases += 1;
        seed += 1;
    }
    println!(
        "{cases} cases, {instructions} instructions, {bad} disagreements (seeds {first} to {})",
        seed - 1
    );
    for (k, n) in &kinds {
        println!("  {n:6} {k}");
    }
    ExitCode::from(u8::from(bad > 0))
}
