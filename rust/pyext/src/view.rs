//! Guest memory as a Python buffer.

use std::os::raw::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pyo3::ffi;
use pyo3::prelude::*;
use vmm::memory::Segment;

use crate::error::Result;

/// See `_vmm.pyi`.
#[pyclass(frozen, module = "pybhyve._vmm")]
pub struct MemView {
    vm: Arc<vmm::vm::Vm>,
    /// Keeps the memory mapped.
    segment: Arc<Segment>,
    offset: u64,
    length: usize,
    writable: bool,
    /// Buffers that Python holds.
    buffers: AtomicUsize,
}

impl MemView {
    /// `offset..offset + length` lies inside the segment; the caller has checked it.
    pub fn new(
        vm: Arc<vmm::vm::Vm>,
        segment: Arc<Segment>,
        offset: u64,
        length: usize,
        writable: bool,
    ) -> Result<MemView> {
        // Mapped here, so that taking a buffer cannot fail for want of address space.
        segment.host()?;
        Ok(MemView { vm, segment, offset, length, writable, buffers: AtomicUsize::new(0) })
    }
}

#[pymethods]
impl MemView {
    fn __len__(&self) -> usize {
        self.length
    }

    /// # Safety
    /// Called by the interpreter, with a `view` that it owns.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        let host = this.segment.host().map_err(crate::error::Fault::from)?;
        // SAFETY: the window is inside the segment, which `this` keeps mapped, and the buffer
        // keeps `this`.  Python reads and writes it through raw pointers (SAFETY.md, "Views").
        let filled = unsafe {
            let start = host.as_ptr().add(this.offset as usize);
            let length = this.length as ffi::Py_ssize_t;
            let readonly = c_int::from(!this.writable);
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start.cast(), length, readonly, flags)
        };
        if filled != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        this.buffers.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// # Safety
    /// Called by the interpreter, once for each successful `__getbuffer__`.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        if self.buffers.fetch_sub(1, Ordering::AcqRel) == 1 && self.writable {
            self.vm.mem.segment_written(&self.segment, self.offset, self.length as u64);
        }
    }
}
