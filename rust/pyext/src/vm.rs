//! `Vm`: memory, vCPUs and in-kernel devices.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use pythonize::{depythonize, pythonize};
use vmm::exit::SuspendHow;
use vmm::platform::{DeliveryMode, Platform};

use crate::error::{Result, invalid};
use crate::vcpu::Vcpu;
use crate::view::MemView;

/// See `_vmm.pyi`.
#[pyclass(frozen, module = "pybhyve._vmm")]
pub struct Vm {
    vm: Arc<vmm::vm::Vm>,
}

impl Vm {
    fn pin(&self, pin: u32) -> Result<u8> {
        let pins = self.vm.ioapic.pincount();
        let valid = u8::try_from(pin).ok().filter(|_| pin < pins);
        valid.ok_or_else(|| invalid(format!("the IOAPIC has no pin {pin}, only 0 to {}", pins - 1)))
    }

    /// An ISA interrupt's PIC line and IOAPIC pin.
    fn isa(&self, atpic_irq: u32, ioapic_irq: i32) -> Result<(Option<u8>, Option<u8>)> {
        let pin = match ioapic_irq {
            -1 => None,
            pin => Some(self.pin(pin as u32)?),
        };
        Ok((Some(atpic_line(atpic_irq)?), pin))
    }
}

fn atpic_line(irq: u32) -> Result<u8> {
    let line = u8::try_from(irq).ok().filter(|irq| *irq < 16);
    line.ok_or_else(|| invalid(format!("the PIC has no line {irq}, only 0 to 15")))
}

fn access_size(size: u8) -> Result<u8> {
    match size {
        1 | 2 | 4 | 8 => Ok(size),
        _ => Err(invalid(format!("an access has 1, 2, 4 or 8 bytes, not {size}"))),
    }
}

#[pymethods]
impl Vm {
    #[new]
    #[pyo3(signature = (maxcpus = 1))]
    fn new(py: Python<'_>, maxcpus: u32) -> Result<Vm> {
        Ok(Vm { vm: py.detach(|| vmm::vm::Vm::new(maxcpus))? })
    }

    // -- memory --------------------------------------------------------------------------------

