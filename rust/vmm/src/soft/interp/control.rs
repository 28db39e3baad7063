//! Jumps, calls, returns, loops.

use super::host::{CF, OF, PF, SF, ZF};
use super::mov::by_cc;
use super::sized_wide;
use crate::soft::Cpu;
use crate::soft::decode::{Lower, reg_offset};
use crate::soft::int::Int;
use crate::soft::mmu::canonical;
use crate::soft::op::*;
use crate::soft::state::*;
use iced_x86::{ConditionCode, FlowControl, Mnemonic, OpKind};

/// Condition `CC` of the opcode map: bit 0 negates.
#[inline(always)]
pub fn cond<const CC: u8>(f: u32) -> bool {
    let v = match CC >> 1 {
        0 => f & OF != 0,
        1 => f & CF != 0,
        2 => f & ZF != 0,
        3 => f & (CF | ZF) != 0,
        4 => f & SF != 0,
        5 => f & PF != 0,
        6 => (f >> 15 ^ f) & 1 != 0,
        _ => f & ZF != 0 || (f >> 15 ^ f) & 1 != 0,
    };
    v != (CC & 1 != 0)
}

impl Cpu {
    /// A near branch target must be canonical, or inside CS; raises #GP(0).
    #[inline(always)]
    pub fn check_target(&mut self, rip: u64) -> Result<(), Stop> {
        let good = if self.code64() {
            canonical(rip)
        } else {
            rip <= u64::from(self.seg[CS as usize].limit)
        };
        if good { Ok(()) } else { Err(self.gp(0)) }
    }
}

/// Direct branches: `imm` is the target relative to the block, `amask` the operand size's mask,
/// `disp` the mode's RIP mask; F_CHECK asks for a limit check.
#[inline(always)]
fn target(cpu: &mut Cpu, o: &Op) -> Result<u64, Stop> {
    let t = cpu.r[R_RIP as usize].wrapping_add(o.imm) & o.amask;
    if o.flags & F_CHECK != 0 {
        cpu.check_target(t)?;
    }
    Ok(t)
}

unsafe fn jcc<const CC: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    if cond::<CC>(cpu.fl) {
        cpu.rip = tri!(cpu, op, target(cpu, o));
        TAKEN
    } else {
        cpu.rip = o.next_rip(cpu) & o.disp;
        FALL
    }
}

unsafe fn jmp(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    cpu.rip = tri!(cpu, op, target(cpu, o));
    TAKEN
}

unsafe fn call<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let t = tri!(cpu, op, target(cpu, o));
    let ret = o.next_rip(cpu) & o.disp;
    tri!(cpu, op, cpu.push(T::from_u64(ret)));
    cpu.rip = t;
    TAKEN
}

unsafe fn jmp_r<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let t = cpu.get::<T>(o.src).to_u64();
    tri!(cpu, op, cpu.check_target(t));
    cpu.rip = t;
    INDIRECT
}

unsafe fn jmp_m<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, false));
    let t = tri!(cpu, op, cpu.ld::<T>(lin)).to_u64();
    tri!(cpu, op, cpu.check_target(t));
    cpu.rip = t;
    INDIRECT
}

unsafe fn call_r<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let t = cpu.get::<T>(o.src).to_u64();
    tri!(cpu, op, cpu.check_target(t));
    let ret = o.next_rip(cpu) & o.disp;
    tri!(cpu, op, cpu.push(T::from_u64(ret)));
    cpu.rip = t;
    INDIRECT
}

unsafe fn call_m<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let lin = tri!(cpu, op, cpu.lin(o, T::SIZE, false));
    let t = tri!(cpu, op, cpu.ld::<T>(lin)).to_u64();
    tri!(cpu, op, cpu.check_target(t));
    // `lin` may have used `disp`, so the mask comes from the mode.
    let ret = o.next_rip(cpu) & cpu.rip_mask();
    tri!(cpu, op, cpu.push(T::from_u64(ret)));
    cpu.rip = t;
    INDIRECT
}

unsafe fn ret<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let t = tri!(cpu, op, cpu.peek::<T>(0)).to_u64();
    tri!(cpu, op, cpu.check_target(t));
    cpu.set_sp(cpu.r[4].wrapping_add(T::SIZE).wrapping_add(o.imm) & cpu.sp_mask);
    cpu.rip = t;
    INDIRECT
}

