//! Random cases from a seed.

use crate::*;
use iced_x86::{Code, Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register};
use vmm::soft::cpuid::decoder_options;

/// SplitMix64: small, and the same everywhere.
pub struct Rng(pub u64);

impl Rng {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.word() % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Numbers at which arithmetic changes its mind, and any others.
    fn value(&mut self) -> u64 {
        const EDGES: [u64; 14] = [
            0,
            1,
            2,
            0x7F,
            0x80,
            0xFF,
            0x7FFF,
            0x8000,
            0x7FFF_FFFF,
            0x8000_0000,
            0xFFFF_FFFF,
            0x7FFF_FFFF_FFFF_FFFF,
            0x8000_0000_0000_0000,
            u64::MAX,
        ];
        match self.below(4) {
            0 => self.pick(&EDGES),
            1 => self.below(64),
            2 => self.word() & 0xFFFF_FFFF,
            _ => self.word(),
        }
    }

    /// A pair of floats or doubles, interesting ones among them.
    fn vector_word(&mut self) -> u64 {
        const DOUBLES: [u64; 10] = [
            0,
            1 << 63,
            0x3FF0_0000_0000_0000,
            0xC008_0000_0000_0000,
            0x7FF0_0000_0000_0000,
            0xFFF0_0000_0000_0000,
            0x7FF8_0000_0000_0001,
            0x7FF0_0000_0000_0001,
            0x000F_FFFF_FFFF_FFFF,
            0x41E0_0000_0000_0000,
        ];
        const FLOATS: [u32; 9] = [
            0,
            0x8000_0000,
            0x3F80_0000,
            0xC040_0000,
            0x7F80_0000,
            0x7FC0_0001,
            0x7F80_0001,
            0x0000_0001,
            0x4F00_0000,
        ];
        match self.below(4) {
            0 => self.pick(&DOUBLES),
            1 => u64::from(self.pick(&FLOATS)) << 32 | u64::from(self.pick(&FLOATS)),
            2 => self.value(),
            _ => self.word(),
        }
    }
}

/// Instructions whose result is not a function of the case.
fn excluded(i: &Instruction) -> bool {
    use Mnemonic::*;
    if i.is_privileged() || i.is_save_restore_instruction() && !vector_save(i) {
        return true;
    }
    if i.flow_control() != FlowControl::Next && i.flow_control() != FlowControl::ConditionalBranch {
        return true;
    }
    if i.op_kinds().any(|k| k == OpKind::Memory)
        && matches!(i.memory_segment(), Register::FS | Register::GS)
    {
        return true;
    }
    if (0..i.op_count()).any(|n| {
        i.op_kind(n) == OpKind::Register
            && (i.op_register(n).is_segment_register()
                || i.op_register(n).is_cr()
                || i.op_register(n).is_dr())
    }) {
        return true;
    }
    // With an operand-size prefix in 64-bit code: some of AMD's truncate RIP even when LOOPNE
    // does not jump, depending on more than the manual says.
    if (i.is_loop() || i.is_loopcc() || i.is_jcx_short()) && i.op0_kind() == OpKind::NearBranch16 {
        return true;
    }
    matches!(
        i.mnemonic(),
        Rdtsc
            | Rdtscp
            | Rdpmc
            | Rdpid
            | Rdrand
            | Rdseed
            | Cpuid
            | Syscall
            | Sysenter
            | Sysexit
            | Sysret
            | Int
            | Int1
            | Int3
            | Into
            | In
            | Out
            | Insb
            | Insw
            | Insd
            | Outsb
            | Outsw
            | Outsd
            | Rdfsbase
            | Rdgsbase
            | Wrfsbase
            | Wrgsbase
            | Xgetbv
            | Lsl
            | Lar
            | Verr
            | Verw
            | Sldt
            | Str
            | Sgdt
            | Sidt
            | Smsw
            | Popf
            | Popfd
            | Popfq
            | Pushf
            | Pushfd
            | Pushfq
            | Pause
            | Tpause
            | Umwait
            | Umonitor
            | Monitor
            | Monitorx
            | Mwait
            | Mwaitx
            | Vmcall
            | Vmmcall
            | Clzero
            | Rdpru
            | Xbegin
            | Xtest
            | Xabort
            | Xend
            | Lds
            | Les
            | Lss
            | Lfs
            | Lgs
            | Ud0
            | Ud1
            | Ud2
            | Arpl
            | Fxsave
            | Fxsave64
            | Fnsave
            | Fnstenv
            | Fxrstor
            | Fxrstor64
            | Frstor
            | Fldenv
            | Rdsspd
            | Rdsspq
            | Incsspd
            | Incsspq
            | Loadall
            | Extrq
            | Insertq
            | Movntss
            | Movntsd
            | Femms
            | Rdpkru
            | Wrpkru
            | Serialize
            | Bound
    )
}

/// LDMXCSR and its like.
fn vector_save(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(i.mnemonic(), Ldmxcsr | Stmxcsr | Vldmxcsr | Vstmxcsr)
}

/// Whether the processor that runs us is one that has the instruction.
fn shown(i: &Instruction) -> bool {
    vmm::soft::cpuid::shown(i)
}

