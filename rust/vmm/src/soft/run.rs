//! The loop: events, interrupts, then block after block.

use super::block::Block;
use super::decode::Next;
use super::excp::{Kind, Undelivered};
use super::op::*;
use super::state::*;
use crate::caps::Caps;
use crate::events;
use crate::exit::{Exit, SuspendHow};
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use std::time::Instant;

/// What wakes a processor that has halted.
const WAKE: u32 = events::INTR | events::NMI | events::INIT | events::SIPI | events::RETURN;

/// Why the inner loop handed back.
enum Why {
    /// Look at events and modes, then go on.
    Look,
    /// Give this to userland.
    Exit(Exit),
    /// The VM has ended.
    Ended,
}

impl Cpu {
    /// Run the guest.  None: one of `events::RETURN` wants attention.
    pub fn run(&mut self, vm: &Vm, vcpu: &Vcpu) -> Option<Exit> {
        self.attach(vm, vcpu);
        if let Some(mut r) = self.asked.take() {
            if let Some(v) = self.answer.take() {
                r.value = v;
            }
            self.replay.push(r);
        }
        let (retired, decoded, dropped) =
            (self.cache.retired, self.cache.decoded, self.cache.invalidated);
        self.native.enter();
        self.enter_jit();
        self.enter_guest();
        let exit = self.execute();
        self.leave_guest();
        let s = &vcpu.stats;
        s.instructions.add(self.cache.retired.wrapping_sub(retired));
        s.blocks_translated.add(std::mem::take(&mut self.jit.translated));
        s.blocks_decoded.add(self.cache.decoded - decoded);
        s.blocks_dropped.add(self.cache.invalidated - dropped);
        if exit.is_some() {
            s.exits.inc();
        }
        exit
    }

    /// Whose processor this is, for as long as the caller holds them; it never changes.
    pub(crate) fn attach(&mut self, vm: &Vm, vcpu: &Vcpu) {
        self.vm = vm;
        self.vcpu = vcpu;
        self.mem_base = vm.mem.base();
        self.mem_flags = vm.mem.page_flag_word(0);
        self.mem_pages = vm.mem.span() >> 12;
    }

    fn execute(&mut self) -> Option<Exit> {
        loop {
            if self.vcpu().events.peek() != 0 && self.events() {
                return None;
            }
            if self.cache.full() || self.native.full() || self.jit.full() {
                self.drop_blocks();
                self.native.reset();
            }
            if !self.cache.emptied.is_empty() {
                self.tidy();
            }
            if let Err(u) = self.deliver_pending() {
                return self.undeliverable(u);
            }
            if self.halted || self.wait_sipi {
                self.sleep();
                continue;
            }
            let why = if self.stepping() { self.step() } else { self.blocks() };
            match why {
                Why::Look => {}
                Why::Exit(e) => return Some(e),
                Why::Ended => return None,
            }
        }
    }

    /// Take what has come in the mailbox; true: return to the caller of `run`.
    #[cold]
    fn events(&mut self) -> bool {
        let e = &self.vcpu().events;
        let set = e.take(
            events::INTR
                | events::NMI
                | events::CODE
                | events::SAFEPOINT
                | events::INIT
                | events::SIPI,
        );
        let back = e.peek() & events::RETURN != 0;
        if set & events::SAFEPOINT != 0 {
            self.leave_guest();
            self.enter_guest();
        }
        if set & events::CODE != 0 {
            let writes = {
                let list = &self.vcpu().code_writes;
                let mut list = list.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                std::mem::take(&mut *list)
            };
            for (gpa, len) in writes {
                self.invalidate(gpa, len);
            }
        }
        self.intr |= set & events::INTR != 0;
        self.nmi_pending |= set & events::NMI != 0;
        if set & events::INIT != 0 {
            self.vcpu().lapic.init_reset(self.vm());
            self.init();
        }
        if set & events::SIPI != 0 && self.wait_sipi {
            let page = self.vcpu().sipi_vector.load(std::sync::atomic::Ordering::SeqCst);
            self.start_up(page as u8);
        }
        back
    }

