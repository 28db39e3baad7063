//! Comes with the system half of the processor.
