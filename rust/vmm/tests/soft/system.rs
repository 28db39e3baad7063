//! Segments, gates, interrupts, task switches and privileged instructions, one at a time.

use crate::guest::*;
use vmm::exit::Exit;
use vmm::regs::{Reg, SegDesc};

const UD: Option<(u8, Option<u32>)> = Some((6, None));
const BR: Option<(u8, Option<u32>)> = Some((5, None));

fn gp(e: u16) -> Option<(u8, Option<u32>)> {
    Some((13, Some(e.into())))
}
fn np(e: u16) -> Option<(u8, Option<u32>)> {
    Some((11, Some(e.into())))
}
fn ss(e: u16) -> Option<(u8, Option<u32>)> {
    Some((12, Some(e.into())))
}
fn ts(e: u16) -> Option<(u8, Option<u32>)> {
    Some((10, Some(e.into())))
}

fn amd() -> bool {
    vmm::soft::cpuid::amd()
}

// -- segment registers -------------------------------------------------------------------------

const MOV_DS: &[u8] = &[0x8E, 0xD8];
const MOV_SS: &[u8] = &[0x8E, 0xD0];
const MOV_FS: &[u8] = &[0x8E, 0xE0];

#[test]
fn loading_a_segment_register() {
    use Mode::*;
    type Row = (Mode, u8, &'static [u8], u16, Option<(u8, Option<u32>)>);
    let table: &[Row] = &[
        (Prot, 0, MOV_DS, DATA32, None),
        (Prot, 0, MOV_DS, 0, None),
        (Prot, 0, MOV_DS, 3, None),
        (Prot, 0, MOV_DS, CODE32, None),
        (Prot, 0, MOV_DS, DATA32_U, None),
        (Prot, 0, MOV_DS, DATA32 | 1, gp(DATA32)),
        (Prot, 0, MOV_DS, ABSENT, np(ABSENT)),
        (Prot, 0, MOV_DS, BEYOND, gp(BEYOND)),
        (Prot, 0, MOV_DS, TASK, gp(TASK)),
        (Prot, 0, MOV_DS, EXECUTE_ONLY_U, gp(EXECUTE_ONLY_U & !3)),
        (Prot, 0, MOV_DS, 4, gp(4)),
        (Prot, 3, MOV_DS, DATA32, gp(DATA32)),
        (Prot, 3, MOV_DS, DATA32_U, None),
        (Prot, 3, MOV_DS, READ_ONLY_U, None),
        (Prot, 3, MOV_DS, CONFORMING, None),
        (Prot, 0, MOV_SS, DATA32, None),
        (Prot, 0, MOV_SS, DATA16, None),
        (Prot, 0, MOV_SS, EXPAND_DOWN, None),
        (Prot, 0, MOV_SS, 0, gp(0)),
        (Prot, 0, MOV_SS, CODE32, gp(CODE32)),
        (Prot, 0, MOV_SS, DATA32_U & !3, gp(DATA32_U & !3)),
        (Prot, 0, MOV_SS, DATA32 | 1, gp(DATA32)),
        (Prot, 0, MOV_SS, ABSENT, ss(ABSENT)),
        (Prot, 3, MOV_SS, READ_ONLY_U, gp(READ_ONLY_U & !3)),
        (Prot, 3, MOV_SS, DATA32_U, None),
        (Prot, 0, &[0x8E, 0xC8], DATA32, UD),
        (Long, 0, MOV_SS, 0, None),
        (Long, 0, MOV_SS, 1, gp(0)),
        (Long, 3, MOV_SS, 3, gp(0)),
        (Long, 0, MOV_DS, ABSENT, np(ABSENT)),
        (Long, 0, MOV_FS, DATA32_U, None),
        (Compat, 3, MOV_SS, 3, gp(0)),
        (V86, 3, MOV_SS, 0xFFFF, None),
        (Real, 0, MOV_SS, 0xFFFF, None),
    ];
    for &(mode, cpl, insn, sel, expected) in table {
        let g = Guest::new(mode, cpl);
        g.set(Reg::Rax, sel.into());

        let got = g.fault(insn);

        assert_eq!(got, expected, "{mode:?} CPL {cpl} {insn:x?} {sel:#x}");
        let reg = [Reg::Es, Reg::Cs, Reg::Ss, Reg::Ds, Reg::Fs][usize::from(insn[1] >> 3 & 7)];
        if expected.is_none() {
            assert_eq!(g.get(reg), sel.into());
        }
    }
}

#[test]
fn the_accessed_bit_is_set() {
    let g = Guest::new(Mode::Prot, 0);
    g.set(Reg::Rax, READ_ONLY_U.into());

    assert_eq!(g.fault(MOV_DS), None);

    assert_eq!(g.descriptor(READ_ONLY_U) >> 40 & 0xFF, 0xF1);
}

#[test]
fn a_null_segment_faults_when_it_is_used() {
    let g = Guest::new(Mode::Prot, 0);
    g.set(Reg::Rax, 0).set(Reg::Rbx, DATA);

    // mov ds, ax; mov al, [ebx]
    assert_eq!(g.fault_in(&[0x8E, 0xD8, 0x8A, 0x03], 2), gp(0));
}

#[test]
fn limits_and_types() {
    // (selector, address, instruction, expected)
    let read: &[u8] = &[0x8E, 0xD8, 0x8A, 0x03];
    let write: &[u8] = &[0x8E, 0xD8, 0x88, 0x03];
    let word: &[u8] = &[0x8E, 0xD8, 0x66, 0x8B, 0x03];
    for (sel, at, insn, expected) in [
        (DATA16, 0xFFFF, read, None),
        (DATA16, 0x1_0000, read, gp(0)),
        (DATA16, 0xFFFF, word, gp(0)),
        (CODE32, 0x100, read, None),
        (CODE32, 0x100, write, gp(0)),
        (READ_ONLY_U, 0x100, read, None),
        (READ_ONLY_U, 0x100, write, gp(0)),
        // Expand-down, limit 0xFF pages.
        (EXPAND_DOWN, 0xF_FFFF, read, gp(0)),
        (EXPAND_DOWN, 0x10_0000, read, None),
    ] {
        let g = Guest::new(Mode::Prot, 0);
        g.set(Reg::Rax, sel.into()).set(Reg::Rbx, at);

        assert_eq!(g.fault_in(insn, 2), expected, "{sel:#x}:{at:#x} {insn:x?}");
    }
}

#[test]
fn real_mode_keeps_limit_and_type() {
    let g = Guest::new(Mode::Real, 0);
    let big = SegDesc { base: 0, limit: u32::MAX, access: 0xC093 };
    g.cpu(|c| c.set_desc(Reg::Ds, big));
    g.set(Reg::Rax, 0x3000).set(Reg::Rbx, 0x10_0000).write(0x13_0000, &[0x5A]);

    // mov ds, ax; mov al, [ebx] (67: 32-bit address)
    assert_eq!(g.fault_in(&[0x8E, 0xD8, 0x67, 0x8A, 0x03], 2), None);

    assert_eq!(g.get(Reg::Rax) & 0xFF, 0x5A);
}

#[test]
fn push_and_pop_of_segments() {
    let g = Guest::new(Mode::Prot, 0);
    // push ds; pop es; push fs (16 bits)
    assert_eq!(g.fault_in(&[0x1E, 0x07, 0x66, 0x0F, 0xA0], 3), None);
    assert_eq!((g.get(Reg::Es), g.get(Reg::Rsp)), (DATA32.into(), STACK - 2));
    let g = Guest::new(Mode::Long, 3);
    // push fs; pop gs
    assert_eq!(g.fault_in(&[0x0F, 0xA0, 0x0F, 0xA9], 2), None);
    assert_eq!(g.get(Reg::Rsp), STACK);
    assert_eq!(g.get(Reg::Gs), DATA32_U.into());
}

#[test]
fn lss_loads_both() {
    let g = Guest::new(Mode::Prot, 0);
    g.set(Reg::Rbx, DATA).write(DATA, &[0x78, 0x56, 0x34, 0x12, DATA16 as u8, 0]);

    // lss esp, [ebx]
    assert_eq!(g.fault(&[0x0F, 0xB2, 0x23]), None);

    assert_eq!((g.get(Reg::Ss), g.get(Reg::Rsp)), (DATA16.into(), 0x1234_5678));
}

// -- tables ------------------------------------------------------------------------------------

#[test]
fn lldt_and_ltr() {
    let lldt: &[u8] = &[0x0F, 0x00, 0xD0];
    let ltr: &[u8] = &[0x0F, 0x00, 0xD8];
    for (mode, cpl, insn, sel, expected) in [
        (Mode::Prot, 0, lldt, LOCAL, None),
        (Mode::Prot, 0, lldt, 0, None),
        (Mode::Prot, 0, lldt, TASK, gp(TASK)),
        (Mode::Prot, 0, lldt, LOCAL | 4, gp(LOCAL | 4)),
        (Mode::Prot, 3, lldt, LOCAL, gp(0)),
        (Mode::Prot, 0, ltr, TASK2, None),
        (Mode::Prot, 0, ltr, 0, gp(0)),
        (Mode::Prot, 0, ltr, LOCAL, gp(LOCAL)),
        (Mode::V86, 3, ltr, TASK, UD),
        (Mode::Real, 0, lldt, LOCAL, UD),
        (Mode::Long, 0, lldt, LOCAL, None),
        (Mode::Long, 0, ltr, TASK, None),
    ] {
        let g = Guest::new(mode, cpl);
        g.set(Reg::Rax, sel.into());

        assert_eq!(g.fault(insn), expected, "{mode:?} {cpl} {insn:x?} {sel:#x}");
        if insn == ltr && expected.is_none() {
            assert_eq!(g.descriptor(sel) >> 40 & 0xF, 0xB, "busy");
            assert_eq!(g.get(Reg::Tr), sel.into());
        }
    }
}

#[test]
fn a_local_descriptor_table_serves() {
    let g = Guest::new(Mode::Prot, 0);
    g.write(LDT + 8, &descriptor(0x1234, 0xFF, 0x93).to_le_bytes());
    g.set(Reg::Rax, LOCAL.into()).set(Reg::Rcx, 0xC);

    // lldt ax; mov ds, cx
    assert_eq!(g.fault_in(&[0x0F, 0x00, 0xD0, 0x8E, 0xD9], 2), None);

    assert_eq!(g.cpu(|c| c.get_desc(Reg::Ds).base), 0x1234);
    // Beyond its limit.
    g.set(Reg::Rip, CODE).set(Reg::Rcx, 0x84);
    assert_eq!(g.fault(&[0x8E, 0xD9]), gp(0x84));
}

#[test]
fn lar_lsl_verr_verw() {
    let zf = |g: &Guest| g.get(Reg::Rflags) & 0x40 != 0;
    // (selector, CPL, LAR, LSL, VERR, VERW)
    for (sel, cpl, lar, lsl, verr, verw) in [
        (DATA32, 0, Some(0x00CF_9300), Some(u32::MAX), true, true),
        (DATA32, 3, None, None, false, false),
        (DATA32_U, 3, Some(0x00CF_F300), Some(u32::MAX), true, true),
        (READ_ONLY_U, 3, Some(0x00CF_F000), Some(u32::MAX), true, false),
        (EXECUTE_ONLY_U, 3, Some(0x00CF_F800), Some(u32::MAX), false, false),
        (CONFORMING, 3, Some(0x00CF_9E00), Some(u32::MAX), true, false),
        (SMALL, 0, Some(0x0040_9A00), Some(0xFF), true, false),
        (TASK, 0, Some(0x0000_8900), Some(0xFFF), false, false),
        (TASK_GATE, 0, Some(0x0000_E500), None, false, false),
        (0, 0, None, None, false, false),
        (BEYOND, 0, None, None, false, false),
    ] {
        let g = Guest::new(Mode::Prot, cpl);
        let what = format!("{sel:#x} CPL {cpl}");
        g.set(Reg::Rcx, sel.into()).set(Reg::Rax, 0xDEAD);
        assert_eq!(g.fault(&[0x0F, 0x02, 0xC1]), None);
        assert_eq!(zf(&g), lar.is_some(), "LAR {what}");
        assert_eq!(g.get(Reg::Rax) as u32, lar.unwrap_or(0xDEAD), "LAR {what}");
        g.set(Reg::Rip, CODE).set(Reg::Rax, 0xDEAD);
        assert_eq!(g.fault(&[0x0F, 0x03, 0xC1]), None);
        assert_eq!(zf(&g), lsl.is_some(), "LSL {what}");
        assert_eq!(g.get(Reg::Rax) as u32, lsl.unwrap_or(0xDEAD), "LSL {what}");
        g.set(Reg::Rip, CODE);
        assert_eq!(g.fault(&[0x0F, 0x00, 0xE1]), None);
        assert_eq!(zf(&g), verr, "VERR {what}");
        g.set(Reg::Rip, CODE);
        assert_eq!(g.fault(&[0x0F, 0x00, 0xE9]), None);
        assert_eq!(zf(&g), verw, "VERW {what}");
    }
}

#[test]
fn arpl_raises_the_rpl() {
    for (dst, src, expected, zf) in [(0x10, 3, 0x13, true), (0x13, 1, 0x13, false)] {
        let g = Guest::new(Mode::Prot, 3);
        g.set(Reg::Rax, dst).set(Reg::Rcx, src);
        // arpl ax, cx
        assert_eq!(g.fault(&[0x63, 0xC8]), None);
        assert_eq!(g.get(Reg::Rax), expected);
        assert_eq!(g.get(Reg::Rflags) & 0x40 != 0, zf);
    }
}

#[test]
fn table_registers() {
    let g = Guest::new(Mode::Long, 0);
    let table = [0x34, 0x12, 8, 7, 6, 5, 4, 3, 0, 0];
    g.set(Reg::Rbx, DATA).write(DATA, &table);
    // lidt [rbx]; sidt [rbx+16]
    assert_eq!(g.fault_in(&[0x0F, 0x01, 0x1B, 0x0F, 0x01, 0x4B, 0x10], 2), None);
    assert_eq!(g.read::<10>(DATA + 16), table);
    // lgdt with a base that is not canonical
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rbx, DATA).write(DATA, &[0xFF, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(g.fault(&[0x0F, 0x01, 0x13]), gp(0));
    // With UMIP, programs may not look.
    let g = Guest::new(Mode::Long, 3);
    g.or(Reg::Cr4, 1 << 11).set(Reg::Rbx, DATA);
    assert_eq!(g.fault(&[0x0F, 0x01, 0x03]), gp(0));
    // 16-bit operands: a 24-bit base.
    let g = Guest::new(Mode::Prot, 0);
    g.set(Reg::Rbx, DATA).write(DATA, &[0xFF, 0, 1, 2, 3, 4]);
    assert_eq!(g.fault(&[0x66, 0x0F, 0x01, 0x13]), None);
    assert_eq!(g.get(Reg::Gdtr), 0x03_0201);
}

// -- interrupts and exceptions -----------------------------------------------------------------

#[test]
fn frames() {
    // Long mode, from level 3.
    let g = Guest::new(Mode::Long, 3);
    assert_eq!(g.exec(&[0xCD, 0x80]), Outcome::Vector(0x80));
    assert_eq!(g.get(Reg::Rsp), STACK0 - 40);
    let [rip, cs, flags, rsp, ss] = g.stack();
    assert_eq!((rip, cs), (CODE + 2, CODE64_U.into()));
    assert_eq!((flags, rsp, ss), (2, STACK, DATA32_U.into()));
    assert_eq!((g.get(Reg::Cs), g.get(Reg::Ss)), (CODE64.into(), 0));
    // From the same level: aligned, SS kept.
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rsp, STACK - 3);
    assert_eq!(g.exec(&[0x0F, 0x0B]), Outcome::Vector(6));
    assert_eq!(g.get(Reg::Rsp), STACK - 16 - 40);
    let [rip, _, flags, rsp, ss] = g.stack();
    // A fault's image has RF.
    assert_eq!((rip, flags, rsp, ss), (CODE, 0x1_0002, STACK - 3, DATA32.into()));
    assert_eq!(g.get(Reg::Ss), DATA32.into());
    // Protected mode, from level 3 with an error code.
    let g = Guest::new(Mode::Prot, 3);
    assert_eq!(g.exec(&[0xF4]), Outcome::Vector(13));
    assert_eq!(g.get(Reg::Rsp), STACK0 - 24);
    let [error, eip, cs, flags, esp, ss] = g.stack();
    assert_eq!((error, eip, cs), (0, CODE, CODE32_U.into()));
    assert_eq!((flags, esp, ss), (0x1_0002, STACK, DATA32_U.into()));
    assert_eq!((g.get(Reg::Cs), g.get(Reg::Ss)), (CODE32.into(), DATA32.into()));
    // Compatibility mode goes to a 64-bit handler.
    let g = Guest::new(Mode::Compat, 3);
    assert_eq!(g.exec(&[0xCD, 0x80]), Outcome::Vector(0x80));
    let [rip, cs, _, rsp, ss] = g.stack();
    assert_eq!((rip, cs, rsp, ss), (CODE + 2, CODE32_U.into(), STACK, DATA32_U.into()));
    // Real mode.
    let g = Guest::new(Mode::Real, 0);
    g.set(Reg::Rflags, 0x302);
    assert_eq!(g.exec(&[0xCD, 0x21]), Outcome::Vector(0x21));
    let [ip, cs, flags] = g.stack();
    assert_eq!((ip, cs, flags), (CODE + 2, 0, 0x302));
    assert_eq!((g.get(Reg::Rflags), g.get(Reg::Rsp)), (2, 0x7000 - 6));
}

#[test]
fn interrupt_gates_clear_if_and_trap_gates_keep_it() {
    for (kind, expected) in [(0xEE, 0), (0xEF, 0x200)] {
        for mode in [Mode::Prot, Mode::Long] {
            let g = Guest::new(mode, 3);
            g.set(Reg::Rflags, 0x202);
            let kernel = if mode == Mode::Long { CODE64 } else { CODE32 };
            g.set_idt(0x80, gate(kernel, HANDLERS + 0x800, kind, 0));

            assert_eq!(g.exec(&[0xCD, 0x80]), Outcome::Vector(0x80));

            assert_eq!(g.get(Reg::Rflags) & 0x200, expected, "{mode:?} {kind:#x}");
        }
    }
}

#[test]
fn who_may_use_a_gate() {
    for mode in [Mode::Prot, Mode::Long] {
        let int = |vector: u8| [0xCD, vector];
        // DPL 0 from level 3: error code vector * 8 + IDT.
        assert_eq!(Guest::new(mode, 3).fault(&int(0x21)), gp(0x21 * 8 + 2), "{mode:?}");
        assert_eq!(Guest::new(mode, 0).fault(&int(0x21)), Some((0x21, None)));
        assert_eq!(Guest::new(mode, 3).fault(&[0xCC]), Some((3, None)));
        // INT1 is not checked.
        assert_eq!(Guest::new(mode, 3).fault(&[0xF1]), Some((1, None)));
        for (gate, expected) in [
            (gate(CODE32, HANDLERS, 0x6E, 0), np(0x80 * 8 + 2)),
            (gate(CODE32, HANDLERS, 0xE9, 0), gp(0x80 * 8 + 2)),
            (gate(0, HANDLERS, 0xEE, 0), gp(0)),
            (gate(DATA32, HANDLERS, 0xEE, 0), gp(DATA32)),
            (gate(ABSENT_CODE, HANDLERS, 0xEE, 0), {
                if mode == Mode::Long { gp(ABSENT_CODE) } else { np(ABSENT_CODE) }
            }),
            (gate(BEYOND, HANDLERS, 0xEE, 0), gp(BEYOND)),
        ] {
            let g = Guest::new(mode, 3);
            g.set_idt(0x80, gate);
            assert_eq!(g.fault(&int(0x80)), expected, "{mode:?} {gate:#x}");
        }
        // The table ends before.
        let g = Guest::new(mode, 0);
        g.cpu(|c| c.set_desc(Reg::Idtr, SegDesc { base: IDT, limit: 0x1FF, access: 0 }));
        assert_eq!(g.fault(&int(0x80)), gp(0x80 * 8 + 2));
    }
    // In long mode the handler must be 64-bit code.
    let g = Guest::new(Mode::Long, 0);
    g.set_idt(0x80, gate(CODE32, HANDLERS, 0x8E, 0));
    assert_eq!(g.fault(&[0xCD, 0x80]), gp(CODE32));
}

#[test]
fn an_exception_in_delivery_has_the_ext_bit() {
    let g = Guest::new(Mode::Prot, 0);
    g.set_idt(6, gate(CODE32, HANDLERS, 0x0E, 0));
    assert_eq!(g.fault(&[0x0F, 0x0B]), np(6 * 8 + 3));
}

#[test]
fn double_and_triple_faults() {
    for mode in [Mode::Prot, Mode::Long] {
        // #GP whose gate is absent: #NP after #GP.
        let g = Guest::new(mode, 0);
        g.set_idt(13, 0);
        assert_eq!(g.fault(&[0xCD, 0x21]).map(|f| f.0), Some(0x21));
        let g = Guest::new(mode, 3);
        g.set_idt(13, 0);
        assert_eq!(g.fault(&[0xF4]), Some((8, Some(0))), "{mode:?}");
        // #UD is benign: its #GP is served.
        let g = Guest::new(mode, 0);
        g.set_idt(6, 0);
        assert_eq!(g.fault(&[0x0F, 0x0B]), gp(6 * 8 + 3), "{mode:?}");
        // No #DF handler either.
        let g = Guest::new(mode, 3);
        g.set_idt(13, 0).set_idt(8, 0);
        assert_eq!(g.exec(&[0xF4]), Outcome::TripleFault, "{mode:?}");
        // A page fault on the stack while a page fault is delivered.
        let g = Guest::new(mode, 0);
        g.set_idt(
            8,
            gate(if mode == Mode::Long { CODE64 } else { CODE32 }, HANDLERS + 128, 0x8E, 1),
        );
        let hole = if mode == Mode::Long { TABLES + 0x1000 + 8 } else { TABLES + 4 * 64 };
        let hole_at = if mode == Mode::Long { 0x4000_0000 } else { 0x1000_0000 };
        g.write(hole, &[0; 4]).set(Reg::Rbx, hole_at).set(Reg::Rsp, hole_at + 0x100);
        // mov al, [rbx]: in protected mode #DF finds the same stack.
        let expected = if mode == Mode::Long { Outcome::Vector(8) } else { Outcome::TripleFault };
        assert_eq!(g.exec(&[0x8A, 0x03]), expected);
        if mode == Mode::Long {
            assert_eq!(g.get(Reg::Rsp), IST1 - 48);
            assert_eq!(g.get(Reg::Cr2), hole_at + 0x100 - 8);
        }
    }
}

#[test]
fn page_faults_tell_address_and_reason() {
    let g = Guest::new(Mode::Long, 3);
    g.write(TABLES + 0x1000 + 8, &[0; 8]).set(Reg::Rbx, 0x4000_0123);
    assert_eq!(g.fault(&[0x88, 0x03]), Some((14, Some(6))));
    assert_eq!(g.get(Reg::Cr2), 0x4000_0123);
}

#[test]
fn interrupt_stack_table() {
    let g = Guest::new(Mode::Long, 0);
    g.set_idt(6, gate(CODE64, HANDLERS + 96, 0x8E, 1)).write(TSS + 0x24, &(IST1 + 9).to_le_bytes());
    assert_eq!(g.exec(&[0x0F, 0x0B]), Outcome::Vector(6));
    assert_eq!(g.get(Reg::Rsp), IST1 - 40);
    assert_eq!(g.get(Reg::Ss), DATA32.into());
    // A stack that is not canonical.
    let g = Guest::new(Mode::Long, 0);
    g.set_idt(6, gate(CODE64, HANDLERS + 96, 0x8E, 1))
        .write(TSS + 0x24, &(1u64 << 50).to_le_bytes());
    assert_eq!(g.fault(&[0x0F, 0x0B]), ss(1));
    // The TSS ends before.
    let g = Guest::new(Mode::Long, 3);
    g.cpu(|c| c.set_desc(Reg::Tr, SegDesc { base: TSS, limit: 3, access: 0x8B }));
    g.set_idt(13, gate(CODE64, HANDLERS + 13 * 16, 0x8E, 0));
    assert_eq!(g.exec(&[0xCD, 0x80]), Outcome::TripleFault);
}

#[test]
fn into_and_bound() {
    let g = Guest::new(Mode::Prot, 3);
    assert_eq!(g.fault(&[0xCE]), None);
    let g = Guest::new(Mode::Prot, 3);
    g.set(Reg::Rflags, 0x802);
    assert_eq!(g.fault(&[0xCE]), Some((4, None)));
    assert_eq!(g.stack::<1>(), [CODE + 1]);
    for (v, expected) in [(5, None), (10, None), (11, BR), (-6i32 as u32 as u64, BR)] {
        let g = Guest::new(Mode::Prot, 3);
        g.set(Reg::Rax, v).set(Reg::Rbx, DATA);
        g.write(DATA, &(-5i32).to_le_bytes()).write(DATA + 4, &10i32.to_le_bytes());
        assert_eq!(g.fault(&[0x62, 0x03]), expected, "{v:#x}");
    }
}

#[test]
fn an_nmi_blocks_others_until_iret() {
    let g = Guest::new(Mode::Long, 0);
    g.cpu(|c| c.inject_nmi());
    assert_eq!(g.steps(1), Outcome::Vector(2));
    // A second one waits.
    g.cpu(|c| c.inject_nmi());
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!(g.lin(), HANDLERS + 32 + 2);
    g.write(HANDLERS + 34, &[0x48, 0xCF]);
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!(g.lin(), CODE);
    g.write(HANDLERS + 34, &[0x90, 0x90]);
    assert_eq!(g.steps(1), Outcome::Vector(2));
}

#[test]
fn single_step_traps_behind_the_instruction() {
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rflags, 0x102);
    assert_eq!(g.exec(&[0x90]), Outcome::Vector(1));
    let [rip, _, flags] = g.stack();
    assert_eq!((rip, flags), (CODE + 1, 0x102));
    assert_eq!(g.get(Reg::Dr6), 0xFFFF_4FF0);
    // Not behind a load of SS, nor on the way into a software interrupt.
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rflags, 0x102).set(Reg::Rax, DATA32.into());
    assert_eq!(g.exec(&[0x8E, 0xD0, 0x90]), Outcome::Done);
    assert_eq!(g.steps(1), Outcome::Vector(1));
    assert_eq!(g.stack::<1>(), [CODE + 3]);
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rflags, 0x102);
    assert_eq!(g.exec(&[0xCD, 0x80]), Outcome::Vector(0x80));
}

