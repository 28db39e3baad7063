//! Every form of every instruction that is ours, compared with the host executing it directly.
//!
//! The host's side (`Oracle`) shares nothing with stubs: it loads the *whole* register state
//! from memory, runs the instruction's original bytes and stores the whole state back.

use super::simd::mxcsr;
use super::*;
use crate::regs::{Reg, SegDesc};
use crate::soft::Cpu;
use crate::soft::decode::Lower;
use crate::soft::op::*;
use crate::soft::state::*;
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use iced_x86::{
    Code, Decoder, Encoder, EncodingKind, MemoryOperand, Mnemonic, OpCodeOperandKind, OpKind,
    Register,
};
use std::any::Any;
use std::arch::asm;
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The guest's memory operand, and the host's: the same address.
const DATA: u64 = 0x20_0000;
const DATA_LEN: usize = 0x2000;
/// Guest code is thought to be here.
const CODE_AT: u64 = 0x1000;

// -- state -------------------------------------------------------------------------------------

/// What an instruction can read and write.
#[derive(Clone, Debug, PartialEq)]
#[repr(C, align(64))]
struct State {
    fx: Fx,
    ymm: [[u64; 4]; 16],
    r: [u64; 16],
    /// Arithmetic flags.
    flags: u64,
    host_rsp: u64,
}

/// FXSAVE64's image.
#[derive(Clone, Debug, PartialEq)]
#[repr(C, align(64))]
struct Fx {
    fpu: Fpu,
    xmm: [[u64; 2]; 16],
    unused: [u64; 12],
}

const FX: i64 = 0;
const YMM: i64 = 512;
const R: i64 = YMM + 512;
const FLAGS: i64 = R + 128;
const HOST_RSP: i64 = FLAGS + 8;

impl Default for State {
    fn default() -> State {
        State {
            fx: Fx { fpu: Fpu::RESET, xmm: [[0; 2]; 16], unused: [0; 12] },
            ymm: [[0; 4]; 16],
            r: [0; 16],
            flags: 2,
            host_rsp: 0,
        }
    }
}

/// Numbers that are the same in every run (xorshift64*).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 32) % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A quadword of vector contents: bits, floats of interest, small integers.
    fn quad(&mut self) -> u64 {
        match self.below(4) {
            0 => self.next(),
            1 => {
                const D: [f64; 12] = [
                    0.0,
                    -0.0,
                    1.0,
                    -1.5,
                    1e-310,
                    1e308,
                    -1e308,
                    3e-308,
                    1e9,
                    0.1,
                    4_503_599_627_370_497.5,
                    f64::INFINITY,
                ];
                match self.below(14) {
                    12 => 0x7FF0_0000_0000_0001,
                    13 => f64::NAN.to_bits(),
                    i => D[i as usize].to_bits(),
                }
            }
            2 => u64::from(self.single()) << 32 | u64::from(self.single()),
            _ => self.next() & 0x0003_0007_0003_0007,
        }
    }

    fn single(&mut self) -> u32 {
        const S: [f32; 11] =
            [0.0, -0.0, 1.0, -1.5, 1e-40, 3e38, -3e38, 1.2e-38, 0.1, 8_388_609.5, f32::INFINITY];
        match self.below(13) {
            11 => 0x7F80_0001,
            12 => f32::NAN.to_bits(),
            i => S[i as usize].to_bits(),
        }
    }

    /// An 80-bit number.
    fn extended(&mut self) -> [u64; 2] {
        let sign = self.below(2) << 15;
        let m = 1 << 63 | self.next() >> 1;
        match self.below(12) {
            0 => [0, sign],
            1 => [1 << 63, sign | 0x7FFF],
            2 => [1 << 63 | 1 << 62 | self.next() >> 2, sign | 0x7FFF],
            // Signalling.
            3 => [1 << 63 | self.next() >> 2 | 1, sign | 0x7FFF],
            // Denormal, and what is none any more.
            4 => [self.next() >> 1, sign],
            5 => [self.next() >> 1, sign | 0x3FFF],
            6 => [m, sign | 0x7FFE],
            7 => [m, sign | 1],
            8 => [m >> 40 << 40, sign | (0x3FFF + self.below(24))],
            9 => [1 << 63, sign | 0x3FFF],
            _ => [m, sign | (0x3FC0 + self.below(0x80))],
        }
    }

    fn state(&mut self) -> State {
        let mut s = State::default();
        for r in &mut s.r {
            *r = match self.below(3) {
                0 => self.next(),
                1 => self.next() & 0xFF,
                _ => self.quad(),
            };
        }
        for y in &mut s.ymm {
            *y = std::array::from_fn(|_| self.quad());
        }
        s.flags = 2 | self.next() & fl::ARITH;
        // All exceptions masked; any rounding, DAZ, FZ and flags.
        s.fx.fpu.mxcsr = (self.next() as u32 & 0xE07F) | mxcsr::MASKS;
        if self.below(2) == 0 {
            s.fx.fpu.mxcsr = mxcsr::MASKS;
        }
        s.fx.fpu.fcw = self.next() as u16 & 0x0F00 | 0x007F;
        // No exception pending, condition codes and TOP as they come.
        s.fx.fpu.fsw = self.next() as u16 & 0x7F7F;
        s.fx.fpu.ftw = if self.below(2) == 0 { 0xFF } else { self.next() as u8 };
        for st in &mut s.fx.fpu.st {
            *st = self.extended();
        }
        s
    }
}

