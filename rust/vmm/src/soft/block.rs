//! Decoded blocks and how they are found: by physical address for their life, by linear address
//! for speed.
//!
//! A block never leaves the linear page that it starts in, but for one instruction that straddles
//! two pages; such a block is found only through the jump cache, whose entries die with the
//! translations that they were found by.  Blocks belong to one vCPU.  A page with blocks carries
//! the `CODE` flag, which keeps fast writes away from it; `Cpu::code_written` drops what a write
//! touches.

use super::Cpu;
use super::op::*;
use super::translate::Code;
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ptr;

const JUMP_ENTRIES: usize = 4096;
/// Bits of a filter of pages.
const JUMP_PAGES: usize = 4096;
/// Ops after which the whole cache is dropped: bounds its memory (about 100 bytes an op).
const MAX_CACHED_OPS: usize = 600_000;

/// Mode bits that decide how bytes decode.
pub mod mode {
    /// 0: 16-bit code, 1: 32, 2: 64.
    pub const BITS: u8 = 3;
    /// Stack pointer wider than 16 bits.
    pub const BIG_STACK: u8 = 1 << 2;
    /// Segments need no checks.
    pub const FLAT: u8 = 1 << 3;
    /// One instruction only.
    pub const SINGLE: u8 = 1 << 4;
    /// SSE and AVX instructions are allowed.
    pub const VECTOR: u8 = 1 << 5;
}

pub struct Block {
    pub ops: Box<[Op]>,
    /// Where a handler's own data lives: instructions of slow handlers, native stubs.
    pub data: Vec<Box<dyn Any>>,
    /// Successors in the same page: not taken, taken.
    pub links: [Cell<*const Block>; 2],
    pub valid: Cell<bool>,
    /// Physical address and length of its bytes.
    pub gpa: u64,
    pub len: u64,
    /// Physical page of the second part of a straddling instruction.
    pub gpa2: Option<u64>,
    /// Guest instructions; `ops` may have one more entry that leaves the block.
    pub count: u64,
    /// Key in the cache's map.
    pub(super) key: u64,
    /// How often it has been interpreted, for a start.
    pub runs: Cell<u16>,
    /// Its translated code; null: none, or none any more.
    pub entry: Cell<*const u8>,
    pub(super) code: UnsafeCell<Option<Box<Code>>>,
}

impl Block {
    /// What belongs to its translated code, if it ever had any.
    #[expect(clippy::mut_from_ref, reason = "blocks belong to one vCPU's thread")]
    pub fn code(&self) -> Option<&mut Code> {
        // SAFETY: callers are on the thread that has the block's vCPU, and none keeps the
        // reference while another is taken.
        unsafe { (*self.code.get()).as_deref_mut() }
    }

    /// The mode bits that it was decoded with.
    pub fn mode(&self) -> u8 {
        self.key as u8
    }

    pub fn set_code(&self, code: Code) {
        self.entry.set(code.entry);
        // SAFETY: as in `code`.
        unsafe { *self.code.get() = Some(Box::new(code)) };
    }
}

#[derive(Clone, Copy)]
struct Jump {
    lin: u64,
    key: u64,
    block: *const Block,
}

/// Multiplicative hash of page numbers and block keys, which are not the guest's to choose freely
/// beyond where its code lies.
#[derive(Default)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        // The map picks its bucket by the low bits, and a product has its mixture in the high ones.
        self.0 ^ self.0 >> 32
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = (self.0.rotate_left(5) ^ v).wrapping_mul(0x517C_C1B7_2722_0A95);
    }
}

type Map<V> = HashMap<u64, V, BuildHasherDefault<KeyHasher>>;

