//! Moves, extensions, conditional moves and sets, LEA, the stack.

use super::control::cond;
use super::{sized, sized_wide};
use crate::soft::Cpu;
use crate::soft::decode::{Lower, Next, reg_offset};
use crate::soft::int::Int;
use crate::soft::op::*;
use crate::soft::state::*;
use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind};

const RSP: u8 = 4 * 8;

unsafe fn mov_rr<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let v: T = cpu.get(o.src);
    cpu.set(o.dst, v);
    next!(cpu, op)
}

unsafe fn mov_ri<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    cpu.set(o.dst, T::from_u64(o.imm));
    next!(cpu, op)
}

unsafe fn mov_rm<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, false));
    let v = tri!(cpu, op, cpu.ld::<T>(lin));
    cpu.set(o.dst, v);
    next!(cpu, op)
}

unsafe fn mov_mr<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, true));
    let v: T = cpu.get(o.src);
    tri!(cpu, op, cpu.st(lin, v));
    next!(cpu, op)
}

unsafe fn mov_mi<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, true));
    tri!(cpu, op, cpu.st(lin, T::from_u64(o.imm)));
    next!(cpu, op)
}

unsafe fn ext_r<S: Int, D: Int, const SIGN: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let v: S = cpu.get(o.src);
    cpu.set(o.dst, D::from_u64(if SIGN { v.to_i64() as u64 } else { v.to_u64() }));
    next!(cpu, op)
}

unsafe fn ext_m<S: Int, D: Int, const SIGN: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, S::SIZE, false));
    let v = tri!(cpu, op, cpu.ld::<S>(lin));
    cpu.set(o.dst, D::from_u64(if SIGN { v.to_i64() as u64 } else { v.to_u64() }));
    next!(cpu, op)
}

fn extend<const SIGN: bool>(l: &mut Lower) -> Handler {
    let i = l.insn;
    l.op.dst = reg_offset(i.op0_register());
    let reg = i.op1_kind() == OpKind::Register;
    let from = if reg {
        l.op.src = reg_offset(i.op1_register());
        i.op1_register().size()
    } else {
        l.mem();
        i.memory_size().size()
    };
    macro_rules! pick {
        ($s:ty, $d:ty) => {
            if reg { ext_r::<$s, $d, SIGN> as Handler } else { ext_m::<$s, $d, SIGN> as Handler }
        };
    }
    match (from, i.op0_register().size()) {
        (1, 2) => pick!(u8, u16),
        (1, 4) => pick!(u8, u32),
        (1, _) => pick!(u8, u64),
        (2, 2) => pick!(u16, u16),
        (2, 4) => pick!(u16, u32),
        (2, _) => pick!(u16, u64),
        (_, 2) => pick!(u32, u16),
        (_, 4) => pick!(u32, u32),
        _ => pick!(u32, u64),
    }
}

unsafe fn lea<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let v = cpu.ea(o);
    cpu.set(o.dst, T::from_u64(v));
    next!(cpu, op)
}

unsafe fn cmov_rr<T: Int, const CC: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    // A 32-bit destination loses its upper half either way.
    let v: T = if cond::<CC>(cpu.fl) { cpu.get(o.src) } else { cpu.get(o.dst) };
    cpu.set(o.dst, v);
    next!(cpu, op)
}

unsafe fn cmov_rm<T: Int, const CC: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, false));
    let m = tri!(cpu, op, cpu.ld::<T>(lin));
    let v: T = if cond::<CC>(cpu.fl) { m } else { cpu.get(o.dst) };
    cpu.set(o.dst, v);
    next!(cpu, op)
}

unsafe fn set_r<const CC: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    cpu.set(o.dst, u8::from(cond::<CC>(cpu.fl)));
    next!(cpu, op)
}

unsafe fn set_m<const CC: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, 1, true));
    tri!(cpu, op, cpu.st(lin, u8::from(cond::<CC>(cpu.fl))));
    next!(cpu, op)
}