#[test]
fn breakpoints() {
    // On an instruction: a fault, once.
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Dr0, CODE).set(Reg::Dr7, 0x401);
    assert_eq!(g.exec(&[0x90]), Outcome::Vector(1));
    assert_eq!(g.stack::<1>(), [CODE]);
    assert_eq!(g.get(Reg::Dr6), 0xFFFF_0FF1);
    let sp = g.get(Reg::Rsp);
    let flags = g.read64(sp + 16) | 0x1_0000;
    g.write(sp + 16, &flags.to_le_bytes()).write(HANDLERS + 17, &[0x48, 0xCF]);
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!(g.lin(), CODE + 1, "RF lets it pass");
    // On data: a trap.
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Dr1, DATA).set(Reg::Dr7, 0x400 | 1 << 2 | 1 << 20).set(Reg::Rbx, DATA);
    assert_eq!(g.exec(&[0x88, 0x03]), Outcome::Vector(1));
    assert_eq!(g.stack::<1>(), [CODE + 2]);
    assert_eq!(g.get(Reg::Dr6), 0xFFFF_0FF2);
}

// -- far transfers -----------------------------------------------------------------------------

/// JMP or CALL sel:offset in 32-bit code.
fn far(op: u8, sel: u16, offset: u64) -> Vec<u8> {
    let mut v = vec![op];
    v.extend((offset as u32).to_le_bytes());
    v.extend(sel.to_le_bytes());
    v
}
const JMP: u8 = 0xEA;
const CALL: u8 = 0x9A;

