//! Host instructions as bytes, with labels.
//!
//! What the guest wrote is encoded by iced; the few fixed sequences around it are spelled here.
//! The processor's state is reached through the GS base, which points at [`Cpu`].
//!
//! [`Cpu`]: crate::soft::Cpu

use iced_x86::{Encoder, IcedError, Instruction};

/// A host register by its number in the instruction encoding.
pub type Reg = u8;

pub const RAX: Reg = 0;
pub const RSP: Reg = 4;
pub const RSI: Reg = 6;
pub const RDI: Reg = 7;
pub const RDX: Reg = 2;
/// Second scratch register.
pub const S2: Reg = 11;
/// First scratch register: addresses.
pub const S1: Reg = 15;

/// Condition codes of Jcc.
pub const NE: u8 = 5;
pub const E: u8 = 4;
pub const B: u8 = 2;
pub const A: u8 = 7;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Label(usize);

pub struct Asm {
    encoder: Encoder,
    /// Host address of the first byte.
    base: u64,
    len: usize,
    labels: Vec<Option<usize>>,
    /// Where a 32-bit distance is to be filled in.
    uses: Vec<(usize, Label)>,
}

impl Asm {
    /// Code that will run at `base`.
    pub fn new(base: u64) -> Asm {
        let encoder = Encoder::new(64);
        Asm { encoder, base, len: 0, labels: Vec::new(), uses: Vec::new() }
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    pub fn bind(&mut self, l: Label) {
        self.labels[l.0] = Some(self.len);
    }

    pub fn here(&mut self) -> Label {
        let l = self.label();
        self.bind(l);
        l
    }

    /// Host address of a label that is bound.
    pub fn address(&self, l: Label) -> u64 {
        self.base + self.labels[l.0].expect("a label is bound before the end") as u64
    }

    /// The code, distances filled in.
    pub fn finish(mut self) -> Vec<u8> {
        let mut code = self.encoder.take_buffer();
        for (at, l) in self.uses {
            let target = self.labels[l.0].expect("a label is bound before the end");
            let distance = (target as i64 - (at + 4) as i64) as i32;
            code[at..at + 4].copy_from_slice(&distance.to_le_bytes());
        }
        code
    }

    pub fn byte(&mut self, b: u8) {
        self.encoder.write_u8(b);
        self.len += 1;
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.byte(b);
        }
    }

    fn imm32(&mut self, v: i32) {
        self.bytes(&v.to_le_bytes());
    }

    /// An instruction whose operands have been renamed.
    pub fn insn(&mut self, i: &Instruction) -> Result<(), IcedError> {
        self.len += self.encoder.encode(i, self.base + self.len as u64)?;
        Ok(())
    }

    fn rex(&mut self, wide: bool, reg: Reg, index: Reg, base: Reg) {
        let w = u8::from(wide) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        if w != 0 {
            self.byte(0x40 | w);
        }
    }

    /// `op reg, gs:[offset]`, or the store form of the opcode.
    fn gs(&mut self, wide: bool, op: u8, reg: Reg, offset: usize) {
        self.byte(0x65);
        self.rex(wide, reg, 0, 0);
        self.bytes(&[op, (reg & 7) << 3 | 4, 0x25]);
        self.imm32(offset as i32);
    }

    pub fn load(&mut self, reg: Reg, offset: usize) {
        self.gs(true, 0x8B, reg, offset);
    }

    pub fn load32(&mut self, reg: Reg, offset: usize) {
        self.gs(false, 0x8B, reg, offset);
    }

    pub fn store(&mut self, offset: usize, reg: Reg) {
        self.gs(true, 0x89, reg, offset);
    }

    /// `mov gs:[offset], ax`
    pub fn store_ax(&mut self, offset: usize) {
        self.byte(0x66);
        self.gs(false, 0x89, RAX, offset);
    }

    /// `movzx eax, word gs:[offset]`
    pub fn load_ax(&mut self, offset: usize) {
        self.bytes(&[0x65, 0x0F, 0xB7, 0x04, 0x25]);
        self.imm32(offset as i32);
    }

    pub fn add_gs(&mut self, reg: Reg, offset: usize) {
        self.gs(true, 0x03, reg, offset);
    }

    pub fn cmp_gs(&mut self, reg: Reg, offset: usize) {
        self.gs(true, 0x3B, reg, offset);
    }

    pub fn xor_gs32(&mut self, reg: Reg, offset: usize) {
        self.gs(false, 0x33, reg, offset);
    }

    /// `test reg, mask` of the low byte
    pub fn test_low(&mut self, reg: Reg, mask: u8) {
        self.bytes(&[0x40 | reg >> 3, 0xF6, 0xC0 | reg & 7, mask]);
    }

    /// `jmp gs:[offset]`
    pub fn jmp_gs(&mut self, offset: usize) {
        self.gs(false, 0xFF, 4, offset);
    }

    pub fn mov(&mut self, to: Reg, from: Reg) {
        self.rex(true, from, 0, to);
        self.bytes(&[0x89, 0xC0 | (from & 7) << 3 | to & 7]);
    }

    pub fn mov32(&mut self, to: Reg, from: Reg) {
        self.rex(false, from, 0, to);
        self.bytes(&[0x89, 0xC0 | (from & 7) << 3 | to & 7]);
    }

