//! Tables and instructions at random: whatever a guest does, the engine stands, and the
//! processor is in a state that a processor can be in.

use crate::guest::*;
use proptest::prelude::*;
use vmm::exit::Exit;
use vmm::regs::{Reg, SegDesc};

/// Instructions that look at descriptors, stacks and gates.
const INSTRUCTIONS: &[&[u8]] = &[
    &[0x8E, 0xD8],
    &[0x8E, 0xC0],
    &[0x8E, 0xD0],
    &[0x8E, 0xE8],
    &[0x07],
    &[0x17],
    &[0x1F],
    &[0x0F, 0xA1],
    &[0x0F, 0xB2, 0x23],
    &[0x0F, 0x00, 0xD0],
    &[0x0F, 0x00, 0xD8],
    &[0x0F, 0x02, 0xC1],
    &[0x0F, 0x03, 0xC1],
    &[0x0F, 0x00, 0xE1],
    &[0x0F, 0x00, 0xE9],
    &[0x63, 0xC8],
    &[0xFF, 0x1B],
    &[0xFF, 0x2B],
    &[0x48, 0xFF, 0x1B],
    &[0xCB],
    &[0xCA, 0x08, 0x00],
    &[0x48, 0xCB],
    &[0x66, 0xCB],
    &[0xCF],
    &[0x48, 0xCF],
    &[0x66, 0xCF],
    &[0xCC],
    &[0xCE],
    &[0xF1],
    &[0x0F, 0x0B],
    &[0xCD, 0x80],
    &[0xCD, 0x21],
    &[0x0F, 0x05],
    &[0x0F, 0x07],
    &[0x48, 0x0F, 0x07],
    &[0x0F, 0x34],
    &[0x0F, 0x35],
    &[0x0F, 0x01, 0xF8],
    &[0x0F, 0x22, 0xC0],
    &[0x0F, 0x22, 0xD8],
    &[0x0F, 0x22, 0xE0],
    &[0x0F, 0x23, 0xF8],
    &[0x0F, 0x30],
    &[0x0F, 0x32],
    &[0x0F, 0x01, 0x13],
    &[0x0F, 0x01, 0x1B],
    &[0x0F, 0x01, 0xF0],
    &[0x0F, 0x01, 0xD1],
    &[0x9C],
    &[0x9D],
    &[0x66, 0x9D],
    &[0xFA],
    &[0xFB],
    &[0x6C],
    &[0xF3, 0x6E],
    &[0xEC],
    &[0x62, 0x03],
    &[0x8A, 0x03],
    &[0x88, 0x03],
];

fn mode() -> impl Strategy<Value = (Mode, u8)> {
    prop_oneof![
        Just((Mode::Real, 0)),
        Just((Mode::V86, 3)),
        Just((Mode::Prot, 0)),
        Just((Mode::Prot, 3)),
        Just((Mode::Compat, 0)),
        Just((Mode::Compat, 3)),
        Just((Mode::Long, 0)),
        Just((Mode::Long, 3)),
    ]
}

/// Mostly something that could be meant: small bases, any type.
fn any_descriptor() -> impl Strategy<Value = u64> {
    let plausible = (any::<u8>(), any::<u8>(), 0u64..0x40, any::<u16>());
    prop_oneof![
        4 => plausible.prop_map(|(access, high, page, limit)| {
            let sel = u64::from(limit & 0xFF) << 16;
            u64::from(limit) | page << 28 | sel
                | u64::from(access | 0x80) << 40 | u64::from(high & 0xF0) << 48
        }),
        1 => any::<u64>(),
    ]
}

/// A selector, an address, or noise.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => (0u64..0x100).prop_map(|s| s),
        1 => 0u64..0x8_0000,
        1 => any::<u64>(),
        1 => any::<u64>().prop_map(|v| v & 0xC000_0000_8000_FFFF),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_breaks_the_engine(
        (mode, cpl) in mode(),
        descriptors in prop::collection::vec((1u16..32, any_descriptor()), 0..12),
        gates in prop::collection::vec((0u8..=255, any_descriptor()), 0..4),
        slots in prop::collection::vec(word(), 12),
        task in prop::collection::vec(word(), 26),
        registers in prop::collection::vec(word(), 8),
        insns in prop::collection::vec(prop::sample::select(INSTRUCTIONS), 1..6),
        flags in prop_oneof![Just(2u64), Just(0x202), any::<u64>()],
    ) {
        let g = Guest::new(mode, cpl);
        for (i, d) in &descriptors {
            g.set_descriptor(i * 8, *d);
        }
        for (v, d) in &gates {
            g.set_idt(*v, *d);
        }
        for (i, v) in task.iter().enumerate() {
            g.write(TSS2 + 4 * i as u64, &(*v as u32).to_le_bytes());
        }
        let all = [Reg::Rax, Reg::Rcx, Reg::Rdx, Reg::Rbx, Reg::Rbp, Reg::Rsi, Reg::Rdi, Reg::R11];
        for (r, v) in all.into_iter().zip(&registers) {
            g.set(r, *v);
        }
        g.set(Reg::Rbx, DATA);
        // VM only as the mode has it, and CPL with it.
        let vm = if mode == Mode::V86 { 1 << 17 } else { 0 };
        g.set(Reg::Rflags, flags & !(1 << 17) | vm);
        let (sp, base) = g.cpu(|c| (c.get_reg(Reg::Rsp) - 0x100, c.get_desc(Reg::Ss).base));
        g.set(Reg::Rsp, sp);
        for (i, v) in slots.iter().enumerate() {
            let size = if matches!(mode, Mode::Long | Mode::Compat) { 8 } else { 4 };
            g.write(base + sp + size * i as u64, &v.to_le_bytes());
            g.write(DATA + 8 * i as u64, &v.to_le_bytes());
        }
        g.code(&insns.concat());
        if flags & 1 << 40 != 0 {
            g.cpu(|c| c.inject_exception(flags as u8, Some(0), true));
        }
        for _ in 0..20 {
            match g.run() {
                Exit::Mmio { value: None, .. } | Exit::Inout { value: None, .. }
                | Exit::Rdmsr { .. } => g.cpu(|c| c.complete(registers[0])),
                Exit::Suspended { .. } => break,
                _ => {}
            }
            if g.cpu(|c| c.halted) {
                break;
            }
        }
        g.cpu(|c| {
            let dpl = |d: SegDesc| (d.access >> 5 & 3) as u8;
            let expected = if c.cr0 & 1 == 0 {
                0
            } else if c.rflags & 1 << 17 != 0 {
                3
            } else {
                dpl(c.get_desc(Reg::Ss))
            };
            // A task switch that fails before SS leaves it null.
            let ss = c.get_desc(Reg::Ss);
            assert!(ss.access == 0x1_0000 || c.cpl == expected, "CPL {} SS {ss:x?}", c.cpl);
            assert!(c.xcr0 & 1 != 0 && c.rflags & 2 != 0);
            assert!(c.cr0 >> 31 == 0 || c.cr0 & 1 != 0, "paging without protection");
            let lma = c.efer >> 10 & 1 != 0;
            assert_eq!(lma, c.efer >> 8 & 1 != 0 && c.cr0 >> 31 != 0, "EFER.LMA");
            let state = c.save();
            c.restore(state.clone()).unwrap();
            assert_eq!(c.save(), state);
        });
    }
}
