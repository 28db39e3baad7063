//! The Python face of vmm: module `pybhyve._vmm`, typed and described in `_vmm.pyi`.
//!
//! Only conversions live here.  A call that may wait lets other Python threads run meanwhile.

mod error;
mod vcpu;
mod view;
mod vm;

use ::vmm::caps::Caps;
use ::vmm::exit::SuspendHow;
use ::vmm::regs::Reg;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

#[pymodule]
mod _vmm {
    #[pymodule_export]
    use super::error::VmmError;
    #[pymodule_export]
    use super::vcpu::Vcpu;
    #[pymodule_export]
    use super::view::MemView;
    #[pymodule_export]
    use super::vm::Vm;

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let py = module.py();
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        for how in SuspendHow::ALL {
            module.add(format!("SUSPEND_{}", format!("{how:?}").to_uppercase()), how as u8)?;
        }
        for (name, code) in vcpu::EXIT_CODES {
            module.add(name, code)?;
        }
        let capabilities = Caps::NAMES.map(|(name, _)| name);
        module.add("CAPABILITIES", PyTuple::new(py, capabilities)?)?;
        let registers = PyDict::new(py);
        for (number, reg) in Reg::ALL.iter().enumerate() {
            registers.set_item(reg.name(), number)?;
        }
        module.add("REGISTERS", registers)?;
        // PyO3's list of everything here; the stub is ours.
        module.delattr("__all__")
    }
}
