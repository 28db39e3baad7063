//! Guest instructions a second of the interpreter, on a few loops.

use std::time::Instant;
use vmm::exit::Exit;
use vmm::regs::{Reg, SegDesc};
use vmm::vm::Vm;

/// Name, code; the loop counter is RCX, and the code ends with a store to an unmapped address.
const LOOPS: &[(&str, &[u8], u64)] = &[
    // l: add rax,rbx; xor rdx,rax; lea rsi,[rsi+rax*2+1]; dec rcx; jnz l
    (
        "alu",
        &[
            0x48, 0x01, 0xD8, 0x48, 0x31, 0xC2, 0x48, 0x8D, 0x74, 0x46, 0x01, 0x48, 0xFF, 0xC9,
            0x75, 0xF0,
        ],
        5,
    ),
    // l: mov rax,[rdi]; add rax,rcx; mov [rdi+8],rax; push rax; pop rbx; dec rcx; jnz l
    (
        "memory",
        &[
            0x48, 0x8B, 0x07, 0x48, 0x01, 0xC8, 0x48, 0x89, 0x47, 0x08, 0x50, 0x5B, 0x48, 0xFF,
            0xC9, 0x75, 0xEF,
        ],
        7,
    ),
    // l: call f; dec rcx; jnz l; jmp out; f: ret; out:
    ("call", &[0xE8, 0x07, 0, 0, 0, 0x48, 0xFF, 0xC9, 0x75, 0xF6, 0xEB, 0x01, 0xC3], 4),
    // Eight instructions; dec rcx; jnz l.
    ("movdqa", &eight([0x66, 0x0F, 0x6F, 0xC1]), 10), // movdqa xmm0,xmm1
    ("paddd", &eight([0x66, 0x0F, 0xFE, 0x07]), 10),  // paddd xmm0,[rdi]
    ("addps", &eight([0x3E, 0x0F, 0x58, 0xC1]), 10),  // addps xmm0,xmm1, with a prefix
    ("vpaddd", &eight([0xC5, 0xFD, 0xFE, 0xC1]), 10), // vpaddd ymm0,ymm0,ymm1
    ("vmovdqu", &eight([0xC5, 0xFE, 0x7F, 0x07]), 10), // vmovdqu [rdi],ymm0
    ("tzcnt", &eight([0xF3, 0x0F, 0xBC, 0xC3]), 10),  // tzcnt eax,ebx
    // Sixteen.
    ("fadd", &eight([0xDC, 0xC1, 0xD8, 0xC1]), 18), // fadd st1,st0; fadd st0,st1
    ("fld", &eight([0xDD, 0x07, 0xDD, 0x1F]), 18),  // fld m64; fstp m64
];

/// Eight times these bytes, and the loop's end.
const fn eight(insn: [u8; 4]) -> [u8; 37] {
    let mut b = [0; 37];
    let mut i = 0;
    while i < 32 {
        b[i] = insn[i % 4];
        i += 1;
    }
    [b[32], b[33], b[34], b[35], b[36]] = [0x48, 0xFF, 0xC9, 0x75, 0xDB];
    b
}

fn main() {
    for &(name, code, per) in LOOPS {
        let vm = Vm::new(1).expect("a VM");
        vm.mem.create_segment(0, "sysmem", 4 << 20, None).expect("memory");
        vm.mmap_memseg(0, 0, 0, 4 << 20, 7).expect("map");
        let mut bytes = code.to_vec();
        bytes.extend([0xA2, 0, 0, 0, 0x80, 0, 0, 0, 0]); // mov [0x80000000], al
        vm.mem.write(0x1000, &bytes).expect("code");
        vm.mem.write(0x2000, &0x3007u64.to_le_bytes()).expect("PML4");
        for i in 0..4u64 {
            vm.mem.write(0x3000 + 8 * i, &(i << 30 | 0x87).to_le_bytes()).expect("PDPT");
        }
        let v = vm.vcpu(0).expect("vCPU");
        v.with_cpu(|c| {
            c.set_reg(Reg::Cr3, 0x2000);
            c.set_reg(Reg::Cr4, 0x4_0620); // PAE OSFXSR OSXMMEXCPT OSXSAVE
            c.set_reg(Reg::Efer, 0x500);
            c.set_reg(Reg::Cr0, 0x8000_0033);
            let data = SegDesc { base: 0, limit: u32::MAX, access: 0xC093 };
            for r in [Reg::Ds, Reg::Es, Reg::Ss] {
                c.set_desc(r, data);
            }
            c.set_desc(Reg::Cs, SegDesc { base: 0, limit: u32::MAX, access: 0xA09B });
            c.set_reg(Reg::Rip, 0x1000);
            c.set_reg(Reg::Rsp, 0x10_0000);
            c.set_reg(Reg::Rdi, 0x20_0000);
            c.xcr0 = 7;
            c.fpu.fcw = 0x37F;
            c.fpu.ftw = 3;
            c.set_reg(Reg::Rcx, 10_000_000);
        });
        vm.activate_cpu(0).expect("active");
        let t = Instant::now();
        let e = v.run(&vm).expect("run");
        let s = t.elapsed().as_secs_f64();
        assert!(matches!(e, Exit::Mmio { gpa: 0x8000_0000, .. }), "{e:?}");
        println!("{name:8} {:7.0} MIPS", 10.0 * per as f64 / s);
    }
}
