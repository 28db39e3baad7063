//! Comes with the system half of the processor.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Msrs {
    pub kernel_gs_base: u64,
}
