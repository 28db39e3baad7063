//! From the instructions of a block to host code.

use super::asm::*;
use super::*;
use crate::soft::block::mode;
use crate::soft::decode::{is_slow, reg_index};
use crate::soft::interp::misc::hint;
use crate::soft::mmu;
use crate::soft::native::simd;
use iced_x86::{
    Code as Insn, ConditionCode, Decoder, Instruction, MemoryOperand, Mnemonic, OpAccess, OpKind,
    Register, RflagsBits, UsedRegister,
};
use std::sync::OnceLock;

const ARITH: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

const RSP_HOST: Reg = 14;

/// Where the guest's arithmetic flags are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flags {
    /// In the host's only.
    Host,
    /// In `Cpu::fl` only.
    Saved,
    Both,
    /// Nowhere, and nothing wants them but a fault: they can be had again from operands of the
    /// instruction with this number.
    Lost(usize),
}

/// What an instruction does with flags and registers.
struct Facts {
    insn: Instruction,
    /// Wants the flags in the host's.
    reads: bool,
    /// Leaves flags in the host's.
    writes: bool,
    /// May fault, or leave.
    faults: bool,
    kind: Kind,
    used: Vec<UsedRegister>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// By the op's handler.
    Handler,
    /// Nothing to do.
    Nothing,
    /// As it is, registers renamed.
    Plain,
    /// As it is, with vector registers loaded before and stored afterwards; the mask of its
    /// operand's alignment.
    Vector {
        vex: bool,
        mask: u8,
    },
    Push,
    Pop,
    Leave,
    Jcc,
    Jmp,
    Call,
    Ret,
    JmpIndirect,
    CallIndirect,
    /// The end of a block that was cut short.
    Fall,
}

/// Out of line: an access that missed.
struct Cold {
    miss: Label,
    back: Label,
    after: Label,
    help: *const Help,
    /// Where in the TLB entry is what was subtracted; None: S1 is as it was.
    tag: Option<i32>,
    /// Flags are to be had from this instruction first.
    recover: Option<usize>,
    /// Behind the instruction flags are in the host's.
    flags_after: bool,
}

/// Out of line: an exit that has no link yet.
#[derive(Clone, Copy)]
struct Exit {
    label: Label,
    way: Flow,
    /// Offset of the target from the page.
    target: i64,
}

struct Lowerer<'a> {
    a: Asm,
    thunks: Thunks,
    block: &'a Block,
    facts: Vec<Facts>,
    flags: Flags,
    cold: Vec<Cold>,
    exits: Vec<Exit>,
    #[expect(clippy::vec_box, reason = "translated code points to them")]
    helps: Vec<Box<Help>>,
    links: Box<[*const u8; 2]>,
    events: u64,
}

/// The instruction is its handler's: something about its operands is out of the ordinary.
struct No;

/// Translate a block of 64-bit code.  A block that cannot be translated stays as it is.
pub fn translate(cpu: &mut Cpu, t: &mut Translator, b: &Block) {
    let Some(facts) = decode(cpu, t, b) else { return };
    let mut l = Lowerer {
        a: Asm::new(t.code.next()),
        thunks: t.thunks,
        block: b,
        facts,
        flags: Flags::Saved,
        cold: Vec::new(),
        exits: Vec::new(),
        helps: Vec::new(),
        links: Box::new([ptr::null(); 2]),
        events: cpu.vcpu().events.word().as_ptr() as u64,
    };
    for n in 0..l.facts.len() {
        l.one(n);
    }
    l.out_of_line();
    if l.a.len() > MAX_BLOCK {
        return;
    }
    let mut unlinked = [ptr::null(); 2];
    for e in &l.exits {
        if e.way < INDIRECT {
            unlinked[e.way as usize] = l.a.address(e.label) as *const u8;
        }
    }
    *l.links = unlinked;
    let code = l.a.finish();
    let Some(entry) = t.code.push(&code) else { return };
    cpu.jit.translated += 1;
    b.set_code(Code {
        entry: entry.as_ptr(),
        links: l.links,
        unlinked,
        incoming: Vec::new(),
        _helps: l.helps,
    });
}

/// The block's instructions, read again; None where they are no longer what the ops were made of.
fn decode(cpu: &Cpu, t: &mut Translator, b: &Block) -> Option<Vec<Facts>> {
    let mut bytes = vec![0; b.len as usize];
    cpu.code_bytes(b.gpa, &mut bytes)?;
    let start = b.gpa & (PAGE - 1);
    let options = crate::soft::cpuid::decoder_options();
    let mut d = Decoder::with_ip(64, &bytes, start, options);
    let mut facts = Vec::with_capacity(b.ops.len());
    for op in b.ops.iter().take(b.count as usize) {
        if d.position() != usize::from(op.off) {
            return None;
        }
        let insn = d.decode();
        if insn.len() != usize::from(op.len) {
            return None;
        }
        let vector = b.mode() & mode::VECTOR != 0;
        let kind = match simd::examine(op, &insn) {
            _ if is_slow(op) => Kind::Handler,
            Some((class, mask)) if vector && named(&insn) => {
                Kind::Vector { vex: class.vex(), mask }
            }
            _ => kind(&insn),
        };
        facts.push(examine(t, insn, kind));
    }
    if b.ops.len() > b.count as usize {
        let mut insn = Instruction::new();
        insn.set_ip(start + b.len);
        facts.push(Facts {
            insn,
            reads: false,
            writes: false,
            faults: false,
            kind: Kind::Fall,
            used: Vec::new(),
        });
    }
    Some(facts)
}

