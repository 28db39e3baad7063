//! Comes with the system half of the processor.
use iced_x86::Instruction;
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct CpuConfig {
    pub ncpu: u32,
    pub sockets: u32,
    pub cores: u32,
    pub threads: u32,
    pub x2apic: bool,
}
pub fn shown(_: &Instruction) -> bool {
    true
}
