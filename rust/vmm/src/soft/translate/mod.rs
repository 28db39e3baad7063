//! Warm blocks as host code.
//!
//! A block that has run a few times is translated: its instructions stay what they are, with
//! registers renamed and memory operands looked up in the TLB.  What the translator does not know,
//! it has the block's own handlers do.  `lower` makes the code, `asm` the bytes; this module
//! decides what is translated, enters the code and leads it on from block to block.
//!
//! While translated code runs, the GS base points at [`Cpu`] and guest registers are in the host
//! registers of the same name, but for RSP, which is in R14, and R11, R14 and R15, which stay in
//! `Cpu::r`: R15 and R11 are scratch.  The guest's arithmetic flags are in the host's or in `Cpu::fl`,
//! as known to the translator at each point, and in `Cpu::fl` wherever code leaves.
//!
//! Code does not know at what linear address it runs, only its offset in the page, because a
//! physical page may be mapped at several; [`Jit::page`] is the page's linear address.

mod asm;
mod lower;

use super::Cpu;
use super::block::Block;
use super::mmu::{PAGE, PAGE_MASK};
use super::native::codebuf::CodeBuf;
use super::op::*;
use asm::*;
use std::arch::asm;
use std::mem::{self, offset_of};
use std::ptr;

/// Runs of a block before it is translated, where nothing else is wanted.
pub const WARM: u16 = 16;
/// Instead of a number of runs: translate nothing.
pub const NEVER: u16 = u16::MAX;
/// Bytes of code kept; when they are used up all blocks are dropped.
const CODE_SIZE: usize = 48 << 20;
/// No block's code is longer.
const MAX_BLOCK: usize = 64 << 10;
/// Entries of the jump table.
const JUMPS: usize = 16384;

/// An op's own handler has run it: go on behind it.
const DONE: Flow = 5;

/// Where a linear address leads, for jumps that are not known to stay in their page.
#[derive(Clone, Copy)]
#[repr(C)]
struct Jump {
    lin: u64,
    key: u64,
    page: u64,
    code: *const u8,
}

const NO_JUMP: Jump = Jump { lin: 0, key: 0, page: 0, code: ptr::null() };

/// What translated code refers to by its offset in [`Cpu`].
#[repr(C)]
pub struct Jit {
    /// Linear address of the page that the running code is in.
    page: u64,
    jumps: *const Jump,
    /// Key of the present mode, privilege and address space.
    key: u64,
    /// The same for code that is in all address spaces.
    global_key: u64,
    /// What it contributes to an index in the jump table.
    salt: u64,
    /// Code to enter.
    target: *const u8,
    cpu: *mut Cpu,
    /// The block that was left last, for a link from it.
    last: *const Block,
    /// Where an indirect call goes, while its return address is pushed.
    callee: u64,
    /// How `help` wants the code left.
    flow: u32,
    /// A block of this vCPU has been dropped since this was cleared.
    pub dropped: bool,
    /// Blocks translated since this was taken.
    pub translated: u64,
    /// Runs of a block before it is translated.
    warm: u16,
    pub translator: Option<Box<Translator>>,
}

impl Jit {
    /// There may be no room for one more block: drop all blocks.
    pub fn full(&self) -> bool {
        self.translator.as_ref().is_some_and(|t| t.full())
    }
}

impl Default for Jit {
    fn default() -> Self {
        Jit {
            page: 0,
            jumps: ptr::null(),
            key: 0,
            global_key: 0,
            salt: 0,
            target: ptr::null(),
            cpu: ptr::null_mut(),
            last: ptr::null(),
            callee: 0,
            flow: 0,
            dropped: false,
            translated: 0,
            warm: WARM,
            translator: None,
        }
    }
}

/// Entry points of the code that all blocks share.
#[derive(Clone, Copy)]
struct Thunks {
    enter: u64,
    /// S2: the flow.
    leave: u64,
    /// As `leave`, with the flow in `Jit::flow`.
    leave_helped: u64,
    /// S1: the linear address to go to.
    jump: u64,
    /// S1: a linear address, S2: a `Help`.  Returns the answer of `help` in S1.
    help: u64,
}

