//! What CPUID shows, and with it which instructions exist.
//!
//! The guest's processor has the vendor, family and name of the host's, and those of the host's
//! features that this engine has; where a feature needs nothing of the host (paging, modes,
//! MSRs) it is always there.  Intel SDM 2A "CPUID", AMD APM 3 appendix E, bhyve's x86.c.

use super::Cpu;
use super::mmu::MAXPHYADDR;
use super::state::{cr4, efer};
use crate::io::vlapic::TIMER_HZ;
use crate::platform::Platform;
use iced_x86::{CpuidFeature, DecoderOptions, Instruction, Mnemonic};
use serde::{Deserialize, Serialize};
use std::sync::OnceLock;

/// What of a VM's configuration CPUID shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuConfig {
    pub ncpu: u32,
    pub sockets: u32,
    /// Per socket.
    pub cores: u32,
    /// Per core.
    pub threads: u32,
    pub x2apic: bool,
}

/// EAX, EBX, ECX, EDX.
type Regs = [u32; 4];
const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Bits given by their positions.
const fn bits<const N: usize>(list: [u32; N]) -> u32 {
    let mut v = 0;
    let mut i = 0;
    while i < N {
        v |= 1 << list[i];
        i += 1;
    }
    v
}

// Per register: what is ours whatever the host, and what depends on its instructions.

