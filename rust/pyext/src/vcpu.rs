//! `Vcpu`: one virtual CPU.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use pythonize::{depythonize, pythonize};
use vmm::caps::Caps;
use vmm::error::Error;
use vmm::exit::Exit;
use vmm::regs::{Reg, SegDesc};
use vmm::vcpu::Frozen;

use crate::error::{Result, invalid};

const INOUT: u8 = 0;
const BOGUS: u8 = 2;
const RDMSR: u8 = 3;
const WRMSR: u8 = 4;
const HLT: u8 = 5;
const MTRAP: u8 = 6;
const PAUSE: u8 = 7;
const INST_EMUL: u8 = 9;
const IOAPIC_EOI: u8 = 13;
const SUSPENDED: u8 = 14;
const DEBUG: u8 = 21;
const BPT: u8 = 23;
const IPI: u8 = 24;
const DB: u8 = 25;

/// VM_EXITCODE_* of vmm.h, for element 0 of `run`'s tuples.
pub const EXIT_CODES: [(&str, u8); 14] = [
    ("EXIT_INOUT", INOUT),
    ("EXIT_BOGUS", BOGUS),
    ("EXIT_RDMSR", RDMSR),
    ("EXIT_WRMSR", WRMSR),
    ("EXIT_HLT", HLT),
    ("EXIT_MTRAP", MTRAP),
    ("EXIT_PAUSE", PAUSE),
    ("EXIT_INST_EMUL", INST_EMUL),
    ("EXIT_IOAPIC_EOI", IOAPIC_EOI),
    ("EXIT_SUSPENDED", SUSPENDED),
    ("EXIT_DEBUG", DEBUG),
    ("EXIT_BPT", BPT),
    ("EXIT_IPI", IPI),
    ("EXIT_DB", DB),
];

