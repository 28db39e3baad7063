//! Our answer: the case runs at CPL 3 in a VM whose exception handlers report by a store to an
//! address that is no memory.

use crate::*;
use std::sync::Arc;
use vmm::exit::Exit;
use vmm::regs::{Reg, SegDesc};
use vmm::vm::Vm;

const GPRS: [Reg; 16] = [
    Reg::Rax,
    Reg::Rcx,
    Reg::Rdx,
    Reg::Rbx,
    Reg::Rsp,
    Reg::Rbp,
    Reg::Rsi,
    Reg::Rdi,
    Reg::R8,
    Reg::R9,
    Reg::R10,
    Reg::R11,
    Reg::R12,
    Reg::R13,
    Reg::R14,
    Reg::R15,
];

/// Linear base of the supervisor's memory, which starts at physical 0.
const KERNEL: u64 = 0xFFFF_8000_0000_0000;
const PHYS_CODE: u64 = 0x10_0000;
const PHYS_DATA: u64 = 0x11_0000;
const REPORT: u64 = 0x8000_0000;
const IDT: u64 = 0x8000;
const GDT: u64 = 0x9000;
const TSS: u64 = 0xA000;
const STUBS: u64 = 0x1_0000;
const STACK_TOP: u64 = 0x2_0000;

pub struct Guest {
    vm: Arc<Vm>,
}

impl Guest {
    /// A VM ready for cases, whose blocks are translated after `translate_after` runs.
    ///
    /// # Panics
    /// When the host has no memory for it.
    pub fn new(translate_after: u16) -> Guest {
        let vm = Vm::new(1).expect("a VM");
        vm.set_translate_after(translate_after);
        let size = 2 << 20;
        vm.mem.create_segment(0, "sysmem", size, None).expect("2 MiB of memory");
        vm.mmap_memseg(0, 0, 0, size, 7).expect("mapping at 0");
        let put = |at: u64, v: u64| vm.mem.write(at, &v.to_le_bytes()).expect("inside memory");
        // Page tables: user pages below, the supervisor in the upper half.
        put(0x1000, 0x2007);
        put(0x2000, 0x3007);
        put(0x3000 + (CODE >> 21) * 8, 0x4007);
        put(0x4000 + ((CODE >> 12) & 511) * 8, PHYS_CODE | 7);
        for i in 0..(DATA_LEN as u64) >> 12 {
            put(0x4000 + (((DATA >> 12) & 511) + i) * 8, (PHYS_DATA + (i << 12)) | 7);
        }
        put(0x1000 + 256 * 8, 0x5003);
        put(0x5000, 0x83);
        put(0x5000 + 8 * 2, REPORT | 0x83);
        // Descriptors with Linux's selectors.
        let gdt = [
            0,
            0,
            0x00AF_9B00_0000_FFFF, // 0x10 supervisor code
            0x00CF_9300_0000_FFFF, // 0x18 supervisor data
            0x00CF_FB00_0000_FFFF, // 0x20 32-bit user code
            0x00CF_F300_0000_FFFF, // 0x28 user data
            0x00AF_FB00_0000_FFFF, // 0x30 64-bit user code
        ];
        for (i, d) in gdt.iter().enumerate() {
            put(GDT + 8 * i as u64, *d);
        }
        put(TSS + 4, KERNEL + STACK_TOP);
        for v in 0..32u64 {
            let to = KERNEL + STUBS + v * 16;
            let dpl = if v == 3 || v == 4 { 0xEE00 } else { 0x8E00 };
            put(IDT + 16 * v, to & 0xFFFF | 0x10 << 16 | dpl << 32 | ((to >> 16) & 0xFFFF) << 48);
            put(IDT + 16 * v + 8, to >> 32);
            // mov [KERNEL + REPORT + 8 * vector], al
            let mut code = vec![0xA2];
            code.extend((KERNEL + REPORT + 8 * v).to_le_bytes());
            vm.mem.write(STUBS + v * 16, &code).expect("inside memory");
        }
        vm.activate_cpu(0).expect("vCPU 0");
        Guest { vm }
    }