pub struct Cache {
    jumps: Box<[Jump]>,
    /// Part of every jump entry's key; changing it empties the jump cache.
    jump_gen: u64,
    /// Number of the address space (12 bits), the other part; 0 in entries for code that is in
    /// all of them.
    space: u64,
    /// Linear pages, by their low bits, that jump entries may lead to.
    jump_pages: Box<[u64; JUMP_PAGES / 64]>,
    map: Map<*const Block>,
    pages: Map<Vec<*const Block>>,
    #[expect(clippy::vec_box, reason = "blocks are pointed to: they must not move")]
    blocks: Vec<Box<Block>>,
    ops: usize,
    /// Pages that lost their last block.
    pub emptied: Vec<u64>,
    pub mode: u8,
    /// The block being run.
    pub current: *const Block,
    /// Instructions completed.
    pub retired: u64,
    pub decoded: u64,
    pub invalidated: u64,
}

impl Default for Cache {
    fn default() -> Self {
        Cache {
            jumps: vec![Jump { lin: 0, key: 0, block: ptr::null() }; JUMP_ENTRIES].into(),
            jump_gen: 1,
            space: 0,
            jump_pages: Box::new([0; JUMP_PAGES / 64]),
            map: Map::default(),
            pages: Map::default(),
            blocks: Vec::new(),
            ops: 0,
            emptied: Vec::new(),
            mode: 0,
            current: ptr::null(),
            retired: 0,
            decoded: 0,
            invalidated: 0,
        }
    }
}

fn key(gpa: u64, mode: u8) -> u64 {
    gpa << 8 | u64::from(mode)
}

impl Cache {
    pub fn flush_jumps(&mut self) {
        self.jump_gen += 1;
        self.jump_pages.fill(0);
    }

    /// Forget the jumps to one page, or more.
    pub fn flush_jumps_to(&mut self, lin: u64) {
        let bit = (lin >> 12) as usize % JUMP_PAGES;
        if self.jump_pages[bit / 64] >> (bit % 64) & 1 != 0 {
            self.flush_jumps();
        }
    }

    /// Find only what was found in this address space.
    pub fn enter_space(&mut self, asid: u64) {
        self.space = asid;
    }

    pub fn set_mode(&mut self, bits: u32, big_stack: bool, flat: bool, vector: bool) {
        self.mode = (bits / 32) as u8
            | if vector { mode::VECTOR } else { 0 }
            | if big_stack { mode::BIG_STACK } else { 0 }
            | if flat { mode::FLAT } else { 0 };
    }

    pub(super) fn jump_key(&self, user: bool) -> u64 {
        self.global_jump_key(user) | self.space << 8
    }

    /// Key of jumps to code that is in all address spaces.
    pub(super) fn global_jump_key(&self, user: bool) -> u64 {
        self.jump_gen << 20 | u64::from(self.mode) | u64::from(user) << 7
    }

    /// Block for a linear address, if the jump cache has it.
    #[inline(always)]
    pub fn jump(&self, lin: u64, user: bool) -> *const Block {
        let j = &self.jumps[(lin ^ lin >> 12) as usize % JUMP_ENTRIES];
        let known = j.key == self.jump_key(user) || j.key == self.global_jump_key(user);
        if j.lin == lin && known { j.block } else { ptr::null() }
    }

    pub fn add_jump(&mut self, lin: u64, user: bool, global: bool, block: *const Block) {
        let key = if global { self.global_jump_key(user) } else { self.jump_key(user) };
        let bit = (lin >> 12) as usize % JUMP_PAGES;
        self.jump_pages[bit / 64] |= 1 << (bit % 64);
        self.jumps[(lin ^ lin >> 12) as usize % JUMP_ENTRIES] = Jump { lin, key, block };
    }

    /// Block for a physical address; `gpa2` is where the following page is, if it is known.
    pub fn get(&self, gpa: u64, single: bool) -> Option<*const Block> {
        let m = self.mode | if single { mode::SINGLE } else { 0 };
        self.map.get(&key(gpa, m)).copied()
    }

    /// Too much cached: `drop_blocks` is due.
    pub fn full(&self) -> bool {
        self.ops > MAX_CACHED_OPS
    }
}

/// Handler that replaces those of a block whose code has been overwritten while it runs.
unsafe fn overwritten(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: called as a handler, with its op; `current` is the block of that op.
    let (op, n) = unsafe { (&*op, (*cpu.cache.current).count) };
    cpu.rip = op.rip(cpu) & cpu.rip_mask();
    // `run` will count the whole block.
    cpu.cache.retired = cpu.cache.retired.wrapping_sub(n - u64::from(op.pos));
    BREAK
}