/// An instruction that may need help.
pub struct Help {
    /// The op and one that gives `DONE`.
    ops: [Op; 2],
    block: *const Block,
    /// Offset of the block in its page.
    start: u64,
    /// Bytes of the memory operand; 0: always run by its handler.
    size: u64,
    write: bool,
}

/// Translated code of a block.
pub struct Code {
    pub entry: *const u8,
    /// Where its exits lead: not taken, taken.  Each is the address of a block's code, or of the
    /// piece that leaves.
    links: Box<[*const u8; 2]>,
    unlinked: [*const u8; 2],
    /// Exits of other blocks that lead here.
    incoming: Vec<(*const Block, usize)>,
    #[expect(clippy::vec_box, reason = "translated code points to them")]
    _helps: Vec<Box<Help>>,
}

pub struct Translator {
    code: CodeBuf,
    thunks: Thunks,
    jumps: Box<[Jump]>,
    info: iced_x86::InstructionInfoFactory,
}

/// Where the guest's registers are while translated code runs; None: in `Cpu::r`.
fn host(guest: u8) -> Option<Reg> {
    match guest {
        4 => Some(14),
        11 | 14 | 15 => None,
        n => Some(n),
    }
}

const fn gpr(n: usize) -> usize {
    offset_of!(Cpu, r) + 8 * n
}

const fn jit(field: usize) -> usize {
    offset_of!(Cpu, jit) + field
}

impl Translator {
    /// None: this host does not let us.
    pub fn new(events: *const u32) -> Option<Translator> {
        if !gs_base_is_ours() {
            return None;
        }
        let mut code = CodeBuf::new(CODE_SIZE).ok()?;
        let thunks = thunks(&mut code, events)?;
        Some(Translator {
            code,
            thunks,
            jumps: vec![NO_JUMP; JUMPS].into(),
            info: iced_x86::InstructionInfoFactory::new(),
        })
    }

    pub fn full(&self) -> bool {
        self.code.room() < MAX_BLOCK
    }
}

/// May user code set the GS base, which nothing else in a Linux process uses?
fn gs_base_is_ours() -> bool {
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    // SAFETY: reads the auxiliary vector.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & HWCAP2_FSGSBASE != 0 }
}

fn save_registers(a: &mut Asm) {
    for g in 0..16 {
        if let Some(h) = host(g) {
            a.store(gpr(g.into()), h);
        }
    }
}

fn load_registers(a: &mut Asm) {
    for g in 0..16 {
        if let Some(h) = host(g) {
            a.load(h, gpr(g.into()));
        }
    }
}

