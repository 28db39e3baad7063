//! What a vCPU counts.  The names that bhyvectl prints are vmm.ko's where the thing is the same.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! stats {
    ($($field:ident $name:literal,)*) => {
        /// Counters of one vCPU; written by any thread, read by anyone, exact when it rests.
        #[derive(Debug, Default)]
        pub struct Stats { $(pub $field: Counter,)* }

        impl Stats {
            /// Names and values, in the order of declaration.
            pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
                vec![$(($name, self.$field.get()),)*]
            }

            pub fn reset(&self) {
                $(self.$field.set(0);)*
            }
        }
    };
}

stats! {
    exits "total number of vm exits",
    exits_userspace "number of vm exits handled in userspace",
    hlt "number of times hlt was intercepted",
    rdmsr "number of times rdmsr was intercepted",
    wrmsr "number of times wrmsr was intercepted",
    mtrap "number of monitor trap exits",
    pause "number of times pause was intercepted",
    inout "number of times in/out was intercepted",
    cpuid "number of times cpuid was intercepted",
    mmio "vm exits for instruction emulation",
    exceptions "number of vm exits due to exceptions",
    idle_ns "number of nanoseconds vcpu was idle",
    runtime_ns "vcpu total runtime",
    nmi "number of NMIs delivered to vcpu",
    extint "number of ExtINTs delivered to vcpu",
    intr "number of interrupts delivered to vcpu",
    ipi "number of INIT and startup IPIs sent by vcpu",
    instructions "number of instructions interpreted",
    blocks_decoded "number of blocks decoded",
    blocks_translated "number of blocks translated",
    blocks_dropped "number of blocks dropped because their code was written",
}

/// An event counter; additions are relaxed.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn inc(&self) {
        self.add(1);
    }

    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Overwrite with a count that the vCPU's thread kept privately.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
