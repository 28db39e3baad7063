//! The guests of `tests/soft` once more, each block translated before it runs.

/// Runs of a block before it is translated.
const TRANSLATE_AFTER: u16 = 0;

#[path = "../soft/guest.rs"]
mod guest;
#[path = "../soft/random.rs"]
mod random;
#[path = "../soft/system.rs"]
mod system;