fn thunks(code: &mut CodeBuf, events: *const u32) -> Option<Thunks> {
    const SAVED: [Reg; 6] = [3, 5, 12, 13, 14, 15];
    let mut a = Asm::new(code.next());
    let enter = a.here();
    for r in SAVED {
        a.push(r);
    }
    // Calls out of blocks happen at this depth: it aligns the stack for them.
    a.alu_imm(true, 5, RSP, 8);
    load_registers(&mut a);
    a.jmp_gs(jit(offset_of!(Jit, target)));

    let leave_helped = a.here();
    a.load32(S2, jit(offset_of!(Jit, flow)));
    let leave = a.here();
    save_registers(&mut a);
    a.mov32(RAX, S2);
    a.alu_imm(true, 0, RSP, 8);
    for r in SAVED.into_iter().rev() {
        a.pop(r);
    }
    a.ret();

    let jump = a.here();
    let (out, other) = (a.label(), a.label());
    a.mov_imm(S2, events as u64);
    a.mem(false, 0x83, 7, S2, 0);
    a.byte(0);
    a.jcc(NE, out);
    a.mov(S2, S1);
    a.shift(5, S2, 12);
    a.alu(false, 0x33, S2, S1);
    a.xor_gs32(S2, jit(offset_of!(Jit, salt)));
    a.alu_imm(false, 4, S2, JUMPS as i32 - 1);
    a.shift(4, S2, size_of::<Jump>().trailing_zeros() as u8);
    a.add_gs(S2, jit(offset_of!(Jit, jumps)));
    a.mem(true, 0x3B, S1, S2, offset_of!(Jump, lin) as i32);
    a.jcc(NE, out);
    let known = a.label();
    a.mem(true, 0x8B, S1, S2, offset_of!(Jump, key) as i32);
    a.cmp_gs(S1, jit(offset_of!(Jit, global_key)));
    a.jcc(E, known);
    a.cmp_gs(S1, jit(offset_of!(Jit, key)));
    a.jcc(NE, other);
    a.bind(known);
    a.mem(true, 0x8B, S1, S2, offset_of!(Jump, page) as i32);
    a.store(jit(offset_of!(Jit, page)), S1);
    a.jmp_mem(S2, offset_of!(Jump, code) as i32);
    a.bind(other);
    a.mem(true, 0x8B, S1, S2, offset_of!(Jump, lin) as i32);
    a.bind(out);
    a.store(offset_of!(Cpu, rip), S1);
    a.mov_imm(S2, INDIRECT.into());
    a.jmp(leave);

    let help_thunk = a.here();
    save_registers(&mut a);
    a.load(RDI, jit(offset_of!(Jit, cpu)));
    a.mov(RSI, S1);
    a.mov(RDX, S2);
    a.mov_imm(RAX, help as *const () as u64);
    a.alu_imm(true, 5, RSP, 8);
    a.call_reg(RAX);
    a.alu_imm(true, 0, RSP, 8);
    a.mov(S1, RAX);
    load_registers(&mut a);
    a.ret();

    let thunks = Thunks {
        enter: a.address(enter),
        leave: a.address(leave),
        leave_helped: a.address(leave_helped),
        jump: a.address(jump),
        help: a.address(help_thunk),
    };
    code.push(&a.finish())?;
    Some(thunks)
}

unsafe fn done(_: &mut Cpu, _: *const Op) -> Flow {
    DONE
}

/// Answers of `help` that are no address.
const LEAVE: u64 = 0;
const COMPLETED: u64 = 1;

/// An access that the TLB did not have, or an instruction that is not translated.  Returns the
/// operand's host address, `COMPLETED`, or `LEAVE`.
///
/// # Safety
/// Called by translated code of `cpu`, with a `Help` of the running block.
unsafe extern "sysv64" fn help(cpu: *mut Cpu, lin: u64, help: *const Help) -> u64 {
    // SAFETY: the caller's promise; nothing else uses the processor while its code runs.
    let (cpu, help) = unsafe { (&mut *cpu, &*help) };
    if help.size != 0
        && (lin & (PAGE - 1)) + help.size <= PAGE
        && let Ok(Some(p)) = cpu.span(lin, help.write)
    {
        return p as u64;
    }
    cpu.r[R_RIP as usize] = cpu.jit.page + help.start;
    cpu.cache.current = help.block;
    cpu.jit.dropped = false;
    let op = help.ops.as_ptr();
    // SAFETY: handlers get their own op; behind it is `done`.
    let flow = unsafe { ((*op).f.get())(cpu, op) };
    // Whatever it was may have changed the address space or the privilege.
    cpu.set_jump_key();
    if flow != DONE {
        // A branch that its handler took: there is no link for it.
        cpu.jit.flow = if flow < INDIRECT { INDIRECT } else { flow };
        return LEAVE;
    }
    if cpu.jit.dropped {
        cpu.rip = help.ops[0].next_rip(cpu);
        cpu.jit.flow = BREAK;
        return LEAVE;
    }
    COMPLETED
}

impl Cpu {
    /// Forget all code; no block is left.
    pub(super) fn restart_translator(&mut self) {
        if self.jit.translator.is_some() {
            self.start_translator();
        }
    }

    fn start_translator(&mut self) {
        let events: *const u32 = self.vcpu().events.word().as_ptr();
        self.jit.translator = Translator::new(events).map(Box::new);
    }

    /// This thread is going to run translated code.
    pub fn enter_jit(&mut self) {
        self.jit.cpu = ptr::from_mut(self);
        self.jit.warm = self.vm().translate_after();
        if self.jit.translator.is_none() && self.jit.warm != NEVER {
            self.start_translator();
        }
        if self.jit.translator.is_some() {
            // SAFETY: user code may set it (`gs_base_is_ours`), and nothing else uses it.
            unsafe { asm!("wrgsbase {}", in(reg) self.jit.cpu as u64, options(nomem, nostack)) };
        }
    }

