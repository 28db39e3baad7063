//! A guest whose tables and memory a test lays out by hand, and runs instruction by instruction.

use std::sync::Arc;
use vmm::caps::Caps;
use vmm::exit::{Exit, SuspendHow};
use vmm::regs::{Reg, SegDesc};
use vmm::soft::Cpu;
use vmm::vm::Vm;

pub const GDT: u64 = 0x1000;
pub const LDT: u64 = 0x1800;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x4000;
pub const TSS2: u64 = 0x5000;
pub const CODE: u64 = 0x8000;
/// A place to jump to, full of NOPs.
pub const TARGET: u64 = 0x9000;
pub const TABLES: u64 = 0x1_0000;
/// Handler of vector v: NOPs at `HANDLERS + 16 * v`.
pub const HANDLERS: u64 = 0x2_0000;
pub const DATA: u64 = 0x3_0000;
pub const STACK: u64 = 0x4_0000;
/// Stack of level 0 in the TSS.
pub const STACK0: u64 = 0x5_0000;
pub const IST1: u64 = 0x6_0000;
/// Neither memory nor a device.
pub const NOWHERE: u64 = 0x4000_0000;
const MEMORY: u64 = 8 << 20;

// Selectors.
pub const CODE64: u16 = 0x08;
pub const DATA32: u16 = 0x10;
pub const CODE32: u16 = 0x18;
pub const CODE32_U: u16 = 0x20 | 3;
pub const DATA32_U: u16 = 0x28 | 3;
pub const CODE64_U: u16 = 0x30 | 3;
pub const TASK: u16 = 0x38;
pub const CODE16: u16 = 0x48;
pub const DATA16: u16 = 0x50;
pub const CONFORMING: u16 = 0x58;
pub const ABSENT: u16 = 0x60;
pub const SMALL: u16 = 0x68;
pub const LOCAL: u16 = 0x70;
pub const GATE: u16 = 0x80;
pub const TASK2: u16 = 0x90;
pub const TASK_GATE: u16 = 0x98;
pub const READ_ONLY_U: u16 = 0xA0 | 3;
pub const EXPAND_DOWN: u16 = 0xA8;
pub const EXECUTE_ONLY_U: u16 = 0xB0 | 3;
pub const DATA_RING1: u16 = 0xB8 | 1;
pub const ABSENT_CODE: u16 = 0xC0;
pub const LONG_AND_32: u16 = 0xC8;
pub const BEYOND: u16 = 0x800;
const GDT_ENTRIES: u16 = 32;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Real,
    V86,
    Prot,
    Compat,
    Long,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// No exception.
    Done,
    /// The handler of this vector was entered.
    Vector(u8),
    TripleFault,
}