#[test]
fn far_jumps() {
    use Mode::*;
    for (mode, cpl, sel, offset, expected) in [
        (Prot, 0, CODE32, TARGET, None),
        (Prot, 0, 0, TARGET, gp(0)),
        (Prot, 0, BEYOND, TARGET, gp(BEYOND)),
        (Prot, 0, DATA32, TARGET, gp(DATA32)),
        (Prot, 0, CODE32_U, TARGET, gp(CODE32_U & !3)),
        (Prot, 0, CODE32 | 3, TARGET, gp(CODE32)),
        (Prot, 3, CODE32, TARGET, gp(CODE32)),
        (Prot, 3, CODE32_U, TARGET, None),
        (Prot, 3, CONFORMING, TARGET, None),
        (Prot, 0, ABSENT_CODE, TARGET, np(ABSENT_CODE)),
        (Prot, 0, SMALL, 0xFF, None),
        (Prot, 0, SMALL, 0x100, gp(0)),
        (Prot, 0, CODE16, 0x1_0000, gp(0)),
        (Compat, 0, CODE64, TARGET, None),
        (Compat, 0, LONG_AND_32, TARGET, gp(LONG_AND_32)),
        (Compat, 0, TASK, TARGET, gp(TASK)),
        (Compat, 0, TASK_GATE, TARGET, gp(TASK_GATE)),
    ] {
        let g = Guest::new(mode, cpl);

        let got = g.fault(&far(JMP, sel, offset));

        assert_eq!(got, expected, "{mode:?} {cpl} {sel:#x}:{offset:#x}");
        if expected.is_none() {
            assert_eq!(g.get(Reg::Rip), offset);
            assert_eq!(g.get(Reg::Cs), u64::from(sel & !3 | u16::from(cpl)));
        }
    }
}

#[test]
fn far_call_and_return() {
    let g = Guest::new(Mode::Prot, 3);
    g.write(TARGET, &[0xCA, 0x08, 0x00]);
    assert_eq!(g.fault(&far(CALL, CODE32_U, TARGET)), None);
    assert_eq!(g.stack(), [CODE + 7, CODE32_U.into()]);
    assert_eq!(g.steps(1), Outcome::Done);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Rsp)), (CODE + 7, STACK + 8));
}

#[test]
fn a_call_without_room_changes_nothing() {
    let g = Guest::new(Mode::Prot, 3);
    g.cpu(|c| c.set_desc(Reg::Ss, SegDesc { base: 0, limit: 3, access: 0x40F3 }));
    g.set(Reg::Rsp, 4);
    assert_eq!(g.fault(&far(CALL, CODE32_U, TARGET)), ss(0));
    let [_, eip, _, _, esp, _] = g.stack();
    assert_eq!((eip, esp), (CODE, 4));
}

#[test]
fn real_mode_far_transfers() {
    let g = Guest::new(Mode::Real, 0);
    // call 0900:0010; there: retf
    g.write(0x9010, &[0xCB]);
    assert_eq!(g.fault(&[CALL, 0x10, 0x00, 0x00, 0x09]), None);
    assert_eq!((g.lin(), g.stack()), (0x9010, [CODE + 5, 0]));
    assert_eq!(g.steps(1), Outcome::Done);
    assert_eq!((g.lin(), g.get(Reg::Rsp)), (CODE + 5, 0x7000));
}

