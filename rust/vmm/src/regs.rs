//! The registers of a vCPU, numbered as vmm.h numbers them (VM_REG_*).

use serde::{Deserialize, Serialize};

macro_rules! registers {
    ($($variant:ident $name:literal,)*) => {
        /// VM_REG_*.  For a segment register, LDTR and TR this is the selector; for GDTR and
        /// IDTR there is only a descriptor.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Reg { $($variant,)* }

        impl Reg {
            /// All registers; the index is the register's number.
            pub const ALL: &'static [Reg] = &[$(Reg::$variant,)*];

            /// The lower-case name, as bhyvectl's options have it.
            pub fn name(self) -> &'static str {
                match self { $(Reg::$variant => $name,)* }
            }
        }
    };
}

registers! {
    Rax "rax", Rbx "rbx", Rcx "rcx", Rdx "rdx", Rsi "rsi", Rdi "rdi", Rbp "rbp",
    R8 "r8", R9 "r9", R10 "r10", R11 "r11", R12 "r12", R13 "r13", R14 "r14", R15 "r15",
    Cr0 "cr0", Cr3 "cr3", Cr4 "cr4", Dr7 "dr7", Rsp "rsp", Rip "rip", Rflags "rflags",
    Es "es", Cs "cs", Ss "ss", Ds "ds", Fs "fs", Gs "gs", Ldtr "ldtr", Tr "tr",
    Idtr "idtr", Gdtr "gdtr", Efer "efer", Cr2 "cr2",
    Pdpte0 "pdpte0", Pdpte1 "pdpte1", Pdpte2 "pdpte2", Pdpte3 "pdpte3",
    IntrShadow "intr_shadow", Dr0 "dr0", Dr1 "dr1", Dr2 "dr2", Dr3 "dr3", Dr6 "dr6",
    EntryInstLength "entry_inst_length", FsBase "fs_base", GsBase "gs_base",
    KgsBase "kgs_base", Tpr "tpr",
}

impl Reg {
    pub fn from_number(number: u32) -> Option<Reg> {
        Self::ALL.get(number as usize).copied()
    }

    /// Whether base, limit and access of this register can be read and set.
    pub fn has_desc(self) -> bool {
        (Reg::Es as u8..=Reg::Gdtr as u8).contains(&(self as u8))
    }
}

/// The hidden part of a segment register, LDTR, TR, GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegDesc {
    pub base: u64,
    /// In bytes, whatever the granularity bit says.
    pub limit: u32,
    /// type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16; 0 for GDTR, IDTR.
    pub access: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_vmm_h_s() {
        let expected =
            [(0, "rax"), (15, "cr0"), (20, "rip"), (22, "es"), (31, "gdtr"), (48, "tpr")];
        for (number, name) in expected {
            assert_eq!(Reg::from_number(number).unwrap().name(), name);
        }
        assert_eq!(Reg::from_number(49), None);
    }

    #[test]
    fn only_segments_and_tables_have_descriptors() {
        let with: Vec<_> = Reg::ALL.iter().filter(|r| r.has_desc()).map(|r| r.name()).collect();
        assert_eq!(with, ["es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr", "idtr", "gdtr"]);
    }
}
