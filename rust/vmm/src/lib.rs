//! vmm: what FreeBSD keeps in vmm.ko and in silicon.

pub mod caps;
pub mod clock;
pub mod error;
pub mod events;
pub mod exit;
pub mod io;
pub mod memory;
pub mod platform;
pub mod regs;
pub mod soft;
pub mod stats;
pub mod vcpu;
pub mod vm;
