//! Random sequences with fixed seeds, on the host and on our processor.

use difftest::generate;
use difftest::guest::Guest;
use difftest::native::Native;

/// Enough to meet every opcode; `fuzz-cpu` goes on where this ends.
const CASES: u64 = 60_000;

#[test]
fn processor_agrees_with_the_host() {
    let mut native = Native::new().expect("a traced child process");
    let mut guest = Guest::new();
    let mut report = String::new();

    for seed in 1..=CASES {
        let case = generate::mixed(seed);
        let host = native.run(&case).expect("the host runs the case");
        let differences = case.compare(&host, &guest.run(&case));
        if !differences.is_empty() {
            let (mode, code) = (case.mode, case.listing());
            report += &format!("seed {seed} {mode:?}\n{code}  {}\n", differences.join("\n  "));
        }
    }

    assert!(report.is_empty(), "{report}");
}