// -- the host ----------------------------------------------------------------------------------

/// Runs instructions in a state of their own choosing.  One at a time: the code, the state and
/// the memory operand have fixed addresses.
struct Oracle {
    /// Writable and executable: it is rewritten for each instruction, and nothing else runs then.
    code: *mut u8,
    /// The state comes first in it; then MXCSR for afterwards.
    state: *mut State,
}

static ORACLE: Mutex<()> = Mutex::new(());

impl Oracle {
    fn lock() -> MutexGuard<'static, ()> {
        ORACLE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new() -> Oracle {
        let map = |at: u64, len: usize, prot: i32| {
            let fixed = if at == 0 { 0 } else { libc::MAP_FIXED };
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
            // SAFETY: nothing else is mapped so low in the address space.
            let p = unsafe { libc::mmap(at as *mut _, len, prot, flags, -1, 0) };
            assert_ne!(p, libc::MAP_FAILED);
            p.cast::<u8>()
        };
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        map(DATA, DATA_LEN, rw);
        Oracle { code: map(0, 4096, rw | libc::PROT_EXEC), state: map(0, 8192, rw).cast() }
    }

    /// The memory operand's surroundings.
    fn memory(&self) -> &'static mut [u8] {
        // SAFETY: mapped by `new`; tests hold the lock.
        unsafe { std::slice::from_raw_parts_mut(DATA as *mut u8, DATA_LEN) }
    }

    fn run(&self, insn: &[u8], s: &State) -> State {
        use Register::*;
        let at = self.state as u64;
        let mut e = Encoder::new(64);
        let mut emit = |i: Instruction| {
            e.encode(&i, 0).unwrap();
        };
        let rax = |offset: i64| MemoryOperand::with_base_displ(RAX, offset);
        let saved = [RBX, RBP, R12, R13, R14, R15];
        for r in saved {
            emit(Instruction::with1(Code::Push_r64, r).unwrap());
        }
        emit(Instruction::with2(Code::Mov_r64_imm64, RAX, at).unwrap());
        emit(Instruction::with2(Code::Mov_rm64_r64, rax(HOST_RSP), RSP).unwrap());
        emit(Instruction::with1(Code::Fxrstor64_m512byte, rax(FX)).unwrap());
        for n in 0..16 {
            let m = rax(YMM + 32 * i64::from(n));
            emit(Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, YMM0 + n, m).unwrap());
        }
        emit(Instruction::with1(Code::Push_rm64, rax(FLAGS)).unwrap());
        emit(Instruction::with(Code::Popfq));
        for n in (0..16).rev() {
            let m = rax(R + 8 * i64::from(n));
            emit(Instruction::with2(Code::Mov_r64_rm64, RAX + n, m).unwrap());
        }
        for &b in insn {
            e.write_u8(b);
        }
        // mov [state.rax], rax; mov rax, state
        e.write_u8(0x48);
        e.write_u8(0xA3);
        for b in (at + R as u64).to_le_bytes() {
            e.write_u8(b);
        }
        let mut emit = |i: Instruction| {
            e.encode(&i, 0).unwrap();
        };
        emit(Instruction::with2(Code::Mov_r64_imm64, RAX, at).unwrap());
        for n in 1..16 {
            let m = rax(R + 8 * i64::from(n));
            emit(Instruction::with2(Code::Mov_rm64_r64, m, RAX + n).unwrap());
        }
        emit(Instruction::with2(Code::Mov_r64_rm64, RSP, rax(HOST_RSP)).unwrap());
        emit(Instruction::with(Code::Pushfq));
        emit(Instruction::with1(Code::Pop_rm64, rax(FLAGS)).unwrap());
        emit(Instruction::with1(Code::Fxsave64_m512byte, rax(FX)).unwrap());
        for n in 0..16 {
            let m = rax(YMM + 32 * i64::from(n));
            emit(Instruction::with2(Code::VEX_Vmovups_ymmm256_ymm, m, YMM0 + n).unwrap());
        }
        emit(Instruction::with1(Code::Ldmxcsr_m32, rax(4096)).unwrap());
        emit(Instruction::with(Code::Fninit));
        emit(Instruction::with(Code::VEX_Vzeroupper));
        for r in saved.into_iter().rev() {
            emit(Instruction::with1(Code::Pop_r64, r).unwrap());
        }
        emit(Instruction::with(Code::Retnq));
        let code = e.take_buffer();
        // SAFETY: the code keeps to the calling convention, whatever the instruction in its middle
        // does to registers; the memory it may touch is mapped.
        unsafe {
            ptr::copy_nonoverlapping(code.as_ptr(), self.code, code.len());
            self.state.write(s.clone());
            self.state.cast::<u8>().add(4096).cast::<u32>().write(0x1F80);
            asm!("call {0}", in(reg) self.code, clobber_abi("sysv64"));
            let mut s = self.state.read();
            s.host_rsp = 0;
            s.flags = s.flags & fl::ARITH | 2;
            s
        }
    }
}

