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
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
        let code = e.take_buffer();
        RESUME.store(self.code as u64 + code.len() as u64, Ordering::SeqCst);
        e.set_buffer(code);
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

/// Where execution goes on after an instruction that trapped.
static RESUME: AtomicU64 = AtomicU64::new(0);
static TRAPPED: AtomicBool = AtomicBool::new(false);

/// SIGFPE: leave the instruction out; MXCSR keeps its flags, with all exceptions masked.
extern "C" fn on_sigfpe(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    TRAPPED.store(true, Ordering::SeqCst);
    // SAFETY: the kernel passes a context; resuming behind the instruction is what the oracle
    // expects.
    unsafe {
        let m = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        m.gregs[libc::REG_RIP as usize] = RESUME.load(Ordering::SeqCst) as i64;
        (*m.fpregs).mxcsr |= mxcsr::MASKS;
    }
}

/// Have instructions that raise SIGFPE left out.
fn catch_sigfpe() {
    // SAFETY: the handler has the type that SA_SIGINFO asks for.
    unsafe {
        let mut a: libc::sigaction = mem::zeroed();
        a.sa_sigaction = on_sigfpe as *const () as usize;
        // RSP is whatever the test made it; Rust gives each thread another stack for signals.
        a.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        assert_eq!(libc::sigaction(libc::SIGFPE, &a, ptr::null_mut()), 0);
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

/// What `exec` makes of an exit to userland; there is no such vector.
const EXIT: Exc = Exc { vector: 0xFF, error: None, payload: 0 };

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
    Some(match (flow, c.stopped) {
        (STOP, Some(Stop::Exception)) => Err(c.exc),
        (STOP, Some(Stop::Exit)) => Err(EXIT),
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
        for trial in 0..150 {
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
            if i.rflags_read() | i.rflags_modified() != 0 {
                // C1 behind FCMOV and FCOMI is 0 or what it was.
                s.fx.fpu.fsw &= !0x200;
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
    assert!(count > 15_000, "{count} runs");
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

#[test]
fn vector_exceptions_that_are_not_masked_are_the_hosts() {
    let _lock = Oracle::lock();
    let oracle = Oracle::new();
    let guest = Guest::new();
    catch_sigfpe();
    let mut rng = Rng(0xF00D_0000_1234_5671);
    const OE: u32 = 1 << 3;
    const PE: u32 = 1 << 5;
    let (mut raised, mut passed) = (0, 0);
    for code in codes() {
        let mut i = Instruction::default();
        i.set_code(code);
        if !super::simd::class(&i).mxcsr() {
            continue;
        }
        let memory_form = code.op_code().op_kinds().iter().any(|&k| or_memory(k));
        for trial in 0..60 {
            let i = form(code, memory_form && trial % 2 == 0, 0, &mut rng);
            let bytes = encode(&i);
            let mut s = rng.state();
            s.r[3] = DATA + 0x80;
            s.fx.fpu.mxcsr = rng.next() as u32 & mxcsr::VALID;
            // What a single unmasked exception does is seen best without the others.
            if trial % 3 != 0 {
                let one = 1 << (mxcsr::MASK_SHIFT + rng.below(6) as u32);
                s.fx.fpu.mxcsr = s.fx.fpu.mxcsr & 0xE07F | mxcsr::MASKS & !one;
            }
            // Old flags must not hide new ones.
            s.fx.fpu.mxcsr &= !mxcsr::FLAGS;
            let memory = random_memory(&mut rng);
            oracle.memory().copy_from_slice(&memory);
            guest.vm.mem.write(DATA, &memory).unwrap();
            let mut before = s.clone();
            before.fx.fpu.fcw = 0x37F;
            let (r, mut after) = guest.with(|c| {
                set(c, &before);
                let r = exec(c, 64, &bytes).expect("ours");
                (r, get(c))
            });
            TRAPPED.store(false, Ordering::SeqCst);
            let mut want = oracle.run(&bytes, &before);
            let what = format!("{code:?} {bytes:02x?} mxcsr {:x}", s.fx.fpu.mxcsr);
            if TRAPPED.load(Ordering::SeqCst) {
                let xm = Exc { vector: vec::XM, error: None, payload: 0 };
                assert_eq!(r, Err(xm), "{what}");
                raised += 1;
            } else {
                assert_eq!(r, Ok(()), "{what}");
                passed += 1;
            }
            let unmasked = want.fx.fpu.mxcsr & !(s.fx.fpu.mxcsr >> mxcsr::MASK_SHIFT);
            let dot = matches!(
                code.mnemonic(),
                Mnemonic::Dpps | Mnemonic::Dppd | Mnemonic::Vdpps | Mnemonic::Vdppd
            );
            // See `unmasked` for what is not compared.
            let ignored = if dot && unmasked & mxcsr::FLAGS != 0 {
                mxcsr::FLAGS
            } else if unmasked & (OE | mxcsr::UE) != 0 {
                PE
            } else {
                0
            };
            for s in [&mut after, &mut want] {
                s.fx.fpu.mxcsr &= mxcsr::FLAGS & !ignored;
                // MMX mode may or may not have been entered.
                s.fx.fpu = Fpu { mxcsr: s.fx.fpu.mxcsr, ..Fpu::RESET };
            }
            compare(&what, &before, &after, &want);
        }
    }
    assert!(raised > 1_000 && passed > 1_000, "{raised} raised, {passed} passed");
}

// -- what instructions refuse ------------------------------------------------------------------

const ADDPS: &[u8] = &[0x0F, 0x58, 0xC1];
const VADDPS: &[u8] = &[0xC5, 0xF0, 0x58, 0xC2];
const PADDB_MM: &[u8] = &[0x0F, 0xFC, 0xC1];
const CVTPS2PI: &[u8] = &[0x0F, 0x2D, 0xC1];
const CVTSD2SI: &[u8] = &[0xF2, 0x0F, 0x2D, 0xC1];
const ANDN: &[u8] = &[0xC4, 0xE2, 0x70, 0xF2, 0xC2];
const POPCNT: &[u8] = &[0xF3, 0x0F, 0xB8, 0xC1];
const MOVNTI: &[u8] = &[0x0F, 0xC3, 0x03];
const VZEROUPPER: &[u8] = &[0xC5, 0xF8, 0x77];
const STMXCSR: &[u8] = &[0x0F, 0xAE, 0x1B];
const LDMXCSR: &[u8] = &[0x0F, 0xAE, 0x13];
const FADD: &[u8] = &[0xD8, 0xC1];
const FWAIT: &[u8] = &[0x9B];
const FNSTSW: &[u8] = &[0xDF, 0xE0];
const FNINIT: &[u8] = &[0xDB, 0xE3];
const FXSAVE: &[u8] = &[0x0F, 0xAE, 0x03];
const FXRSTOR: &[u8] = &[0x0F, 0xAE, 0x0B];
const XSAVE: &[u8] = &[0x0F, 0xAE, 0x23];
const XRSTOR: &[u8] = &[0x0F, 0xAE, 0x2B];
const EMMS: &[u8] = &[0x0F, 0x77];

/// A guest with `change` made, in which RBX points to its data.
fn outcome(bytes: &[u8], change: impl FnOnce(&mut Cpu)) -> Result<(), Exc> {
    let guest = Guest::new();
    guest.with(|c| {
        c.r[3] = DATA;
        change(c);
        exec(c, 64, bytes).expect("ours")
    })
}

fn raises(vector: u8) -> Result<(), Exc> {
    let error = matches!(vector, vec::GP | vec::PF).then_some(0);
    Err(Exc { vector, error, payload: 0 })
}

#[test]
fn the_mode_decides_what_is_allowed() {
    type Change = fn(&mut Cpu);
    let ts: Change = |c| c.cr0 |= cr0::TS;
    let em: Change = |c| c.cr0 |= cr0::EM;
    let no_osfxsr: Change = |c| c.cr4 &= !cr4::OSFXSR;
    let no_osxsave: Change = |c| c.cr4 &= !cr4::OSXSAVE;
    let no_avx: Change = |c| c.xcr0 = 3;
    let real: Change = |c| c.cr0 &= !cr0::PE;
    let v86: Change = |c| c.rflags |= fl::VM;
    let all: [Change; 7] = [ts, em, no_osfxsr, no_osxsave, no_avx, real, v86];
    // In the order of `all`; 0: allowed.
    let (nm, ud) = (vec::NM, vec::UD);
    let table: &[(&[u8], [u8; 7])] = &[
        (ADDPS, [nm, ud, ud, 0, 0, 0, 0]),
        (CVTSD2SI, [nm, ud, ud, 0, 0, 0, 0]),
        (STMXCSR, [nm, ud, ud, 0, 0, 0, 0]),
        (CVTPS2PI, [nm, ud, ud, 0, 0, 0, 0]),
        (PADDB_MM, [nm, ud, 0, 0, 0, 0, 0]),
        (EMMS, [nm, ud, 0, 0, 0, 0, 0]),
        (VADDPS, [nm, 0, 0, ud, ud, ud, ud]),
        (VZEROUPPER, [nm, 0, 0, ud, ud, ud, ud]),
        (ANDN, [0, 0, 0, 0, 0, ud, ud]),
        (POPCNT, [0, 0, 0, 0, 0, 0, 0]),
        (MOVNTI, [0, 0, 0, 0, 0, 0, 0]),
        (FADD, [nm, nm, 0, 0, 0, 0, 0]),
        (FNINIT, [nm, nm, 0, 0, 0, 0, 0]),
        (FWAIT, [0, 0, 0, 0, 0, 0, 0]),
        (FXSAVE, [nm, nm, 0, 0, 0, 0, 0]),
        (XSAVE, [nm, 0, 0, ud, 0, 0, 0]),
    ];
    for (bytes, vectors) in table {
        for (i, (&change, &vector)) in all.iter().zip(vectors).enumerate() {
            let r = outcome(bytes, |c| {
                change(c);
                c.mode_changed();
            });
            let want = if vector == 0 { Ok(()) } else { raises(vector) };
            assert_eq!(r, want, "{bytes:02x?} with change {i}");
        }
    }
    let r = outcome(FWAIT, |c| c.cr0 |= cr0::TS | cr0::MP);
    assert_eq!(r, raises(vec::NM));
}

#[test]
fn a_pending_x87_exception_is_reported_by_what_waits() {
    let pending = |c: &mut Cpu| {
        c.fpu.fcw = 0x37E;
        c.fpu.set_fsw(1);
    };
    for bytes in [FADD, FWAIT, PADDB_MM, EMMS, CVTPS2PI] {
        assert_eq!(outcome(bytes, pending), raises(vec::MF), "{bytes:02x?}");
    }
    for bytes in [FNSTSW, FNINIT, FXSAVE, XSAVE, ADDPS] {
        assert_eq!(outcome(bytes, pending), Ok(()), "{bytes:02x?}");
    }
    // Without CR0.NE the interrupt line tells.
    let r = outcome(FADD, |c| {
        pending(c);
        c.cr0 &= !cr0::NE;
    });
    assert_eq!(r, Err(EXIT));
}

#[test]
fn without_osxmmexcpt_a_vector_exception_is_an_invalid_opcode() {
    // divps xmm0, xmm1: 0 by 0
    for (clear, want) in [(0, vec::XM), (cr4::OSXMMEXCPT, vec::UD)] {
        let r = outcome(&[0x0F, 0x5E, 0xC1], |c| {
            c.fpu.mxcsr = 0x1F00;
            c.cr4 &= !clear;
        });
        assert_eq!(r, raises(want));
    }
}

#[test]
fn alignment_counts_where_it_must() {
    // [rbx + 8]
    let legacy = |opcode: &[u8]| [opcode, &[0x43, 0x08]].concat();
    let gp = raises(vec::GP);
    for (bytes, want) in [
        (legacy(&[0x0F, 0x28]), gp),           // movaps
        (legacy(&[0x0F, 0x29]), gp),           // movaps, store
        (legacy(&[0x0F, 0x58]), gp),           // addps
        (legacy(&[0x66, 0x0F, 0xFE]), gp),     // paddd
        (legacy(&[0x0F, 0x10]), Ok(())),       // movups
        (legacy(&[0x66, 0x0F, 0xD6]), Ok(())), // movq
        (legacy(&[0xF3, 0x0F, 0x58]), Ok(())), // addss
        (legacy(&[0xC5, 0xF8, 0x28]), gp),     // vmovaps
        (legacy(&[0xC5, 0xFD, 0xE7]), gp),     // vmovntdq, 32 bytes
        (legacy(&[0xC5, 0xF0, 0x58]), Ok(())), // vaddps
    ] {
        assert_eq!(outcome(&bytes, |_| ()), want, "{bytes:02x?}");
    }
    assert_eq!(outcome(FXSAVE, |c| c.r[3] += 8), gp);
    assert_eq!(outcome(XSAVE, |c| c.r[3] += 32), gp);
    assert_eq!(outcome(XRSTOR, |c| c.r[3] += 32), gp);
}

#[test]
fn an_operand_that_faults_changes_nothing() {
    let end = DATA + DATA_LEN as u64;
    let guest = Guest::new();
    let mut rng = Rng(0x7777_0000_1234_5671);
    let tail = [0xA5; 64];
    let loads: &[&[u8]] = &[
        &[0x0F, 0x10, 0x03],       // movups xmm0, [rbx]
        &[0xC5, 0xFC, 0x58, 0x03], // vaddps ymm0, ymm0, [rbx]
        &[0xDD, 0x03],             // fld qword [rbx]
        &[0xDD, 0x23],             // frstor [rbx]
    ];
    let stores: &[&[u8]] = &[
        &[0x0F, 0x11, 0x03],                   // movups [rbx], xmm0
        &[0xC5, 0xFC, 0x11, 0x03],             // vmovups [rbx], ymm0
        &[0xDD, 0x1B],                         // fstp qword [rbx]
        &[0xDD, 0x33],                         // fnsave [rbx]
        &[0xC4, 0xE3, 0x7D, 0x1D, 0x03, 0x00], // vcvtps2ph [rbx], ymm0
    ];
    for (list, write) in [(loads, false), (stores, true)] {
        for bytes in list {
            guest.vm.mem.write(end - 64, &tail).unwrap();
            let mut before = rng.state();
            before.r[3] = end - 4;
            guest.with(|c| {
                set(c, &before);
                let before = get(c);

                let r = exec(c, 64, bytes).expect("ours");

                let error = Some(if write { 2 } else { 0 });
                let pf = Exc { vector: vec::PF, error, payload: end };
                assert_eq!(r, Err(pf), "{bytes:02x?}");
                assert_eq!(get(c), before, "{bytes:02x?}");
            });
            let mut after = [0; 64];
            guest.vm.mem.read(end - 64, &mut after).unwrap();
            assert_eq!(after, tail, "{bytes:02x?}");
        }
    }
}

#[test]
fn masked_moves_fault_only_for_what_they_move() {
    let end = DATA + DATA_LEN as u64;
    let guest = Guest::new();
    // vpmaskmovd ymm0, ymm1, [rbx]; vpmaskmovd [rbx], ymm1, ymm0; maskmovdqu xmm0, xmm1
    let load: &[u8] = &[0xC4, 0xE2, 0x75, 0x8C, 0x03];
    let store: &[u8] = &[0xC4, 0xE2, 0x75, 0x8E, 0x03];
    let bytewise: &[u8] = &[0x66, 0x0F, 0xF7, 0xC1];
    guest.vm.mem.write(end - 8, &0x2222_2222_1111_1111u64.to_le_bytes()).unwrap();
    guest.with(|c| {
        c.r[3] = end - 8;
        c.r[7] = end - 8;
        c.ymm[0] = [!0; 4];
        c.ymm[1] = [0x8000_0000_0000_0000, 0, 0, 0];
        assert_eq!(exec(c, 64, load), Some(Ok(())));
        assert_eq!(c.ymm[0], [0x2222_2222_0000_0000, 0, 0, 0]);

        c.ymm[0] = [0x4444_4444_3333_3333, 0, 0, 0];
        assert_eq!(exec(c, 64, store), Some(Ok(())));
        assert_eq!(exec(c, 64, bytewise), Some(Ok(())));

        // The third element lies behind the end.
        let before = [0x5555_5555_5555_5555; 4];
        c.ymm[0] = before;
        c.ymm[1] = [0x8000_0000_8000_0000, 0x8000_0000, 0, 0];
        let pf = |error, payload| Some(Err(Exc { vector: vec::PF, error: Some(error), payload }));
        assert_eq!(exec(c, 64, load), pf(0, end));
        assert_eq!(c.ymm[0], before);
        assert_eq!(exec(c, 64, store), pf(2, end));
        assert_eq!(exec(c, 64, bytewise), pf(2, end + 3));
    });
    let mut after = [0; 8];
    guest.vm.mem.read(end - 8, &mut after).unwrap();
    assert_eq!(u64::from_le_bytes(after), 0x4444_4444_1111_1111);
}

#[test]
fn a_gather_keeps_what_it_had_before_a_fault() {
    let end = DATA + DATA_LEN as u64;
    let guest = Guest::new();
    // vpgatherdd xmm0, [rbx + xmm2 * 4], xmm1
    let bytes: &[u8] = &[0xC4, 0xE2, 0x71, 0x90, 0x04, 0x93];
    guest.vm.mem.write(end - 8, &0x2222_2222_1111_1111u64.to_le_bytes()).unwrap();
    guest.with(|c| {
        c.r[3] = end;
        c.ymm[0] = [0xAAAA_AAAA_AAAA_AAAA; 4];
        c.ymm[1] = [!0; 4];
        // Elements at -8, -4, 0 (absent), -8.
        c.ymm[2] = [0xFFFF_FFFF_FFFF_FFFE, 0xFFFF_FFFE_0000_0000, 0, 0];

        let r = exec(c, 64, bytes);

        let pf = Exc { vector: vec::PF, error: Some(0), payload: end };
        assert_eq!(r, Some(Err(pf)));
        assert_eq!(c.ymm[0][..2], [0x2222_2222_1111_1111, 0xAAAA_AAAA_AAAA_AAAA]);
        assert_eq!(c.ymm[1], [0, !0, !0, !0]);

        // The missing element is found elsewhere when it runs again.
        c.ymm[2][1] = 0xFFFF_FFFE_FFFF_FFFF;
        assert_eq!(exec(c, 64, bytes), Some(Ok(())));
        assert_eq!(c.ymm[0], [0x2222_2222_1111_1111, 0x1111_1111_2222_2222, 0, 0]);
        assert_eq!(c.ymm[1], [0; 4]);
    });
}

#[test]
fn mxcsr_takes_only_bits_that_exist() {
    let guest = Guest::new();
    guest.with(|c| {
        c.r[3] = DATA;
        for (v, want) in [(0xFFBF, Ok(())), (0x1_0000, raises(vec::GP))] {
            guest.vm.mem.write(DATA, &u32::to_le_bytes(v)).unwrap();
            assert_eq!(exec(c, 64, LDMXCSR), Some(want));
            assert_eq!(c.fpu.mxcsr, 0xFFBF);
        }
        assert_eq!(exec(c, 64, STMXCSR), Some(Ok(())));
    });
    let mut v = [0; 4];
    guest.vm.mem.read(DATA, &mut v).unwrap();
    assert_eq!(u32::from_le_bytes(v), 0xFFBF);
    // FXRSTOR and XRSTOR too.
    for bytes in [FXRSTOR, XRSTOR] {
        guest.vm.mem.write(DATA + 24, &0x1_0000u32.to_le_bytes()).unwrap();
        guest.with(|c| {
            c.r[0] = 7;
            c.r[2] = 0;
            assert_eq!(exec(c, 64, bytes), Some(raises(vec::GP)));
        });
    }
}

#[test]
fn xrstor_refuses_headers_it_does_not_know() {
    for (at, v) in [
        (512, 8),           // XSTATE_BV: a component that is not enabled
        (520, 1),           // XCOMP_BV without bit 63
        (528, 1),           // reserved
        (520, 1 << 63 | 8), // compacted, with a component that is not enabled
    ] {
        let guest = Guest::new();
        guest.vm.mem.write(DATA + at, &u64::to_le_bytes(v)).unwrap();
        guest.with(|c| {
            c.r[3] = DATA;
            c.r[0] = 7;
            assert_eq!(exec(c, 64, XRSTOR), Some(raises(vec::GP)), "{v:#x} at {at}");
        });
    }
    let guest = Guest::new();
    guest.vm.mem.write(DATA + 512, &[2]).unwrap();
    guest.vm.mem.write(DATA + 520, &(1u64 << 63 | 1).to_le_bytes()).unwrap();
    guest.with(|c| {
        c.r[3] = DATA;
        c.r[0] = 7;
        assert_eq!(exec(c, 64, XRSTOR), Some(raises(vec::GP)), "not in XCOMP_BV");
    });
}

#[test]
fn what_is_initial_is_left_out_and_comes_back() {
    let guest = Guest::new();
    let mut rng = Rng(0x2222_0000_1234_5671);
    // xsaveopt [rbx]; xsavec [rbx]
    for bytes in [&[0x0F, 0xAE, 0x33], &[0x0F, 0xC7, 0x23]] {
        guest.vm.mem.write(DATA, &[0xEE; 832]).unwrap();
        guest.vm.mem.write(DATA + 512, &[0; 64]).unwrap();
        guest.with(|c| {
            c.r[3] = DATA;
            c.r[0] = 7;
            c.fpu = Fpu::RESET;
            c.fpu.fcw = 0x37F;
            c.ymm = [[0; 4]; 16];
            assert_eq!(c.xinuse(), 0);
            c.ymm[9][1] = 5;
            assert_eq!(c.xinuse(), 2);
            assert_eq!(exec(c, 64, bytes), Some(Ok(())));
            set(c, &rng.state());
            c.r[3] = DATA;
            c.r[0] = 7;
            c.r[2] = 0;
            assert_eq!(c.xinuse(), 7);

            assert_eq!(exec(c, 64, XRSTOR), Some(Ok(())));

            assert_eq!(c.xinuse(), 2);
            assert_eq!(c.ymm[9], [0, 5, 0, 0]);
        });
        let mut b = [0; 832];
        guest.vm.mem.read(DATA, &mut b).unwrap();
        assert_eq!(b[512], 2);
        assert_eq!(b[..24], [0xEE; 24]);
        assert_eq!(b[576..], [0xEE; 256]);
    }
}

/// 32-bit protected mode; segments that need checks.
fn compatibility(c: &mut Cpu) {
    c.set_desc(Reg::Cs, SegDesc { base: 0, limit: u32::MAX, access: 0xC09B });
    c.mode_changed();
}

#[test]
fn outside_64_bit_mode_eight_registers_exist() {
    let guest = Guest::new();
    let s = Rng(0x3333_0000_1234_5671).state();
    guest.with(|c| {
        compatibility(c);
        set(c, &s);
        assert_eq!(exec(c, 32, VZEROUPPER), Some(Ok(())));
        assert!(c.ymm[..8].iter().all(|y| y[2..] == [0, 0]));
        assert_eq!(c.ymm[8..], s.ymm[8..]);

        c.r[3] = DATA;
        assert_eq!(exec(c, 32, FXSAVE), Some(Ok(())));
    });
    let mut b = [0; 512];
    guest.vm.mem.read(DATA, &mut b).unwrap();
    assert_eq!(b[160..168], s.ymm[0][0].to_le_bytes());
    assert_eq!(b[160 + 128..], [0; 512 - 160 - 128]);
}

#[test]
fn segments_limit_operands() {
    let guest = Guest::new();
    guest.with(|c| {
        compatibility(c);
        c.set_desc(Reg::Ds, SegDesc { base: 0, limit: DATA as u32 + 14, access: 0x4093 });
        c.mode_changed();
        c.r[3] = DATA;
        assert_eq!(exec(c, 32, &[0x0F, 0x10, 0x03]), Some(raises(vec::GP)));
        assert_eq!(exec(c, 32, &[0xF3, 0x0F, 0x10, 0x03]), Some(Ok(())));
        // vpmaskmovd xmm0, xmm1, [ebx]: only what is accessed counts.
        c.ymm[1] = [0, 0x8000_0000, 0, 0];
        assert_eq!(exec(c, 32, &[0xC4, 0xE2, 0x71, 0x8C, 0x03]), Some(Ok(())));
        c.ymm[1] = [0, 0x8000_0000_0000_0000, 0, 0];
        assert_eq!(exec(c, 32, &[0xC4, 0xE2, 0x71, 0x8C, 0x03]), Some(raises(vec::GP)));
    });
}

#[test]
fn environments_have_four_formats() {
    let guest = Guest::new();
    let image = |c: &mut Cpu, bytes: &[u8]| {
        guest.vm.mem.write(DATA, &[0x77; 28]).unwrap();
        assert_eq!(exec(c, 32, bytes), Some(Ok(())));
        let mut b = [0; 28];
        guest.vm.mem.read(DATA, &mut b).unwrap();
        b
    };
    guest.with(|c| {
        compatibility(c);
        let set = |c: &mut Cpu| {
            c.r[3] = DATA;
            c.fpu = Fpu { fcw: 0x27F, fop: 0x345, fip: 0x1_2345, fdp: 0x6_789A, ..Fpu::RESET };
            // 1.0 in physical register 7.
            c.fpu.set_fsw(0x3800);
            c.fpu.st[0] = [1 << 63, 0x3FFF];
            c.fpu.ftw = 0x80;
        };
        let dwords = |b: [u8; 28]| -> Vec<u32> {
            b.chunks(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect()
        };
        let words = |b: [u8; 28]| -> Vec<u16> {
            b.chunks(2).map(|w| u16::from_le_bytes(w.try_into().unwrap())).collect()
        };
        let (fnstenv, fldenv): (&[u8], &[u8]) = (&[0xD9, 0x33], &[0xD9, 0x23]);
        let (fnstenv16, fldenv16): (&[u8], &[u8]) = (&[0x66, 0xD9, 0x33], &[0x66, 0xD9, 0x23]);
        let tags = 0x3FFF;

        set(c);
        let b = dwords(image(c, fnstenv));
        let head = [0xFFFF_027F, 0xFFFF_3800, 0xFFFF_0000 | tags];
        assert_eq!(b[..3], head);
        assert_eq!(b[3..], [0x1_2345, 0x345 << 16, 0x6_789A, 0xFFFF_0000]);
        assert_eq!(c.fpu.fcw, 0x27F | 0x3F);
        let before = c.fpu;
        c.fpu = Fpu::RESET;
        c.fpu.set_fsw(0x3800);
        assert_eq!(exec(c, 32, fldenv), Some(Ok(())));
        assert_eq!((c.fpu.fsw, c.fpu.ftw, c.fpu.fop), (before.fsw, before.ftw, before.fop));
        assert_eq!((c.fpu.fip, c.fpu.fdp), (before.fip, before.fdp));

        set(c);
        let b = words(image(c, fnstenv16));
        assert_eq!(b[..7], [0x27F, 0x3800, tags as u16, 0x2345, 0, 0x789A, 0]);
        assert_eq!(exec(c, 32, fldenv16), Some(Ok(())));
        assert_eq!((c.fpu.fip, c.fpu.fdp, c.fpu.fop), (0x2345, 0x789A, 0x345));

        c.rflags |= fl::VM;
        set(c);
        let b = dwords(image(c, fnstenv));
        assert_eq!(b[..3], head);
        assert_eq!(b[3..], [0xFFFF_2345, 0x1345, 0xFFFF_789A, 0x6000]);
        c.fpu.fip = 0;
        assert_eq!(exec(c, 32, fldenv), Some(Ok(())));
        assert_eq!((c.fpu.fip, c.fpu.fdp, c.fpu.fop), (0x1_2345, 0x6_789A, 0x345));

        set(c);
        let b = words(image(c, fnstenv16));
        assert_eq!(b[..7], [0x27F, 0x3800, tags as u16, 0x2345, 0x1345, 0x789A, 0x6000]);
        c.fpu.fip = 0;
        assert_eq!(exec(c, 32, fldenv16), Some(Ok(())));
        assert_eq!((c.fpu.fip, c.fpu.fdp, c.fpu.fop), (0x1_2345, 0x6_789A, 0x345));
    });
}

#[test]
fn random_numbers_come_in_three_sizes() {
    let guest = Guest::new();
    guest.with(|c| {
        for (bytes, kept) in [
            (&[0x66, 0x0F, 0xC7, 0xF1][..], !0xFFFF),
            (&[0x0F, 0xC7, 0xF1], 0),
            (&[0x48, 0x0F, 0xC7, 0xF9], 0),
        ] {
            c.r[1] = !0;
            c.fl = 0xFFFF;
            assert_eq!(exec(c, 64, bytes), Some(Ok(())));
            assert_eq!(c.get_rflags() & fl::ARITH, fl::CF);
            assert_ne!(c.r[1], !0);
            assert_eq!(c.r[1] & kept, kept);
        }
        assert!(c.r[1] >> 32 != 0);
    });
}

#[test]
fn equal_instructions_share_a_stub_and_a_reset_forgets_all() {
    let guest = Guest::new();
    guest.with(|c| {
        c.r[3] = DATA;
        // movups xmm0, [rbx] and [rbx + 16]
        exec(c, 64, &[0x0F, 0x10, 0x03]).unwrap().unwrap();
        exec(c, 64, &[0x0F, 0x10, 0x43, 0x10]).unwrap().unwrap();
        assert_eq!(c.native.stubs.len(), 1);
        // pand xmm0, xmm1 and xmm2
        exec(c, 64, &[0x66, 0x0F, 0xDB, 0xC1]).unwrap().unwrap();
        exec(c, 64, &[0x66, 0x0F, 0xDB, 0xC2]).unwrap().unwrap();
        assert_eq!(c.native.stubs.len(), 3);

        c.native.reset();
        assert!(c.native.stubs.is_empty());
        assert!(!c.native.full());
        exec(c, 64, &[0x0F, 0x10, 0x03]).unwrap().unwrap();
    });
}

#[test]
fn a_full_buffer_is_told_in_time() {
    let mut native = Native::default();
    let mut blend = Instruction::default();
    let mut made = 0;
    // vpblendw xmm0, xmm1, xmm2, imm8 with all registers: more than the buffer takes.
    for i in 0u32.. {
        if native.full() {
            break;
        }
        blend.set_code(Code::VEX_Vpblendw_xmm_xmm_xmmm128_imm8);
        for n in 0..3 {
            blend.set_op_kind(n, OpKind::Register);
            blend.set_op_register(n, Register::XMM0 + (i >> (8 + 4 * n) & 15));
        }
        blend.set_op_kind(3, OpKind::Immediate8);
        blend.set_immediate8(i as u8);
        native.stub(&blend, Class(Class::AVX | Class::VEX));
        made += 1;
    }
    assert!(made > 10_000, "{made}");
    // A whole block still fits.
    assert!(native.code.as_ref().unwrap().room() >= (MAX_OPS - 1) * stub::MAX_LEN);
}

#[test]
fn a_vector_store_over_code_is_seen_by_the_next_instruction() {
    let guest = Guest::new();
    // movups [rip], xmm0; mov al, 1; mov [0x80000000], al
    let code = [0x0F, 0x11, 0x05, 0, 0, 0, 0, 0xB0, 1, 0xA2, 0, 0, 0, 0x80, 0, 0, 0, 0];
    guest.vm.mem.write(CODE_AT, &code).unwrap();
    // A device's page.
    guest.vm.mem.write(0x3000 + 16, &(0x8000_0000u64 | 0x87).to_le_bytes()).unwrap();
    let mut new = [0; 16];
    new.copy_from_slice(&[&[0xB0, 2], &code[9..], &[0; 5]].concat());
    guest.with(|c| {
        c.ymm[0][0] = u64::from_le_bytes(new[..8].try_into().unwrap());
        c.ymm[0][1] = u64::from_le_bytes(new[8..].try_into().unwrap());
        c.rip = CODE_AT;
    });
    guest.vm.activate_cpu(0).unwrap();

    let exit = guest.vcpu.run(&guest.vm).unwrap();

    assert_eq!(exit, crate::exit::Exit::Mmio { gpa: 0x8000_0000, size: 1, value: Some(2) });
}
