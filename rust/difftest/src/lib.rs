//! The software processor against the one it runs on.
//!
//! A [`Case`] is a few instructions with a state to start from.  [`native::Native`] runs it in a
//! child process of its own on the host, [`guest::Guest`] at CPL 3 in a VM; both see the same
//! bytes at the same addresses, and both report an [`Outcome`], which must be equal to the bit,
//! undefined flags included.

pub mod generate;
pub mod guest;
pub mod native;

/// Where the code of a case lies.
pub const CODE: u64 = 0x2000_0000;
/// Two pages that a case may read and write.
pub const DATA: u64 = 0x2001_0000;
pub const DATA_LEN: usize = 0x2000;

/// Code width of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 16-bit code, with 64 KiB segments at `CODE` and `DATA` in a local descriptor table.
    Small,
    /// 32-bit code in a compatibility-mode segment.
    Compat,
    Long,
}

impl Mode {
    /// What `DATA` is in the case's data segments.
    pub fn data(self) -> u64 {
        if self == Mode::Small { 0 } else { DATA }
    }

    pub fn bits(self) -> u32 {
        match self {
            Mode::Small => 16,
            Mode::Compat => 32,
            Mode::Long => 64,
        }
    }
}

/// The registers that user code can change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regs {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8-R15.
    pub gpr: [u64; 16],
    pub rip: u64,
    /// Arithmetic flags and DF.
    pub flags: u64,
    pub ymm: [[u64; 4]; 16],
    pub mxcsr: u32,
    pub fcw: u16,
    pub fsw: u16,
    pub ftw: u8,
    pub st: [[u64; 2]; 8],
}

pub const FLAGS: u64 = 0xCD5;

#[derive(Clone, Debug)]
pub struct Case {
    pub mode: Mode,
    pub code: Vec<u8>,
    pub regs: Regs,
    pub data: Vec<u8>,
}

/// Signals as a kernel makes them of exceptions, so that both sides speak of the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Reached the INT3 behind the code.
    Done,
    /// SIGFPE: #DE, #MF, #XM.
    Arithmetic,
    /// SIGILL: #UD.
    Illegal,
    /// SIGSEGV with an address: #PF.
    Page(u64),
    /// SIGSEGV without: #GP and others.
    Protection,
    /// SIGBUS: #SS, #AC.
    Bus,
    /// SIGTRAP: #DB.
    Trap,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub end: End,
    pub regs: Regs,
    pub data: Vec<u8>,
}

impl Case {
    /// Differences between two outcomes of this case, one a line.
    pub fn compare(&self, host: &Outcome, ours: &Outcome) -> Vec<String> {
        const NAMES: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ];
        let mut d = Vec::new();
        let mut say =
            |what: String, h: String, o: String| d.push(format!("{what}: host {h}, ours {o}"));
        if host.end != ours.end && !self.any_fault(host.end, ours.end) {
            say("end".into(), format!("{:x?}", host.end), format!("{:x?}", ours.end));
        }
        let (h, o) = (&host.regs, &ours.regs);
        let count = if self.mode == Mode::Long { 16 } else { 8 };
        for (name, (a, b)) in NAMES.iter().zip(h.gpr.iter().zip(&o.gpr)).take(count) {
            // Going to a 16-bit stack and back, a kernel need not keep the upper half.
            let mask = if self.mode == Mode::Small && *name == "rsp" { 0xFFFF } else { u64::MAX };
            if (a ^ b) & mask != 0 {
                say((*name).into(), format!("{a:#x}"), format!("{b:#x}"));
            }
        }
        // PE beside an unmasked overflow or underflow: see `native::simd::unmasked`.
        let sticky = if host.end == End::Arithmetic { !0x20 } else { !0 };
        let defined = FLAGS & !self.undefined_flags();
        let words = [
            ("rip", h.rip, o.rip),
            ("flags", h.flags & defined, o.flags & defined),
            ("mxcsr", (h.mxcsr & sticky).into(), (o.mxcsr & sticky).into()),
            ("fcw", h.fcw.into(), o.fcw.into()),
            ("fsw", h.fsw.into(), o.fsw.into()),
            ("ftw", h.ftw.into(), o.ftw.into()),
        ];
        for (n, a, b) in words {
            if a != b {
                say(n.into(), format!("{a:#x}"), format!("{b:#x}"));
            }
        }
        for i in 0..count {
            if h.ymm[i] != o.ymm[i] {
                say(format!("ymm{i}"), format!("{:x?}", h.ymm[i]), format!("{:x?}", o.ymm[i]));
            }
        }
        for i in 0..8 {
            let (a, b) = (h.st[i], o.st[i]);
            if a[0] != b[0] || a[1] as u16 != b[1] as u16 {
                say(format!("st{i}"), format!("{a:x?}"), format!("{b:x?}"));
            }
        }
        if let Some(at) = (0..self.data.len()).find(|&i| host.data[i] != ours.data[i]) {
            let end = (at + 16).min(self.data.len());
            say(
                format!("data+{at:#x}"),
                format!("{:02x?}", &host.data[at..end]),
                format!("{:02x?}", &ours.data[at..end]),
            );
        }
        d
    }

    /// Both ended in a fault of an instruction that may touch its operands in any order.
    fn any_fault(&self, host: End, ours: End) -> bool {
        use iced_x86::{Decoder, Mnemonic};
        let options = vmm::soft::cpuid::decoder_options();
        let mut code = Decoder::new(self.mode.bits(), &self.code, options).into_iter();
        let fault = |e| matches!(e, End::Page(_) | End::Protection | End::Bus);
        fault(host)
            && fault(ours)
            && code.any(|i| {
                use Mnemonic::*;
                matches!(
                    i.mnemonic(),
                    Cmpsb | Cmpsw | Cmpsd | Cmpsq | Maskmovdqu | Maskmovq | Vmaskmovdqu
                )
            })
    }

    /// Decimal adjustments are the one thing that our processor cannot have the host do (they
    /// do not exist in 64-bit code), so the flags that they leave undefined may differ.
    fn undefined_flags(&self) -> u64 {
        use iced_x86::{Decoder, Mnemonic, RflagsBits};
        let bits = [
            (RflagsBits::CF, 0x1),
            (RflagsBits::PF, 0x4),
            (RflagsBits::AF, 0x10),
            (RflagsBits::ZF, 0x40),
            (RflagsBits::SF, 0x80),
            (RflagsBits::OF, 0x800),
        ];
        let options = vmm::soft::cpuid::decoder_options();
        Decoder::new(self.mode.bits(), &self.code, options)
            .into_iter()
            .filter(|i| {
                use Mnemonic::*;
                matches!(i.mnemonic(), Aaa | Aas | Aam | Aad | Daa | Das)
            })
            .flat_map(|i| bits.into_iter().filter(move |b| i.rflags_undefined() & b.0 != 0))
            .fold(0, |mask, b| mask | b.1)
    }

    /// The code as assembly, one instruction a line.
    pub fn listing(&self) -> String {
        use iced_x86::{Decoder, Formatter, NasmFormatter};
        let mut f = NasmFormatter::new();
        let mut text = String::new();
        let mut d = Decoder::with_ip(
            self.mode.bits(),
            &self.code,
            CODE,
            vmm::soft::cpuid::decoder_options(),
        );
        for i in &mut d {
            let at = (i.ip() - CODE) as usize;
            let mut line = String::new();
            f.format(&i, &mut line);
            let bytes: String =
                self.code[at..at + i.len()].iter().map(|b| format!("{b:02x}")).collect();
            text += &format!("  {:x} {bytes:<24} {line}\n", i.ip());
        }
        text
    }
}