    pub fn mov_imm(&mut self, to: Reg, v: u64) {
        if let Ok(v) = u32::try_from(v) {
            self.rex(false, 0, 0, to);
            self.byte(0xB8 | to & 7);
            self.imm32(v as i32);
        } else {
            self.rex(true, 0, 0, to);
            self.byte(0xB8 | to & 7);
            self.bytes(&v.to_le_bytes());
        }
    }

    /// An instruction with a register and `[base + displacement]`.
    pub fn mem(&mut self, wide: bool, op: u8, reg: Reg, base: Reg, displacement: i32) {
        self.rex(wide, reg, 0, base);
        self.byte(op);
        self.modrm(reg, base, displacement);
    }

    fn modrm(&mut self, reg: Reg, base: Reg, displacement: i32) {
        let short = i8::try_from(displacement).is_ok();
        let mode = match (displacement, base & 7) {
            (0, 0..=4 | 6 | 7) => 0,
            _ if short => 0x40,
            _ => 0x80,
        };
        self.byte(mode | (reg & 7) << 3 | base & 7);
        if base & 7 == RSP {
            self.byte(0x24);
        }
        match mode {
            0 => {}
            0x40 => self.byte(displacement as u8),
            _ => self.imm32(displacement),
        }
    }

    /// `lea to, [base + displacement]`
    pub fn lea(&mut self, to: Reg, base: Reg, displacement: i32) {
        self.mem(true, 0x8D, to, base, displacement);
    }

    /// `lea to, [base + index << scale + displacement]`; 32 bits wide if not `wide`.
    pub fn lea_index(
        &mut self,
        wide: bool,
        to: Reg,
        base: Option<Reg>,
        index: Reg,
        scale: u8,
        displacement: i32,
    ) {
        self.rex(wide, to, index, base.unwrap_or(0));
        self.byte(0x8D);
        let sib = scale << 6 | (index & 7) << 3;
        match base {
            Some(b) => {
                self.bytes(&[0x80 | (to & 7) << 3 | 4, sib | b & 7]);
            }
            None => self.bytes(&[(to & 7) << 3 | 4, sib | 5]),
        }
        self.imm32(displacement);
    }

    /// Group 1 (`add` 0, `and` 4, `sub` 5, `cmp` 7) with an immediate.
    pub fn alu_imm(&mut self, wide: bool, op: u8, reg: Reg, v: i32) {
        self.rex(wide, 0, 0, reg);
        if let Ok(v) = i8::try_from(v) {
            self.bytes(&[0x83, 0xC0 | op << 3 | reg & 7, v as u8]);
        } else {
            self.bytes(&[0x81, 0xC0 | op << 3 | reg & 7]);
            self.imm32(v);
        }
    }

    /// `op to, from` for an opcode of the form "r, r/m".
    pub fn alu(&mut self, wide: bool, op: u8, to: Reg, from: Reg) {
        self.rex(wide, to, 0, from);
        self.bytes(&[op, 0xC0 | (to & 7) << 3 | from & 7]);
    }

    /// Shift group: `shl` 4, `shr` 5, `sar` 7.
    pub fn shift(&mut self, op: u8, reg: Reg, by: u8) {
        self.rex(true, 0, 0, reg);
        self.bytes(&[0xC1, 0xC0 | op << 3 | reg & 7, by]);
    }

    pub fn jcc(&mut self, cc: u8, to: Label) {
        self.bytes(&[0x0F, 0x80 | cc]);
        self.distance(to);
    }

    pub fn jmp(&mut self, to: Label) {
        self.byte(0xE9);
        self.distance(to);
    }

    fn distance(&mut self, to: Label) {
        self.uses.push((self.len, to));
        self.imm32(0);
    }

    /// `jmp` to code elsewhere in the buffer.
    pub fn jmp_to(&mut self, target: u64) {
        self.byte(0xE9);
        self.distance_to(target);
    }

    pub fn jcc_to(&mut self, cc: u8, target: u64) {
        self.bytes(&[0x0F, 0x80 | cc]);
        self.distance_to(target);
    }

    pub fn call_to(&mut self, target: u64) {
        self.byte(0xE8);
        self.distance_to(target);
    }

    fn distance_to(&mut self, target: u64) {
        let next = self.base + self.len as u64 + 4;
        self.imm32(target.wrapping_sub(next) as i32);
    }

    /// `jmp [reg + displacement]`
    pub fn jmp_mem(&mut self, reg: Reg, displacement: i32) {
        self.mem(false, 0xFF, 4, reg, displacement);
    }

    /// `call reg`
    pub fn call_reg(&mut self, reg: Reg) {
        self.rex(false, 0, 0, reg);
        self.bytes(&[0xFF, 0xD0 | reg & 7]);
    }

    pub fn push(&mut self, reg: Reg) {
        self.rex(false, 0, 0, reg);
        self.byte(0x50 | reg & 7);
    }

    pub fn pop(&mut self, reg: Reg) {
        self.rex(false, 0, 0, reg);
        self.byte(0x58 | reg & 7);
    }

    pub fn ret(&mut self) {
        self.byte(0xC3);
    }
}
