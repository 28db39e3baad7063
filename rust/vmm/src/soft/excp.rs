//! Comes with the system half of the processor.
use super::state::*;
pub struct Triple;
pub enum Event {
    Nmi,
    External,
}
impl Cpu {
    pub fn deliver(&mut self) -> Result<(), Triple> {
        Err(Triple)
    }
    pub fn deliver_interrupt(&mut self, _: u8, _: Event) -> Result<(), Triple> {
        Err(Triple)
    }
}