fn kind(i: &Instruction) -> Kind {
    use Mnemonic::*;
    let near = matches!(i.op0_kind(), OpKind::NearBranch64);
    match i.mnemonic() {
        Jmp if near => return Kind::Jmp,
        Call if near => return Kind::Call,
        Jmp if i.is_jmp_near_indirect() && i.code() == Insn::Jmp_rm64 => return Kind::JmpIndirect,
        Call if i.is_call_near_indirect() && i.code() == Insn::Call_rm64 => {
            return Kind::CallIndirect;
        }
        Ret if matches!(i.code(), Insn::Retnq | Insn::Retnq_imm16) => return Kind::Ret,
        Jrcxz | Jecxz | Jcxz | Loop | Loope | Loopne => return Kind::Handler,
        _ if i.condition_code() != ConditionCode::None && near => return Kind::Jcc,
        Push => {
            return match i.code() {
                Insn::Push_r64 if i.op0_register() != Register::RSP => Kind::Push,
                Insn::Pushq_imm32 | Insn::Pushq_imm8 => Kind::Push,
                _ => Kind::Handler,
            };
        }
        Pop => {
            return match i.code() {
                Insn::Pop_r64 if i.op0_register() != Register::RSP => Kind::Pop,
                _ => Kind::Handler,
            };
        }
        Leave => return if i.code() == Insn::Leaveq { Kind::Leave } else { Kind::Handler },
        m if hint(m) => return Kind::Nothing,
        _ => {}
    }
    if plain(i) { Kind::Plain } else { Kind::Handler }
}

/// Can it run as it is, once registers are renamed and its operand is found?
fn plain(i: &Instruction) -> bool {
    use Mnemonic::*;
    let known = matches!(
        i.mnemonic(),
        Mov | Movzx
            | Movsx
            | Movsxd
            | Lea
            | Add
            | Or
            | Adc
            | Sbb
            | And
            | Sub
            | Xor
            | Cmp
            | Test
            | Not
            | Neg
            | Inc
            | Dec
            | Shl
            | Shr
            | Sar
            | Rol
            | Ror
            | Shld
            | Shrd
            | Imul
            | Mul
            | Bt
            | Bts
            | Btr
            | Btc
            | Bsf
            | Bsr
            | Tzcnt
            | Lzcnt
            | Popcnt
            | Bswap
            | Xchg
            | Xadd
            | Cmpxchg
            | Cbw
            | Cwde
            | Cdqe
            | Cwd
            | Cdq
            | Cqo
            | Andn
            | Bextr
            | Blsi
            | Blsr
            | Blsmsk
            | Bzhi
            | Rorx
            | Sarx
            | Shlx
            | Shrx
            | Pdep
            | Pext
            | Movbe
            | Clc
            | Stc
            | Cmc
            | Lahf
            | Sahf
            | Crc32
            | Adcx
            | Adox
            | Lfence
            | Mfence
            | Sfence
    ) || i.condition_code() != ConditionCode::None; // CMOVcc, SETcc
    if !known || i.is_string_instruction() || !named(i) {
        return false;
    }
    let memory = i.op_kinds().any(|k| k == OpKind::Memory);
    if memory {
        // Forms whose address is not in ModRM.
        if matches!(
            i.code(),
            Insn::Mov_AL_moffs8
                | Insn::Mov_AX_moffs16
                | Insn::Mov_EAX_moffs32
                | Insn::Mov_RAX_moffs64
                | Insn::Mov_moffs8_AL
                | Insn::Mov_moffs16_AX
                | Insn::Mov_moffs32_EAX
                | Insn::Mov_moffs64_RAX
        ) {
            return false;
        }
        // The index of a bit may reach beyond the operand.
        if matches!(i.mnemonic(), Bt | Bts | Btr | Btc) && i.op1_kind() == OpKind::Register {
            return false;
        }
    }
    true
}

/// Can its registers be named by others, and its address be computed?
fn named(i: &Instruction) -> bool {
    use Mnemonic::Lea;
    let mut outside = Vec::new();
    let mut high = false;
    let mut wide = false;
    let mut memory = false;
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register => {
                let r = i.op_register(n);
                if r.is_xmm() || r.is_ymm() {
                    continue;
                }
                if !r.is_gpr() {
                    return false;
                }
                high |= matches!(r, Register::AH | Register::BH | Register::CH | Register::DH);
                wide |= r.size() == 8 || reg_index(r) >= 4;
                if host(reg_index(r)).is_none() && !outside.contains(&reg_index(r)) {
                    outside.push(reg_index(r));
                }
            }
            OpKind::Memory => memory = true,
            OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => {}
            _ => return false,
        }
    }
    let touches = memory && i.mnemonic() != Lea;
    // A high-byte register cannot be named together with R8 to R15.
    if high && (touches || wide) {
        return false;
    }
    if outside.len() > if touches { 1 } else { 2 } {
        return false;
    }
    !memory || i.memory_base() != Register::EIP && !i.is_vsib()
}