#[test]
fn call_gates() {
    // To level 0 with two parameters.
    let g = Guest::new(Mode::Prot, 3);
    g.set_descriptor(GATE, gate(CODE32, TARGET, 0xEC, 2));
    g.write(STACK - 8, &[1, 0, 0, 0, 2, 0, 0, 0]).set(Reg::Rsp, STACK - 8);
    g.write(TARGET, &[0xCA, 0x08, 0x00]);
    assert_eq!(g.fault(&far(CALL, GATE | 3, 0)), None);
    assert_eq!(g.stack(), [CODE + 7, CODE32_U.into(), 1, 2, STACK - 8, DATA32_U.into()]);
    assert_eq!((g.get(Reg::Cs), g.get(Reg::Ss)), (CODE32.into(), DATA32.into()));
    // And back: the data segments of level 0 do not come along.
    g.set(Reg::Ds, DATA32.into());
    g.cpu(|c| c.set_desc(Reg::Ds, SegDesc { base: 0, limit: u32::MAX, access: 0xC093 }));
    assert_eq!(g.steps(1), Outcome::Done);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Rsp)), (CODE + 7, STACK));
    assert_eq!((g.get(Reg::Cs), g.get(Reg::Ss)), (CODE32_U.into(), DATA32_U.into()));
    assert_eq!((g.get(Reg::Ds), g.get(Reg::Es)), (0, DATA32_U.into()));

    for (d, op, expected) in [
        // DPL 0.
        (gate(CODE32, TARGET, 0x8C, 0), CALL, gp(GATE)),
        (gate(CODE32, TARGET, 0x6C, 0), CALL, np(GATE)),
        (gate(0, TARGET, 0xEC, 0), CALL, gp(0)),
        (gate(DATA32, TARGET, 0xEC, 0), CALL, gp(DATA32)),
        (gate(ABSENT_CODE, TARGET, 0xEC, 0), CALL, np(ABSENT_CODE)),
        // JMP does not change the level, but to conforming code it goes.
        (gate(CODE32, TARGET, 0xEC, 0), JMP, gp(CODE32)),
        (gate(CONFORMING, TARGET, 0xEC, 0), JMP, None),
        (gate(CONFORMING, TARGET, 0xEC, 0), CALL, None),
        (gate(SMALL, 0x100, 0xEC, 0), CALL, gp(0)),
    ] {
        let g = Guest::new(Mode::Prot, 3);
        g.set_descriptor(GATE, d);
        assert_eq!(g.fault(&far(op, GATE | 3, 0)), expected, "{d:#x} {op:#x}");
    }
}

#[test]
fn bad_inner_stacks() {
    for (sel, expected) in [
        (0, ts(0)),
        (BEYOND, ts(BEYOND)),
        (DATA32_U, ts(DATA32_U & !3)),
        (CODE32, ts(CODE32)),
        (ABSENT, ss(ABSENT)),
    ] {
        let g = Guest::new(Mode::Prot, 3);
        // A gate to level 1 leaves the handlers their stack.
        g.set_descriptor(CONFORMING, descriptor(0, 0xF_FFFF, 0xC0BB));
        g.set_descriptor(GATE, gate(CONFORMING, TARGET, 0xEC, 0));
        g.write(TSS + 12, &(STACK0 as u32).to_le_bytes()).write(TSS + 16, &sel.to_le_bytes());
        let expected = if sel == ABSENT {
            // Its RPL must be 1 before presence matters.
            ts(ABSENT)
        } else {
            expected
        };
        assert_eq!(g.fault(&far(CALL, GATE | 3, 0)), expected, "{sel:#x}");
    }
    let g = Guest::new(Mode::Prot, 3);
    g.set_descriptor(CONFORMING, descriptor(0, 0xF_FFFF, 0xC0BB));
    g.set_descriptor(GATE, gate(CONFORMING, TARGET, 0xEC, 0));
    g.write(TSS + 12, &(STACK0 as u32).to_le_bytes()).write(TSS + 16, &DATA_RING1.to_le_bytes());
    assert_eq!(g.fault(&far(CALL, GATE | 3, 0)), None);
    assert_eq!((g.get(Reg::Cs), g.get(Reg::Ss)), (u64::from(CONFORMING) | 1, DATA_RING1.into()));
}

#[test]
fn a_64_bit_call_gate() {
    let g = Guest::new(Mode::Long, 3);
    g.set_descriptor(GATE, gate(CODE64, TARGET, 0xEC, 0)).set_descriptor(GATE + 8, 0);
    g.set(Reg::Rbx, DATA).write(DATA + 4, &(GATE | 3).to_le_bytes());
    g.write(TARGET, &[0x48, 0xCB]);
    // call far [rbx]
    assert_eq!(g.fault(&[0xFF, 0x1B]), None);
    assert_eq!(g.stack(), [CODE + 2, CODE64_U.into(), STACK, DATA32_U.into()]);
    assert_eq!((g.get(Reg::Ss), g.get(Reg::Rsp)), (0, STACK0 - 32));
    assert_eq!(g.steps(1), Outcome::Done);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Rsp)), (CODE + 2, STACK));
    // The upper half must have type 0.
    let g = Guest::new(Mode::Long, 3);
    g.set_descriptor(GATE, gate(CODE64, TARGET, 0xEC, 0)).set_descriptor(GATE + 8, 1 << 40);
    g.set(Reg::Rbx, DATA).write(DATA + 4, &(GATE | 3).to_le_bytes());
    assert_eq!(g.fault(&[0xFF, 0x1B]), gp(GATE));
}

// -- IRET --------------------------------------------------------------------------------------

fn push64(g: &Guest, values: &[u64]) {
    let sp = STACK - 8 * values.len() as u64;
    for (i, v) in values.iter().enumerate() {
        g.write(sp + 8 * i as u64, &v.to_le_bytes());
    }
    g.set(Reg::Rsp, sp);
}

fn push32(g: &Guest, values: &[u64]) {
    let sp = STACK - 4 * values.len() as u64;
    for (i, v) in values.iter().enumerate() {
        g.write(sp + 4 * i as u64, &(*v as u32).to_le_bytes());
    }
    g.set(Reg::Rsp, sp);
}

#[test]
fn iretq() {
    let u = u64::from;
    for (rip, cs, sp, ss_sel, expected) in [
        (TARGET, CODE64, 0x123, 0, None),
        (TARGET, CODE64, 0x123, DATA32, None),
        (TARGET, CODE64_U, 0x123, DATA32_U, None),
        (TARGET, CODE32_U, 0x123, DATA32_U, None),
        (TARGET, CODE64_U, 0x123, 0, gp(0)),
        (TARGET, CODE64_U, 0x123, 3, gp(0)),
        (TARGET, CODE32, 0x123, 0, gp(0)),
        (1 << 47, CODE64_U, 0x123, DATA32_U, gp(0)),
        (TARGET, 0, 0x123, DATA32, gp(0)),
        (TARGET, CODE64 | 3, 0x123, DATA32, gp(CODE64)),
        (TARGET, LONG_AND_32, 0x123, DATA32, gp(LONG_AND_32)),
        (TARGET, CODE64_U, 0x123, DATA32, gp(DATA32)),
        (TARGET, CODE64, 0x123, ABSENT, ss(ABSENT)),
    ] {
        let g = Guest::new(Mode::Long, 0);
        push64(&g, &[rip, u(cs), 0x0020_0AD7, sp, u(ss_sel)]);

        let got = g.fault(&[0x48, 0xCF]);

        assert_eq!(got, expected, "{cs:#x}:{rip:#x} {ss_sel:#x}:{sp:#x}");
        if expected.is_none() {
            assert_eq!((g.get(Reg::Rip), g.get(Reg::Cs)), (rip, u(cs)));
            assert_eq!((g.get(Reg::Rsp), g.get(Reg::Ss)), (sp, u(ss_sel)));
            assert_eq!(g.get(Reg::Rflags), 0x0020_0AD7);
        }
    }
    // NT has no meaning but an error here.
    let g = Guest::new(Mode::Long, 0);
    push64(&g, &[TARGET, u(CODE64), 2, STACK, 0]);
    g.or(Reg::Rflags, 1 << 14);
    assert_eq!(g.fault(&[0x48, 0xCF]), gp(0));
}

#[test]
fn a_program_cannot_return_inwards_or_raise_its_rights() {
    let g = Guest::new(Mode::Long, 3);
    push64(&g, &[TARGET, CODE64.into(), 2, STACK, 0]);
    assert_eq!(g.fault(&[0x48, 0xCF]), gp(CODE64));
    let g = Guest::new(Mode::Long, 3);
    push64(&g, &[TARGET, CODE64_U.into(), 0x3202, STACK, DATA32_U.into()]);
    assert_eq!(g.fault(&[0x48, 0xCF]), None);
    assert_eq!(g.get(Reg::Rflags), 2, "neither IF nor IOPL");
}

#[test]
fn iret_to_a_16_bit_stack_moves_sp_only() {
    let g = Guest::new(Mode::Prot, 0);
    g.set_descriptor(DATA32_U, descriptor(0, 0xFFFF, 0xF3));
    push32(&g, &[TARGET, CODE32_U.into(), 2, 0x1234_5678, DATA32_U.into()]);
    assert_eq!(g.fault(&[0xCF]), None);
    assert_eq!(g.get(Reg::Rsp), 0x3_5678);
}

#[test]
fn iret_same_level_and_16_bit() {
    let g = Guest::new(Mode::Prot, 0);
    push32(&g, &[TARGET, CODE32.into(), 0x202]);
    assert_eq!(g.fault(&[0xCF]), None);
    assert_eq!((g.get(Reg::Rsp), g.get(Reg::Rflags)), (STACK, 0x202));
    let g = Guest::new(Mode::Real, 0);
    g.set(Reg::Rsp, 0x6FFA).write(0x6FFA, &[0x10, 0x00, 0x00, 0x09, 0xFF, 0x02]);
    assert_eq!(g.fault(&[0xCF]), None);
    assert_eq!((g.lin(), g.get(Reg::Rsp), g.get(Reg::Rflags)), (0x9010, 0x7000, 0x2D7));
}

// -- virtual-8086 mode -------------------------------------------------------------------------