/// PCID, TSC deadline, hypervisor.
const L1_ECX: u32 = bits([17, 24, 31]);
const L1_ECX_X2APIC: u32 = 1 << 21;
const L1_ECX_OSXSAVE: u32 = 1 << 27;
/// SSE3 PCLMUL SSSE3 FMA CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES XSAVE AVX F16C RDRAND.
const L1_ECX_HOST: u32 = bits([0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
/// FPU VME DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE
/// SSE2.
const L1_EDX: u32 =
    bits([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26]);
const L1_EDX_HTT: u32 = 1 << 28;
/// Self-snoop.
const L1_EDX_HOST: u32 = 1 << 27;
/// FSGSBASE TSC_ADJUST SMEP ERMS INVPCID SMAP.
const L7_EBX: u32 = bits([0, 1, 7, 9, 10, 20]);
/// BMI1 AVX2 FDP_EXCPTN_ONLY BMI2 no-FPU-CS/DS RDSEED ADX CLFLUSHOPT CLWB SHA.
const L7_EBX_HOST: u32 = bits([3, 5, 6, 8, 13, 18, 19, 23, 24, 29]);
/// UMIP RDPID.
const L7_ECX: u32 = bits([2, 22]);
/// FSRM.
const L7_EDX: u32 = 1 << 4;
/// SPEC_CTRL and PRED_CMD, ARCH_CAPABILITIES (Intel).
const L7_EDX_INTEL: u32 = bits([26, 29]);
/// XSAVEOPT XSAVEC XGETBV(1).
const LD1_EAX_HOST: u32 = bits([0, 1, 2]);
/// LAHF in 64-bit mode, PREFETCHW.
const E1_ECX: u32 = bits([0, 8]);
const E1_ECX_CMP_LEGACY: u32 = 1 << 1;
/// LZCNT.
const E1_ECX_HOST: u32 = 1 << 5;
/// Topology extensions (AMD).
const E1_ECX_AMD: u32 = 1 << 22;
/// SYSCALL NX 1 GiB pages RDTSCP, long mode.
const E1_EDX: u32 = bits([11, 20, 26, 27, 29]);
const E1_EDX_SYSCALL: u32 = 1 << 11;
/// Those bits of leaf 1 that AMD repeats, and AMD's MMX extensions (part of SSE).
const E1_EDX_AMD: u32 = L1_EDX & 0x0183_F3FF | 1 << 22;
/// Invariant TSC.
const E7_EDX: u32 = 1 << 8;
/// SSB_NO BTC_NO: a processor that does not speculate has no such leaks; WBNOINVD.
const E8_EBX_AMD: u32 = bits([9, 26, 29]);
/// CLZERO, FXSAVE always stores error pointers.
const E8_EBX_AMD_HOST: u32 = bits([0, 2]);
/// No nested data breakpoints, LFENCE serialises, null selectors clear bases, automatic IBRS,
/// SRSO_NO, SRSO_USER_KERNEL_NO.
const E21_EAX_AMD: u32 = bits([0, 2, 6, 8, 29, 30]);
/// TSA_SQ_NO TSA_L1_NO.
const E21_ECX_AMD: u32 = bits([1, 2]);

/// What all VMs on this host are shown alike.
struct Model {
    amd: bool,
    max_basic: u32,
    max_extended: u32,
    /// (leaf, subleaf, registers), sorted.
    leaves: Vec<(u32, u32, Regs)>,
    decoder_options: u32,
}

impl Model {
    fn new(host: impl Fn(u32, u32) -> Regs) -> Model {
        let h0 = host(0, 0);
        let vendor = [h0[EBX], h0[EDX], h0[ECX]];
        let amd = matches!(&vendor, [v, _, _] if *v == word(b"Auth") || *v == word(b"Hygo"));
        let (max_basic, max_extended) = if amd { (0xD, 0x8000_0021) } else { (0x16, 0x8000_0008) };
        let within = |leaf: u32, sub| {
            let max = if leaf < 0x8000_0000 { h0[EAX] } else { host(0x8000_0000, 0)[EAX] };
            if leaf <= max { host(leaf, sub) } else { [0; 4] }
        };
        let pick = |leaf, sub, reg: usize, mask: u32| within(leaf, sub)[reg] & mask;
        let only = |yes: bool, v: u32| if yes { v } else { 0 };

        let mut leaves = vec![
            (0, 0, [max_basic, h0[EBX], h0[ECX], h0[EDX]]),
            (
                1,
                0,
                [
                    within(1, 0)[EAX],
                    pick(1, 0, EBX, 0xFF) | 8 << 8,
                    L1_ECX | pick(1, 0, ECX, L1_ECX_HOST),
                    L1_EDX | pick(1, 0, EDX, L1_EDX_HOST),
                ],
            ),
            // Always-running APIC timer.
            (6, 0, [1 << 2, 0, 0, 0]),
            (
                7,
                0,
                [
                    0,
                    L7_EBX | pick(7, 0, EBX, L7_EBX_HOST),
                    L7_ECX,
                    L7_EDX | only(!amd, L7_EDX_INTEL),
                ],
            ),
            (0x8000_0000, 0, [max_extended, 0, 0, 0]),
            (
                0x8000_0001,
                0,
                [
                    within(0x8000_0001, 0)[EAX],
                    pick(0x8000_0001, 0, EBX, only(amd, u32::MAX)),
                    E1_ECX | only(amd, E1_ECX_AMD) | pick(0x8000_0001, 0, ECX, E1_ECX_HOST),
                    E1_EDX | only(amd, E1_EDX_AMD),
                ],
            ),
            (0x8000_0007, 0, [0, 0, 0, E7_EDX]),
            (
                0x8000_0008,
                0,
                [
                    MAXPHYADDR | 48 << 8,
                    only(amd, E8_EBX_AMD) | pick(0x8000_0008, 0, EBX, only(amd, E8_EBX_AMD_HOST)),
                    0,
                    0,
                ],
            ),
        ];
        for leaf in [0x8000_0002, 0x8000_0003, 0x8000_0004, 0x8000_0006] {
            leaves.push((leaf, 0, within(leaf, 0)));
        }
        let has = |leaves: &[(u32, u32, Regs)], leaf, reg: usize, bit: u32| {
            leaves.iter().any(|l| l.0 == leaf && l.2[reg] >> bit & 1 != 0)
        };
        if has(&leaves, 1, ECX, 26) {
            let avx = has(&leaves, 1, ECX, 28);
            let size = if avx { 832 } else { 576 };
            leaves.push((0xD, 0, [if avx { 7 } else { 3 }, 576, size, 0]));
            leaves.push((0xD, 1, [pick(0xD, 1, EAX, LD1_EAX_HOST), 576, 0, 0]));
            if avx {
                leaves.push((0xD, 2, [256, 576, 0, 0]));
            }
        }
        let caches = if amd {
            let e = &mut leaves.iter_mut().find(|l| l.0 == 0x8000_0000).expect("pushed above").2;
            (e[EBX], e[ECX], e[EDX]) = (h0[EBX], h0[ECX], h0[EDX]);
            leaves.push((0x8000_0005, 0, within(0x8000_0005, 0)));
            leaves.push((0x8000_001A, 0, within(0x8000_001A, 0)));
            leaves.push((0x8000_0021, 0, [E21_EAX_AMD, 0, E21_ECX_AMD, 0]));
            0x8000_001D
        } else {
            leaves.push((2, 0, within(2, 0)));
            4
        };
        // A table of caches ends with one of type 0; hosts list four or five.
        for sub in 0..8 {
            let cache = within(caches, sub);
            if cache[EAX] & 0x1F == 0 {
                break;
            }
            leaves.push((caches, sub, cache));
        }
        leaves.sort_unstable();
        // The hint space (0F 0D, 0F 18 to 0F 1F) is all NOPs, ENDBR and what is newer too.
        let decoder_options = DecoderOptions::FORCE_RESERVED_NOP;
        let mut m = Model { amd, max_basic, max_extended, leaves, decoder_options };
        for (feature, option) in [
            (CpuidFeature::BMI1, DecoderOptions::NO_MPFX_0FBC),
            (CpuidFeature::LZCNT, DecoderOptions::NO_MPFX_0FBD),
            (CpuidFeature::WBNOINVD, DecoderOptions::NO_WBNOINVD),
        ] {
            if !m.shows(feature) {
                m.decoder_options |= option;
            }
        }
        if amd {
            m.decoder_options |= DecoderOptions::AMD;
        }
        m
    }

    fn get(&self, leaf: u32, sub: u32) -> Regs {
        match self.leaves.binary_search_by_key(&(leaf, sub), |l| (l.0, l.1)) {
            Ok(i) => self.leaves[i].2,
            Err(_) => [0; 4],
        }
    }

    fn has(&self, leaf: u32, reg: usize, bit: u32) -> bool {
        self.get(leaf, 0)[reg] >> bit & 1 != 0
    }

    /// Whether the guest is shown a feature.  `matches!` lists are those that every x86-64
    /// processor has, or ours always.
    fn shows(&self, feature: CpuidFeature) -> bool {
        use CpuidFeature::*;
        match feature {
            INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 | FPU | FPU287 | FPU387
            | CPUID | TSC | MSR | CX8 | CMOV | MMX | FXSR | SSE | SSE2 | SEP | SYSCALL | CLFSH
            | MULTIBYTENOP | PAUSE | RDPMC | RDTSCP | RDPID | FSGSBASE | INVPCID | SMAP
            | PREFETCHW => true,
            SSE3 => self.has(1, ECX, 0),
            PCLMULQDQ => self.has(1, ECX, 1),
            SSSE3 => self.has(1, ECX, 9),
            FMA => self.has(1, ECX, 12),
            CMPXCHG16B => self.has(1, ECX, 13),
            SSE4_1 => self.has(1, ECX, 19),
            SSE4_2 => self.has(1, ECX, 20),
            MOVBE => self.has(1, ECX, 22),
            POPCNT => self.has(1, ECX, 23),
            AES => self.has(1, ECX, 25),
            XSAVE => self.has(1, ECX, 26),
            AVX => self.has(1, ECX, 28),
            F16C => self.has(1, ECX, 29),
            RDRAND => self.has(1, ECX, 30),
            BMI1 => self.has(7, EBX, 3),
            AVX2 => self.has(7, EBX, 5),
            BMI2 => self.has(7, EBX, 8),
            RDSEED => self.has(7, EBX, 18),
            ADX => self.has(7, EBX, 19),
            CLFLUSHOPT => self.has(7, EBX, 23),
            CLWB => self.has(7, EBX, 24),
            SHA => self.has(7, EBX, 29),
            XSAVEOPT => self.get(0xD, 1)[EAX] & 1 != 0,
            XSAVEC => self.get(0xD, 1)[EAX] & 2 != 0,
            LZCNT => self.has(0x8000_0001, ECX, 5),
            CLZERO => self.has(0x8000_0008, EBX, 0),
            WBNOINVD => self.has(0x8000_0008, EBX, 9),
            _ => false,
        }
    }
}

const fn word(s: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*s)
}

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        Model::new(|leaf, sub| {
            let r = std::arch::x86_64::__cpuid_count(leaf, sub);
            [r.eax, r.ebx, r.ecx, r.edx]
        })
    })
}

