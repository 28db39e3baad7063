//! An x86-64 processor in software.
//!
//! `state` has the registers, `mmu` paging and memory access, `decode` turns bytes into blocks of
//! `op`s, `block` keeps them, `run` is the loop.  Handlers are in `interp` (general-purpose
//! instructions), `native` (vector and x87, on the host's own units) and `sys` with `seg`, `excp`, `task`,
//! `msr` and `cpuid` (what a kernel uses).

pub mod api;
pub mod block;
pub mod cpuid;
pub mod decode;
pub mod excp;
pub mod int;
pub mod interp;
pub mod mmu;
pub mod msr;
pub mod native;
pub mod op;
pub mod run;
pub mod safepoint;
pub mod seg;
pub mod state;
pub mod sys;
pub mod task;
pub mod translate;

pub use api::CpuState;
pub use cpuid::CpuConfig;
pub use state::Cpu;