#[test]
fn into_virtual_8086_mode_and_back() {
    let g = Guest::new(Mode::Prot, 0);
    let flags = 0x2_3202;
    push32(&g, &[0x10, 0x900, flags, 0x2000, 0x300, 0x301, 0x302, 0x303, 0x304]);
    assert_eq!(g.fault(&[0xCF]), None);
    assert_eq!((g.lin(), g.get(Reg::Rflags)), (0x9010, flags));
    assert_eq!(
        g.cpu(|c| c.get_desc(Reg::Gs)),
        SegDesc { base: 0x3040, limit: 0xFFFF, access: 0xF3 }
    );
    // IOPL 3: INT goes through the gate, to level 0.
    g.write(0x9010, &[0xCD, 0x80]);
    assert_eq!(g.steps(1), Outcome::Vector(0x80));
    let frame = g.stack::<9>();
    assert_eq!(frame, [0x12, 0x900, flags, 0x2000, 0x300, 0x301, 0x302, 0x303, 0x304]);
    assert_eq!(
        (g.get(Reg::Rflags) & 0x2_0200, g.get(Reg::Gs), g.get(Reg::Ss)),
        (0, 0, DATA32.into())
    );
    // and IRET brings it back.
    g.write(HANDLERS + 0x800, &[0xCF]);
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!((g.lin(), g.get(Reg::Fs)), (0x9012, 0x303));
}

#[test]
fn iopl_in_virtual_8086_mode() {
    let sensitive: &[&[u8]] = &[&[0xFA], &[0xFB], &[0x9C], &[0x9D], &[0xCD, 0x80], &[0xCF]];
    for insn in sensitive {
        assert_eq!(Guest::new(Mode::V86, 3).fault(insn), gp(0), "{insn:x?}");
        let g = Guest::new(Mode::V86, 3);
        g.or(Reg::Rflags, 0x3000);
        assert_ne!(g.fault(insn), gp(0), "{insn:x?} with IOPL 3");
    }
    // INT3 is not sensitive; HLT always is.
    assert_eq!(Guest::new(Mode::V86, 3).fault(&[0xCC]), Some((3, None)));
    let g = Guest::new(Mode::V86, 3);
    g.or(Reg::Rflags, 0x3000);
    assert_eq!(g.fault(&[0xF4]), gp(0));
}

#[test]
fn virtual_interrupt_flag() {
    const VIF: u64 = 1 << 19;
    const VIP: u64 = 1 << 20;
    let guest = || {
        let g = Guest::new(Mode::V86, 3);
        g.or(Reg::Cr4, 1);
        g
    };
    let g = guest();
    assert_eq!(g.fault(&[0xFB]), None);
    assert_eq!(g.get(Reg::Rflags) & (VIF | 0x200), VIF);
    // PUSHF shows it as IF, with IOPL 3.
    g.set(Reg::Rip, 0);
    assert_eq!(g.fault(&[0x9C]), None);
    assert_eq!(g.read16(0x3000 + 0xFFE), 0x3202);
    g.set(Reg::Rip, 0);
    assert_eq!(g.fault(&[0xFA]), None);
    assert_eq!(g.get(Reg::Rflags) & VIF, 0);
    // With VIP pending, STI and POPF of IF fault.
    let g = guest();
    g.or(Reg::Rflags, VIP);
    assert_eq!(g.fault(&[0xFB]), gp(0));
    let g = guest();
    g.or(Reg::Rflags, VIP).write(0x4000, &[0x02, 0x02]);
    assert_eq!(g.fault(&[0x9D]), gp(0));
    // INT n by the 8086's own table where the bitmap's bit is 0.
    let g = guest();
    g.or(Reg::Rflags, VIF).write(TSS + 0x68 + 0x80 / 8, &[0xFE]);
    g.write(4 * 0x80, &[0x10, 0x00, 0x00, 0x09]);
    assert_eq!(g.fault(&[0xCD, 0x80]), None);
    assert_eq!((g.lin(), g.get(Reg::Rsp)), (0x9010, 0xFFA));
    assert_eq!(g.read::<6>(0x3FFA), [0x02, 0x00, 0x00, 0x08, 0x02, 0x32]);
    assert_eq!(g.get(Reg::Rflags) & VIF, 0);
    // PVI: the same for level 3 of protected mode.
    let g = Guest::new(Mode::Prot, 3);
    g.or(Reg::Cr4, 2);
    assert_eq!(g.fault(&[0xFB]), None);
    assert_eq!(g.get(Reg::Rflags) & (VIF | 0x200), VIF);
}

// -- tasks -------------------------------------------------------------------------------------

fn second_task(g: &Guest) {
    let mut tss = [0; 0x68];
    let mut put = |at: usize, v: u64| tss[at..at + 4].copy_from_slice(&(v as u32).to_le_bytes());
    put(0x1C, TABLES);
    put(0x20, TARGET);
    put(0x24, 0x2);
    for i in 0..8 {
        put(0x28 + 4 * i, 0x100 + i as u64);
    }
    put(0x38, STACK0);
    for (i, sel) in [DATA32, CODE32, DATA32, DATA32, 0, DATA32].into_iter().enumerate() {
        put(0x48 + 4 * i, sel.into());
    }
    g.write(TSS2, &tss);
    // The task that runs is busy.
    g.set_descriptor(TASK, descriptor(TSS as u32, 0xFFF, 0x8B));
}

#[test]
fn task_switches() {
    // JMP: the old task becomes available.
    let g = Guest::new(Mode::Prot, 0);
    second_task(&g);
    g.set(Reg::Rbx, 0xB0B);
    assert_eq!(g.fault(&far(JMP, TASK2, 0)), None);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Tr), g.get(Reg::Rbx)), (TARGET, TASK2.into(), 0x103));
    assert_eq!((g.get(Reg::Rsp), g.get(Reg::Fs), g.get(Reg::Gs)), (STACK0, 0, DATA32.into()));
    assert_eq!((g.read32(TSS + 0x20), g.read32(TSS + 0x34)), (CODE as u32 + 7, 0xB0B));
    assert_eq!((g.read16(TSS + 0x4C), g.read16(TSS + 0x54)), (CODE32, DATA32));
    assert_eq!(g.descriptor(TASK) >> 40 & 0xF, 9);
    assert_eq!(g.descriptor(TASK2) >> 40 & 0xF, 0xB);
    assert_ne!(g.get(Reg::Cr0) & 8, 0, "TS");
    // CALL through a task gate: nested; IRET returns.
    let g = Guest::new(Mode::Prot, 3);
    second_task(&g);
    g.write(TARGET, &[0xCF]);
    assert_eq!(g.fault(&far(CALL, TASK_GATE | 3, 0)), None);
    assert_eq!(g.descriptor(TASK) >> 40 & 0xF, 0xB);
    assert_eq!((g.read16(TSS2), g.get(Reg::Rflags)), (TASK, 0x4002));
    assert_eq!(g.steps(1), Outcome::Done);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Tr)), (CODE + 7, TASK.into()));
    assert_eq!((g.get(Reg::Cs), g.get(Reg::Ds)), (CODE32_U.into(), DATA32_U.into()));
    assert_eq!(g.descriptor(TASK2) >> 40 & 0xF, 9);
    assert_eq!(g.read32(TSS2 + 0x24), 2, "NT is cleared in what IRET leaves");
    // An exception through a task gate: its error code is on the new stack.
    let g = Guest::new(Mode::Prot, 3);
    second_task(&g);
    g.set_idt(13, gate(TASK2, 0, 0x85, 0));
    assert_eq!(g.exec(&[0xF4]), Outcome::Done);
    assert_eq!((g.get(Reg::Rip), g.stack()), (TARGET + 1, [0]));
    assert_eq!(g.read32(TSS + 0x20), CODE as u32);
    assert_eq!(g.read32(TSS + 0x24), 0x1_0002);
}

#[test]
fn refused_task_switches() {
    for (d, expected) in [
        (descriptor(TSS2 as u32, 0x66, 0x89), ts(TASK2)),
        (descriptor(TSS2 as u32, 0x67, 0x8B), gp(TASK2)),
        (descriptor(TSS2 as u32, 0x67, 0x09), np(TASK2)),
    ] {
        let g = Guest::new(Mode::Prot, 0);
        second_task(&g);
        g.set_descriptor(TASK2, d);
        assert_eq!(g.fault(&far(JMP, TASK2, 0)), expected, "{d:#x}");
        assert_eq!(g.get(Reg::Tr), TASK.into());
    }
    let g = Guest::new(Mode::Prot, 3);
    second_task(&g);
    assert_eq!(g.fault(&far(JMP, TASK2, 0)), gp(TASK2), "DPL");
    // IRET to a task that is not busy.
    let g = Guest::new(Mode::Prot, 0);
    second_task(&g);
    g.write(TSS, &TASK2.to_le_bytes()).or(Reg::Rflags, 1 << 14);
    assert_eq!(g.fault(&[0xCF]), ts(TASK2));
}

#[test]
fn errors_in_the_new_task_are_the_new_task_s() {
    const CS: u64 = 0x4C;
    const SS: u64 = 0x50;
    const DS: u64 = 0x54;
    const LDTR: u64 = 0x60;
    for (at, sel, expected) in [
        (CS, 3, ts(0)),
        (CS, DATA32_U, ts(DATA32_U & !3)),
        (CS, CODE32 | 3, ts(CODE32)),
        (SS, 3, ts(0)),
        (SS, READ_ONLY_U, ts(READ_ONLY_U & !3)),
        (SS, DATA32, ts(DATA32)),
        (DS, DATA32, ts(DATA32)),
        (DS, BEYOND, ts(BEYOND)),
        (LDTR, TASK, ts(TASK)),
        (LDTR, LOCAL | 4, ts(LOCAL | 4)),
    ] {
        // A task of level 3, so that handlers have a stack whatever becomes of SS.
        let g = Guest::new(Mode::Prot, 0);
        second_task(&g);
        g.write(TSS2 + 4, &(STACK0 as u32).to_le_bytes()).write(TSS2 + 8, &DATA32.to_le_bytes());
        g.write(TSS2 + CS, &CODE32_U.to_le_bytes());
        for reg in [0x48, SS, DS, 0x58, 0x5C] {
            g.write(TSS2 + reg, &DATA32_U.to_le_bytes());
        }
        g.write(TSS2 + at, &sel.to_le_bytes());

        assert_eq!(g.fault_in(&far(JMP, TASK2, 0), 2), expected, "{at:#x} {sel:#x}");

        assert_eq!(g.get(Reg::Tr), TASK2.into());
        assert_eq!(g.stack::<2>()[1], TARGET, "{at:#x} {sel:#x}");
    }
    // Without a stack there is no handler either.
    let g = Guest::new(Mode::Prot, 0);
    second_task(&g);
    g.write(TSS2 + SS, &[0; 2]);
    assert_eq!(g.code(&far(JMP, TASK2, 0)).steps(2), Outcome::TripleFault);
}

