//! Random sequences with fixed seeds, on the host and on our processor.

use difftest::generate;
use difftest::guest::Guest;
use difftest::native::Native;
use vmm::soft::translate::NEVER;

/// Enough to meet every opcode; `fuzz-cpu` goes on where this ends.
const CASES: u64 = 60_000;

#[test]
fn processor_agrees_with_the_host() {
    let mut native = Native::new().expect("a traced child process");
    let mut stages = [Guest::new(NEVER), Guest::new(0)];
    let mut report = String::new();

    for seed in 1..=CASES {
        let case = generate::mixed(seed);
        let host = native.run(&case).expect("the host runs the case");
        for (stage, guest) in ["interpreted", "translated"].iter().zip(&mut stages) {
            let differences = case.compare(&host, &guest.run(&case));
            if !differences.is_empty() {
                let (mode, code) = (case.mode, case.listing());
                let differences = differences.join("\n  ");
                report += &format!("seed {seed} {mode:?} {stage}\n{code}  {differences}\n");
            }
        }
    }

    assert!(report.is_empty(), "{report}");
}