    /// Run a block's code, and on from there.
    #[inline(always)]
    pub(super) fn run_code(&mut self, entry: *const u8) -> Flow {
        let Some(t) = &self.jit.translator else { return BREAK };
        let enter = t.thunks.enter;
        self.jit.jumps = t.jumps.as_ptr();
        self.jit.page = self.rip & PAGE_MASK;
        self.set_jump_key();
        self.jit.target = entry;
        let flow: u64;
        // SAFETY: generated by `thunks`: it saves what a call must preserve; `entry` is the code
        // of a valid block.  The processor is only used through the GS base meanwhile.
        unsafe {
            asm!(
                "call {enter}",
                enter = in(reg) enter,
                lateout("rax") flow,
                clobber_abi("sysv64"),
            );
        }
        flow as Flow
    }

    /// With 0 as the number of runs, a block is translated before its first.
    #[inline(always)]
    pub(super) fn warm_now(&mut self, b: &Block) {
        if self.jit.warm == 0 && b.entry.get().is_null() {
            self.translate_block(b);
        }
    }

    /// A block has run once more: translate it when it is warm.
    #[inline(always)]
    pub(super) fn warm(&mut self, b: &Block) {
        let n = b.runs.get().wrapping_add(1);
        b.runs.set(n);
        if n == self.jit.warm && n != NEVER {
            self.translate_block(b);
        }
    }

    #[inline(never)]
    fn translate_block(&mut self, b: &Block) {
        if b.gpa2.is_some() || !self.code64() || !b.valid.get() {
            return;
        }
        let Some(mut t) = self.jit.translator.take() else { return };
        if !t.full() {
            lower::translate(self, &mut t, b);
        }
        self.jit.translator = Some(t);
    }

    fn set_jump_key(&mut self) {
        let user = self.cpl == 3;
        self.jit.key = self.cache.jump_key(user);
        self.jit.global_key = self.cache.global_jump_key(user);
        // The same addresses in several spaces have entries of their own; most of a kernel is
        // in all of them.
        self.jit.salt = if user { self.asid.wrapping_mul(0x9E37) } else { 0 };
    }

    /// Translated code left for `to`, whose code is here: have it go there by itself next time.
    pub(super) fn lead(&mut self, flow: Flow, to: &Block) {
        if to.entry.get().is_null() {
            return;
        }
        let Some(code) = to.code() else { return };
        if flow == INDIRECT {
            self.set_jump_key();
            let lin = self.rip;
            let global = self.is_global(lin);
            let Some(t) = &mut self.jit.translator else { return };
            let i = ((lin >> 12 ^ lin ^ self.jit.salt) as usize) % JUMPS;
            let key = if global { self.jit.global_key } else { self.jit.key };
            t.jumps[i] = Jump { lin, key, page: lin & PAGE_MASK, code: code.entry };
            return;
        }
        // SAFETY: blocks live until `drop_blocks`; nobody else uses this one's code.
        let from = unsafe { &*self.jit.last };
        let way = flow as usize;
        if let Some(f) = from.code()
            && from.valid.get()
            && f.links[way] != code.entry
        {
            f.links[way] = code.entry;
            code.incoming.push((self.jit.last, way));
        }
    }

    /// Nothing may lead to a block that is dropped.
    pub(super) fn unlead(&mut self, b: &Block) {
        self.jit.dropped = true;
        let Some(code) = b.code() else { return };
        for (from, way) in mem::take(&mut code.incoming) {
            // SAFETY: as in `lead`.
            if let Some(f) = unsafe { &*from }.code()
                && f.links[way] == code.entry
            {
                f.links[way] = f.unlinked[way];
            }
        }
        if let Some(t) = &mut self.jit.translator {
            // Code is written seldom enough to look at all of them.
            for jump in t.jumps.iter_mut().filter(|j| j.code == code.entry) {
                *jump = NO_JUMP;
            }
        }
        b.entry.set(ptr::null());
    }
}
