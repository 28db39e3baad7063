//! The processor's system half, from outside: small guests, run instruction by instruction.

/// Runs of a block before it is translated.
const TRANSLATE_AFTER: u16 = vmm::soft::translate::NEVER;

mod guest;
mod random;
mod system;
