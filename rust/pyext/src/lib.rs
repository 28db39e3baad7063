//! The Python face of vmm: module `pybhyve._vmm`.
