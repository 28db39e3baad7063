//! vmm: what FreeBSD keeps in vmm.ko and in silicon.

pub mod events;
pub mod io;
pub mod platform;