    /// Deliver what waits for an instruction boundary: an injected event, an NMI, an interrupt.
    #[inline]
    fn deliver_pending(&mut self) -> Result<(), Undelivered> {
        if let Some(e) = self.injected.take() {
            // A delivery that went out to userland goes on with the answers it has had.
            self.replay_pos = 0;
            self.exc = e;
            self.deliver()?;
            self.replay_done();
            return Ok(());
        }
        // An instruction that userland has half done finishes first.
        if !self.intr && !self.nmi_pending || !self.replay.is_empty() || self.shadow {
            return Ok(());
        }
        if self.wait_sipi {
            return Ok(());
        }
        if self.nmi_pending && !self.nmi_blocked {
            self.nmi_pending = false;
            self.halted = false;
            self.vcpu().stats.nmi.inc();
            return self.deliver_interrupt(vec::NMI, Kind::Nmi);
        }
        if self.intr && self.rflags & fl::IF != 0 {
            if self.vcpu().has_cap(Caps::MASK_HWINTR) {
                return Ok(());
            }
            let vm: *const Vm = self.vm;
            // SAFETY: as `Cpu::vm`; the VM outlives this call and is not part of `self`.
            let vm = unsafe { &*vm };
            if let Some(v) = self.vcpu().lapic.pending_intr() {
                self.vcpu().lapic.intr_accepted(vm, v);
                self.halted = false;
                self.vcpu().stats.intr.inc();
                return self.deliver_interrupt(v, Kind::External);
            }
            if self.vcpu().lapic.accepts_extint()
                && let Some(v) = vm.pic.pending_intr()
            {
                vm.pic.intr_accepted(vm, v);
                self.halted = false;
                self.vcpu().stats.extint.inc();
                return self.deliver_interrupt(v, Kind::External);
            }
            self.intr = false;
        }
        Ok(())
    }

    /// Wait in HLT, or for a start-up IPI.
    fn sleep(&mut self) {
        let awake = Instant::now();
        self.leave_guest();
        let deaf = self.rflags & fl::IF == 0;
        self.vm().set_halted(self.id, Some(!deaf));
        let mask = if deaf || self.wait_sipi { WAKE & !events::INTR } else { WAKE };
        // Code writes and safepoints wait until there is something to do.
        self.vcpu().events.wait(mask, None);
        self.vm().set_halted(self.id, None);
        self.vcpu().stats.idle_ns.add(awake.elapsed().as_nanos() as u64);
        self.enter_guest();
    }

    /// An event could not be delivered: the processor shuts down, or userland has a device read.
    #[cold]
    fn undeliverable(&mut self, why: Undelivered) -> Option<Exit> {
        if why == Undelivered::TripleFault {
            // The VM may have ended for another reason already.
            let _ = self.vm().suspend(SuspendHow::TripleFault);
        }
        self.exit.take()
    }

    /// Must instructions be run one by one?
    #[inline]
    fn stepping(&self) -> bool {
        self.shadow
            || self.rflags & fl::TF != 0
            || self.dr7 & 0xFF != 0
            || !self.replay.is_empty()
            || self.vcpu().has_cap(Caps::MTRAP_EXIT)
    }

    /// Linear address of code.
    #[inline(always)]
    pub(super) fn code_lin(&self, rip: u64) -> u64 {
        if self.long_mode() && self.seg_base[CS as usize] == 0 {
            return rip;
        }
        let lin = self.seg_base[CS as usize].wrapping_add(rip);
        if self.code64() { lin } else { lin & 0xFFFF_FFFF }
    }

    /// Run blocks until something outside of them has to be looked at.
    fn blocks(&mut self) -> Why {
        // RF only matters to breakpoints, and with those set instructions run one by one.
        self.rflags &= !fl::RF;
        let mut block = match self.next_block() {
            Ok(b) => b,
            Err(s) => return self.stop(s),
        };
        loop {
            // SAFETY: blocks live until `drop_blocks`, which only `execute` calls.
            let b = unsafe { &*block };
            self.r[R_RIP as usize] = self.rip;
            self.cache.current = block;
            self.warm_now(b);
            let entry = b.entry.get();
            let translated = !entry.is_null();
            let flow = if translated {
                self.run_code(entry)
            } else {
                let op = b.ops.as_ptr();
                // SAFETY: a block has at least one op; its handlers get their own op.
                unsafe { ((*op).f.get())(self, op) }
            };
            if flow == STOP {
                let s = self.stopped.take().unwrap_or(Stop::Exception);
                return self.stop(s);
            }
            if !translated {
                self.cache.retired = self.cache.retired.wrapping_add(b.count);
                self.warm(b);
            }
            if flow == BREAK || self.vcpu().events.peek() != 0 {
                return Why::Look;
            }
            if flow < INDIRECT && !translated {
                let next = b.links[flow as usize].get();
                // SAFETY: as above; a link points to a block of the same cache.
                if !next.is_null() && unsafe { (*next).valid.get() } {
                    block = next;
                    continue;
                }
            }
            block = match self.next_block() {
                Ok(b) => b,
                Err(s) => return self.stop(s),
            };
            if translated {
                // SAFETY: as above.
                self.lead(flow, unsafe { &*block });
            } else if flow < INDIRECT {
                self.link(b, flow as usize, block);
            }
            if self.cache.full() || self.native.full() || self.jit.full() {
                return Why::Look;
            }
        }
    }