fn examine(t: &mut Translator, insn: Instruction, kind: Kind) -> Facts {
    let used = t.info.info(&insn).used_registers().to_vec();
    let memory = insn.op_kinds().any(|k| k == OpKind::Memory) && insn.mnemonic() != Mnemonic::Lea;
    let (mut reads, mut writes) = (false, false);
    match kind {
        Kind::Plain | Kind::Vector { .. } => {
            let modified = insn.rflags_modified() & ARITH;
            writes = modified != 0;
            let whole = modified == ARITH && (modified & !insn.rflags_undefined() == ARITH)
                || defines_all(&insn);
            reads = insn.rflags_read() & ARITH != 0 || writes && !whole;
        }
        Kind::Jcc => reads = true,
        _ => {}
    }
    let faults = match kind {
        Kind::Plain | Kind::Vector { .. } => memory,
        Kind::Nothing | Kind::Jcc | Kind::Jmp | Kind::Fall => false,
        _ => true,
    };
    Facts { insn, reads, writes, faults, kind, used }
}

/// Does the flags' value behind it not depend on that before, although some are undefined?
fn defines_all(i: &Instruction) -> bool {
    use Mnemonic::*;
    match i.mnemonic() {
        And | Or | Xor | Test | Andn => true,
        Shl | Shr | Sar if i.op1_kind() == OpKind::Immediate8 => {
            let bits = if i.op0_kind() == OpKind::Register {
                i.op0_register().size() * 8
            } else {
                i.memory_size().size() * 8
            };
            let n = i.immediate8() & if bits == 64 { 63 } else { 31 };
            // OF is undefined for counts above 1, and bits beyond a short operand.
            n != 0 && usize::from(n) < bits && probe().shifts
        }
        Imul if i.op_count() > 1 => probe().multiplies,
        _ => false,
    }
}

/// What this host's undefined flags depend on.
struct Probe {
    shifts: bool,
    multiplies: bool,
}

fn probe() -> &'static Probe {
    static PROBE: OnceLock<Probe> = OnceLock::new();
    PROBE.get_or_init(|| {
        let mut probe = Probe { shifts: true, multiplies: true };
        for v in [0u64, 1, 0x8000_0000_0000_0000, 0x7FFF_1234_5678_9ABC, u64::MAX] {
            let run = |flags: u64| {
                let (a, b, c, d): (u64, u64, u64, u64);
                // SAFETY: registers and flags only.
                unsafe {
                    asm!(
                        "mov {x}, {v}", "push {f}", "popfq", "shl {x}, 5", "pushfq", "pop {a}",
                        "mov {x}, {v}", "push {f}", "popfq", "shr {x}, 1", "pushfq", "pop {b}",
                        "mov {x}, {v}", "push {f}", "popfq", "sar {x}, 63", "pushfq", "pop {c}",
                        "mov {x}, {v}", "push {f}", "popfq", "imul {x}, {x}", "pushfq", "pop {d}",
                        v = in(reg) v, f = in(reg) flags, x = out(reg) _,
                        a = out(reg) a, b = out(reg) b, c = out(reg) c, d = out(reg) d,
                    );
                }
                ([a, b, c], d)
            };
            let (low, high) = (run(0x202), run(0x202 | u64::from(0x8D5u16)));
            probe.shifts &= low.0 == high.0;
            probe.multiplies &= low.1 == high.1;
        }
        probe
    })
}

/// `r` as part of the 64-bit host register `full`, of the size of `like`.
fn sized(full: Reg, like: Register) -> Register {
    let n = u32::from(full);
    match like.size() {
        8 => Register::RAX + n,
        4 => Register::EAX + n,
        2 => Register::AX + n,
        _ if n < 4 => Register::AL + n,
        _ if n < 8 => Register::SPL + (n - 4),
        _ => Register::R8L + (n - 8),
    }
}

fn high_byte(r: Register) -> bool {
    matches!(r, Register::AH | Register::BH | Register::CH | Register::DH)
}