/// The instance of a handler for a condition code.
macro_rules! by_cc {
    ($cc:expr, $f:ident $(, $t:ty)?) => {
        match $cc {
            ConditionCode::o => $f::<$($t,)? 0> as Handler,
            ConditionCode::no => $f::<$($t,)? 1> as Handler,
            ConditionCode::b => $f::<$($t,)? 2> as Handler,
            ConditionCode::ae => $f::<$($t,)? 3> as Handler,
            ConditionCode::e => $f::<$($t,)? 4> as Handler,
            ConditionCode::ne => $f::<$($t,)? 5> as Handler,
            ConditionCode::be => $f::<$($t,)? 6> as Handler,
            ConditionCode::a => $f::<$($t,)? 7> as Handler,
            ConditionCode::s => $f::<$($t,)? 8> as Handler,
            ConditionCode::ns => $f::<$($t,)? 9> as Handler,
            ConditionCode::p => $f::<$($t,)? 10> as Handler,
            ConditionCode::np => $f::<$($t,)? 11> as Handler,
            ConditionCode::l => $f::<$($t,)? 12> as Handler,
            ConditionCode::ge => $f::<$($t,)? 13> as Handler,
            ConditionCode::le => $f::<$($t,)? 14> as Handler,
            _ => $f::<$($t,)? 15> as Handler,
        }
    };
}
pub(crate) use by_cc;

// -- the stack -----------------------------------------------------------------------------------

impl Cpu {
    /// Linear address of a stack slot; raises #SS.
    #[inline(always)]
    pub fn stack_lin(&mut self, sp: u64, size: u64, write: bool) -> Result<u64, Stop> {
        if self.cache.mode & (super::super::block::mode::FLAT) != 0 {
            return Ok(sp);
        }
        self.lin_checked(SS, sp, size, write)
    }

    /// Set the stack pointer, in its width.
    #[inline(always)]
    pub fn set_sp(&mut self, sp: u64) {
        if self.sp_mask == 0xFFFF {
            self.set(RSP, sp as u16);
        } else {
            self.r[4] = sp & self.sp_mask;
        }
    }

    #[inline(always)]
    pub fn push<T: Int>(&mut self, v: T) -> Result<(), Stop> {
        let sp = self.r[4].wrapping_sub(T::SIZE) & self.sp_mask;
        let r = self.stack_lin(sp, T::SIZE, true).and_then(|lin| self.st(lin, v));
        match r {
            Ok(()) => {
                self.set_sp(sp);
                Ok(())
            }
            Err(s) => Err(self.stack_fault(s)),
        }
    }

    /// The value on top of the stack; the caller moves the stack pointer.
    #[inline(always)]
    pub fn peek<T: Int>(&mut self, above: u64) -> Result<T, Stop> {
        let sp = self.r[4].wrapping_add(above) & self.sp_mask;
        let r = self.stack_lin(sp, T::SIZE, false).and_then(|lin| self.ld(lin));
        match r {
            Ok(v) => Ok(v),
            Err(s) => Err(self.stack_fault(s)),
        }
    }

    #[inline(always)]
    pub fn pop<T: Int>(&mut self) -> Result<T, Stop> {
        let v = self.peek(0)?;
        self.set_sp(self.r[4].wrapping_add(T::SIZE) & self.sp_mask);
        Ok(v)
    }

    /// A non-canonical stack address is #SS, not #GP.
    #[cold]
    pub fn stack_fault(&mut self, s: Stop) -> Stop {
        if s == Stop::Exception
            && self.exc.vector == vec::GP
            && self.exc.payload == super::super::mmu::NON_CANONICAL
        {
            self.exc.vector = vec::SS;
        }
        s
    }
}

unsafe fn push_r<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let v: T = cpu.get(o.src);
    tri!(cpu, op, cpu.push(v));
    next!(cpu, op)
}

unsafe fn push_i<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    tri!(cpu, op, cpu.push(T::from_u64(o.imm)));
    next!(cpu, op)
}

unsafe fn push_m<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, false));
    let v = tri!(cpu, op, cpu.ld::<T>(lin));
    tri!(cpu, op, cpu.push(v));
    next!(cpu, op)
}

unsafe fn pop_r<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let v: T = tri!(cpu, op, cpu.pop());
    cpu.set(o.dst, v);
    next!(cpu, op)
}

/// POP to memory: an address based on RSP is computed with the incremented RSP.
unsafe fn pop_m<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let v: T = tri!(cpu, op, cpu.peek(0));
    let old = cpu.r[4];
    cpu.set_sp(old.wrapping_add(T::SIZE) & cpu.sp_mask);
    let r = cpu.lin(o, T::SIZE, true).and_then(|lin| cpu.st(lin, v));
    if let Err(s) = r {
        cpu.r[4] = old;
        return cpu.stop_at(op, s);
    }
    next!(cpu, op)
}