    /// # Panics
    /// When the processor does what no case can make it do.
    pub fn run(&mut self, case: &Case) -> Outcome {
        let mut code = case.code.clone();
        code.resize(0x1000, 0xCC);
        self.vm.mem.write(PHYS_CODE, &code).expect("inside memory");
        self.vm.mem.write(PHYS_DATA, &case.data).expect("inside memory");
        let v = self.vm.vcpu(0).expect("vCPU 0").clone();
        v.with_cpu(|c| {
            c.reset();
            c.set_reg(Reg::Cr3, 0x1000);
            c.set_reg(Reg::Cr4, 0x5_0620);
            c.set_reg(Reg::Efer, 0xD01);
            c.set_reg(Reg::Cr0, 0x8005_0033);
            let limit = u32::MAX;
            let flat = SegDesc { base: 0, limit, access: 0xC0F3 };
            let (cs, code, ds, data) = match case.mode {
                Mode::Small => (
                    7,
                    SegDesc { base: CODE, limit: 0xFFF, access: 0xFB },
                    0xF,
                    SegDesc { base: DATA, limit: DATA_LEN as u32 - 1, access: 0xF3 },
                ),
                Mode::Compat => (0x23, SegDesc { base: 0, limit, access: 0xC0FB }, 0x2B, flat),
                Mode::Long => (0x33, SegDesc { base: 0, limit, access: 0xA0FB }, 0x2B, flat),
            };
            for r in [Reg::Ss, Reg::Ds, Reg::Es] {
                c.set_reg(r, ds);
                c.set_desc(r, data);
            }
            let null = SegDesc { base: 0, limit: 0, access: 0x1_0000 };
            for r in [Reg::Fs, Reg::Gs] {
                c.set_reg(r, 0);
                c.set_desc(r, null);
            }
            c.set_reg(Reg::Cs, cs);
            c.set_desc(Reg::Cs, code);
            c.set_desc(Reg::Gdtr, SegDesc { base: KERNEL + GDT, limit: 0x7F, access: 0 });
            c.set_desc(Reg::Idtr, SegDesc { base: KERNEL + IDT, limit: 0x1FF, access: 0 });
            c.set_reg(Reg::Tr, 0x40);
            c.set_desc(Reg::Tr, SegDesc { base: KERNEL + TSS, limit: 0x67, access: 0x8B });
            for (r, v) in GPRS.iter().zip(case.regs.gpr) {
                c.set_reg(*r, v);
            }
            c.set_reg(Reg::Rip, if case.mode == Mode::Small { 0 } else { CODE });
            c.set_reg(Reg::Rflags, case.regs.flags | 0x202);
            c.xcr0 = 7;
            c.ymm = case.regs.ymm;
            let f = &mut c.fpu;
            (f.fcw, f.fsw, f.ftw) = (case.regs.fcw, case.regs.fsw, case.regs.ftw);
            (f.mxcsr, f.st) = (case.regs.mxcsr, case.regs.st);
        });
        let exit = v.run(&self.vm).expect("an exit");
        let Exit::Mmio { gpa, .. } = exit else {
            panic!("{exit:?} in\n{}with {:#x?}", case.listing(), case.regs.gpr)
        };
        let vector = (gpa - REPORT) / 8;
        let mut regs = case.regs.clone();
        let (mut sp, mut cr2) = (0, 0);
        v.with_cpu(|c| {
            for (r, v) in GPRS.iter().zip(&mut regs.gpr) {
                *v = c.get_reg(*r);
            }
            sp = c.get_reg(Reg::Rsp) - KERNEL;
            cr2 = c.get_reg(Reg::Cr2);
            regs.ymm = c.ymm;
            (regs.fcw, regs.fsw, regs.ftw) = (c.fpu.fcw, c.fpu.fsw, c.fpu.ftw);
            (regs.mxcsr, regs.st) = (c.fpu.mxcsr, c.fpu.st);
        });
        let frame = sp + if matches!(vector, 8 | 10..=14 | 17) { 8 } else { 0 };
        let word = |i: u64| {
            let mut b = [0; 8];
            self.vm.mem.read(frame + 8 * i, &mut b).expect("the frame is in memory");
            u64::from_le_bytes(b)
        };
        (regs.rip, regs.gpr[4]) = (word(0), word(3));
        regs.flags = word(2) & FLAGS;
        let end = match vector {
            3 => End::Done,
            0 | 16 | 19 => End::Arithmetic,
            6 => End::Illegal,
            14 => End::Page(cr2),
            12 | 17 => End::Bus,
            1 => End::Trap,
            _ => End::Protection,
        };
        let mut data = vec![0; DATA_LEN];
        self.vm.mem.read(PHYS_DATA, &mut data).expect("inside memory");
        Outcome { end, regs, data }
    }
}