/// Whether the processor follows AMD where the vendors differ.
pub fn amd() -> bool {
    model().amd
}

/// Whether the guest's processor has XSAVE.
pub fn xsave() -> bool {
    model().has(1, ECX, 26)
}

/// Whether XGETBV has a second register.
pub fn xgetbv1() -> bool {
    model().get(0xD, 1)[EAX] & 4 != 0
}

/// State components that XCR0 may enable.
pub fn xcr0_mask() -> u64 {
    u64::from(model().get(0xD, 0)[EAX])
}

/// EFER bits that WRMSR accepts.
pub fn efer_mask() -> u64 {
    let common = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    // Automatic IBRS: storage only, there are no predictions to restrict.
    common | if amd() { 1 << 21 } else { 0 }
}

/// Whether the guest is shown every feature that an instruction belongs to.
pub fn shown(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        // Hints in the space of reserved NOPs.
        Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Cldemote
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1 => true,
        _ => insn.cpuid_features().iter().all(|&f| model().shows(f)),
    }
}

/// How to decode encodings whose meaning depends on a feature: older processors ignore the
/// prefix that makes the newer instruction.
pub fn decoder_options() -> u32 {
    model().decoder_options
}

/// Positions of the thread and the core in an APIC id: bits below the core's number, and below
/// the socket's.
fn shifts(c: &CpuConfig) -> (u32, u32) {
    let log2 = |n: u32| n.next_power_of_two().trailing_zeros();
    (log2(c.threads), log2(c.threads * c.cores))
}