unsafe fn leave<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let old = cpu.r[4];
    let frame = cpu.r[5] & cpu.sp_mask;
    cpu.set_sp(frame);
    match cpu.pop::<T>() {
        Ok(v) => cpu.set(5 * 8, v),
        Err(s) => {
            cpu.r[4] = old;
            return cpu.stop_at(op, s);
        }
    }
    next!(cpu, op)
}

/// PUSHA, in order AX CX DX BX SP BP SI DI.  One that faults has written what came before.
fn pusha<T: Int>(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    let sp = cpu.r[4];
    for i in 0..8u8 {
        let v: T = if i == 4 { T::from_u64(sp) } else { cpu.get(i * 8) };
        if let Err(stop) = cpu.push(v) {
            cpu.r[4] = sp;
            return Err(stop);
        }
    }
    Ok(Next::Seq)
}

fn popa<T: Int>(cpu: &mut Cpu, _: &Instruction) -> Result<Next, Stop> {
    let mut v = [T::default(); 8];
    for (i, slot) in v.iter_mut().enumerate() {
        *slot = cpu.peek(i as u64 * T::SIZE)?;
    }
    for (i, v) in v.iter().rev().enumerate() {
        if i != 4 {
            cpu.set(i as u8 * 8, *v);
        }
    }
    cpu.set_sp(cpu.r[4].wrapping_add(8 * T::SIZE) & cpu.sp_mask);
    Ok(Next::Seq)
}

/// ENTER (SDM 2A): `size` bytes of frame, nesting level 0-31.
fn enter<T: Int>(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let old = cpu.r[4];
    let r = (|| {
        let size = u64::from(i.immediate16());
        let level = i.immediate8_2nd() % 32;
        let bp: T = cpu.get(5 * 8);
        cpu.push(bp)?;
        let frame = cpu.r[4];
        if level > 0 {
            let mut at = cpu.r[5];
            for _ in 1..level {
                at = at.wrapping_sub(T::SIZE);
                let lin = cpu.stack_lin(at & cpu.sp_mask, T::SIZE, false)?;
                let v: T = cpu.ld(lin)?;
                cpu.push(v)?;
            }
            cpu.push(T::from_u64(frame))?;
        }
        let sp = cpu.r[4].wrapping_sub(size) & cpu.sp_mask;
        // The new top must be writable, or ENTER faults.
        let lin = cpu.stack_lin(sp, 1, true)?;
        cpu.probe_write(lin, 1, super::super::mmu::Right::Current)?;
        cpu.set_sp(sp);
        cpu.set(5 * 8, T::from_u64(frame));
        Ok(Next::Seq)
    })();
    r.map_err(|s| {
        cpu.r[4] = old;
        cpu.stack_fault(s)
    })
}

/// Push a segment register.
fn push_seg<T: Int>(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let sel = cpu.seg[crate::soft::decode::seg_index(i.op0_register()) as usize].sel;
    if T::SIZE == 4 {
        // Only the low word of the slot is written.
        let sp = cpu.r[4].wrapping_sub(4) & cpu.sp_mask;
        let lin = cpu.stack_lin(sp, 2, true)?;
        cpu.st(lin, sel)?;
        cpu.set_sp(sp);
    } else {
        cpu.push(T::from_u64(u64::from(sel)))?;
    }
    Ok(Next::Seq)
}

/// MOV from a segment register.
fn mov_from_seg(cpu: &mut Cpu, i: &Instruction) -> Result<Next, Stop> {
    let sel = cpu.seg[crate::soft::decode::seg_index(i.op1_register()) as usize].sel;
    if i.op0_kind() == OpKind::Register {
        let off = reg_offset(i.op0_register());
        match i.op0_register().size() {
            2 => cpu.set(off, sel),
            4 => cpu.set(off, u32::from(sel)),
            _ => cpu.set(off, u64::from(sel)),
        }
    } else {
        let lin = crate::soft::sys::operand_lin(cpu, i, 2, true)?;
        cpu.st(lin, sel)?;
    }
    Ok(Next::Seq)
}

/// Size of a stack slot of this push or pop, bytes.
fn slot(l: &Lower) -> usize {
    l.insn.stack_pointer_increment().unsigned_abs() as usize
}