impl Cpu {
    /// Take a decoded block into the cache.
    pub fn insert(&mut self, mut block: Box<Block>, single: bool) -> *const Block {
        let m = self.cache.mode | if single { mode::SINGLE } else { 0 };
        block.key = key(block.gpa, m);
        let p: *const Block = &*block;
        let pages = [Some(block.gpa >> 12), block.gpa2.map(|g| g >> 12)];
        self.cache.ops += block.ops.len();
        self.cache.decoded += 1;
        self.cache.map.insert(block.key, p);
        self.cache.blocks.push(block);
        for page in pages.into_iter().flatten() {
            self.cache.pages.entry(page).or_default().push(p);
        }
        p
    }

    /// Before decoding from a physical page: see to it that writes to it will be noticed.
    pub fn watch_code_page(&mut self, gpa: u64) {
        if !self.cache.pages.contains_key(&(gpa >> 12)) {
            self.protect_code_page(gpa);
            self.cache.pages.insert(gpa >> 12, Vec::new());
        }
    }

    /// Bytes of guest memory were written where code may be: drop the blocks that they touch here,
    /// and tell the other vCPUs.
    pub fn code_written(&mut self, gpa: u64, len: u64) {
        self.invalidate(gpa, len);
        let me = self.id;
        for v in &self.vm().vcpus {
            if v.id != me {
                v.code_written(gpa, len);
            }
        }
    }

    /// Drop this vCPU's blocks that overlap the bytes.
    pub fn invalidate(&mut self, gpa: u64, len: u64) {
        let mut page = gpa >> 12;
        while page <= (gpa + len - 1) >> 12 {
            if let Some(list) = self.cache.pages.get_mut(&page) {
                let hit: Vec<*const Block> = list
                    .extract_if(.., |&mut b| {
                        // SAFETY: blocks live until `drop_blocks`, which empties the lists.
                        let b = unsafe { &*b };
                        touches(b, gpa, len)
                    })
                    .collect();
                if list.is_empty() {
                    self.cache.emptied.push(page);
                }
                for b in hit {
                    self.kill(b);
                }
            }
            page += 1;
        }
    }

    fn kill(&mut self, b: *const Block) {
        // SAFETY: as in `invalidate`.
        let block = unsafe { &*b };
        if !block.valid.replace(false) {
            return;
        }
        self.cache.invalidated += 1;
        self.unlead(block);
        if self.cache.map.get(&block.key) == Some(&b) {
            self.cache.map.remove(&block.key);
        }
        if b == self.cache.current {
            for op in &block.ops {
                op.f.set(overwritten);
            }
        }
    }

    /// Give up the pages whose last block has gone.  Only between blocks.
    pub fn tidy(&mut self) {
        let mut gone = std::mem::take(&mut self.cache.emptied);
        gone.sort_unstable();
        gone.dedup();
        gone.retain(|p| self.cache.pages.get(p).is_some_and(Vec::is_empty));
        for p in &gone {
            self.cache.pages.remove(p);
        }
        self.release_code_pages(gone);
    }

    /// Drop all blocks.  Only between blocks.
    pub fn drop_blocks(&mut self) {
        let pages: Vec<u64> = self.cache.pages.drain().map(|(p, _)| p).collect();
        if !pages.is_empty() {
            self.release_code_pages(pages);
        }
        let c = &mut self.cache;
        c.emptied.clear();
        c.map.clear();
        c.blocks.clear();
        c.ops = 0;
        c.current = ptr::null();
        c.flush_jumps();
        self.restart_translator();
    }
}

fn touches(b: &Block, gpa: u64, len: u64) -> bool {
    let first = 0x1000 - (b.gpa & 0xFFF);
    let (a, n) = (b.gpa, b.len.min(first));
    let over = |a: u64, n: u64| a < gpa + len && gpa < a + n;
    over(a, n) || b.gpa2.is_some_and(|g| over(g, b.len - first))
}
