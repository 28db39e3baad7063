//! The processor's system half, from outside: small guests, run instruction by instruction.

mod guest;
mod random;
mod system;