pub fn lower(l: &mut Lower) -> Option<Handler> {
    let i = l.insn;
    let cc = i.condition_code();
    let size = super::arith::operand_size(l);
    let (k0, k1) = (i.op0_kind(), i.op1_kind());
    Some(match i.mnemonic() {
        Mnemonic::Mov => match (k0, k1) {
            (OpKind::Register, OpKind::Register)
                if i.op0_register().is_gpr() && i.op1_register().is_gpr() =>
            {
                l.op.dst = reg_offset(i.op0_register());
                l.op.src = reg_offset(i.op1_register());
                sized!(size, mov_rr)
            }
            (_, OpKind::Register) if i.op1_register().is_segment_register() => {
                l.slow(mov_from_seg, false)
            }
            (OpKind::Register, OpKind::Memory) if i.op0_register().is_gpr() => {
                l.op.dst = reg_offset(i.op0_register());
                l.mem();
                sized!(size, mov_rm)
            }
            (OpKind::Memory, OpKind::Register) => {
                l.op.src = reg_offset(i.op1_register());
                l.mem();
                sized!(size, mov_mr)
            }
            (OpKind::Memory, _) => {
                l.op.imm = i.immediate(1);
                l.mem();
                sized!(size, mov_mi)
            }
            (OpKind::Register, OpKind::Register | OpKind::Memory) => return None,
            _ => {
                l.op.dst = reg_offset(i.op0_register());
                l.op.imm = i.immediate(1);
                sized!(size, mov_ri)
            }
        },
        Mnemonic::Movzx => extend::<false>(l),
        Mnemonic::Movsx | Mnemonic::Movsxd => extend::<true>(l),
        Mnemonic::Lea => {
            l.op.dst = reg_offset(i.op0_register());
            l.mem();
            sized_wide!(i.op0_register().size(), lea)
        }
        m if cc != ConditionCode::None && is_cmov(m) => {
            l.op.dst = reg_offset(i.op0_register());
            if k1 == OpKind::Register {
                l.op.src = reg_offset(i.op1_register());
                match size {
                    2 => by_cc!(cc, cmov_rr, u16),
                    4 => by_cc!(cc, cmov_rr, u32),
                    _ => by_cc!(cc, cmov_rr, u64),
                }
            } else {
                l.mem();
                match size {
                    2 => by_cc!(cc, cmov_rm, u16),
                    4 => by_cc!(cc, cmov_rm, u32),
                    _ => by_cc!(cc, cmov_rm, u64),
                }
            }
        }
        m if cc != ConditionCode::None && is_set(m) => {
            if k0 == OpKind::Register {
                l.op.dst = reg_offset(i.op0_register());
                by_cc!(cc, set_r)
            } else {
                l.mem();
                by_cc!(cc, set_m)
            }
        }
        Mnemonic::Push => {
            let n = slot(l);
            match k0 {
                OpKind::Register if i.op0_register().is_segment_register() => match n {
                    2 => l.slow(push_seg::<u16>, false),
                    4 => l.slow(push_seg::<u32>, false),
                    _ => l.slow(push_seg::<u64>, false),
                },
                OpKind::Register => {
                    l.op.src = reg_offset(i.op0_register());
                    sized_wide!(n, push_r)
                }
                OpKind::Memory => {
                    l.mem();
                    sized_wide!(n, push_m)
                }
                _ => {
                    l.op.imm = i.immediate(0);
                    sized_wide!(n, push_i)
                }
            }
        }
        Mnemonic::Pop if k0 == OpKind::Memory => {
            l.mem();
            sized_wide!(slot(l), pop_m)
        }
        Mnemonic::Pop if i.op0_register().is_gpr() => {
            l.op.dst = reg_offset(i.op0_register());
            sized_wide!(slot(l), pop_r)
        }
        Mnemonic::Leave => sized_wide!(leave_size(&i), leave),
        Mnemonic::Enter => match i.code() {
            iced_x86::Code::Enterw_imm16_imm8 => l.slow(enter::<u16>, false),
            iced_x86::Code::Enterd_imm16_imm8 => l.slow(enter::<u32>, false),
            _ => l.slow(enter::<u64>, false),
        },
        Mnemonic::Pusha => l.slow(pusha::<u16>, false),
        Mnemonic::Pushad => l.slow(pusha::<u32>, false),
        Mnemonic::Popa => l.slow(popa::<u16>, false),
        Mnemonic::Popad => l.slow(popa::<u32>, false),
        _ => return None,
    })
}

fn leave_size(i: &Instruction) -> usize {
    match i.code() {
        iced_x86::Code::Leavew => 2,
        iced_x86::Code::Leaved => 4,
        _ => 8,
    }
}

fn is_cmov(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
    )
}

fn is_set(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Seta | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
    )
}
