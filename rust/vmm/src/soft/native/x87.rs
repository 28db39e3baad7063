//! x87 instructions.

use super::simd::FSW_ES;
use crate::exit::Exit;
use crate::platform::Platform;
use crate::soft::Cpu;
use crate::soft::state::*;

/// Interrupt line that FERR# is wired to in a PC.
const FERR_IRQ: u8 = 13;

/// What a waiting instruction does first: report the exception that an earlier one left pending.
pub fn pending(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.fpu.fsw & FSW_ES == 0 {
        return Ok(());
    }
    if cpu.cr0 & cr0::NE != 0 {
        return Err(cpu.raise(vec::MF, None));
    }
    // MS-DOS compatible reporting: the processor waits for the interrupt.
    cpu.vm().isa_pulse(Some(FERR_IRQ), Some(FERR_IRQ));
    Err(cpu.leave(Exit::Bogus))
}