/// The closest fraction (numerator, denominator) to `num / den` with a numerator of at most `max`.
fn closest_fraction(num: u64, den: u64, max: u64) -> (u32, u32) {
    let distance = |n: u64, d: u64| {
        let (n, d) = (u128::from(n), u128::from(d));
        // Times d * den, for there to be no rounding.
        (n * u128::from(den)).abs_diff(d * u128::from(num))
    };
    // Convergents of the continued fraction, and the last step as far as `max` lets it go.
    let (mut a, mut b) = (num, den);
    let (mut n, mut d) = ((0, 1), (1, 0));
    while b != 0 {
        let room = ((max - n.0) / n.1).min((u64::from(u32::MAX) - d.0) / d.1.max(1));
        let q = (a / b).min(room);
        let next = (q * n.1 + n.0, q * d.1 + d.0);
        if q < a / b {
            let (this, last) = (distance(next.0, next.1), distance(n.1, d.1));
            if this * u128::from(d.1) < last * u128::from(next.1) {
                (n.1, d.1) = next;
            }
            break;
        }
        n = (n.1, next.0);
        d = (d.1, next.1);
        (a, b) = (b, a % b);
    }
    (n.1 as u32, d.1 as u32)
}

impl Cpu {
    /// EAX, EBX, ECX and EDX for a leaf and subleaf.
    pub fn cpuid(&self, leaf: u32, sub: u32) -> [u32; 4] {
        let m = model();
        let leaf = match leaf {
            0x4000_0000..=0x4FFF_FFFF => return hypervisor(leaf),
            l if l < 0x8000_0000 && l <= m.max_basic => l,
            l if l >= 0x8000_0000 && l <= m.max_extended => l,
            // Beyond the last leaf Intel shows that leaf, AMD nothing.
            _ if m.amd => return [0; 4],
            _ => m.max_basic,
        };
        let c = &self.config;
        let (core_shift, socket_shift) = shifts(c);
        let per_socket = c.threads * c.cores;
        let sub = if matches!(leaf, 4 | 0xB | 0xD | 0x8000_001D | 7) { sub } else { 0 };
        let mut r = m.get(leaf, sub);
        match leaf {
            1 => {
                r[EBX] |= per_socket.min(255) << 16 | self.id << 24;
                if c.x2apic {
                    r[ECX] |= L1_ECX_X2APIC;
                }
                if self.cr4 & cr4::OSXSAVE != 0 {
                    r[ECX] |= L1_ECX_OSXSAVE;
                }
                if per_socket > 1 {
                    r[EDX] |= L1_EDX_HTT;
                }
            }
            4 | 0x8000_001D if r[EAX] & 0x1F != 0 => {
                let level = r[EAX] >> 5 & 7;
                let sharing = if level < 3 { core_shift } else { socket_shift };
                r[EAX] = r[EAX] & 0x3FFF | ((1 << sharing) - 1) << 14;
                if leaf == 4 {
                    r[EAX] |= ((1 << (socket_shift - core_shift)) - 1) << 26;
                }
            }
            0xB => {
                r = match sub {
                    0 => [core_shift, c.threads, 1 << 8, self.id],
                    1 => [socket_shift, per_socket, 2 << 8 | 1, self.id],
                    _ => [0, 0, sub & 0xFF, self.id],
                };
            }
            // The size of what XCR0 has enabled.
            0xD if sub <= 1 && self.xcr0 & 4 != 0 => r[EBX] = 832,
            0x15 => {
                // Linux takes the crystal for the clock of the APIC timer, and multiplies its
                // kHz by the numerator in 32 bits.
                let max = u64::from(u32::MAX) / (TIMER_HZ / 1000);
                let (n, d) = closest_fraction(self.vm().tsc_hz(), TIMER_HZ, max);
                r = [d, n, TIMER_HZ as u32, 0];
            }
            0x16 => {
                let mhz = (self.vm().tsc_hz() / 1_000_000).min(0xFFFF) as u32;
                r = [mhz, mhz, 100, 0];
            }
            0x8000_0001 => {
                if !m.amd && !self.code64() {
                    r[EDX] &= !E1_EDX_SYSCALL;
                }
                if m.amd && per_socket > 1 {
                    r[ECX] |= E1_ECX_CMP_LEGACY;
                }
            }
            0x8000_0008 if m.amd => r[ECX] = socket_shift << 12 | (per_socket - 1).min(255),
            0x8000_001E => {
                r = [self.id, (self.id >> core_shift) & 0xFF | (c.threads - 1) << 8, 0, 0];
            }
            _ => {}
        }
        r
    }
}

