//! Vector and x87 instructions on the host's own units.
use super::decode::*;
use super::op::*;
#[derive(Default)]
pub struct Native;
impl Native {
    pub fn full(&self) -> bool {
        false
    }
    pub fn reset(&mut self) {}
}
pub fn lower(_: &mut Lower) -> Option<Handler> {
    None
}
