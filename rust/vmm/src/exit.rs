//! Why `Vcpu::run` came back.

use crate::error::{Error, Result};

/// Reasons for which a VM's life ends, in vmm.h's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SuspendHow {
    None = 0,
    Reset = 1,
    Poweroff = 2,
    Halt = 3,
    TripleFault = 4,
    Destroy = 5,
}

impl SuspendHow {
    pub const ALL: [SuspendHow; 6] =
        [Self::None, Self::Reset, Self::Poweroff, Self::Halt, Self::TripleFault, Self::Destroy];

    /// The reason with vmm.h's number `how`.
    pub fn from_number(how: u32) -> Result<Self> {
        let known = Self::ALL.iter().find(|h| **h as u32 == how);
        known.copied().ok_or_else(|| {
            Error::Invalid(format!("{how} is not a reason for suspending a VM (0-5)"))
        })
    }
}

/// What userland must act on.  An exit with an optional value reads when it is `None`: the
/// answer goes to `Vcpu::complete` before the next run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// IN (`value` is `None`) or OUT; `size` is 1, 2 or 4 bytes.
    Inout {
        port: u16,
        size: u8,
        value: Option<u32>,
    },
    /// Nothing happened: run again.
    Bogus,
    Rdmsr {
        msr: u32,
    },
    Wrmsr {
        msr: u32,
        value: u64,
    },
    /// HLT, with capability hlt_exit.
    Hlt,
    /// One instruction done, with capability mtrap_exit.
    Mtrap,
    /// PAUSE, with capability pause_exit.
    Pause,
    /// Access to something that is neither memory nor an in-kernel device; `size` is 1 to 8.
    Mmio {
        gpa: u64,
        size: u8,
        value: Option<u64>,
    },
    /// EOI of a level-triggered vector that no in-kernel IOAPIC pin had.
    IoapicEoi {
        vector: u8,
    },
    /// The VM was suspended and every active vCPU has stopped.
    Suspended {
        how: SuspendHow,
    },
    /// This vCPU was suspended (`Vm::suspend_cpu`).
    Debug,
    /// INT3, with capability bpt_exit.
    Bpt {
        inst_length: u8,
    },
    /// #DB, with capability rflags_tf.
    Db {
        dr6: u64,
    },
    /// INIT (mode 5) or start-up (mode 6) IPI, with capability ipi_exit, on the sender.
    Ipi {
        mode: u8,
        vector: u8,
        dest: Vec<u32>,
    },
}