    /// Remember a direct successor, where that cannot go stale: in the same page, flat.
    fn link(&self, from: &Block, way: usize, to: *const Block) {
        // SAFETY: as in `blocks`.
        let t = unsafe { &*to };
        let flat = self.cache.mode & super::block::mode::FLAT != 0;
        if flat && from.gpa >> 12 == t.gpa >> 12 && from.gpa2.is_none() && t.gpa2.is_none() {
            from.links[way].set(to);
        }
    }

    /// The block at `rip`, from the jump cache if it is there.
    #[inline(always)]
    fn next_block(&mut self) -> Result<*const Block, Stop> {
        let lin = self.code_lin(self.rip);
        let known = self.cache.jump(lin, self.cpl == 3);
        // SAFETY: as in `blocks`.
        if !known.is_null() && unsafe { (*known).valid.get() } {
            return Ok(known);
        }
        self.lookup()
    }

    /// The block at `rip`; raises what fetching it raises.
    #[inline(never)]
    fn lookup(&mut self) -> Result<*const Block, Stop> {
        let lin = self.code_lin(self.rip);
        let b = self.block_at(lin, false)?;
        // SAFETY: as in `blocks`.
        let global = self.is_global(lin) && unsafe { (*b).gpa2.is_none() };
        self.cache.add_jump(lin, self.cpl == 3, global, b);
        Ok(b)
    }

    /// One instruction, with all that may happen around it.
    fn step(&mut self) -> Why {
        let lin = self.code_lin(self.rip);
        if self.dr7 & 0xFF != 0 && self.rflags & fl::RF == 0 {
            let hits = self.code_breakpoints(lin);
            if hits != 0 {
                self.exc = Exc { vector: vec::DB, error: None, payload: hits };
                return self.stop(Stop::Exception);
            }
        }
        let trap = self.rflags & fl::TF != 0;
        let rf = self.rflags & fl::RF;
        self.shadow = false;
        self.watch_hits = 0;
        self.no_trap = false;
        self.replay_pos = 0;
        let block = match self.block_at(lin, true) {
            Ok(b) => b,
            Err(s) => return self.stop(s),
        };
        self.r[R_RIP as usize] = self.rip;
        self.cache.current = block;
        self.rflags &= !fl::RF;
        // SAFETY: as in `blocks`.
        let flow = unsafe {
            let op = (*block).ops.as_ptr();
            ((*op).f.get())(self, op)
        };
        if flow == STOP {
            self.rflags |= rf;
            let s = self.stopped.take().unwrap_or(Stop::Exception);
            return self.stop(s);
        }
        self.cache.retired = self.cache.retired.wrapping_add(1);
        self.replay_done();
        let bits = self.watch_hits | if trap && !self.no_trap { 1 << 14 } else { 0 };
        if bits != 0 {
            self.exc = Exc { vector: vec::DB, error: None, payload: bits };
            return self.stop(Stop::Exception);
        }
        if self.vcpu().has_cap(Caps::MTRAP_EXIT) {
            self.vcpu().stats.mtrap.inc();
            return Why::Exit(Exit::Mtrap);
        }
        Why::Look
    }

    /// Instruction breakpoints at `lin`: DR6 bits 0-3.
    fn code_breakpoints(&self, lin: u64) -> u64 {
        (0..4)
            .filter(|i| {
                self.dr7 >> (2 * i) & 3 != 0
                    && self.dr7 >> (16 + 4 * i) & 3 == 0
                    && self.dr[*i] == lin
            })
            .fold(0, |m, i| m | 1 << i)
    }

    /// What userland answered for the instruction is used up.
    fn replay_done(&mut self) {
        self.replay.clear();
        self.replay_pos = 0;
    }

    /// An instruction could not complete.
    #[inline(never)]
    fn stop(&mut self, s: Stop) -> Why {
        match s {
            Stop::Exit => match self.exit.take() {
                Some(e) => {
                    self.count_exit(&e);
                    Why::Exit(e)
                }
                None => Why::Look,
            },
            Stop::Exception => {
                self.replay_done();
                self.vcpu().stats.exceptions.inc();
                match self.deliver() {
                    Ok(()) => Why::Look,
                    Err(u) => self.undeliverable(u).map_or(Why::Ended, Why::Exit),
                }
            }
        }
    }

    fn count_exit(&self, e: &Exit) {
        let s = &self.vcpu().stats;
        if matches!(e, Exit::Mmio { .. }) {
            s.mmio.inc();
        }
    }

    /// HLT.
    pub fn halt(&mut self) -> Result<Next, Stop> {
        self.vcpu().stats.hlt.inc();
        self.halted = true;
        Ok(Next::Break)
    }
}
