//! Stubs: one guest instruction each, as a host function.
//!
//! A stub loads the registers that the instruction reads from [`Cpu`], executes the instruction
//! itself, and stores the registers that it writes.  Vector registers keep their numbers, since
//! the host's calling convention lets a function use all of them; general-purpose registers that
//! are operands become R8 to R11, those that the instruction implies (EAX, ECX, EDX) stay.  The
//! memory operand becomes `[rsi]`.
//!
//! `rdi` is the [`Cpu`], `rsi` the operand's host address.  RAX carries the flags.

use super::Class;
use crate::soft::Cpu;
use crate::soft::decode::{reg_index, reg_offset};
use crate::soft::native::Native;
use crate::soft::state::Fpu;
use iced_x86::{
    Code, Encoder, Instruction, InstructionInfoFactory, MemoryOperand, OpAccess, OpKind, Register,
    RflagsBits,
};
use std::mem::offset_of;

/// A stub's entry point.
///
/// # Safety
/// `mem` points to as many bytes as the instruction's memory operand has; they are writable if
/// the instruction writes it.
pub type Stub = unsafe extern "sysv64" fn(cpu: *mut Cpu, mem: *mut u8);

// A register that lies across two cache lines costs several times as much.
const _: () = assert!(offset_of!(Cpu, ymm) % 32 == 0);

/// No stub is longer.
pub const MAX_LEN: usize = 256;

const CPU: Register = Register::RDI;
const MEM: Register = Register::RSI;
/// What becomes of operands: no instruction has more than three of them.
const FREE: [Register; 4] = [Register::R8, Register::R9, Register::R10, Register::R11];

const ARITH: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// Put `[rsi]` in the place of the memory operand and drop prefixes that go with it.
pub fn normalise(insn: &Instruction) -> Instruction {
    let mut i = *insn;
    i.set_segment_prefix(Register::None);
    i.set_has_rep_prefix(false);
    i.set_has_repne_prefix(false);
    if i.op_kinds().any(|k| k == OpKind::Memory) {
        i.set_memory_base(MEM);
        i.set_memory_index(Register::None);
        i.set_memory_index_scale(1);
        i.set_memory_displacement64(0);
        i.set_memory_displ_size(0);
    }
    i
}

/// The part of `full` that `like` is of its own register; AH to BH become the low byte.
fn resized(full: Register, like: Register) -> Register {
    let i = full as u32 - Register::RAX as u32;
    let first = match like.size() {
        8 => Register::RAX,
        4 => Register::EAX,
        2 => Register::AX,
        // SPL, BPL, SIL and DIL lie between R7's and R8's byte registers.
        _ => return Register::R8L + (i - 8),
    };
    first + i
}

/// A general-purpose register that the instruction touches.
struct Gpr {
    /// Offset of the guest's register in `Cpu::r`, bytes.
    offset: u8,
    host: Register,
    read: bool,
    written: bool,
}

struct Vector {
    number: u32,
    read: bool,
    written: bool,
}

struct Assembler(Encoder);

impl Assembler {
    fn emit(&mut self, i: &Instruction) {
        self.0.encode(i, 0).expect("a decoded instruction can be encoded");
    }

    fn load(&mut self, code: Code, r: Register, offset: usize) {
        self.emit(&Instruction::with2(code, r, field(offset)).expect("a load"));
    }

    fn store(&mut self, code: Code, offset: usize, r: Register) {
        self.emit(&Instruction::with2(code, field(offset), r).expect("a store"));
    }

    fn unary(&mut self, code: Code, offset: usize) {
        self.emit(&Instruction::with1(code, field(offset)).expect("an instruction on memory"));
    }

    fn load_flags(&mut self) {
        self.load(Code::Mov_r32_rm32, Register::EAX, offset_of!(Cpu, fl));
        // add al, 127 sets OF from bit 0 of AL; sahf.
        self.bytes(&[0x04, 0x7F, 0x9E]);
    }

    fn store_flags(&mut self) {
        // lahf; seto al; movzx eax, ax
        self.bytes(&[0x9F, 0x0F, 0x90, 0xC0, 0x0F, 0xB7, 0xC0]);
        self.store(Code::Mov_rm32_r32, offset_of!(Cpu, fl), Register::EAX);
    }

