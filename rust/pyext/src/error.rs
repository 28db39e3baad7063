//! The one place where vmm's errors become Python's.

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

pyo3::create_exception!(
    pybhyve._vmm,
    VmmError,
    PyOSError,
    "An operation that vmm refuses; ``errno`` is the one vmm.ko would return."
);

/// What a method of this module fails with.
pub enum Fault {
    Vmm(vmm::error::Error),
    Python(PyErr),
}

pub type Result<T> = std::result::Result<T, Fault>;

impl From<vmm::error::Error> for Fault {
    fn from(error: vmm::error::Error) -> Fault {
        Fault::Vmm(error)
    }
}

impl From<PyErr> for Fault {
    fn from(error: PyErr) -> Fault {
        Fault::Python(error)
    }
}

impl From<pythonize::PythonizeError> for Fault {
    fn from(error: pythonize::PythonizeError) -> Fault {
        Fault::Vmm(vmm::error::Error::Invalid(format!("not a saved state: {error}")))
    }
}

impl From<Fault> for PyErr {
    fn from(fault: Fault) -> PyErr {
        match fault {
            Fault::Vmm(error) => VmmError::new_err((error.errno(), error.to_string())),
            Fault::Python(error) => error,
        }
    }
}

/// An argument that is outside of what the operation takes (EINVAL).
pub fn invalid(what: impl Into<String>) -> Fault {
    Fault::Vmm(vmm::error::Error::Invalid(what.into()))
}
