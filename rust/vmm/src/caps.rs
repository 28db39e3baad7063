//! Capabilities of a vCPU, with the names of vm_capability_name2type().

use bitflags::bitflags;

bitflags! {
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Caps: u32 {
        /// HLT returns from run with `Exit::Hlt`; else the vCPU sleeps in the kernel.
        const HALT_EXIT = 1 << 0;
        /// Each instruction returns from run with `Exit::Mtrap`.
        const MTRAP_EXIT = 1 << 1;
        /// PAUSE returns from run with `Exit::Pause`.
        const PAUSE_EXIT = 1 << 2;
        /// Real mode and unpaged protected mode run; always on.
        const UNRESTRICTED_GUEST = 1 << 3;
        /// The guest may use INVPCID.
        const ENABLE_INVPCID = 1 << 4;
        /// INT3 returns from run with `Exit::Bpt`.
        const BPT_EXIT = 1 << 5;
        /// The guest has RDPID; read-only.
        const RDPID = 1 << 6;
        /// The guest has RDTSCP; read-only.
        const RDTSCP = 1 << 7;
        /// INIT and start-up IPIs return from the sender's run with `Exit::Ipi`.
        const IPI_EXIT = 1 << 8;
        /// No maskable interrupt is delivered (a debugger steps).
        const MASK_HWINTR = 1 << 9;
        /// RFLAGS.TF is the debugger's: #DB returns from run with `Exit::Db`.
        const RFLAGS_TF = 1 << 10;
    }
}

impl Caps {
    pub const NAMES: [(&'static str, Caps); 11] = [
        ("hlt_exit", Caps::HALT_EXIT),
        ("mtrap_exit", Caps::MTRAP_EXIT),
        ("pause_exit", Caps::PAUSE_EXIT),
        ("unrestricted_guest", Caps::UNRESTRICTED_GUEST),
        ("enable_invpcid", Caps::ENABLE_INVPCID),
        ("bpt_exit", Caps::BPT_EXIT),
        ("rdpid", Caps::RDPID),
        ("rdtscp", Caps::RDTSCP),
        ("ipi_exit", Caps::IPI_EXIT),
        ("mask_hwintr", Caps::MASK_HWINTR),
        ("rflags_tf", Caps::RFLAGS_TF),
    ];

    /// What cannot be switched off, because our processor always has it.
    pub const FIXED: Caps = Caps::UNRESTRICTED_GUEST.union(Caps::RDPID).union(Caps::RDTSCP);

    pub fn named(name: &str) -> Option<Caps> {
        Self::NAMES.iter().find(|(n, _)| *n == name).map(|(_, cap)| *cap)
    }
}