    fn finish(mut self) -> Vec<u8> {
        self.emit(&Instruction::with(Code::Retnq));
        let code = self.0.take_buffer();
        assert!(code.len() <= MAX_LEN, "a stub of {} bytes", code.len());
        code
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.0.write_u8(b);
        }
    }
}

fn field(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(CPU, offset as i64)
}

/// How an instruction uses an operand.
fn reads(a: OpAccess) -> bool {
    !matches!(a, OpAccess::None | OpAccess::Write | OpAccess::NoMemAccess)
}

fn writes(a: OpAccess) -> bool {
    matches!(
        a,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

/// Give the general-purpose operands of `i` registers that a stub may use.
fn rename(i: &mut Instruction) -> Vec<Gpr> {
    let mut gprs: Vec<Gpr> = Vec::new();
    for n in 0..i.op_count() {
        if i.op_kind(n) != OpKind::Register || !i.op_register(n).is_gpr() {
            continue;
        }
        let r = i.op_register(n);
        let offset = reg_offset(r);
        let host = match gprs.iter().find(|g| g.offset == offset) {
            Some(g) => g.host,
            None => {
                let host = FREE[gprs.len()];
                gprs.push(Gpr { offset, host, read: false, written: false });
                host
            }
        };
        i.set_op_register(n, resized(host, r));
    }
    gprs
}

/// Generate the stub for `insn`, which `normalise` made.
pub fn build(insn: &Instruction, class: Class, info: &mut InstructionInfoFactory) -> Vec<u8> {
    let vex = class.vex();
    let mut insn = *insn;
    let mut gprs = rename(&mut insn);
    let mut vectors: Vec<Vector> = Vec::new();
    let mut mmx: Vec<Vector> = Vec::new();
    for u in info.info(&insn).used_registers() {
        let r = u.register();
        let (read, written) = (reads(u.access()), writes(u.access()));
        if r.is_gpr() {
            let full = r.full_register();
            if full == MEM {
                continue;
            }
            let g = match gprs.iter_mut().find(|g| g.host == full) {
                Some(g) => g,
                None => {
                    gprs.push(Gpr { offset: reg_index(r) * 8, host: full, read, written });
                    gprs.last_mut().expect("just pushed")
                }
            };
            // The rest of the register survives the write of a part.
            g.read |= read || r.size() < 4 || u.access() == OpAccess::CondWrite;
            g.written |= written;
        } else if r.is_vector_register() {
            let v = entry(&mut vectors, r.number() as u32);
            v.read |= read;
            v.written |= written;
        } else if r.is_mm() {
            let v = entry(&mut mmx, r.number() as u32);
            v.read |= read;
            v.written |= written;
        }
    }

    let wide = (0..insn.op_count())
        .any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_ymm());

    let mut a = Assembler(Encoder::new(64));
    let native = offset_of!(Cpu, native);
    let mxcsr = offset_of!(Cpu, fpu) + offset_of!(Fpu, mxcsr);
    if class.x87() {
        a.unary(Code::Fxrstor64_m512byte, native + offset_of!(Native, image));
    }
    for g in gprs.iter().filter(|g| g.read) {
        let offset = offset_of!(Cpu, r) + usize::from(g.offset);
        if g.offset % 8 == 0 {
            a.load(Code::Mov_r64_rm64, g.host, offset);
        } else {
            a.load(Code::Movzx_r32_rm8, resized(g.host, Register::EAX), offset);
        }
    }
    for v in vectors.iter().filter(|v| v.read) {
        let offset = offset_of!(Cpu, ymm) + 32 * v.number as usize;
        let (xmm, ymm) = (Register::XMM0 + v.number, Register::YMM0 + v.number);
        match (vex, wide) {
            (false, _) => a.load(Code::Movups_xmm_xmmm128, xmm, offset),
            (true, false) => a.load(Code::VEX_Vmovups_xmm_xmmm128, xmm, offset),
            (true, true) => a.load(Code::VEX_Vmovups_ymm_ymmm256, ymm, offset),
        }
    }
    for v in mmx.iter().filter(|v| v.read) {
        a.load(Code::Movq_mm_mmm64, Register::MM0 + v.number, st(v.number));
    }
    let flags = insn.rflags_modified() & ARITH;
    let defined = flags & !insn.rflags_undefined();
    if insn.rflags_read() & ARITH != 0 || flags != 0 && defined != ARITH {
        a.load_flags();
    }
    if class.mxcsr() {
        a.unary(Code::Ldmxcsr_m32, mxcsr);
    }

    a.emit(&insn);

    for g in gprs.iter().filter(|g| g.written) {
        a.store(Code::Mov_rm64_r64, offset_of!(Cpu, r) + usize::from(g.offset), g.host);
    }
    if flags != 0 {
        a.store_flags();
    }
    if class.mxcsr() {
        a.unary(Code::Stmxcsr_m32, mxcsr);
        a.unary(Code::Ldmxcsr_m32, native + offset_of!(Native, host_mxcsr));
    }
    for v in vectors.iter().filter(|v| v.written) {
        let offset = offset_of!(Cpu, ymm) + 32 * v.number as usize;
        if vex {
            // The upper half too: what the instruction does not write there it clears.
            a.store(Code::VEX_Vmovups_ymmm256_ymm, offset, Register::YMM0 + v.number);
        } else {
            a.store(Code::Movups_xmmm128_xmm, offset, Register::XMM0 + v.number);
        }
    }
    for v in mmx.iter().filter(|v| v.written) {
        a.store(Code::Movq_mmm64_mm, st(v.number), Register::MM0 + v.number);
        let exponent = field(st(v.number) + 8);
        a.emit(&Instruction::with2(Code::Mov_rm16_imm16, exponent, 0xFFFF).expect("mov"));
    }
    if class.x87() {
        // Neither of these reports what may be pending.
        a.unary(Code::Fxsave64_m512byte, native + offset_of!(Native, image));
        a.emit(&Instruction::with(Code::Fninit));
    }
    if class.mmx() {
        a.emit(&Instruction::with(Code::Emms));
    }
    if wide {
        a.emit(&Instruction::with(Code::VEX_Vzeroupper));
    }
    a.finish()
}

/// An x87 instruction of which is known what it does to the stack.
pub struct X87Plan {
    /// Register to load besides ST(0); it becomes the host's ST(1).
    pub other: Option<u8>,
    /// ST(0) is an operand.
    pub top: bool,
    /// None: only moves between registers.
    pub insn: Option<Instruction>,
    /// What is then on the host's stack, from its top, and where it goes; None: nowhere.
    pub results: Vec<Option<u8>>,
}

/// Generate the stub for an x87 instruction that finds its operands in place and whose exceptions
/// are masked.  Loads and stores of 80 bits have no other effects, so only its operands need to be
/// on the host's stack.
pub fn build_x87(plan: &X87Plan) -> Vec<u8> {
    let mut a = Assembler(Encoder::new(64));
    let native = offset_of!(Cpu, native);
    a.unary(Code::Fldcw_m2byte, offset_of!(Cpu, fpu) + offset_of!(Fpu, fcw));
    for i in plan.other.into_iter().chain(plan.top.then_some(0)) {
        a.unary(Code::Fld_m80fp, st(i.into()));
    }
    let mut flags = false;
    if let Some(insn) = &plan.insn {
        let mut insn = normalise(insn);
        for n in 0..insn.op_count() {
            if insn.op_kind(n) == OpKind::Register && insn.op_register(n) != Register::ST0 {
                insn.set_op_register(n, Register::ST1);
            }
        }
        if insn.rflags_read() & ARITH != 0 {
            a.load_flags();
        }
        a.emit(&insn);
        flags = insn.rflags_modified() & ARITH != 0;
    }
    if flags {
        a.store_flags();
    }
    a.unary(Code::Fnstsw_m2byte, native + offset_of!(Native, x87_status));
    for r in &plan.results {
        match r {
            Some(i) => a.unary(Code::Fstp_m80fp, st((*i).into())),
            None => {
                let drop = Instruction::with1(Code::Fstp_sti, Register::ST0);
                a.emit(&drop.expect("fstp"));
            }
        }
    }
    a.unary(Code::Fldcw_m2byte, native + offset_of!(Native, host_fcw));
    a.finish()
}

/// Offset in [`Cpu`] of ST(`number`), which is the MMX register of this number while TOP is 0.
fn st(number: u32) -> usize {
    offset_of!(Cpu, fpu) + offset_of!(Fpu, st) + 16 * number as usize
}

fn entry(list: &mut Vec<Vector>, number: u32) -> &mut Vector {
    if let Some(i) = list.iter().position(|v| v.number == number) {
        return &mut list[i];
    }
    list.push(Vector { number, read: false, written: false });
    list.last_mut().expect("just pushed")
}