// -- the guest ---------------------------------------------------------------------------------

struct Guest {
    vm: Arc<Vm>,
    vcpu: Arc<Vcpu>,
}

impl Guest {
    /// A VM in 64-bit mode with memory mapped one to one, and everything enabled.
    fn new() -> Guest {
        let vm = Vm::new(1).expect("a VM");
        vm.mem.create_segment(0, "sysmem", 4 << 20, None).expect("memory");
        vm.mmap_memseg(0, 0, 0, 4 << 20, 7).expect("map");
        vm.mem.write(0x2000, &0x3007u64.to_le_bytes()).expect("PML4");
        vm.mem.write(0x3000, &0x4007u64.to_le_bytes()).expect("PDPT");
        vm.mem.write(0x4000, &0x87u64.to_le_bytes()).expect("PD");
        vm.mem.write(0x4008, &0x5007u64.to_le_bytes()).expect("PD");
        for i in 0..512u64 {
            // The page behind the operand's two is not present.
            let present = if i == (DATA_LEN as u64 >> 12) { 0 } else { 7 };
            let pte = (DATA + (i << 12)) | present;
            vm.mem.write(0x5000 + 8 * i, &pte.to_le_bytes()).expect("PT");
        }
        let vcpu = vm.vcpu(0).expect("vCPU").clone();
        let guest = Guest { vm, vcpu };
        guest.with(|c| {
            c.set_reg(Reg::Cr3, 0x2000);
            c.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
            c.xcr0 = 7;
            c.efer = efer::LMA | efer::LME;
            c.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET;
            let data = SegDesc { base: 0, limit: u32::MAX, access: 0xC093 };
            for r in [Reg::Ds, Reg::Es, Reg::Ss] {
                c.set_desc(r, data);
            }
            c.set_desc(Reg::Cs, SegDesc { base: 0, limit: u32::MAX, access: 0xA09B });
            c.rip = CODE_AT;
            c.mode_changed();
        });
        guest
    }

    fn with<T>(&self, f: impl FnOnce(&mut Cpu) -> T) -> T {
        self.vcpu.with_cpu(|c| {
            c.vm = &*self.vm;
            c.vcpu = &*self.vcpu;
            c.mem_base = self.vm.mem.base();
            c.mem_flags = self.vm.mem.page_flag_word(0);
            c.mem_pages = self.vm.mem.span() >> 12;
            f(c)
        })
    }

    fn memory(&self) -> Vec<u8> {
        let mut v = vec![0; DATA_LEN];
        self.vm.mem.read(DATA, &mut v).unwrap();
        v
    }
}