#[test]
fn the_debug_trap_of_a_task() {
    let g = Guest::new(Mode::Prot, 0);
    second_task(&g);
    g.write(TSS2 + 0x64, &[1]);
    assert_eq!(g.fault_in(&far(JMP, TASK2, 0), 2), Some((1, None)));
    assert_eq!(g.get(Reg::Dr6), 0xFFFF_8FF0);
    assert_eq!(g.stack::<1>(), [TARGET]);
}

#[test]
fn a_16_bit_tss() {
    let g = Guest::new(Mode::Prot, 0);
    second_task(&g);
    let mut tss = [0; 0x2C];
    let mut put = |at: usize, v: u16| tss[at..at + 2].copy_from_slice(&v.to_le_bytes());
    put(0x0E, TARGET as u16);
    put(0x10, 2);
    for i in 0..8 {
        put(0x12 + 2 * i, 0x40 + i as u16);
    }
    for (i, sel) in [DATA16, CODE16, DATA16, DATA16].into_iter().enumerate() {
        put(0x22 + 2 * i, sel);
    }
    g.write(TSS2, &tss).set_descriptor(TASK2, descriptor(TSS2 as u32, 0x2B, 0x81));
    assert_eq!(g.fault(&far(JMP, TASK2, 0)), None);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Cs), g.get(Reg::Rdi)), (TARGET, CODE16.into(), 0x47));
    assert_eq!(g.descriptor(TASK2) >> 40 & 0xF, 3);
}

// -- system calls ------------------------------------------------------------------------------

const STAR: u32 = 0xC000_0081;
const LSTAR: u32 = 0xC000_0082;
const CSTAR: u32 = 0xC000_0083;
const SFMASK: u32 = 0xC000_0084;

/// WRMSR by the guest itself, at level 0, before the test.
fn wrmsr(g: &Guest, msr: u32, v: u64) {
    g.cpu(|c| match msr {
        STAR => c.msr.star = v,
        LSTAR => c.msr.lstar = v,
        CSTAR => c.msr.cstar = v,
        SFMASK => c.msr.sfmask = v,
        0x174 => c.msr.sysenter_cs = v,
        0x175 => c.msr.sysenter_esp = v,
        0x176 => c.msr.sysenter_eip = v,
        _ => panic!("{msr:#x}"),
    });
}

fn syscall_msrs(g: &Guest) {
    // SYSRET: CS 0x20 (32-bit), SS 0x28, CS 0x30 (64-bit).
    wrmsr(g, STAR, 0x0023_0008_0000_9000);
    wrmsr(g, LSTAR, TARGET);
    wrmsr(g, CSTAR, TARGET + 0x100);
    wrmsr(g, SFMASK, 0x200);
}

#[test]
fn syscall_and_sysret() {
    let g = Guest::new(Mode::Long, 3);
    syscall_msrs(&g);
    g.set(Reg::Rflags, 0x246);
    assert_eq!(g.fault(&[0x0F, 0x05]), None);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Rcx)), (TARGET, CODE + 2));
    assert_eq!((g.get(Reg::R11), g.get(Reg::Rflags)), (0x246, 0x46));
    assert_eq!((g.get(Reg::Cs), g.get(Reg::Ss)), (0x08, 0x10));
    assert_eq!(g.get(Reg::Rsp), STACK);
    g.write(TARGET, &[0x48, 0x0F, 0x07]);
    assert_eq!(g.steps(1), Outcome::Done);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Rflags)), (CODE + 2, 0x246));
    assert_eq!((g.get(Reg::Cs), g.get(Reg::Ss)), (0x33, 0x2B));
    assert_eq!(g.cpu(|c| c.get_desc(Reg::Cs).access), 0xA0FB);
    // To 32-bit code.
    let g = Guest::new(Mode::Long, 0);
    syscall_msrs(&g);
    g.set(Reg::Rcx, 0x1_0000_0000 | TARGET).set(Reg::R11, 0x202);
    assert_eq!(g.fault(&[0x0F, 0x07]), None);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Cs), g.get(Reg::Ss)), (TARGET, 0x23, 0x2B));
    // Not at all without SCE, and SYSRET only at level 0.
    let g = Guest::new(Mode::Long, 3);
    syscall_msrs(&g);
    assert_eq!(g.fault(&[0x48, 0x0F, 0x07]), gp(0));
    let g = Guest::new(Mode::Long, 3);
    g.set(Reg::Efer, 0xD00);
    assert_eq!(g.fault(&[0x0F, 0x05]), UD);
    // Where the return address is not canonical, Intel faults before the switch and AMD behind it.
    let g = Guest::new(Mode::Long, 0);
    syscall_msrs(&g);
    g.set(Reg::Rcx, 1 << 47).set(Reg::R11, 2);
    assert_eq!(g.fault_in(&[0x48, 0x0F, 0x07], 2), gp(0));
    let [_, rip, cs] = g.stack();
    let expected = if amd() { (1 << 47, CODE64_U.into()) } else { (CODE, CODE64.into()) };
    assert_eq!((rip, cs), expected);
}

#[test]
fn syscall_outside_of_64_bit_mode() {
    for mode in [Mode::Compat, Mode::Prot] {
        let g = Guest::new(mode, 3);
        syscall_msrs(&g);
        g.or(Reg::Efer, 1).set(Reg::Rflags, 0x202);
        let got = g.fault(&[0x0F, 0x05]);
        if !amd() {
            assert_eq!(got, UD);
            continue;
        }
        assert_eq!(got, None);
        let target = if mode == Mode::Compat { TARGET + 0x100 } else { TARGET };
        assert_eq!((g.get(Reg::Rip), g.get(Reg::Rcx)), (target, CODE + 2));
        assert_eq!((g.get(Reg::Rflags), g.get(Reg::Cs)), (2, 8));
    }
}

#[test]
fn sysenter_and_sysexit() {
    let msrs = |g: &Guest| {
        wrmsr(g, 0x174, CODE32.into());
        wrmsr(g, 0x175, STACK0);
        wrmsr(g, 0x176, TARGET);
    };
    // Data follows code in the table by 8.
    let table = |g: &Guest| {
        g.set_descriptor(0x20, descriptor(0, 0xF_FFFF, 0xC093));
    };
    let g = Guest::new(Mode::Prot, 3);
    table(&g);
    msrs(&g);
    g.set(Reg::Rflags, 0x202);
    assert_eq!(g.fault(&[0x0F, 0x34]), None);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Rsp), g.get(Reg::Rflags)), (TARGET, STACK0, 2));
    assert_eq!((g.get(Reg::Cs), g.get(Reg::Ss)), (0x18, 0x20));
    g.set(Reg::Rdx, CODE).set(Reg::Rcx, STACK).write(TARGET, &[0x0F, 0x35]);
    assert_eq!(g.steps(1), Outcome::Done);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Rsp)), (CODE, STACK));
    assert_eq!((g.get(Reg::Cs), g.get(Reg::Ss)), (0x2B, 0x33));
    // No segment: not set up.
    assert_eq!(Guest::new(Mode::Prot, 3).fault(&[0x0F, 0x34]), gp(0));
    assert_eq!(Guest::new(Mode::Prot, 3).fault(&[0x0F, 0x35]), gp(0));
    // AMD has none in long mode.
    let g = Guest::new(Mode::Long, 3);
    msrs(&g);
    assert_eq!(g.fault(&[0x0F, 0x34]), if amd() { UD } else { None });
}

#[test]
fn swapgs_and_bases() {
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::GsBase, 0x1000).set(Reg::KgsBase, 0x2000);
    assert_eq!(g.fault(&[0x0F, 0x01, 0xF8]), None);
    assert_eq!((g.get(Reg::GsBase), g.get(Reg::KgsBase)), (0x2000, 0x1000));
    assert_eq!(Guest::new(Mode::Long, 3).fault(&[0x0F, 0x01, 0xF8]), gp(0));
    // wrgsbase rax
    let insn = &[0xF3, 0x48, 0x0F, 0xAE, 0xD8];
    assert_eq!(Guest::new(Mode::Long, 3).fault(insn), UD);
    for (v, expected) in [(0x7FFF_FFFF_F000, None), (1 << 47, gp(0))] {
        let g = Guest::new(Mode::Long, 3);
        g.or(Reg::Cr4, 1 << 16).set(Reg::Rax, v);
        assert_eq!(g.fault(insn), expected);
        if expected.is_none() {
            assert_eq!(g.get(Reg::GsBase), v);
        }
    }
}

// -- control registers -------------------------------------------------------------------------

#[test]
fn control_registers_are_checked() {
    use Mode::*;
    const CR0: u8 = 0xC0;
    const CR3: u8 = 0xD8;
    const CR4: u8 = 0xE0;
    for (mode, cpl, reg, v, expected) in [
        (Long, 0, CR0, 0x8000_0031, None),
        (Long, 0, CR0, 0x1_8000_0031, gp(0)),
        (Long, 0, CR0, 0x31, gp(0)),
        (Long, 0, CR0, 0x8000_0030, gp(0)),
        (Long, 0, CR0, 0xA000_0031, gp(0)),
        (Long, 0, CR0, 0xE000_0031, None),
        (Long, 3, CR0, 0x8000_0031, gp(0)),
        (Prot, 0, CR0, 0x31, None),
        (V86, 3, CR0, 0x31, gp(0)),
        (Long, 0, CR4, 0x20, None),
        (Long, 0, CR4, 0, gp(0)),
        (Long, 0, CR4, 0x1020, gp(0)),
        (Long, 0, CR4, 0x2_0020, None),
        (Prot, 0, CR4, 0x2_0000, gp(0)),
        (Long, 0, CR4, 0x30_0820, None),
        (Long, 0, CR3, TABLES, None),
        (Long, 0, CR3, TABLES | 1 << 63, gp(0)),
        (Long, 0, CR3, TABLES | 1 << 51, gp(0)),
    ] {
        let g = Guest::new(mode, cpl);
        g.set(Reg::Rax, v);
        assert_eq!(g.fault(&[0x0F, 0x22, reg]), expected, "{mode:?} {cpl} {reg:#x} {v:#x}");
    }
    // PCID: bit 63 of CR3 keeps translations, and paging cannot go.
    let g = Guest::new(Mode::Long, 0);
    g.or(Reg::Cr4, 1 << 17).set(Reg::Rax, TABLES | 5 | 1 << 63);
    assert_eq!(g.fault(&[0x0F, 0x22, CR3]), None);
    assert_eq!(g.get(Reg::Cr3), TABLES | 5);
    // CR8 and CR5.
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rax, 16);
    assert_eq!(g.fault(&[0x44, 0x0F, 0x22, 0xC0]), gp(0));
    g.set(Reg::Rip, CODE).set(Reg::Rax, 7);
    assert_eq!(Guest::new(Mode::Long, 0).fault(&[0x0F, 0x22, 0xE8]), UD);
}