/// Leaves that say which hypervisor this is, as vmm.ko has them.
fn hypervisor(leaf: u32) -> Regs {
    match leaf {
        0x4000_0000 => [0x4000_0001, word(b"bhyv"), word(b"e bh"), word(b"yve ")],
        // Bit 0: 15-bit destination ids in MSI and IOAPIC entries.
        0x4000_0001 => [1, 0, 0, 0],
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with every feature bit set.
    fn everything(vendor: &[u8; 12]) -> impl Fn(u32, u32) -> Regs + '_ {
        let part = |i: usize| u32::from_le_bytes(vendor[i..i + 4].try_into().unwrap());
        move |leaf, sub| match leaf {
            0 => [0x20, part(0), part(8), part(4)],
            0x8000_0000 => [0x8000_0021, part(0), part(8), part(4)],
            4 | 0x8000_001D if sub < 4 => [0xFFFF_C000 | (sub + 1) << 5 | 1, 0x01C0_003F, 63, 0],
            4 | 0x8000_001D => [0; 4],
            _ => [u32::MAX; 4],
        }
    }

    /// The barest x86-64.
    fn bare(leaf: u32, _: u32) -> Regs {
        match leaf {
            0 => [1, word(b"Genu"), word(b"ntel"), word(b"ineI")],
            0x8000_0000 => [0x8000_0008, 0, 0, 0],
            1 => [0x6F0, 0, 0, 0x0789_FBFF],
            _ => [0; 4],
        }
    }

    #[test]
    fn what_is_not_implemented_is_never_shown() {
        for vendor in [b"GenuineIntel", b"AuthenticAMD"] {
            let m = Model::new(everything(vendor));
            // (leaf, register, bits)
            for (leaf, reg, hidden) in [
                // MONITOR VMX SMX EST TM2 FMA4's neighbours; x2APIC and OSXSAVE are dynamic.
                (1, ECX, bits([2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 18, 21, 27])),
                (1, EDX, bits([10, 18, 20, 21, 22, 29, 30, 31])),
                // SGX HLE PQM MPX AVX-512.
                (7, EBX, bits([2, 4, 11, 12, 14, 15, 16, 17, 21, 26, 27, 28, 30, 31])),
                // PKU OSPKE WAITPKG CET GFNI VAES VPCLMUL LA57.
                (7, ECX, bits([3, 4, 5, 7, 8, 9, 10, 16])),
                (7, EDX, bits([20, 22, 24, 25])),
                // SVM SSE4A MISALIGNSSE OSVW IBS XOP FMA4 TBM PERFCTR MWAITX.
                (0x8000_0001, ECX, bits([2, 6, 7, 9, 10, 11, 16, 21, 23, 24, 29])),
                (0x8000_0001, EDX, bits([25, 30, 31])),
            ] {
                let shown = m.get(leaf, 0)[reg] & hidden;
                assert_eq!(shown, 0, "{:?} {leaf:#x} {reg}", std::str::from_utf8(vendor));
            }
            assert_eq!(m.get(0xD, 0), [7, 576, 832, 0]);
            assert_eq!(m.get(0xD, 1)[EAX], 7, "no XSAVES");
            assert_eq!(m.get(0xA, 0), [0; 4], "no PMU");
            for f in [CpuidFeature::AVX512F, CpuidFeature::VMX, CpuidFeature::SVM] {
                assert!(!m.shows(f));
            }
            assert!(m.shows(CpuidFeature::AVX2) && m.shows(CpuidFeature::SHA));
        }
    }

    #[test]
    fn what_the_host_lacks_is_not_shown() {
        let m = Model::new(bare);
        assert!(!m.amd);
        for f in [CpuidFeature::AVX, CpuidFeature::XSAVE, CpuidFeature::SSE3, CpuidFeature::BMI1] {
            assert!(!m.shows(f), "{f:?}");
        }
        // Of the host these need nothing.
        for f in [CpuidFeature::SMAP, CpuidFeature::INVPCID, CpuidFeature::RDTSCP] {
            assert!(m.shows(f), "{f:?}");
        }
        assert_eq!(m.get(0xD, 0), [0; 4]);
        let tzcnt = DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD;
        assert_eq!(m.decoder_options & tzcnt, tzcnt);
    }

    #[test]
    fn this_host_s_vendor_and_name() {
        let m = model();
        for leaf in [0, 0x8000_0002, 0x8000_0003, 0x8000_0004] {
            let r = std::arch::x86_64::__cpuid(leaf);
            assert_eq!(m.get(leaf, 0)[EBX..], [r.ebx, r.ecx, r.edx], "{leaf:#x}");
        }
    }

    fn cpu(id: u32, sockets: u32, cores: u32, threads: u32) -> Box<Cpu> {
        let ncpu = sockets * cores * threads;
        Cpu::new(id, &CpuConfig { ncpu, sockets, cores, threads, x2apic: true })
    }

    #[test]
    fn topology() {
        let c = cpu(5, 2, 2, 2);
        assert_eq!(c.cpuid(1, 0)[EBX] >> 16, 5 << 8 | 4);
        assert_eq!(c.cpuid(0xB, 0), [1, 2, 0x100, 5]);
        assert_eq!(c.cpuid(0xB, 1), [2, 4, 0x201, 5]);
        assert_eq!(c.cpuid(0xB, 2), [0, 0, 2, 5]);
        if amd() {
            assert_eq!(c.cpuid(0x8000_001E, 0), [5, 2 | 1 << 8, 0, 0]);
            assert_eq!(c.cpuid(0x8000_0008, 0)[ECX], 2 << 12 | 3);
        }
        let alone = cpu(0, 1, 1, 1);
        assert_eq!(alone.cpuid(1, 0)[EDX] & L1_EDX_HTT, 0);
        assert_eq!(alone.cpuid(0xB, 0), [0, 1, 0x100, 0]);
    }

    #[test]
    fn what_the_guest_enables_shows() {
        let mut c = cpu(0, 1, 1, 1);
        assert_eq!(c.cpuid(1, 0)[ECX] & L1_ECX_OSXSAVE, 0);
        c.cr4 |= cr4::OSXSAVE;
        assert_ne!(c.cpuid(1, 0)[ECX] & L1_ECX_OSXSAVE, 0);
        if xcr0_mask() == 7 {
            c.xcr0 = 3;
            assert_eq!(c.cpuid(0xD, 0)[EBX], 576);
            c.xcr0 = 7;
            assert_eq!((c.cpuid(0xD, 0)[EBX], c.cpuid(0xD, 1)[EBX]), (832, 832));
        }
    }

    #[test]
    fn beyond_the_last_leaf() {
        let c = cpu(0, 1, 1, 1);
        assert_eq!(c.cpuid(0x4000_0000, 0)[EAX], 0x4000_0001);
        assert_eq!(c.cpuid(0x4000_0002, 0), [0; 4]);
        if amd() {
            assert_eq!(c.cpuid(0x1000, 0), [0; 4]);
            assert_eq!(c.cpuid(0x8000_1000, 0), [0; 4]);
        }
    }

    #[test]
    fn fractions_are_close_and_small() {
        for hz in [1_000_000_000, 2_596_142_000, 3_400_000_000, 5_799_999_937] {
            let max = u64::from(u32::MAX) / (TIMER_HZ / 1000);
            let (n, d) = closest_fraction(hz, TIMER_HZ, max);
            assert!(u64::from(n) <= max && d != 0);
            let got = TIMER_HZ as f64 * f64::from(n) / f64::from(d);
            assert!((got / hz as f64 - 1.0).abs() < 1e-6, "{hz}: {n}/{d}");
        }
    }
}