fn set(c: &mut Cpu, s: &State) {
    c.r[..16].copy_from_slice(&s.r);
    c.ymm = s.ymm;
    c.fpu = s.fx.fpu;
    let rest = c.rflags;
    c.set_rflags(rest & !fl::ARITH | s.flags & fl::ARITH);
}

fn get(c: &Cpu) -> State {
    let mut s = State::default();
    s.r.copy_from_slice(&c.r[..16]);
    s.ymm = c.ymm;
    s.fx.fpu = c.fpu;
    s.flags = c.get_rflags() & fl::ARITH | 2;
    s
}

/// Execute one instruction in code of `bits`; None: not ours.
fn exec(c: &mut Cpu, bits: u32, bytes: &[u8]) -> Option<Result<(), Exc>> {
    let insn = Decoder::with_ip(bits, bytes, CODE_AT, 0).decode();
    assert_eq!(insn.len(), bytes.len(), "{insn:?} {bytes:02x?}");
    let mut data: Vec<Box<dyn Any>> = Vec::new();
    let flat = bits == 64;
    let mut l = Lower {
        insn,
        bits,
        big_stack: true,
        flat,
        op: Op::new(end, 0, bytes.len(), 0),
        data: &mut data,
        end: false,
    };
    assert!(!c.native.full());
    let f = lower(&mut l, &mut c.native)?;
    l.op.f.set(f);
    let ops = [l.op, Op::new(end, bytes.len(), 0, 1)];
    c.r[R_RIP as usize] = CODE_AT;
    c.exc = Exc::default();
    c.stopped = None;
    // SAFETY: an op as `lower` made it, and one behind it that ends the block.
    let flow = unsafe { f(c, &ops[0]) };
    Some(match flow {
        STOP => {
            assert_eq!(c.stopped, Some(Stop::Exception));
            Err(c.exc)
        }
        _ => Ok(()),
    })
}

unsafe fn end(_: &mut Cpu, _: *const Op) -> Flow {
    FALL
}

// -- forms -------------------------------------------------------------------------------------

/// Whether the host has what an instruction needs.
fn host_has(f: CpuidFeature) -> bool {
    match f {
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::SHA => is_x86_feature_detected!("sha"),
        CpuidFeature::FMA => is_x86_feature_detected!("fma"),
        CpuidFeature::F16C => is_x86_feature_detected!("f16c"),
        CpuidFeature::ADX => is_x86_feature_detected!("adx"),
        CpuidFeature::BMI1 => is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => is_x86_feature_detected!("bmi2"),
        CpuidFeature::LZCNT => is_x86_feature_detected!("lzcnt"),
        CpuidFeature::MOVBE => is_x86_feature_detected!("movbe"),
        // The oracle itself needs AVX.
        _ => is_x86_feature_detected!("avx2"),
    }
}

/// A register for an operand, or None for one that is not a register.
/// With `high`, the instruction may name AH to BH, and so nothing that takes a REX prefix.
fn register(kind: OpCodeOperandKind, high: bool, rng: &mut Rng) -> Option<Register> {
    use OpCodeOperandKind as K;
    let (first, n) = match kind {
        K::r8_or_mem => (Register::AL, if high { 8 } else { 4 }),
        K::r16_or_mem | K::r16_reg | K::r16_rm => (Register::AX, 16),
        K::r32_reg if high => (Register::EAX, 8),
        K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_vvvv => (Register::EAX, 16),
        K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_vvvv => (Register::RAX, 16),
        K::mm_or_mem | K::mm_reg | K::mm_rm => (Register::MM0, 8),
        K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => (Register::XMM0, 16),
        K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => (Register::YMM0, 16),
        K::sti_opcode => (Register::ST0, 8),
        K::st0 => (Register::ST0, 1),
        K::ax => (Register::AX, 1),
        _ => return None,
    };
    Some(first + rng.below(n) as u32)
}

fn or_memory(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(
        kind,
        K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
    )
}

fn vsib(kind: OpCodeOperandKind) -> Option<Register> {
    use OpCodeOperandKind as K;
    match kind {
        K::mem_vsib32x | K::mem_vsib64x => Some(Register::XMM0),
        K::mem_vsib32y | K::mem_vsib64y => Some(Register::YMM0),
        _ => None,
    }
}