#[test]
fn from_real_mode_to_long_mode_and_back() {
    let g = Guest::new(Mode::Real, 0);
    let page = |at: u64, v: u64| {
        g.write(at, &v.to_le_bytes());
    };
    page(TABLES, TABLES + 0x1007);
    page(TABLES + 0x1000, 0x87);
    let set_cr0 = |v: u64| {
        g.set(Reg::Rip, CODE).set(Reg::Rax, v);
        g.fault(&[0x0F, 0x22, 0xC0])
    };
    let set_cr4 = |v: u64| {
        g.set(Reg::Rip, CODE).set(Reg::Rax, v);
        g.fault(&[0x0F, 0x22, 0xE0])
    };
    g.set(Reg::Cr3, TABLES).set(Reg::Efer, 0x100);
    // Not without PAE.
    g.cpu(|c| c.set_desc(Reg::Idtr, SegDesc { base: IDT, limit: 0x3FF, access: 0 }));
    assert_eq!(set_cr0(0x8000_0011), Some((13, None)));
    let g2 = Guest::new(Mode::Real, 0);
    drop(g2);
    g.cpu(|c| c.set_desc(Reg::Cs, SegDesc { base: 0, limit: 0xFFFF, access: 0x93 }));
    assert_eq!(set_cr4(0x20), None);
    assert_eq!(set_cr0(0x8000_0011), None);
    assert_eq!(g.get(Reg::Efer), 0x500, "LMA");
    // jmp far to 64-bit code (16-bit operands), then to 32-bit code, and paging off.
    g.set(Reg::Rip, CODE);
    let mut far = vec![JMP];
    far.extend((TARGET as u16).to_le_bytes());
    far.extend(CODE64.to_le_bytes());
    g.code(&far);
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Cs)), (TARGET, CODE64.into()));
    g.set(Reg::Rbx, DATA).write(DATA, &(CODE as u32).to_le_bytes());
    g.write(DATA + 4, &CODE32.to_le_bytes()).write(TARGET, &[0xFF, 0x2B]);
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!((g.get(Reg::Rip), g.get(Reg::Cs)), (CODE, CODE32.into()));
    assert_eq!(set_cr0(0x11), None);
    assert_eq!(g.get(Reg::Efer), 0x100);
}

#[test]
fn pae_page_directory_pointers() {
    for (entry, expected) in
        [(TABLES + 0x1001, None), (TABLES + 0x1003, gp(0)), (1 << 60 | 1, gp(0))]
    {
        let g = Guest::new(Mode::Prot, 0);
        g.set(Reg::Cr0, 0x31).set(Reg::Cr4, 0x20).set(Reg::Cr3, TABLES + 0x4000);
        g.write(TABLES + 0x4000, &(TABLES + 0x1001).to_le_bytes());
        g.write(TABLES + 0x4008, &u64::to_le_bytes(entry));
        for i in 0..4 {
            g.write(TABLES + 0x1000 + 8 * i, &(i << 21 | 0x87).to_le_bytes());
        }
        g.set(Reg::Rax, 0x8000_0031);
        assert_eq!(g.fault(&[0x0F, 0x22, 0xC0]), expected, "{entry:#x}");
    }
}

#[test]
fn smsw_and_lmsw() {
    let g = Guest::new(Mode::Prot, 0);
    g.set(Reg::Rax, 0xE);
    // lmsw ax: PE stays.
    assert_eq!(g.fault(&[0x0F, 0x01, 0xF0]), None);
    assert_eq!(g.get(Reg::Cr0) & 0xF, 0xF);
    g.set(Reg::Rip, CODE);
    assert_eq!(g.fault(&[0x0F, 0x01, 0xE0]), None);
    assert_eq!(g.get(Reg::Rax), g.get(Reg::Cr0));
}

#[test]
fn debug_registers() {
    let to_dr7: &[u8] = &[0x0F, 0x23, 0xF8];
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rax, 1 << 32);
    assert_eq!(g.fault(to_dr7), gp(0));
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rax, 0xFFFF_FFFF);
    assert_eq!(g.fault(&[0x0F, 0x23, 0xF0]), None);
    assert_eq!(g.get(Reg::Dr6), 0xFFFF_EFFF);
    assert_eq!(Guest::new(Mode::Long, 3).fault(to_dr7), gp(0));
    // DR4 is DR6, unless CR4.DE.
    let g = Guest::new(Mode::Long, 0);
    assert_eq!(g.fault(&[0x0F, 0x21, 0xE0]), None);
    assert_eq!(g.get(Reg::Rax), g.get(Reg::Dr6));
    let g = Guest::new(Mode::Long, 0);
    g.or(Reg::Cr4, 8);
    assert_eq!(g.fault(&[0x0F, 0x21, 0xE0]), UD);
    // General detect.
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Dr7, 0x2400);
    assert_eq!(g.fault(to_dr7), Some((1, None)));
    assert_eq!((g.get(Reg::Dr6), g.get(Reg::Dr7)), (0xFFFF_2FF0, 0x400));
    assert_eq!(g.stack::<1>(), [CODE]);
}

#[test]
fn privileged_instructions() {
    let list: &[&[u8]] = &[
        &[0xF4],
        &[0x0F, 0x06],
        &[0x0F, 0x08],
        &[0x0F, 0x09],
        &[0x0F, 0x01, 0x3B],
        &[0x0F, 0x30],
        &[0x0F, 0x32],
        &[0x0F, 0x20, 0xC0],
        &[0x0F, 0x21, 0xC0],
        &[0x0F, 0x01, 0x13],
        &[0x0F, 0x01, 0x1B],
        &[0x0F, 0x01, 0xF0],
        &[0x66, 0x0F, 0x38, 0x82, 0x03],
        &[0xFA],
        &[0xFB],
        &[0xEC],
        &[0x6C],
    ];
    for insn in list {
        let g = Guest::new(Mode::Long, 3);
        g.set(Reg::Rbx, DATA);
        assert_eq!(g.fault(insn), gp(0), "{insn:x?}");
    }
    // STAC and CLAC do not exist for programs.
    assert_eq!(Guest::new(Mode::Long, 3).fault(&[0x0F, 0x01, 0xCB]), UD);
    // What is not shown: VMCALL, VMMCALL, RSM, MONITOR, WRPKRU.
    let absent: &[&[u8]] = &[
        &[0x0F, 0x01, 0xC1],
        &[0x0F, 0x01, 0xD9],
        &[0x0F, 0xAA],
        &[0x0F, 0x01, 0xC8],
        &[0x0F, 0x01, 0xEF],
    ];
    for insn in absent {
        assert_eq!(Guest::new(Mode::Long, 0).fault(insn), UD, "{insn:x?}");
    }
    // RDTSC with CR4.TSD.
    let g = Guest::new(Mode::Long, 3);
    g.or(Reg::Cr4, 4);
    assert_eq!(g.fault(&[0x0F, 0x31]), gp(0));
}

#[test]
fn smap_and_stac() {
    let g = Guest::new(Mode::Long, 0);
    g.or(Reg::Cr4, 1 << 21).set(Reg::Rbx, DATA);
    // mov al, [rbx] on a page of user mode
    assert_eq!(
        g.code(&[0x0F, 0x01, 0xCB, 0x8A, 0x03, 0x0F, 0x01, 0xCA, 0x8A, 0x03]).steps(3),
        Outcome::Done
    );
    assert_eq!(g.get(Reg::Rflags) & 0x4_0000, 0);
    // The stack is a user page too: the fault cannot be delivered.
    assert_eq!(g.steps(1), Outcome::TripleFault);
}

#[test]
fn invpcid() {
    for (kind, pcid, address, cr4, expected) in [
        (0, 0, DATA, 0, None),
        (1, 0, 0, 0, None),
        (1, 5, 0, 0, gp(0)),
        (1, 5, 0, 1 << 17, None),
        (2, 0, 0, 0, None),
        (3, 0, 0, 0, None),
        (4, 0, 0, 0, gp(0)),
        (0, 0, 1 << 50, 0, gp(0)),
        (2, 1 << 12, 0, 0, gp(0)),
    ] {
        let g = Guest::new(Mode::Long, 0);
        g.or(Reg::Cr4, cr4).set(Reg::Rax, kind).set(Reg::Rbx, DATA);
        g.write(DATA, &u64::to_le_bytes(pcid)).write(DATA + 8, &u64::to_le_bytes(address));
        // invpcid rax, [rbx]
        assert_eq!(
            g.fault(&[0x66, 0x0F, 0x38, 0x82, 0x03]),
            expected,
            "{kind} {pcid:#x} {address:#x}"
        );
    }
}

#[test]
fn xcr0() {
    let xsetbv: &[u8] = &[0x0F, 0x01, 0xD1];
    assert_eq!(Guest::new(Mode::Long, 0).fault(xsetbv), UD);
    for (cpl, rcx, rax, expected) in [
        (0, 0, 3, None),
        (0, 0, 1, None),
        (0, 0, 2, gp(0)),
        (0, 0, 5, gp(0)),
        (0, 1, 3, gp(0)),
        (0, 0, 0xE7, gp(0)),
        (3, 0, 3, gp(0)),
    ] {
        let g = Guest::new(Mode::Long, cpl);
        g.or(Reg::Cr4, 1 << 18).set(Reg::Rcx, rcx).set(Reg::Rax, rax).set(Reg::Rdx, 0);
        assert_eq!(g.fault(xsetbv), expected, "{cpl} {rcx} {rax:#x}");
        if expected.is_none() {
            g.set(Reg::Rip, CODE).set(Reg::Rax, 0);
            assert_eq!(g.fault(&[0x0F, 0x01, 0xD0]), None);
            assert_eq!(g.get(Reg::Rax), rax);
        }
    }
}

// -- flags -------------------------------------------------------------------------------------

#[test]
fn popf_respects_privilege() {
    for (cpl, iopl, popped, expected) in [
        (0, 0, 0x24_7FD7, 0x24_7FD7),
        (0, 0, 0x1B_0002, 2),
        (3, 0, 0x3202, 2),
        (3, 3, 0x0202, 0x3202),
        (3, 3, 0x3002, 0x3002),
    ] {
        let g = Guest::new(Mode::Long, cpl);
        g.set(Reg::Rflags, 2 | iopl << 12);
        push64(&g, &[popped & !0x100]);
        assert_eq!(g.fault(&[0x9D]), None);
        assert_eq!(g.get(Reg::Rflags), expected & !0x100, "{cpl} {iopl} {popped:#x}");
    }
    // 16 bits leave the rest.
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rflags, 0x20_0002);
    push64(&g, &[0]);
    assert_eq!(g.fault(&[0x66, 0x9D]), None);
    assert_eq!((g.get(Reg::Rflags), g.get(Reg::Rsp)), (0x20_0002, STACK - 6));
}