/// A random instruction of one of the opcode maps; its bytes.
pub fn instruction(rng: &mut Rng, mode: Mode) -> Option<Vec<u8>> {
    let long = mode == Mode::Long;
    let mut b = Vec::new();
    for p in [0x66, 0xF2, 0xF3, 0xF0, 0x67] {
        let odds = if p == 0x67 { 24 } else { 8 };
        if rng.below(odds) == 0 {
            b.push(p);
        }
    }
    let vex = rng.below(5) == 0;
    if vex {
        b.clear();
        if rng.below(2) == 0 {
            b.extend([0xC5, rng.word() as u8 | if long { 0 } else { 0xC0 }]);
        } else {
            let map = 1 + rng.below(3) as u8;
            let rxb = if long { rng.word() as u8 & 0xE0 } else { 0xE0 };
            b.extend([0xC4, rxb | map, rng.word() as u8 & if long { 0xFF } else { 0x7F }]);
        }
    } else {
        if long && rng.below(2) == 0 {
            b.push(0x40 | rng.below(16) as u8);
        }
        match rng.below(8) {
            0..=2 => {}
            3..=5 => b.push(0x0F),
            6 => b.extend([0x0F, 0x38]),
            _ => b.extend([0x0F, 0x3A]),
        }
    }
    for _ in 0..14 {
        b.push(rng.word() as u8);
    }
    let mut d = Decoder::with_ip(mode.bits(), &b, CODE, decoder_options());
    let i = d.decode();
    if i.code() == Code::INVALID || i.len() > b.len() || excluded(&i) || !shown(&i) {
        return None;
    }
    let at = d.get_constant_offsets(&i);
    b.truncate(i.len());
    if at.has_displacement() {
        // Keep near the registers, most of which point into the data.
        let o = at.displacement_offset();
        let n = at.displacement_size();
        let no_base = i.memory_base() == Register::None && i.memory_index() == Register::None;
        let v = match (no_base, i.memory_base()) {
            (_, Register::RIP) => DATA.wrapping_sub(CODE) + rng.below(0x1800),
            (true, _) if n >= 4 || mode == Mode::Small => mode.data() + rng.below(0x1800),
            _ => rng.below(0x400).wrapping_sub(0x200),
        };
        let bytes = v.to_le_bytes();
        b[o..o + n].copy_from_slice(&bytes[..n]);
    }
    if i.is_jcc_short() || i.is_loop() || i.is_loopcc() || i.is_jcx_short() {
        // Skip a few bytes: whatever they decode to is the next instruction.
        let n = b.len();
        b[n - 1] = 0;
    } else if i.flow_control() == FlowControl::ConditionalBranch {
        return None;
    }
    Some(b)
}

/// A decimal adjustment: what it leaves undefined must not decide about what follows.
fn decimal(code: &[u8], mode: Mode) -> bool {
    use Mnemonic::*;
    let i = Decoder::new(mode.bits(), code, decoder_options()).decode();
    matches!(i.mnemonic(), Aaa | Aas | Aam | Aad | Daa | Das)
}

/// The case of a seed: half of them 64-bit code, half of one instruction.
pub fn mixed(seed: u64) -> Case {
    let mode = match seed % 4 {
        0 => Mode::Small,
        1 => Mode::Compat,
        _ => Mode::Long,
    };
    case(seed, mode, if seed & 4 == 0 { 1 } else { 6 })
}

/// One to `most` random instructions with random registers and data.
pub fn case(seed: u64, mode: Mode, most: u64) -> Case {
    let mut rng = Rng(seed);
    let n = 1 + rng.below(most);
    let mut code = Vec::new();
    let mut got = 0;
    while got < n {
        if let Some(b) = instruction(&mut rng, mode) {
            got = if decimal(&b, mode) { n } else { got + 1 };
            code.extend(b);
        }
    }
    let mut gpr = [0; 16];
    for g in &mut gpr {
        *g = match rng.below(3) {
            0 => mode.data() + 0x400 + rng.below(0x1800),
            1 => mode.data() + 0x400 + rng.below(0x180) * 16,
            _ => rng.value(),
        };
        if mode != Mode::Long {
            *g &= 0xFFFF_FFFF;
        }
    }
    // Repeat counts should end.
    if gpr[1] > 1 << 20 && rng.below(8) != 0 {
        gpr[1] = rng.below(300);
    }
    if rng.below(8) != 0 {
        gpr[4] = mode.data() + 0x800 + rng.below(0x100) * 8;
    }
    if mode == Mode::Small {
        gpr[4] &= 0xFFFF;
    }
    let mut ymm = [[0; 4]; 16];
    for w in ymm.iter_mut().flatten() {
        *w = rng.vector_word();
    }
    let mut data = vec![0; DATA_LEN];
    for w in data.chunks_exact_mut(8) {
        w.copy_from_slice(&rng.vector_word().to_le_bytes());
    }
    let mut st = [[0; 2]; 8];
    for s in &mut st {
        let e = match rng.below(4) {
            0 => 0,
            1 => 0x7FFF,
            2 => 0x3FFF + rng.below(70),
            _ => rng.below(0x8000),
        };
        *s = [rng.word() | 1 << 63, e | rng.below(2) << 15];
    }
    let mxcsr = match rng.below(4) {
        0 => 0x1F80,
        1 => 0x1F80 | rng.below(4) << 13,
        2 => 0x1F80 | rng.below(2) << 15 | rng.below(2) << 6 | rng.below(0x40),
        _ => rng.below(0x40) << 7,
    } as u32;
    let fcw = 0x37F & !(rng.below(4) << 10) as u16 & !(rng.below(4) << 8) as u16;
    Case {
        mode,
        code,
        regs: Regs {
            gpr,
            rip: CODE,
            flags: rng.word() & FLAGS & !(if rng.below(4) != 0 { 0x400 } else { 0 }),
            ymm,
            mxcsr,
            fcw,
            fsw: (rng.below(8) << 11) as u16,
            ftw: rng.word() as u8,
            st,
        },
        data,
    }
}