/// An instruction of this code with random operands; memory operands are at RBX plus `disp`.
fn form(code: Code, memory: bool, disp: i64, rng: &mut Rng) -> Instruction {
    let mut i = Instruction::default();
    i.set_code(code);
    let high = code == Code::Crc32_r32_rm8 && rng.below(2) == 0;
    for (n, &kind) in code.op_code().op_kinds().iter().enumerate() {
        let n = n as u32;
        let mem = |i: &mut Instruction| {
            i.set_op_kind(n, OpKind::Memory);
            i.set_memory_base(Register::RBX);
            i.set_memory_displacement64(disp as u64);
            i.set_memory_displ_size(if disp == 0 { 0 } else { 8 });
        };
        if let Some(first) = vsib(kind) {
            mem(&mut i);
            // Registers of a gather differ: 1 and 2 are for the others.
            i.set_memory_index(first + 3 + rng.below(13) as u32);
            i.set_memory_index_scale(1 << rng.below(4));
        } else if kind == OpCodeOperandKind::mem || or_memory(kind) && memory {
            mem(&mut i);
        } else if let Some(mut r) = register(kind, high, rng) {
            if r.is_gpr() && r.full_register() == Register::RBX {
                r -= 1u32;
            }
            if code.op_code().op_kinds().iter().any(|&k| vsib(k).is_some()) {
                let first = if r.is_ymm() { Register::YMM0 } else { Register::XMM0 };
                r = first + if n == 0 { 1 } else { 2 };
            }
            i.set_op_kind(n, OpKind::Register);
            i.set_op_register(n, r);
        } else {
            use OpCodeOperandKind as K;
            match kind {
                K::imm8 => {
                    i.set_op_kind(n, OpKind::Immediate8);
                    i.set_immediate8(rng.next() as u8);
                }
                K::seg_rDI => i.set_op_kind(n, OpKind::MemorySegRDI),
                _ => panic!("{code:?}: operand {kind:?}"),
            }
        }
    }
    i
}

fn encode(i: &Instruction) -> Vec<u8> {
    let mut e = Encoder::new(64);
    e.encode(i, CODE_AT).unwrap_or_else(|e| panic!("{i:?}: {e}"));
    e.take_buffer()
}