#[test]
fn sti_holds_interrupts_off_for_one_instruction() {
    let g = Guest::new(Mode::Long, 0);
    assert_eq!(g.fault(&[0xFB]), None);
    assert_eq!((g.get(Reg::Rflags), g.get(Reg::IntrShadow)), (0x202, 1));
    assert_eq!(g.steps(1), Outcome::Done);
    assert_eq!(g.get(Reg::IntrShadow), 0);
    // CLI does not.
    g.set(Reg::Rip, CODE);
    assert_eq!(g.fault(&[0xFA]), None);
    assert_eq!((g.get(Reg::Rflags), g.get(Reg::IntrShadow)), (2, 0));
}

// -- ports -------------------------------------------------------------------------------------

#[test]
fn the_permission_bitmap() {
    // in al, dx (EC), in eax, dx (ED): ports below 0x100 are denied.
    for (mode, port, insn, expected) in [
        (Mode::Long, 0x60, 0xEC, gp(0)),
        (Mode::Long, 0x100, 0xEC, None),
        (Mode::Long, 0xFD, 0xED, gp(0)),
        (Mode::Prot, 0x100, 0xED, None),
        (Mode::V86, 0x60, 0xEC, gp(0)),
        (Mode::V86, 0x100, 0xEC, None),
        // The TSS ends before its bit.
        (Mode::Long, 0x7F00, 0xEC, gp(0)),
    ] {
        let g = Guest::new(mode, 3);
        if mode == Mode::V86 {
            // Where IOPL does not help.
            g.or(Reg::Rflags, 0x3000);
        }
        g.cpu(|c| c.set_desc(Reg::Tr, SegDesc { base: TSS, limit: 0x3FF, access: 0x8B }));
        g.set(Reg::Rdx, port).code(&[insn]);
        let got = match g.run() {
            Exit::Inout { port: p, value: None, .. } => {
                assert_eq!(u64::from(p), port);
                None
            }
            Exit::Mtrap => Some((13, Some(g.stack::<1>()[0] as u32))),
            e => panic!("{e:?}"),
        };
        assert_eq!(got, expected, "{mode:?} {port:#x} {insn:#x}");
    }
    let g = Guest::new(Mode::Long, 3);
    g.or(Reg::Rflags, 0x3000).set(Reg::Rdx, 0x60).code(&[0xEC]);
    assert!(matches!(g.run(), Exit::Inout { port: 0x60, size: 1, value: None }), "IOPL");
}

#[test]
fn in_and_out() {
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rax, 0x1122_3344_5566_7788).set(Reg::Rdx, 0x510).code(&[0x66, 0xED, 0xEF]);
    assert_eq!(g.run(), Exit::Inout { port: 0x510, size: 2, value: None });
    g.cpu(|c| c.complete(0xABCD));
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!(g.get(Reg::Rax), 0x1122_3344_5566_ABCD);
    assert_eq!(g.run(), Exit::Inout { port: 0x510, size: 4, value: Some(0x5566_ABCD) });
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!(g.lin(), CODE + 3);
}

#[test]
fn string_input_and_output() {
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rdx, 0x510).set(Reg::Rcx, 3).set(Reg::Rdi, DATA).set(Reg::Rsi, DATA + 5);
    // rep insw; std; rep outsb
    g.code(&[0xF3, 0x66, 0x6D, 0xFD, 0xF3, 0x6E]);
    for v in [0x0201, 0x0403, 0x0605] {
        assert_eq!(g.run(), Exit::Inout { port: 0x510, size: 2, value: None });
        g.cpu(|c| c.complete(v));
    }
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!((g.get(Reg::Rcx), g.get(Reg::Rdi)), (0, DATA + 6));
    assert_eq!(g.read::<6>(DATA), [1, 2, 3, 4, 5, 6]);
    g.set(Reg::Rcx, 2);
    assert_eq!(g.run(), Exit::Mtrap);
    for v in [6, 5] {
        assert_eq!(g.run(), Exit::Inout { port: 0x510, size: 1, value: Some(v) });
    }
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!((g.get(Reg::Rcx), g.get(Reg::Rsi)), (0, DATA + 3));
    // A destination that faults is found before the device is read.
    let g = Guest::new(Mode::Prot, 0);
    g.write(TABLES + 4 * 64, &[0; 4]);
    g.set(Reg::Rdx, 0x510).set(Reg::Rcx, 2).set(Reg::Rdi, 0x1000_0000);
    assert_eq!(g.fault(&[0xF3, 0x6C]), Some((14, Some(2))));
    assert_eq!((g.get(Reg::Rcx), g.stack::<2>()[1]), (2, CODE));
}

// -- MSRs and identification -------------------------------------------------------------------

#[test]
fn model_specific_registers() {
    let write = |msr: u64, v: u64| {
        let g = Guest::new(Mode::Long, 0);
        g.set(Reg::Rcx, msr).set(Reg::Rax, v & 0xFFFF_FFFF).set(Reg::Rdx, v >> 32);
        let f = g.fault(&[0x0F, 0x30]);
        if f.is_some() {
            return Err(f);
        }
        g.set(Reg::Rip, CODE);
        assert_eq!(g.fault(&[0x0F, 0x32]), None);
        Ok(g.get(Reg::Rdx) << 32 | g.get(Reg::Rax))
    };
    for (msr, v, expected) in [
        (0xC000_0080, 0xD01, Ok(0xD01)),
        // LME cannot change while paging; LMA is not written.
        (0xC000_0080, 0xC01, Err(gp(0))),
        (0xC000_0080, 0x901, Ok(0xD01)),
        (0xC000_0080, 0x1_0D01, Err(gp(0))),
        (0xC000_0082, 0xFFFF_8000_0000_0000, Ok(0xFFFF_8000_0000_0000)),
        (0xC000_0082, 0x8000_0000_0000, Err(gp(0))),
        (0xC000_0100, 0x1234, Ok(0x1234)),
        (0xC000_0101, 1 << 50, Err(gp(0))),
        (0xC000_0103, 5, Ok(5)),
        (0x277, 0x0007_0106_0007_0106, Ok(0x0007_0106_0007_0106)),
        (0x277, 2, Err(gp(0))),
        (0x3B, 0, Ok(0)),
        // x2APIC registers while the APIC is not in that mode.
        (0x802, 0, Err(gp(0))),
    ] {
        assert_eq!(write(msr, v), expected, "{msr:#x} <- {v:#x}");
    }
}

#[test]
fn unknown_msrs_are_userland_s() {
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rcx, 0x4B56_0000).code(&[0x0F, 0x32, 0x0F, 0x30]);
    assert_eq!(g.run(), Exit::Rdmsr { msr: 0x4B56_0000 });
    g.cpu(|c| c.complete(0x1_0000_0002));
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!((g.get(Reg::Rdx), g.get(Reg::Rax)), (1, 2));
    assert_eq!(g.run(), Exit::Wrmsr { msr: 0x4B56_0000, value: 0x1_0000_0002 });
    g.cpu(|c| c.inject_exception(13, Some(0), true));
    assert_eq!(g.steps(1), Outcome::Vector(13));
    assert_eq!(g.stack::<2>()[1], CODE + 2);
}

#[test]
fn the_tsc_follows_what_is_written() {
    let g = Guest::new(Mode::Long, 0);
    g.set(Reg::Rcx, 0x10).set(Reg::Rax, 0).set(Reg::Rdx, 0x100);
    // wrmsr; rdtsc
    assert_eq!(g.fault_in(&[0x0F, 0x30, 0x0F, 0x31], 2), None);
    assert_eq!(g.get(Reg::Rdx), 0x100);
}

#[test]
fn cpuid_names_the_hypervisor() {
    let g = Guest::new(Mode::Long, 3);
    g.set(Reg::Rax, 0x4000_0000);
    assert_eq!(g.fault(&[0x0F, 0xA2]), None);
    let mut name = Vec::new();
    for r in [Reg::Rbx, Reg::Rcx, Reg::Rdx] {
        name.extend((g.get(r) as u32).to_le_bytes());
    }
    assert_eq!((g.get(Reg::Rax), &name[..]), (0x4000_0001, &b"bhyve bhyve "[..]));
}

#[test]
fn pause_exits_only_when_asked() {
    use vmm::caps::Caps;
    let g = Guest::new(Mode::Long, 3);
    assert_eq!(g.fault(&[0xF3, 0x90]), None);
    g.vm.vcpu(0).unwrap().set_cap(Caps::PAUSE_EXIT, true).unwrap();
    g.set(Reg::Rip, CODE);
    assert_eq!(g.run(), Exit::Pause);
    assert_eq!(g.run(), Exit::Mtrap);
    assert_eq!(g.lin(), CODE + 2);
}

#[test]
fn breakpoints_exit_when_asked() {
    use vmm::caps::Caps;
    let g = Guest::new(Mode::Long, 3);
    g.vm.vcpu(0).unwrap().set_cap(Caps::BPT_EXIT, true).unwrap();
    g.code(&[0xCC]);
    assert_eq!(g.run(), Exit::Bpt { inst_length: 1 });
    assert_eq!(g.lin(), CODE);
    // The debugger gives it back to the guest.
    g.cpu(|c| c.inject_exception(3, None, true));
    assert_eq!(g.steps(1), Outcome::Vector(3));
    assert_eq!(g.stack::<1>(), [CODE + 1]);
}

/// A table or a stack in a device: the delivery leaves for userland and goes on afterwards.
#[test]
fn delivery_through_a_device() {
    let g = Guest::new(Mode::Long, 0);
    g.cpu(|c| c.set_desc(Reg::Idtr, SegDesc { base: NOWHERE, limit: 0xFFF, access: 0 }));
    g.code(&[0x0F, 0x0B]);
    let entry = gate(CODE64, HANDLERS + 96, 0x8E, 0);
    assert_eq!(g.run(), Exit::Mmio { gpa: NOWHERE + 96, size: 8, value: None });
    g.cpu(|c| c.complete(entry));
    assert_eq!(g.run(), Exit::Mmio { gpa: NOWHERE + 104, size: 8, value: None });
    g.cpu(|c| c.complete(0));
    assert_eq!(g.steps(1), Outcome::Vector(6));
}
