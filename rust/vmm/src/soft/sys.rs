//! Comes with the system half of the processor.
use super::decode::*;
use super::state::*;
use iced_x86::Instruction;
pub fn lookup(_: &Instruction) -> Option<(Slow, bool)> {
    None
}
pub fn operand_lin(cpu: &mut Cpu, _: &Instruction, _: u64, _: bool) -> Result<u64, Stop> {
    Err(cpu.ud())
}