/// LOOP, LOOPE, LOOPNE, JCXZ: `aux` 0 to 3, counter size `T`.
unsafe fn loops<T: Int>(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    let mut c = cpu.get::<T>(8).to_u64();
    if o.aux != 3 {
        c = T::from_u64(c.wrapping_sub(1)).to_u64();
    }
    let zf = cpu.fl & ZF != 0;
    let go = match o.aux {
        0 => c != 0,
        1 => c != 0 && zf,
        2 => c != 0 && !zf,
        _ => c == 0,
    };
    let t = if go { tri!(cpu, op, target(cpu, o)) } else { o.next_rip(cpu) & o.disp };
    if o.aux != 3 {
        cpu.set(8, T::from_u64(c));
    }
    cpu.rip = t;
    if go { TAKEN } else { FALL }
}

/// Falls into the next block: what ends a block that was cut short.
pub(crate) unsafe fn fall(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: handlers are called with their op.
    let o = unsafe { &*op };
    cpu.rip = o.rip(cpu) & cpu.rip_mask();
    FALL
}

fn branch(l: &mut Lower) {
    let i = &l.insn;
    let start = i.ip().wrapping_sub(u64::from(l.op.off));
    l.op.imm = i.near_branch_target().wrapping_sub(start);
    l.op.amask = match i.op0_kind() {
        OpKind::NearBranch16 => 0xFFFF,
        OpKind::NearBranch32 => 0xFFFF_FFFF,
        _ => u64::MAX,
    };
    if l.bits != 64 && !l.flat {
        l.op.flags |= F_CHECK;
    }
}

pub fn lower(l: &mut Lower) -> Option<Handler> {
    let i = l.insn;
    if !matches!(
        i.flow_control(),
        FlowControl::UnconditionalBranch
            | FlowControl::IndirectBranch
            | FlowControl::ConditionalBranch
            | FlowControl::Return
            | FlowControl::Call
            | FlowControl::IndirectCall
    ) {
        return None;
    }
    l.op.disp = if l.bits == 64 { u64::MAX } else { 0xFFFF_FFFF };
    let slot = i.stack_pointer_increment().unsigned_abs() as usize;
    let near =
        matches!(i.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    let h = match i.mnemonic() {
        Mnemonic::Jmp if near => {
            branch(l);
            jmp as Handler
        }
        Mnemonic::Call if near => {
            branch(l);
            sized_wide!(slot, call)
        }
        Mnemonic::Jmp if i.is_jmp_near_indirect() => {
            if i.op0_kind() == OpKind::Register {
                l.op.src = reg_offset(i.op0_register());
                sized_wide!(i.op0_register().size(), jmp_r)
            } else {
                l.mem();
                sized_wide!(i.memory_size().size(), jmp_m)
            }
        }
        Mnemonic::Call if i.is_call_near_indirect() => {
            if i.op0_kind() == OpKind::Register {
                l.op.src = reg_offset(i.op0_register());
                sized_wide!(i.op0_register().size(), call_r)
            } else {
                l.mem();
                sized_wide!(i.memory_size().size(), call_m)
            }
        }
        Mnemonic::Ret => {
            use iced_x86::Code::*;
            l.op.imm = if i.op_count() == 1 { u64::from(i.immediate16()) } else { 0 };
            match i.code() {
                Retnw | Retnw_imm16 => ret::<u16> as Handler,
                Retnd | Retnd_imm16 => ret::<u32> as Handler,
                _ => ret::<u64> as Handler,
            }
        }
        m @ (Mnemonic::Loop
        | Mnemonic::Loope
        | Mnemonic::Loopne
        | Mnemonic::Jcxz
        | Mnemonic::Jecxz
        | Mnemonic::Jrcxz) => {
            branch(l);
            l.op.aux = match m {
                Mnemonic::Loop => 0,
                Mnemonic::Loope => 1,
                Mnemonic::Loopne => 2,
                _ => 3,
            };
            sized_wide!(counter_size(l), loops)
        }
        _ if i.condition_code() != ConditionCode::None && near => {
            branch(l);
            by_cc!(i.condition_code(), jcc)
        }
        _ => return None,
    };
    l.end = true;
    Some(h)
}

/// Size of the counter of LOOP and JCXZ: the address size.
fn counter_size(l: &Lower) -> usize {
    use iced_x86::Code::*;
    match l.insn.code() {
        Jcxz_rel8_16 | Jcxz_rel8_32 | Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX
        | Loope_rel8_32_CX | Loopne_rel8_16_CX | Loopne_rel8_32_CX => 2,
        Jecxz_rel8_16 | Jecxz_rel8_32 | Jecxz_rel8_64 | Loop_rel8_16_ECX | Loop_rel8_32_ECX
        | Loop_rel8_64_ECX | Loope_rel8_16_ECX | Loope_rel8_32_ECX | Loope_rel8_64_ECX
        | Loopne_rel8_16_ECX | Loopne_rel8_32_ECX | Loopne_rel8_64_ECX => 4,
        _ => 8,
    }
}