impl Lowerer<'_> {
    fn one(&mut self, n: usize) {
        match self.facts[n].kind {
            Kind::Nothing => {}
            Kind::Handler => self.handler(n),
            Kind::Plain | Kind::Vector { .. } => {
                if self.plain(n).is_err() {
                    self.handler(n);
                }
            }
            Kind::Push => self.push(n),
            Kind::Pop => self.pop(n),
            Kind::Leave => self.leave(n),
            Kind::Jcc => self.jcc(n),
            Kind::Jmp => {
                self.save_flags();
                let target = self.facts[n].insn.near_branch64();
                self.go(n, TAKEN, target);
            }
            Kind::Call => self.call(n),
            Kind::Ret => self.ret(n),
            Kind::JmpIndirect | Kind::CallIndirect => {
                if self.indirect(n).is_err() {
                    self.handler(n);
                }
            }
            Kind::Fall => {
                self.save_flags();
                let target = self.facts[n].insn.ip();
                self.go(n, FALL, target);
            }
        }
    }

    // -- flags ---------------------------------------------------------------------------------

    /// Put the flags into `Cpu::fl`, and leave them in the host's.
    fn save_flags(&mut self) {
        match self.flags {
            Flags::Host => {
                self.spill_flags();
                self.flags = Flags::Both;
            }
            Flags::Lost(p) => {
                self.again(p);
                self.spill_flags();
                self.flags = Flags::Both;
            }
            Flags::Saved | Flags::Both => {}
        }
    }

    fn spill_flags(&mut self) {
        self.a.mov(S2, RAX);
        // lahf; seto al
        self.a.bytes(&[0x9F, 0x0F, 0x90, 0xC0]);
        self.a.store_ax(offset_of!(Cpu, fl));
        self.a.mov(RAX, S2);
    }

    fn fill_flags(&mut self) {
        self.a.mov(S2, RAX);
        self.a.load_ax(offset_of!(Cpu, fl));
        // add al, 127; sahf
        self.a.bytes(&[0x04, 0x7F, 0x9E]);
        self.a.mov(RAX, S2);
    }

    /// Have the flags in the host's.  S2 is free.
    fn want_flags(&mut self) {
        match self.flags {
            Flags::Saved => {
                self.fill_flags();
                self.flags = Flags::Both;
            }
            Flags::Lost(p) => {
                self.again(p);
                self.flags = Flags::Host;
            }
            Flags::Host | Flags::Both => {}
        }
    }

    /// The host's flags are about to be overwritten by a lookup for instruction `n`.
    fn lose_flags(&mut self, n: usize) {
        match self.flags {
            Flags::Host => {
                self.flags = match self.producer(n) {
                    Some(p) => Flags::Lost(p),
                    None => {
                        self.spill_flags();
                        Flags::Saved
                    }
                };
            }
            Flags::Both => self.flags = Flags::Saved,
            Flags::Saved | Flags::Lost(_) => {}
        }
    }

    /// The instruction that made the present flags, if nothing before their end needs them but a
    /// fault, and they can be had again until then.
    fn producer(&self, n: usize) -> Option<usize> {
        let p = (0..n).rev().find(|&p| self.facts[p].writes)?;
        let operands = repeatable(&self.facts[p].insn)?;
        let mut changed = self.facts[p + 1..n].iter().any(|f| changes(f, &operands));
        for f in &self.facts[n..] {
            if f.kind == Kind::Handler || f.reads {
                return None;
            }
            if f.faults && changed {
                return None;
            }
            if f.writes {
                return Some(p);
            }
            changed |= changes(f, &operands);
        }
        None
    }

    /// Make the flags of instruction `p` once more.  S2 is free.
    fn again(&mut self, p: usize) {
        let insn = self.facts[p].insn;
        self.a.insn(&repeat(&insn)).expect("an instruction on registers");
    }

    // -- memory --------------------------------------------------------------------------------

    /// S1: the linear address of the memory operand.  S2 is used.
    fn linear(&mut self, i: &Instruction) -> Result<(), No> {
        self.effective(i, S1)?;
        let seg = i.memory_segment();
        if matches!(seg, Register::FS | Register::GS) {
            let s = if seg == Register::FS { FS } else { GS };
            self.a.add_gs(S1, offset_of!(Cpu, seg_base) + 8 * usize::from(s));
        }
        Ok(())
    }

    /// `to`: the effective address.  S2 is used.  Flags stay.
    fn effective(&mut self, i: &Instruction, to: Reg) -> Result<(), No> {
        let (base, index) = (i.memory_base(), i.memory_index());
        let displacement = i.memory_displacement64();
        if base == Register::RIP {
            // The decoder was told that the page is at 0.
            let d = i32::try_from(displacement as i64).map_err(|_| No)?;
            self.a.load(to, jit(offset_of!(Jit, page)));
            self.a.lea(to, to, d);
            return Ok(());
        }
        let wide = match (base, index) {
            (Register::None, Register::None) => {
                if i.memory_displ_size() == 4 && displacement >> 31 == 1 {
                    // An address of 32 bits, not sign-extended.
                    self.a.mov_imm(to, displacement);
                    return Ok(());
                }
                self.a.mov_imm(to, displacement);
                return Ok(());
            }
            (Register::None, r) | (r, _) => r.size() == 8,
        };
        let d = if wide { displacement as i64 } else { i64::from(displacement as u32 as i32) };
        let d = i32::try_from(d).map_err(|_| No)?;
        let base = match base {
            Register::None => None,
            r => Some(self.operand(reg_index(r), to)),
        };
        if index == Register::None {
            let b = base.expect("one of them is there");
            if wide {
                self.a.lea(to, b, d);
            } else {
                self.a.lea_index(false, to, Some(b), RSP, 0, d);
            }
            return Ok(());
        }
        let x = self.operand(reg_index(index), S2);
        let scale = i.memory_index_scale().trailing_zeros() as u8;
        self.a.lea_index(wide, to, base, x, scale, d);
        Ok(())
    }

    /// The host register that has guest register `g`; loaded into `free` if it is not in one.
    fn operand(&mut self, g: u8, free: Reg) -> Reg {
        match host(g) {
            Some(h) => h,
            None => {
                self.a.load(free, gpr(g.into()));
                free
            }
        }
    }

    /// S1: a linear address becomes a host address.  S2 and flags are used.  Returns what has to
    /// be completed when the instruction's end is known.
    fn lookup(&mut self, n: usize, size: u64, write: bool) -> usize {
        let recover = match self.flags {
            Flags::Lost(p) => Some(p),
            _ => None,
        };
        let tag = if write { mmu::WTAG } else { mmu::RTAG } as i32;
        let help = self.help(n, size, write);
        let (miss, back, after) = (self.a.label(), self.a.label(), self.a.label());
        let a = &mut self.a;
        a.mov(S2, S1);
        a.shift(5, S2, 12 - mmu::ENTRY_SHIFT);
        a.alu_imm(false, 4, S2, ((mmu::TLB_ENTRIES - 1) << mmu::ENTRY_SHIFT) as i32);
        a.add_gs(S2, offset_of!(Cpu, bank_at));
        a.mem(true, 0x2B, S1, S2, tag);
        a.alu_imm(true, 7, S1, (PAGE - size) as i32);
        a.jcc(A, miss);
        a.mem(true, 0x03, S1, S2, mmu::HOST as i32);
        a.bind(back);
        let tag = Some(tag);
        self.cold.push(Cold { miss, back, after, help, tag, recover, flags_after: false });
        self.cold.len() - 1
    }

    /// The instruction of a lookup ends here.
    fn finish(&mut self, cold: usize) {
        let after = self.cold[cold].after;
        self.a.bind(after);
        self.cold[cold].flags_after = matches!(self.flags, Flags::Host | Flags::Both);
    }

    fn help(&mut self, n: usize, size: u64, write: bool) -> *const Help {
        let op = &self.block.ops[n];
        let help = Box::new(Help {
            ops: [op.copy(), Op::new(done, 0, 0, 0)],
            block: self.block,
            start: self.block.gpa & (PAGE - 1),
            size,
            write,
        });
        let p: *const Help = &*help;
        self.helps.push(help);
        p
    }

    // -- instructions --------------------------------------------------------------------------

    /// Have the op's own handler do it.
    fn handler(&mut self, n: usize) {
        self.save_flags();
        let help = self.help(n, 0, false);
        self.a.mov_imm(S2, help as u64);
        self.a.call_to(self.thunks.help);
        self.a.alu_imm(true, 7, S1, COMPLETED as i32);
        self.a.jcc_to(NE, self.thunks.leave_helped);
        self.flags = Flags::Saved;
    }

    fn plain(&mut self, n: usize) -> Result<(), No> {
        let f = &self.facts[n];
        let (insn, reads, writes) = (f.insn, f.reads, f.writes);
        if insn.mnemonic() == Mnemonic::Lea {
            return self.lea(&insn);
        }
        let memory = insn.op_kinds().any(|k| k == OpKind::Memory);
        let mut i = insn;
        let mut cold = None;
        if memory {
            let size = insn.memory_size().size() as u64;
            if size == 0 || size > 32 {
                return Err(No);
            }
            // An address that cannot be computed is found out before anything is emitted.
            reachable(&insn)?;
            // CMPXCHG and bit tests with LOCK write whatever comes of them.
            let write = self.facts[n].insn.has_lock_prefix() || self.writes_memory(n);
            if reads {
                self.save_flags();
            }
            self.lose_flags(n);
            self.linear(&insn)?;
            if let Kind::Vector { mask, .. } = self.facts[n].kind
                && mask != 0
            {
                self.aligned(n, mask);
            }
            cold = Some(self.lookup(n, size, write));
            i.set_memory_base(Register::RAX + u32::from(S1));
            i.set_memory_index(Register::None);
            i.set_memory_index_scale(1);
            i.set_memory_displacement64(0);
            i.set_memory_displ_size(0);
            i.set_segment_prefix(Register::None);
        }
        if reads {
            self.want_flags();
        }
        let stores = self.rename(n, &mut i, if memory { &[S2] } else { &[S1, S2] });
        self.load_vectors(n);
        self.a.insn(&i).expect("a decoded instruction can be encoded");
        self.store_vectors(n);
        for (g, h) in stores {
            self.a.store(gpr(g.into()), h);
        }
        if writes {
            self.flags = Flags::Host;
        }
        if let Some(c) = cold {
            self.finish(c);
        }
        Ok(())
    }

    /// A misaligned address in S1 is the handler's to complain about.
    fn aligned(&mut self, n: usize, mask: u8) {
        let recover = match self.flags {
            Flags::Lost(p) => Some(p),
            _ => None,
        };
        let help = self.help(n, 0, false);
        let (miss, after) = (self.a.label(), self.a.label());
        self.a.test_low(S1, mask);
        self.a.jcc(NE, miss);
        self.a.bind(after);
        let cold = Cold { miss, back: after, after, help, tag: None, recover, flags_after: false };
        self.cold.push(cold);
    }

    /// Vector registers that instruction `n` reads, and that it writes, by number.
    fn vectors(&self, n: usize) -> (u32, u32) {
        let (mut read, mut written) = (0, 0);
        for u in &self.facts[n].used {
            if !u.register().is_vector_register() {
                continue;
            }
            let bit = 1 << u.register().number();
            if !matches!(u.access(), OpAccess::Write | OpAccess::None | OpAccess::NoMemAccess) {
                read |= bit;
            }
            if !matches!(u.access(), OpAccess::Read | OpAccess::CondRead) {
                written |= bit;
            }
        }
        (read, written)
    }

    fn wide(&self, n: usize) -> bool {
        let i = &self.facts[n].insn;
        (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Register && i.op_register(k).is_ymm())
    }

    fn load_vectors(&mut self, n: usize) {
        let Kind::Vector { vex, .. } = self.facts[n].kind else { return };
        let read = self.vectors(n).0;
        let wide = self.wide(n);
        for v in (0..16).filter(|v| read >> v & 1 != 0) {
            let (code, r) = match (vex, wide) {
                (false, _) => (Insn::Movups_xmm_xmmm128, Register::XMM0 + v),
                (true, false) => (Insn::VEX_Vmovups_xmm_xmmm128, Register::XMM0 + v),
                (true, true) => (Insn::VEX_Vmovups_ymm_ymmm256, Register::YMM0 + v),
            };
            let i = Instruction::with2(code, r, vector(v)).expect("a load");
            self.a.insn(&i).expect("a load");
        }
    }

    fn store_vectors(&mut self, n: usize) {
        let Kind::Vector { vex, .. } = self.facts[n].kind else { return };
        let written = self.vectors(n).1;
        for v in (0..16).filter(|v| written >> v & 1 != 0) {
            // What an instruction with VEX does not write of the upper half it clears.
            let (code, r) = if vex {
                (Insn::VEX_Vmovups_ymmm256_ymm, Register::YMM0 + v)
            } else {
                (Insn::Movups_xmmm128_xmm, Register::XMM0 + v)
            };
            let i = Instruction::with2(code, vector(v), r).expect("a store");
            self.a.insn(&i).expect("a store");
        }
        if self.wide(n) {
            let i = Instruction::with(Insn::VEX_Vzeroupper);
            self.a.insn(&i).expect("vzeroupper");
        }
    }

    fn writes_memory(&self, n: usize) -> bool {
        use Mnemonic::*;
        let i = &self.facts[n].insn;
        match i.mnemonic() {
            Cmp | Test | Bt | Push => false,
            Xchg | Xadd | Cmpxchg => true,
            _ => i.op0_kind() == OpKind::Memory,
        }
    }

    /// Put host registers in the place of the guest's.  Returns those to be stored afterwards.
    fn rename(&mut self, n: usize, i: &mut Instruction, free: &[Reg]) -> Vec<(u8, Reg)> {
        let mut given: Vec<(u8, Reg)> = Vec::new();
        let mut stores = Vec::new();
        for k in 0..i.op_count() {
            if i.op_kind(k) != OpKind::Register {
                continue;
            }
            let r = i.op_register(k);
            if high_byte(r) || !r.is_gpr() {
                continue;
            }
            let g = reg_index(r);
            let h = match host(g) {
                Some(h) => h,
                None => match given.iter().find(|x| x.0 == g) {
                    Some(x) => x.1,
                    None => {
                        let h = free[given.len()];
                        given.push((g, h));
                        let access = self.access(n, g);
                        if access.0 {
                            self.a.load(h, gpr(g.into()));
                        }
                        if access.1 {
                            stores.push((g, h));
                        }
                        h
                    }
                },
            };
            i.set_op_register(k, sized(h, r));
        }
        stores
    }

    /// Is guest register `g` to be loaded before, and stored after instruction `n`?
    fn access(&self, n: usize, g: u8) -> (bool, bool) {
        let (mut read, mut written) = (false, false);
        for u in &self.facts[n].used {
            let r = u.register();
            if !r.is_gpr() || reg_index(r) != g {
                continue;
            }
            let w = matches!(
                u.access(),
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            );
            read |= u.access() != OpAccess::Write || r.size() < 4;
            written |= w;
        }
        (read, written)
    }

    fn lea(&mut self, i: &Instruction) -> Result<(), No> {
        let r = i.op0_register();
        if r.size() < 4 {
            return Err(No);
        }
        reachable(i)?;
        let g = reg_index(r);
        let to = host(g).unwrap_or(S1);
        // The destination may be the index as well.
        self.effective(i, S1)?;
        if r.size() == 8 {
            if to != S1 {
                self.a.mov(to, S1);
            }
        } else {
            self.a.mov32(to, S1);
        }
        if host(g).is_none() {
            self.a.store(gpr(g.into()), to);
        }
        Ok(())
    }

    fn push(&mut self, n: usize) {
        let i = self.facts[n].insn;
        self.lose_flags(n);
        self.a.lea(S1, RSP_HOST, -8);
        let cold = self.lookup(n, 8, true);
        if i.op0_kind() == OpKind::Register {
            let r = self.operand(reg_index(i.op0_register()), S2);
            self.a.mem(true, 0x89, r, S1, 0);
        } else {
            let v = i.immediate(0) as i32;
            self.a.mem(true, 0xC7, 0, S1, 0);
            self.a.bytes(&v.to_le_bytes());
        }
        self.a.lea(RSP_HOST, RSP_HOST, -8);
        self.finish(cold);
    }

    fn pop(&mut self, n: usize) {
        let g = reg_index(self.facts[n].insn.op0_register());
        self.lose_flags(n);
        self.a.mov(S1, RSP_HOST);
        let cold = self.lookup(n, 8, false);
        let to = host(g).unwrap_or(S2);
        self.a.mem(true, 0x8B, to, S1, 0);
        if host(g).is_none() {
            self.a.store(gpr(g.into()), to);
        }
        self.a.lea(RSP_HOST, RSP_HOST, 8);
        self.finish(cold);
    }

    fn leave(&mut self, n: usize) {
        const RBP: Reg = 5;
        self.lose_flags(n);
        self.a.mov(S1, RBP);
        let cold = self.lookup(n, 8, false);
        self.a.lea(RSP_HOST, RBP, 8);
        self.a.mem(true, 0x8B, RBP, S1, 0);
        self.finish(cold);
    }

    // -- branches ------------------------------------------------------------------------------

    fn jcc(&mut self, n: usize) {
        let i = self.facts[n].insn;
        self.want_flags();
        self.save_flags();
        let taken = self.a.label();
        // iced counts from 1.
        self.a.jcc(i.condition_code() as u8 - 1, taken);
        self.go(n, FALL, i.next_ip());
        self.a.bind(taken);
        self.go(n, TAKEN, i.near_branch64());
    }

    /// Leave the block for `target`, an offset in the page.  Flags are saved.
    fn go(&mut self, n: usize, way: Flow, target: u64) {
        let target = target as i64;
        if !(0..PAGE as i64).contains(&target) {
            match i32::try_from(target) {
                Ok(t) => {
                    self.a.load(S1, jit(offset_of!(Jit, page)));
                    self.a.lea(S1, S1, t);
                    self.a.jmp_to(self.thunks.jump);
                }
                Err(_) => self.leave_for(INDIRECT, target),
            }
            return;
        }
        let label = self.a.label();
        if target <= self.facts[n].insn.ip() as i64 {
            // Each loop has such a branch: it is where other threads are heard.
            self.a.mov_imm(S1, self.events);
            self.a.mem(false, 0x83, 7, S1, 0);
            self.a.byte(0);
            self.a.jcc(NE, label);
        }
        let link = &raw const self.links[way as usize];
        self.a.mov_imm(S1, link as u64);
        self.a.jmp_mem(S1, 0);
        self.exits.push(Exit { label, way, target });
    }

    /// Leave translated code; `run` finds the block to go on with.
    fn leave_for(&mut self, way: Flow, target: i64) {
        self.a.mov_imm(S2, target as u64);
        self.a.load(S1, jit(offset_of!(Jit, page)));
        self.a.alu(true, 0x03, S1, S2);
        self.a.store(offset_of!(Cpu, rip), S1);
        self.a.mov_imm(S1, ptr::from_ref(self.block) as u64);
        self.a.store(jit(offset_of!(Jit, last)), S1);
        self.a.mov_imm(S2, way.into());
        self.a.jmp_to(self.thunks.leave);
    }

    /// Push the address behind instruction `n`.
    fn push_return(&mut self, n: usize) {
        let next = self.facts[n].insn.next_ip() as i32;
        self.save_flags();
        self.flags = Flags::Saved;
        self.a.lea(S1, RSP_HOST, -8);
        let cold = self.lookup(n, 8, true);
        // With help the whole call has been done: there is no way back behind it.
        self.a.load(S2, jit(offset_of!(Jit, page)));
        self.a.lea(S2, S2, next);
        self.a.mem(true, 0x89, S2, S1, 0);
        self.a.lea(RSP_HOST, RSP_HOST, -8);
        self.finish(cold);
    }

    fn call(&mut self, n: usize) {
        self.push_return(n);
        let target = self.facts[n].insn.near_branch64();
        self.go(n, TAKEN, target);
    }

    fn ret(&mut self, n: usize) {
        let i = self.facts[n].insn;
        let extra = if i.op_count() == 1 { i32::from(i.immediate16()) } else { 0 };
        self.save_flags();
        self.flags = Flags::Saved;
        self.a.mov(S1, RSP_HOST);
        let cold = self.lookup(n, 8, false);
        self.a.mem(true, 0x8B, S1, S1, 0);
        self.canonical(n);
        self.a.lea(RSP_HOST, RSP_HOST, 8 + extra);
        self.finish(cold);
        self.a.jmp_to(self.thunks.jump);
    }

    /// Only a canonical address can be gone to: what else is in S1 the handler deals with.
    fn canonical(&mut self, n: usize) {
        let good = self.a.label();
        self.a.mov(S2, S1);
        self.a.shift(4, S2, 16);
        self.a.shift(7, S2, 16);
        self.a.alu(true, 0x3B, S2, S1);
        self.a.jcc(E, good);
        let help = self.help(n, 0, false);
        self.a.mov_imm(S2, help as u64);
        self.a.call_to(self.thunks.help);
        self.a.jmp_to(self.thunks.leave_helped);
        self.a.bind(good);
    }

    fn indirect(&mut self, n: usize) -> Result<(), No> {
        let f = &self.facts[n];
        let (i, kind) = (f.insn, f.kind);
        let memory = i.op0_kind() == OpKind::Memory;
        if memory {
            reachable(&i)?;
        }
        self.save_flags();
        self.flags = Flags::Saved;
        let mut cold = None;
        if memory {
            self.linear(&i)?;
            cold = Some(self.lookup(n, 8, false));
            self.a.mem(true, 0x8B, S1, S1, 0);
        } else {
            let r = self.operand(reg_index(i.op0_register()), S1);
            if r != S1 {
                self.a.mov(S1, r);
            }
        }
        self.canonical(n);
        if kind == Kind::CallIndirect {
            self.a.store(jit(offset_of!(Jit, callee)), S1);
            self.push_return(n);
            self.a.load(S1, jit(offset_of!(Jit, callee)));
        }
        if let Some(c) = cold {
            self.finish(c);
        }
        self.a.jmp_to(self.thunks.jump);
        Ok(())
    }

    // -- out of line ---------------------------------------------------------------------------

    fn out_of_line(&mut self) {
        for c in mem::take(&mut self.cold) {
            self.a.bind(c.miss);
            if let Some(tag) = c.tag {
                self.a.mem(true, 0x03, S1, S2, tag);
            }
            if let Some(p) = c.recover {
                self.again(p);
                self.spill_flags();
            }
            self.a.mov_imm(S2, c.help as u64);
            self.a.call_to(self.thunks.help);
            self.a.alu_imm(true, 7, S1, COMPLETED as i32);
            self.a.jcc_to(B, self.thunks.leave_helped);
            self.a.jcc(NE, c.back);
            if c.flags_after {
                self.fill_flags();
            }
            self.a.jmp(c.after);
        }
        for n in 0..self.exits.len() {
            let Exit { label, way, target } = self.exits[n];
            self.a.bind(label);
            self.leave_for(way, target);
        }
    }
}