/// All instructions that `simd` and `special` have and a 64-bit guest can use.
fn codes() -> impl Iterator<Item = Code> {
    Code::values().filter(|&code| {
        let i = {
            let mut i = Instruction::default();
            i.set_code(code);
            i
        };
        code.op_code().mode64()
            && matches!(i.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
            && code.cpuid_features().iter().all(|&f| covered(f) && host_has(f))
            && !super::simd::excluded(code.mnemonic())
            // Compared by tests of their own, or not reproducible.
            && !matches!(
                code.mnemonic(),
                Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr | Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr
            )
    })
}

fn compare(what: &str, before: &State, guest: &State, host: &State) {
    let mut g = guest.clone();
    let mut h = host.clone();
    for s in [&mut g, &mut h] {
        s.fx.xmm = [[0; 2]; 16];
        s.fx.unused = [0; 12];
        // The host's code is elsewhere, and it may keep pointers for pending exceptions only.
        s.fx.fpu.fip = 0;
        if s.fx.fpu.fsw & super::simd::FSW_ES == 0 {
            s.fx.fpu.fop = 0;
            s.fx.fpu.fdp = 0;
        }
        for st in &mut s.fx.fpu.st {
            st[1] &= 0xFFFF;
        }
        // SAFETY: plain bytes behind the field, in FXSAVE's image MXCSR_MASK.
        s.fx.fpu = Fpu { ..s.fx.fpu };
    }
    if g == h {
        return;
    }
    let mut diff = String::new();
    for n in 0..16 {
        if g.r[n] != h.r[n] {
            diff += &format!("r{n}: {:x}, guest {:x}, host {:x}\n", before.r[n], g.r[n], h.r[n]);
        }
        if g.ymm[n] != h.ymm[n] {
            diff += &format!(
                "ymm{n}: {:x?}\n  guest {:x?}\n  host  {:x?}\n",
                before.ymm[n], g.ymm[n], h.ymm[n]
            );
        }
    }
    if g.flags != h.flags {
        diff += &format!("flags: {:x}, guest {:x}, host {:x}\n", before.flags, g.flags, h.flags);
    }
    if g.fx != h.fx {
        diff += &format!(
            "x87: {:x?}\n  guest {:x?}\n  host  {:x?}\n",
            before.fx.fpu, g.fx.fpu, h.fx.fpu
        );
    }
    panic!("{what}\n{diff}");
}

/// Run one instruction on both sides and compare everything.
fn differential(guest: &Guest, oracle: &Oracle, bytes: &[u8], before: &State, memory: &[u8]) {
    differential_but(guest, oracle, bytes, before, memory, 0..0);
}

/// As `differential`, but for some bytes of memory.
fn differential_but(
    guest: &Guest,
    oracle: &Oracle,
    bytes: &[u8],
    before: &State,
    memory: &[u8],
    ignored: Range<usize>,
) {
    let what = {
        let i = Decoder::with_ip(64, bytes, CODE_AT, 0).decode();
        format!("{:?} {bytes:02x?} {i:?}", i.code())
    };
    oracle.memory().copy_from_slice(memory);
    guest.vm.mem.write(DATA, memory).unwrap();
    let r = guest.with(|c| {
        set(c, before);
        exec(c, 64, bytes).map(|r| r.map(|()| get(c)))
    });
    let after = r.unwrap_or_else(|| panic!("{what}: not ours"));
    let after = after.unwrap_or_else(|e| panic!("{what}: {e:?}"));
    let want = oracle.run(bytes, before);
    compare(&what, before, &after, &want);
    let (have, want) = (guest.memory(), oracle.memory());
    if let Some(at) = (0..DATA_LEN).find(|i| have[*i] != want[*i] && !ignored.contains(i)) {
        panic!(
            "{what}: memory at {at:#x}: guest {:02x?}, host {:02x?}",
            &have[at..at + 32],
            &want[at..at + 32]
        );
    }
}

fn random_memory(rng: &mut Rng) -> Vec<u8> {
    (0..DATA_LEN / 8).flat_map(|_| rng.quad().to_le_bytes()).collect()
}

#[test]
fn every_vector_form_is_the_hosts() {
    let _lock = Oracle::lock();
    let oracle = Oracle::new();
    let guest = Guest::new();
    let mut rng = Rng(0x1234_5678_9ABC_DEF1);
    let mut count = 0;
    for code in codes() {
        let kinds = code.op_code().op_kinds();
        let memory_forms: &[bool] =
            if kinds.iter().any(|&k| or_memory(k)) { &[false, true] } else { &[true] };
        for &memory in memory_forms {
            for trial in 0..12 {
                // Aligned, unaligned where allowed, and across the page boundary.
                let mut at = DATA + 0xF80 + if trial % 3 == 2 { 0x60 } else { 0 };
                let mut i = form(code, memory, rng.pick(&[0, 64, -128]), &mut rng);
                let insn = Decoder::with_ip(64, &encode(&i), CODE_AT, 0).decode();
                let size = insn.memory_size().size();
                let aligned = super::simd::wants_aligned(&insn, super::simd::class(&insn), size);
                if trial % 3 == 2 && !aligned {
                    i.set_memory_displacement64(0);
                    i.set_memory_displ_size(0);
                    at = DATA + 0x1000 - rng.below(40);
                } else if trial % 3 == 1 && !aligned {
                    at += rng.below(8);
                }
                let mut s = rng.state();
                s.r[3] = at;
                s.r[7] = if insn.op0_kind() == OpKind::MemorySegRDI { at } else { s.r[7] };
                if kinds.iter().any(|&k| vsib(k).is_some()) {
                    // Offsets of either width that stay in the operand's pages.
                    let index = &mut s.ymm[insn.memory_index().number()];
                    let wide = matches!(insn.memory_index_scale(), _ if kinds.iter().any(|&k| {
                        matches!(k, OpCodeOperandKind::mem_vsib64x | OpCodeOperandKind::mem_vsib64y)
                    }));
                    for q in index.iter_mut() {
                        let mut small = || rng.below(512) as i64 - 256;
                        *q = if wide {
                            small() as u64
                        } else {
                            u64::from(small() as u32) << 32 | u64::from(small() as u32)
                        };
                    }
                    s.r[3] = DATA + 0x1000;
                }
                let memory = random_memory(&mut rng);
                differential(&guest, &oracle, &encode(&i), &s, &memory);
                count += 1;
            }
        }
    }
    assert!(count > 10_000, "{count} runs");
}

/// x87 instructions that do not wait are not in need of a 9B prefix; iced has codes for both.
fn x87_codes() -> impl Iterator<Item = Code> {
    Code::values().filter(|&code| {
        let mut i = Instruction::default();
        i.set_code(code);
        let len = code.op_code().op_code_len();
        let opcode = code.op_code().op_code() >> (8 * (len - 1));
        i.encoding() == EncodingKind::Legacy
            && code.op_code().mode64()
            && code.op_code().table() == iced_x86::OpCodeTableKind::Normal
            && (0xD8..=0xDF).contains(&opcode)
            && !code.op_code().fwait()
            // Of the 286 and of clones only.
            && !matches!(
                code,
                Code::Frstpm
                    | Code::Ftstp
                    | Code::Frint2
                    | Code::Frichop
                    | Code::Frinear
                    | Code::Fstdw_AX
                    | Code::Fstsg_AX
            )
    })
}

#[test]
fn every_x87_form_is_the_hosts() {
    let _lock = Oracle::lock();
    let oracle = Oracle::new();
    let guest = Guest::new();
    let mut rng = Rng(0xF87F_0000_1234_5671);
    let mut count = 0;
    for code in x87_codes() {
        for trial in 0..60 {
            let i = form(code, true, 0, &mut rng);
            let bytes = encode(&i);
            if Decoder::with_ip(64, &bytes, CODE_AT, 0).decode().code() != code {
                // An alias: decoded as the documented one.
                assert!(i.op_code().op_code_len() == 2, "{code:?}");
            }
            let mut s = rng.state();
            s.r[3] = if trial % 4 == 3 { DATA + 0x1000 - rng.below(12) } else { DATA + 0x800 };
            if trial % 2 == 1 {
                // Some exceptions not masked, none of them pending.
                s.fx.fpu.fcw &= 0xFFC0 | rng.next() as u16;
                s.fx.fpu.fsw &= s.fx.fpu.fcw | 0xFFC0;
            }
            let mut memory = random_memory(&mut rng);
            let at = (s.r[3] - DATA) as usize;
            match rng.below(3) {
                0 => {
                    let x = rng.extended();
                    memory[at..at + 8].copy_from_slice(&x[0].to_le_bytes());
                    memory[at + 8..at + 10].copy_from_slice(&x[1].to_le_bytes()[..2]);
                }
                1 => {
                    for b in &mut memory[at..at + 9] {
                        *b = (rng.below(10) << 4 | rng.below(10)) as u8;
                    }
                    memory[at + 9] = rng.pick(&[0, 0x80]);
                }
                _ => {}
            }
            differential(&guest, &oracle, &bytes, &s, &memory);
            count += 1;
        }
    }
    assert!(count > 6_000, "{count} runs");
}

#[test]
fn state_is_saved_and_restored_as_the_host_does() {
    use Code::*;
    let _lock = Oracle::lock();
    let oracle = Oracle::new();
    let guest = Guest::new();
    let mut rng = Rng(0x55AA_0000_1234_5671);
    let codes = [
        Fxsave_m512byte,
        Fxsave64_m512byte,
        Fxrstor_m512byte,
        Fxrstor64_m512byte,
        Xsave_mem,
        Xsave64_mem,
        Xsaveopt_mem,
        Xsaveopt64_mem,
        Xsavec_mem,
        Xsavec64_mem,
        Xrstor_mem,
        Xrstor64_mem,
    ];
    for code in codes {
        for trial in 0..200 {
            let i = form(code, true, 0, &mut rng);
            let mut s = rng.state();
            // In a page, and across two.
            let at = if trial % 2 == 0 { 0x400 } else { 0x1000 - 64 * rng.below(13) as usize };
            s.r[3] = DATA + at as u64;
            // Other components of the host stay out of this.
            s.r[0] = if trial % 4 < 2 { rng.below(8) } else { 7 };
            s.r[2] = 0;
            let mut memory = random_memory(&mut rng);
            let image = &mut memory[at..at + 832];
            let mxcsr = rng.next() as u32 & mxcsr::VALID;
            image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
            // Canonical pointers: the host makes them so.
            image[14..16].fill(0);
            image[22..24].fill(0);
            image[13] &= 0x7F;
            image[21] &= 0x7F;
            // A component that is not there, at times.
            let bv = rng.below(8);
            let compacted = rng.below(2) == 0;
            image[512..576].fill(0);
            image[512] = bv as u8;
            if compacted {
                image[520..528].copy_from_slice(&(1 << 63 | bv | rng.below(8)).to_le_bytes());
            }
            differential_but(&guest, &oracle, &encode(&i), &s, &memory, at + 28..at + 32);
        }
    }
}