    #[pyo3(
        signature = (segid, name, length, fd = -1),
        text_signature = "($self, segid, name, length, fd=-1)"
    )]
    fn create_memseg(&self, segid: i32, name: &str, length: u64, fd: i32) -> Result<()> {
        // SAFETY: the caller's descriptor stays open for the call, which duplicates it; a number
        // that is no descriptor fails with EBADF.
        let file = (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) });
        Ok(self.vm.mem.create_segment(segid, name, length, file)?)
    }

    #[pyo3(signature = (gpa, segid, offset, length, prot = 7))]
    fn mmap_memseg(
        &self,
        py: Python<'_>,
        gpa: u64,
        segid: i32,
        offset: u64,
        length: u64,
        prot: u32,
    ) -> Result<()> {
        Ok(py.detach(|| self.vm.mmap_memseg(gpa, segid, offset, length, prot))?)
    }

    fn munmap_memseg(&self, py: Python<'_>, gpa: u64, length: u64) -> Result<()> {
        Ok(py.detach(|| self.vm.munmap_memseg(gpa, length))?)
    }

    fn memsegs(&self) -> Vec<(i32, String, u64)> {
        self.vm.mem.segments().iter().map(|s| (s.id, s.name.clone(), s.length)).collect()
    }

    fn memmap(&self) -> Vec<(u64, i32, u64, u64, u32)> {
        let maps = self.vm.mem.maps();
        maps.iter().map(|m| (m.gpa, m.segment.id, m.offset, m.length, m.prot)).collect()
    }

    fn read_mem<'py>(
        &self,
        py: Python<'py>,
        gpa: u64,
        length: usize,
    ) -> Result<Bound<'py, PyBytes>> {
        // Checked first: the length alone must not make us allocate it.
        if self.vm.mem.host(gpa, length as u64).is_none() {
            return Err(vmm::error::Error::BadAddress { gpa, len: length as u64 }.into());
        }
        Ok(PyBytes::new_with(py, length, |into| {
            self.vm.mem.read(gpa, into).map_err(|e| crate::error::Fault::from(e).into())
        })?)
    }

    fn write_mem(&self, py: Python<'_>, gpa: u64, data: &Bound<'_, PyAny>) -> Result<()> {
        if let Ok(data) = data.cast::<PyBytes>() {
            return Ok(self.vm.mem.write_rom(gpa, data.as_bytes())?);
        }
        // A copy: other threads may write a bytearray's or a view's memory meanwhile.
        let data = PyBuffer::<u8>::get(data)?.to_vec(py)?;
        Ok(self.vm.mem.write_rom(gpa, &data)?)
    }

    #[pyo3(signature = (gpa, length, writable = false))]
    fn view(&self, gpa: u64, length: u64, writable: bool) -> Result<MemView> {
        let map = self.vm.mem.map_at(gpa, length)?;
        if writable && map.prot & vmm::memory::PROT_WRITE == 0 {
            return Err(vmm::error::Error::BadAddress { gpa, len: length }.into());
        }
        let offset = map.offset + (gpa - map.gpa);
        MemView::new(Arc::clone(&self.vm), map.segment, offset, length as usize, writable)
    }

    #[pyo3(signature = (segid, offset, length, writable = false))]
    fn view_memseg(&self, segid: i32, offset: u64, length: u64, writable: bool) -> Result<MemView> {
        let segment = self.vm.mem.segment(segid)?;
        if offset.checked_add(length).is_none_or(|end| end > segment.length) {
            return Err(invalid(format!(
                "memory segment {segid} has {:#x} bytes, not {length:#x} from {offset:#x}",
                segment.length
            )));
        }
        MemView::new(Arc::clone(&self.vm), segment, offset, length as usize, writable)
    }

    #[pyo3(signature = (gpa, length, clear = false))]
    fn dirty_pages<'py>(
        &self,
        py: Python<'py>,
        gpa: u64,
        length: u64,
        clear: bool,
    ) -> Result<Bound<'py, PyBytes>> {
        let log = py.detach(|| self.vm.dirty_pages(gpa, length, clear))?;
        Ok(PyBytes::new(py, &log))
    }

    // -- vCPUs ---------------------------------------------------------------------------------

    #[getter]
    fn maxcpus(&self) -> usize {
        self.vm.vcpus.len()
    }

    fn vcpu(&self, index: u32) -> Result<Vcpu> {
        Ok(Vcpu::new(Arc::clone(&self.vm), Arc::clone(self.vm.vcpu(index)?)))
    }

    #[pyo3(signature = (sockets, cores, threads, maxcpus = 0))]
    fn set_topology(
        &self,
        py: Python<'_>,
        sockets: u16,
        cores: u16,
        threads: u16,
        maxcpus: u16,
    ) -> Result<()> {
        Ok(py.detach(|| self.vm.set_topology(sockets, cores, threads, maxcpus))?)
    }

    fn get_topology(&self) -> (u16, u16, u16, u16) {
        let t = self.vm.topology();
        (t.sockets, t.cores, t.threads, t.maxcpus)
    }

    fn activate_cpu(&self, py: Python<'_>, index: u32) -> Result<()> {
        Ok(py.detach(|| self.vm.activate_cpu(index))?)
    }

    fn suspend_cpu(&self, py: Python<'_>, index: u32) -> Result<()> {
        Ok(py.detach(|| self.vm.suspend_cpu(index))?)
    }

    fn resume_cpu(&self, py: Python<'_>, index: u32) -> Result<()> {
        Ok(py.detach(|| self.vm.resume_cpu(index))?)
    }

    fn suspend_all_cpus(&self, py: Python<'_>) {
        py.detach(|| self.vm.suspend_all_cpus());
    }

    fn resume_all_cpus(&self, py: Python<'_>) {
        py.detach(|| self.vm.resume_all_cpus());
    }

    fn active_cpus(&self) -> Vec<u32> {
        self.vm.active_cpus()
    }

    fn debug_cpus(&self) -> Vec<u32> {
        self.vm.debug_cpus()
    }

    fn suspended_cpus(&self) -> Vec<u32> {
        self.vm.suspended_cpus()
    }

    fn suspend(&self, how: u32) -> Result<()> {
        Ok(self.vm.suspend(SuspendHow::from_number(how)?)?)
    }

    fn suspended(&self) -> u32 {
        self.vm.suspended().unwrap_or(SuspendHow::None) as u32
    }

    #[pyo3(signature = (runs))]
    fn set_translate_after(&self, runs: Option<u16>) {
        self.vm.set_translate_after(runs.unwrap_or(vmm::soft::translate::NEVER));
    }

    fn reinit(&self, py: Python<'_>) -> Result<()> {
        Ok(py.detach(|| self.vm.reinit())?)
    }

    // -- interrupts ----------------------------------------------------------------------------

    fn lapic_irq(&self, vcpu: u32, vector: u32) -> Result<()> {
        let target = self.vm.vcpu(vcpu)?;
        let valid = u8::try_from(vector).ok().filter(|v| *v >= 16);
        let vector = valid
            .ok_or_else(|| invalid(format!("{vector} is not an interrupt vector (16-255)")))?;
        target.lapic.deliver(&*self.vm, DeliveryMode::Fixed, vector, false);
        Ok(())
    }

    fn lapic_local_irq(&self, vcpu: i32, lvt: u32) -> Result<()> {
        Ok(self.vm.lapic_local_irq(vcpu, lvt)?)
    }

    fn lapic_msi(&self, addr: u64, msg: u64) {
        self.vm.lapic_msi(addr, msg);
    }

    fn ioapic_assert_irq(&self, pin: u32) -> Result<()> {
        self.vm.isa_irq(None, Some(self.pin(pin)?), true);
        Ok(())
    }

    fn ioapic_deassert_irq(&self, pin: u32) -> Result<()> {
        self.vm.isa_irq(None, Some(self.pin(pin)?), false);
        Ok(())
    }

    fn ioapic_pulse_irq(&self, pin: u32) -> Result<()> {
        self.vm.isa_pulse(None, Some(self.pin(pin)?));
        Ok(())
    }

    fn ioapic_pincount(&self) -> u32 {
        self.vm.ioapic.pincount()
    }

    fn isa_assert_irq(&self, atpic_irq: u32, ioapic_irq: i32) -> Result<()> {
        let (line, pin) = self.isa(atpic_irq, ioapic_irq)?;
        self.vm.isa_irq(line, pin, true);
        Ok(())
    }

    fn isa_deassert_irq(&self, atpic_irq: u32, ioapic_irq: i32) -> Result<()> {
        let (line, pin) = self.isa(atpic_irq, ioapic_irq)?;
        self.vm.isa_irq(line, pin, false);
        Ok(())
    }

    fn isa_pulse_irq(&self, atpic_irq: u32, ioapic_irq: i32) -> Result<()> {
        let (line, pin) = self.isa(atpic_irq, ioapic_irq)?;
        self.vm.isa_pulse(line, pin);
        Ok(())
    }

    fn isa_set_irq_trigger(&self, atpic_irq: u32, level: bool) -> Result<()> {
        Ok(self.vm.isa_set_irq_trigger(atpic_line(atpic_irq)?, level)?)
    }

    fn kernemu_read(&self, vcpu: u32, gpa: u64, size: u8) -> Result<u64> {
        Ok(self.vm.kernemu_read(vcpu, gpa, access_size(size)?)?)
    }

    fn kernemu_write(&self, vcpu: u32, gpa: u64, size: u8, value: u64) -> Result<()> {
        Ok(self.vm.kernemu_write(vcpu, gpa, access_size(size)?, value)?)
    }

    // -- time ----------------------------------------------------------------------------------

    fn rtc_read(&self, offset: u32) -> Result<u8> {
        Ok(self.vm.rtc_read(offset)?)
    }

    fn rtc_write(&self, offset: u32, value: u8) -> Result<()> {
        Ok(self.vm.rtc_write(offset, value)?)
    }

    fn rtc_gettime(&self) -> i64 {
        self.vm.rtc.gettime(&*self.vm)
    }

    fn rtc_settime(&self, secs: i64) -> Result<()> {
        Ok(self.vm.rtc_settime(secs)?)
    }

    fn hpet_capabilities(&self) -> u64 {
        self.vm.hpet_capabilities()
    }

    fn now(&self) -> u64 {
        self.vm.now()
    }

    fn wait_halt(&self, py: Python<'_>, seen: u64, seconds: f64) -> Result<u64> {
        let limit = Duration::try_from_secs_f64(seconds)
            .map_err(|_| invalid(format!("cannot wait for {seconds} seconds")))?;
        Ok(py.detach(|| self.vm.halts.wait(seen, limit)))
    }

    fn pause_clock(&self, py: Python<'_>) {
        py.detach(|| self.vm.pause_clock());
    }

    fn resume_clock(&self) {
        self.vm.resume_clock();
    }

    // -- state ---------------------------------------------------------------------------------

    fn vm_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = PyDict::new(py);
        stats.set_item("Resident memory", self.vm.mem.resident())?;
        Ok(stats)
    }

    fn save_devices<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyAny>> {
        Ok(pythonize(py, &self.vm.save_devices())?)
    }

    fn restore_devices(&self, state: &Bound<'_, PyDict>) -> Result<()> {
        Ok(self.vm.restore_devices(depythonize(state)?)?)
    }
}