fn exit_tuple(py: Python<'_>, exit: Exit) -> PyResult<Bound<'_, PyTuple>> {
    match exit {
        Exit::Inout { port, size, value } => (INOUT, port, size, value).into_pyobject(py),
        Exit::Mmio { gpa, size, value } => (INST_EMUL, gpa, size, value).into_pyobject(py),
        Exit::Bogus => (BOGUS,).into_pyobject(py),
        Exit::Rdmsr { msr } => (RDMSR, msr).into_pyobject(py),
        Exit::Wrmsr { msr, value } => (WRMSR, msr, value).into_pyobject(py),
        Exit::Hlt => (HLT,).into_pyobject(py),
        Exit::Mtrap => (MTRAP,).into_pyobject(py),
        Exit::Pause => (PAUSE,).into_pyobject(py),
        Exit::IoapicEoi { vector } => (IOAPIC_EOI, vector).into_pyobject(py),
        Exit::Suspended { how } => (SUSPENDED, how as u8).into_pyobject(py),
        Exit::Debug => (DEBUG,).into_pyobject(py),
        Exit::Bpt { inst_length } => (BPT, inst_length).into_pyobject(py),
        Exit::Db { dr6 } => (DB, dr6).into_pyobject(py),
        Exit::Ipi { mode, vector, dest } => (IPI, mode, vector, dest).into_pyobject(py),
    }
}

fn register(number: u32) -> Result<Reg> {
    let reg = Reg::from_number(number).filter(|r| !matches!(r, Reg::Gdtr | Reg::Idtr));
    reg.ok_or_else(|| invalid(format!("{number} is not a register with a value")))
}

fn descriptor(number: u32) -> Result<Reg> {
    let reg = Reg::from_number(number).filter(|r| r.has_desc());
    reg.ok_or_else(|| invalid(format!("{number} is not a register with a descriptor")))
}

fn capability(name: &str) -> Result<Caps> {
    let cap = Caps::named(name);
    Ok(cap.ok_or_else(|| Error::NotFound(format!("there is no capability {name:?}")))?)
}

/// See `_vmm.pyi`.
#[pyclass(frozen, module = "pybhyve._vmm")]
pub struct Vcpu {
    vm: Arc<vmm::vm::Vm>,
    vcpu: Arc<vmm::vcpu::Vcpu>,
}

impl Vcpu {
    pub fn new(vm: Arc<vmm::vm::Vm>, vcpu: Arc<vmm::vcpu::Vcpu>) -> Vcpu {
        Vcpu { vm, vcpu }
    }

    /// Do something to the processor, held still; other Python threads run while it stops.
    fn with_cpu<R: Send>(
        &self,
        py: Python<'_>,
        act: impl FnOnce(&mut Frozen<'_>) -> R + Send,
    ) -> R {
        match self.vcpu.try_freeze() {
            Some(mut cpu) => act(&mut cpu),
            None => py.detach(|| self.vcpu.with_cpu(act)),
        }
    }
}

#[pymethods]
impl Vcpu {
    #[getter]
    fn id(&self) -> u32 {
        self.vcpu.id
    }

    fn run<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyTuple>> {
        let exit = py.detach(|| self.vcpu.run(&self.vm))?;
        Ok(exit_tuple(py, exit)?)
    }

    fn complete(&self, py: Python<'_>, value: u64) {
        self.with_cpu(py, |cpu| cpu.complete(value));
    }

    fn kick(&self) {
        self.vcpu.kick();
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.vcpu.reset());
    }

    fn init(&self, py: Python<'_>) {
        py.detach(|| self.vcpu.init());
    }

    fn get_register(&self, py: Python<'_>, reg: u32) -> Result<u64> {
        let reg = register(reg)?;
        Ok(self.with_cpu(py, |cpu| cpu.get_register(reg)))
    }

    fn set_register(&self, py: Python<'_>, reg: u32, value: u64) -> Result<()> {
        let reg = register(reg)?;
        self.with_cpu(py, |cpu| cpu.set_register(&self.vm, reg, value));
        Ok(())
    }

    fn get_desc(&self, py: Python<'_>, reg: u32) -> Result<(u64, u32, u32)> {
        let reg = descriptor(reg)?;
        let SegDesc { base, limit, access } = self.with_cpu(py, |cpu| cpu.get_desc(reg));
        Ok((base, limit, access))
    }

    fn set_desc(&self, py: Python<'_>, reg: u32, base: u64, limit: u32, access: u32) -> Result<()> {
        let reg = descriptor(reg)?;
        self.with_cpu(py, |cpu| cpu.set_desc(reg, SegDesc { base, limit, access }));
        Ok(())
    }

    fn get_capability(&self, name: &str) -> Result<u32> {
        Ok(self.vcpu.has_cap(capability(name)?).into())
    }

    fn set_capability(&self, py: Python<'_>, name: &str, value: u32) -> Result<()> {
        let cap = capability(name)?;
        Ok(py.detach(|| self.vcpu.set_cap(cap, value != 0))?)
    }

    fn get_x2apic_state(&self) -> u32 {
        self.vcpu.x2apic().into()
    }

    fn set_x2apic_state(&self, py: Python<'_>, state: u32) -> Result<()> {
        if state > 1 {
            return Err(invalid(format!("x2APIC state {state} is neither 0 nor 1")));
        }
        Ok(py.detach(|| self.vcpu.set_x2apic(&self.vm, state == 1))?)
    }

    #[pyo3(signature = (vector, error_code = None, restart = true))]
    fn inject_exception(
        &self,
        py: Python<'_>,
        vector: u8,
        error_code: Option<u32>,
        restart: bool,
    ) -> Result<()> {
        if vector >= 32 {
            return Err(invalid(format!("{vector} is not the vector of an exception (0-31)")));
        }
        self.with_cpu(py, |cpu| cpu.inject_exception(vector, error_code, restart));
        Ok(())
    }

    fn inject_nmi(&self) {
        use vmm::platform::Platform;
        self.vm.post_nmi(self.vcpu.id);
    }

    fn get_intinfo(&self, py: Python<'_>) -> (u64, u64) {
        self.with_cpu(py, |cpu| cpu.get_intinfo())
    }

    fn set_intinfo(&self, py: Python<'_>, info: u64) {
        self.with_cpu(py, |cpu| cpu.set_intinfo(info));
    }

    #[pyo3(signature = (gla, prot = 1))]
    fn gla2gpa(&self, py: Python<'_>, gla: u64, prot: u32) -> Option<u64> {
        self.with_cpu(py, |cpu| cpu.translate(&self.vm, gla, prot))
    }

    fn get_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = PyDict::new(py);
        for (name, value) in self.vcpu.all_stats() {
            stats.set_item(name, value)?;
        }
        Ok(stats)
    }

    fn save<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyAny>> {
        let state = py.detach(|| self.vcpu.save());
        Ok(pythonize(py, &state)?)
    }

    fn restore(&self, py: Python<'_>, state: &Bound<'_, PyDict>) -> Result<()> {
        let state = depythonize(state)?;
        Ok(py.detach(|| self.vcpu.restore(&self.vm, state))?)
    }
}