/// Where a vector register is while code runs.
fn vector(n: u32) -> MemoryOperand {
    let at = offset_of!(Cpu, ymm) + 32 * n as usize;
    MemoryOperand::new(Register::None, Register::None, 1, at as i64, 8, false, Register::GS)
}

/// Can its address be computed?
fn reachable(i: &Instruction) -> Result<(), No> {
    let d = i.memory_displacement64();
    let (base, index) = (i.memory_base(), i.memory_index());
    let absolute = base == Register::None && index == Register::None;
    let narrow = base != Register::RIP && base.size().max(index.size()) == 4;
    let fits = absolute || narrow || i32::try_from(d as i64).is_ok();
    if fits { Ok(()) } else { Err(No) }
}

/// Guest registers that the flags of an instruction can be had from once more; None: they cannot.
fn repeatable(i: &Instruction) -> Option<Vec<u8>> {
    use Mnemonic::*;
    let registers = match i.mnemonic() {
        Cmp | Test => i.op_count(),
        And | Or | Xor => 1,
        _ => return None,
    };
    let mut operands = Vec::new();
    for n in 0..registers {
        match i.op_kind(n) {
            OpKind::Register => {
                let r = i.op_register(n);
                if high_byte(r) || host(reg_index(r)).is_none() {
                    return None;
                }
                operands.push(reg_index(r));
            }
            OpKind::Memory => return None,
            _ => {}
        }
    }
    Some(operands)
}

/// The instruction that makes the flags of a `repeatable` one again.
fn repeat(i: &Instruction) -> Instruction {
    let name = |r: Register| sized(host(reg_index(r)).expect("it is repeatable"), r);
    if !matches!(i.mnemonic(), Mnemonic::Cmp | Mnemonic::Test) {
        // The result alone decides: carry and overflow are clear, so is the undefined AF.
        let r = name(i.op0_register());
        let code = match r.size() {
            1 => Insn::Test_rm8_r8,
            2 => Insn::Test_rm16_r16,
            4 => Insn::Test_rm32_r32,
            _ => Insn::Test_rm64_r64,
        };
        return Instruction::with2(code, r, r).expect("test");
    }
    let mut again = *i;
    for n in 0..i.op_count() {
        if i.op_kind(n) == OpKind::Register {
            again.set_op_register(n, name(i.op_register(n)));
        }
    }
    again
}

/// Does it write one of these guest registers?
fn changes(f: &Facts, registers: &[u8]) -> bool {
    f.used.iter().any(|u| {
        let r = u.register();
        r.is_gpr()
            && registers.contains(&reg_index(r))
            && !matches!(u.access(), OpAccess::Read | OpAccess::CondRead)
    })
}