/// An eight-byte descriptor; `access` as in `Seg::access`.
pub fn descriptor(base: u32, limit: u32, access: u32) -> u64 {
    let (base, limit, access) = (u64::from(base), u64::from(limit), u64::from(access));
    limit & 0xFFFF
        | (base & 0xFF_FFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | (base >> 24) << 56
}

/// A gate; `kind` is the type with P and DPL.
pub fn gate(sel: u16, offset: u64, kind: u8, low: u8) -> u64 {
    offset & 0xFFFF
        | u64::from(sel) << 16
        | u64::from(low) << 32
        | u64::from(kind) << 40
        | (offset >> 16 & 0xFFFF) << 48
}

pub struct Guest {
    pub vm: Arc<Vm>,
    pub mode: Mode,
}

impl Guest {
    pub fn new(mode: Mode, cpl: u8) -> Guest {
        let vm = Vm::new(1).unwrap();
        vm.set_translate_after(crate::TRANSLATE_AFTER);
        vm.mem.create_segment(0, "sysmem", MEMORY, None).unwrap();
        vm.mmap_memseg(0, 0, 0, MEMORY, 7).unwrap();
        vm.activate_cpu(0).unwrap();
        vm.vcpu(0).unwrap().set_cap(Caps::MTRAP_EXIT, true).unwrap();
        let g = Guest { vm, mode };
        g.tables();
        g.enter(cpl);
        g
    }

    fn long(&self) -> bool {
        matches!(self.mode, Mode::Compat | Mode::Long)
    }

    fn tables(&self) {
        for at in [CODE, TARGET, HANDLERS] {
            self.vm.mem.write(at, &[0x90; 0x1000]).unwrap();
        }
        let base = TARGET as u32;
        for (sel, d) in [
            (CODE64, descriptor(0, 0xF_FFFF, 0xA09B)),
            (DATA32, descriptor(0, 0xF_FFFF, 0xC093)),
            (CODE32, descriptor(0, 0xF_FFFF, 0xC09B)),
            (CODE32_U, descriptor(0, 0xF_FFFF, 0xC0FB)),
            (DATA32_U, descriptor(0, 0xF_FFFF, 0xC0F3)),
            (CODE64_U, descriptor(0, 0xF_FFFF, 0xA0FB)),
            (TASK, descriptor(TSS as u32, 0xFFF, 0x89)),
            (CODE16, descriptor(0, 0xFFFF, 0x9B)),
            (DATA16, descriptor(0, 0xFFFF, 0x93)),
            (CONFORMING, descriptor(0, 0xF_FFFF, if self.long() { 0xA09E } else { 0xC09E })),
            (ABSENT, descriptor(0, 0xF_FFFF, 0xC013)),
            (SMALL, descriptor(base, 0xFF, 0x409A)),
            (LOCAL, descriptor(LDT as u32, 0x7F, 0x82)),
            (TASK2, descriptor(TSS2 as u32, 0xFFF, 0x89)),
            (TASK_GATE, gate(TASK2, 0, 0xE5, 0)),
            (READ_ONLY_U, descriptor(0, 0xF_FFFF, 0xC0F0)),
            (EXPAND_DOWN, descriptor(0, 0xFF, 0xC096)),
            (EXECUTE_ONLY_U, descriptor(0, 0xF_FFFF, 0xC0F8)),
            (DATA_RING1, descriptor(0, 0xF_FFFF, 0xC0B3)),
            (ABSENT_CODE, descriptor(0, 0xF_FFFF, 0xC01B)),
            (LONG_AND_32, descriptor(0, 0xF_FFFF, 0xE09B)),
        ] {
            self.set_descriptor(sel, d);
        }
        let kernel = if self.long() { CODE64 } else { CODE32 };
        for v in 0..=255u8 {
            // INT3, INTO and 0x80 may be asked for by programs.
            let dpl = if matches!(v, 3 | 4 | 0x80) { 0x60 } else { 0 };
            self.set_idt(v, gate(kernel, HANDLERS + 16 * u64::from(v), 0x8E | dpl, 0));
        }
        // Identity: user pages of 2 MiB over memory, one of 1 GiB over nothing behind.
        let t = TABLES;
        if self.long() {
            self.write(t, &(t + 0x1007).to_le_bytes());
            for i in 0..4u64 {
                self.write(t + 0x1000 + 8 * i, &(i << 30 | 0x87).to_le_bytes());
            }
        } else {
            for i in 0..1024u32 {
                self.write(t + 4 * u64::from(i), &(i << 22 | 0x87).to_le_bytes());
            }
        }
        if self.long() {
            self.write(TSS + 4, &STACK0.to_le_bytes());
            self.write(TSS + 0x24, &IST1.to_le_bytes());
        } else {
            self.write(TSS + 4, &(STACK0 as u32).to_le_bytes());
            self.write(TSS + 8, &DATA32.to_le_bytes());
        }
        // All ports from 0x100 up are allowed; the bitmap lies at 0x88, behind the
        // redirection bitmap.
        self.write(TSS + 0x66, &0x88u16.to_le_bytes());
        self.write(TSS + 0x88, &[0xFF; 0x20]);
        self.write(TSS + 0x68, &[0xFF; 0x20]);
    }

    fn enter(&self, cpl: u8) {
        let mode = self.mode;
        self.cpu(|c| {
            c.reset();
            let flat = |access| SegDesc { base: 0, limit: u32::MAX, access };
            let at8086 = |sel: u64| SegDesc { base: sel << 4, limit: 0xFFFF, access: 0x93 };
            c.set_desc(
                Reg::Gdtr,
                SegDesc { base: GDT, limit: 8 * u32::from(GDT_ENTRIES) - 1, access: 0 },
            );
            c.set_desc(Reg::Idtr, SegDesc { base: IDT, limit: 0xFFF, access: 0 });
            c.set_reg(Reg::Tr, TASK.into());
            c.set_desc(Reg::Tr, SegDesc { base: TSS, limit: 0xFFF, access: 0x8B });
            c.set_reg(Reg::Ldtr, 0);
            c.set_desc(Reg::Ldtr, SegDesc { base: 0, limit: 0, access: 0x1_0000 });
            c.set_reg(Reg::Rdx, 0);
            let all = [Reg::Es, Reg::Cs, Reg::Ss, Reg::Ds, Reg::Fs, Reg::Gs];
            if mode == Mode::Real {
                c.set_desc(Reg::Idtr, SegDesc { base: IDT, limit: 0x3FF, access: 0 });
                for r in all {
                    c.set_reg(r, 0);
                    c.set_desc(r, at8086(0));
                }
                c.set_reg(Reg::Rip, CODE);
                c.set_reg(Reg::Rsp, 0x7000);
                return;
            }
            if matches!(mode, Mode::Compat | Mode::Long) {
                c.set_reg(Reg::Cr4, 0x20);
                c.set_reg(Reg::Efer, 0xD01);
            } else {
                c.set_reg(Reg::Cr4, 0x10);
            }
            c.set_reg(Reg::Cr3, TABLES);
            c.set_reg(Reg::Cr0, 0x8000_0031);
            let dpl = u32::from(cpl) << 5;
            let (code, access) = match (mode, cpl) {
                (Mode::Long, 0) => (CODE64, 0xA09B),
                (Mode::Long, _) => (CODE64_U, 0xA09B),
                (_, 0) => (CODE32, 0xC09B),
                _ => (CODE32_U, 0xC09B),
            };
            let data = if cpl == 0 { DATA32 } else { DATA32_U };
            for r in all {
                c.set_reg(r, data.into());
                c.set_desc(r, flat(0xC093 | dpl));
            }
            c.set_reg(Reg::Cs, code.into());
            c.set_desc(Reg::Cs, flat(access | dpl));
            c.set_reg(Reg::Rip, CODE);
            c.set_reg(Reg::Rsp, STACK);
            if mode == Mode::V86 {
                for r in all {
                    c.set_reg(r, 0x300);
                    c.set_desc(r, SegDesc { base: 0x3000, limit: 0xFFFF, access: 0xF3 });
                }
                c.set_reg(Reg::Cs, CODE >> 4);
                c.set_desc(Reg::Cs, SegDesc { base: CODE, limit: 0xFFFF, access: 0xF3 });
                c.set_reg(Reg::Rip, 0);
                c.set_reg(Reg::Rsp, 0x1000);
                c.set_reg(Reg::Rflags, 0x2_0002);
            }
        });
        if mode == Mode::Real {
            for v in 0..=255u64 {
                let entry = (HANDLERS >> 4 << 16) as u32 | (16 * v) as u32;
                self.write(IDT + 4 * v, &entry.to_le_bytes());
            }
        }
    }

    pub fn cpu<R>(&self, f: impl FnOnce(&mut Cpu) -> R) -> R {
        self.vm.vcpu(0).unwrap().with_cpu(|c| f(c))
    }

    pub fn get(&self, r: Reg) -> u64 {
        self.cpu(|c| c.get_reg(r))
    }

    pub fn set(&self, r: Reg, v: u64) -> &Self {
        self.cpu(|c| c.set_reg(r, v));
        self
    }

    /// Set bits of a register.
    pub fn or(&self, r: Reg, v: u64) -> &Self {
        self.set(r, self.get(r) | v)
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) -> &Self {
        self.vm.mem.write(gpa, bytes).unwrap();
        self
    }

    pub fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut b = [0; N];
        self.vm.mem.read(gpa, &mut b).unwrap();
        b
    }

    pub fn read16(&self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.read(gpa))
    }

    pub fn read32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.read(gpa))
    }

    pub fn read64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.read(gpa))
    }

    pub fn set_descriptor(&self, sel: u16, d: u64) -> &Self {
        self.write(GDT + u64::from(sel & 0xFFF8), &d.to_le_bytes())
    }

    pub fn descriptor(&self, sel: u16) -> u64 {
        self.read64(GDT + u64::from(sel & 0xFFF8))
    }

    pub fn set_idt(&self, vector: u8, gate: u64) -> &Self {
        let size = if self.long() { 16 } else { 8 };
        self.write(IDT + size * u64::from(vector), &gate.to_le_bytes())
    }

    /// Put code where the processor is.
    pub fn code(&self, bytes: &[u8]) -> &Self {
        self.write(CODE, bytes)
    }

    /// Where the processor is, linear.
    pub fn lin(&self) -> u64 {
        self.cpu(|c| c.get_desc(Reg::Cs).base.wrapping_add(c.get_reg(Reg::Rip)))
    }

    /// One exit.
    pub fn run(&self) -> Exit {
        self.vm.vcpu(0).unwrap().run(&self.vm).unwrap()
    }

    /// Run `n` instructions, or until a handler has been entered (and one NOP of it is done).
    pub fn steps(&self, n: usize) -> Outcome {
        for _ in 0..n {
            match self.run() {
                Exit::Mtrap => {}
                Exit::Suspended { how: SuspendHow::TripleFault } => return Outcome::TripleFault,
                other => panic!("{other:?}"),
            }
            let at = self.lin();
            if (HANDLERS..HANDLERS + 0x1000).contains(&at) {
                return Outcome::Vector(((at - HANDLERS) / 16) as u8);
            }
        }
        Outcome::Done
    }

    /// Run one instruction.
    pub fn exec(&self, bytes: &[u8]) -> Outcome {
        self.code(bytes).steps(1)
    }

    /// The top slots of the stack.
    pub fn stack<const N: usize>(&self) -> [u64; N] {
        let sp = self.get(Reg::Rsp);
        std::array::from_fn(|i| match self.mode {
            Mode::Long | Mode::Compat => self.read64(sp + 8 * i as u64),
            Mode::Real => self.read16(sp + 2 * i as u64).into(),
            _ => self.read32(sp + 4 * i as u64).into(),
        })
    }

    /// Run one instruction; the vector that it raised, and the error code on the stack.
    pub fn fault(&self, bytes: &[u8]) -> Option<(u8, Option<u32>)> {
        self.fault_in(bytes, 1)
    }

    pub fn fault_in(&self, bytes: &[u8], n: usize) -> Option<(u8, Option<u32>)> {
        match self.code(bytes).steps(n) {
            Outcome::Done => None,
            Outcome::TripleFault => Some((0xFF, None)),
            Outcome::Vector(v) => {
                let with_code = matches!(v, 8 | 10..=14 | 17) && self.mode != Mode::Real;
                Some((v, with_code.then(|| self.stack::<1>()[0] as u32)))
            }
        }
    }
}
