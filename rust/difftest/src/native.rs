//! The host's answer: the case runs in a traced child process.

use crate::*;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;

const NT_X86_XSTATE: usize = 0x202;
/// The longest XSAVE area of today's processors, with AMX, is about 11 KiB.
const XSAVE_MAX: usize = 16384;

pub struct Native {
    pid: libc::pid_t,
    code: *mut u8,
    data: *mut u8,
}

fn check(r: i64, what: &str) -> io::Result<i64> {
    if r < 0 {
        let e = io::Error::last_os_error();
        return Err(io::Error::new(e.kind(), format!("{what}: {e}")));
    }
    Ok(r)
}

/// A shared mapping of both areas; `at` gives fixed addresses.
fn map(fd: i32, offset: i64, len: usize, at: u64, prot: i32) -> io::Result<*mut u8> {
    let flags = libc::MAP_SHARED | if at != 0 { libc::MAP_FIXED_NOREPLACE } else { 0 };
    // SAFETY: a new mapping at an address that is free or the kernel's choice.
    let p = unsafe { libc::mmap(at as *mut libc::c_void, len, prot, flags, fd, offset) };
    if p == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(p.cast())
}

impl Native {
    /// Start the child that runs cases.
    pub fn new() -> io::Result<Native> {
        // SAFETY: plain system calls; the name is a C string.
        let fd = unsafe { libc::memfd_create(c"difftest".as_ptr(), 0) };
        check(fd.into(), "memfd_create")?;
        // SAFETY: as above.
        check(unsafe { libc::ftruncate(fd, 0x1000 + DATA_LEN as i64) }.into(), "ftruncate")?;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let code = map(fd, 0, 0x1000, 0, rw)?;
        let data = map(fd, 0x1000, DATA_LEN, 0, rw)?;
        // SAFETY: the child calls only async-signal-safe functions before it stops for good.
        let pid = unsafe { libc::fork() };
        check(pid.into(), "fork")?;
        if pid == 0 {
            let ok = map(fd, 0, 0x1000, CODE, rw | libc::PROT_EXEC).is_ok()
                && map(fd, 0x1000, DATA_LEN, DATA, rw).is_ok()
                && local_descriptor(0, CODE, 0xFFF, 2)
                && local_descriptor(1, DATA, DATA_LEN as u32 - 1, 0);
            // SAFETY: as above.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if ok && libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) == 0 {
                    libc::raise(libc::SIGSTOP);
                }
                libc::_exit(1);
            }
        }
        // SAFETY: the parent's own descriptor, used no more.
        unsafe { libc::close(fd) };
        let n = Native { pid, code, data };
        match n.wait()? {
            libc::SIGSTOP => Ok(n),
            s => Err(io::Error::other(format!("the traced child stopped with signal {s}"))),
        }
    }

    /// Wait until the child stops; the signal.
    fn wait(&self) -> io::Result<i32> {
        let mut status = 0;
        // SAFETY: waits for our own child.
        check(unsafe { libc::waitpid(self.pid, &raw mut status, 0) }.into(), "waitpid")?;
        if !libc::WIFSTOPPED(status) {
            return Err(io::Error::other(format!("the traced child ended: {status:#x}")));
        }
        Ok(libc::WSTOPSIG(status))
    }

    fn xstate(&self, set: bool, area: &mut [u8]) -> io::Result<usize> {
        let mut iov = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
        let request = if set { libc::PTRACE_SETREGSET } else { libc::PTRACE_GETREGSET };
        // SAFETY: `iov` describes `area`.
        let r = unsafe { libc::ptrace(request, self.pid, NT_X86_XSTATE, &raw mut iov) };
        check(r, "ptrace xstate")?;
        Ok(iov.iov_len)
    }

    pub fn run(&mut self, case: &Case) -> io::Result<Outcome> {
        let mut code = case.code.clone();
        code.resize(0x1000, 0xCC);
        // SAFETY: both are our mappings, of these sizes; the child is stopped.
        unsafe {
            ptr::copy_nonoverlapping(code.as_ptr(), self.code, 0x1000);
            ptr::copy_nonoverlapping(case.data.as_ptr(), self.data, DATA_LEN);
        }
        let mut area = vec![0; XSAVE_MAX];
        let len = self.xstate(false, &mut area)?;
        area.truncate(len);
        put_fpu(&case.regs, &mut area);
        self.xstate(true, &mut area)?;
        let mut u = MaybeUninit::<libc::user_regs_struct>::zeroed();
        // SAFETY: the structure is the kernel's, all zero is valid.
        let u = unsafe {
            check(libc::ptrace(libc::PTRACE_GETREGS, self.pid, 0, u.as_mut_ptr()), "getregs")?;
            u.assume_init_mut()
        };
        let g = &case.regs.gpr;
        (u.rax, u.rcx, u.rdx, u.rbx) = (g[0], g[1], g[2], g[3]);
        (u.rsp, u.rbp, u.rsi, u.rdi) = (g[4], g[5], g[6], g[7]);
        (u.r8, u.r9, u.r10, u.r11) = (g[8], g[9], g[10], g[11]);
        (u.r12, u.r13, u.r14, u.r15) = (g[12], g[13], g[14], g[15]);
        u.rip = if case.mode == Mode::Small { 0 } else { CODE };
        u.eflags = case.regs.flags | 0x202;
        u.orig_rax = u64::MAX;
        let (cs, data) = match case.mode {
            Mode::Small => (7, 0xF),
            Mode::Compat => (0x23, 0x2B),
            Mode::Long => (0x33, 0x2B),
        };
        u.cs = cs;
        (u.ss, u.ds, u.es, u.fs, u.gs) = (data, data, data, 0, 0);
        (u.fs_base, u.gs_base) = (0, 0);
        // SAFETY: `u` is a register set of the kernel's layout.
        unsafe {
            check(libc::ptrace(libc::PTRACE_SETREGS, self.pid, 0, ptr::from_mut(u)), "setregs")?;
            check(libc::ptrace(libc::PTRACE_CONT, self.pid, 0, 0), "cont")?;
        }
        let signal = self.wait()?;
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: as above.
        let info = unsafe {
            check(
                libc::ptrace(libc::PTRACE_GETSIGINFO, self.pid, 0, info.as_mut_ptr()),
                "siginfo",
            )?;
            check(libc::ptrace(libc::PTRACE_GETREGS, self.pid, 0, ptr::from_mut(u)), "getregs")?;
            info.assume_init()
        };
        let kernel = info.si_code == 0x80;
        let end = match signal {
            libc::SIGTRAP if kernel => End::Done,
            libc::SIGTRAP => End::Trap,
            libc::SIGFPE => End::Arithmetic,
            libc::SIGILL => End::Illegal,
            libc::SIGSEGV if kernel => End::Protection,
            // SAFETY: SIGSEGV has an address.
            libc::SIGSEGV => End::Page(unsafe { info.si_addr() } as u64),
            libc::SIGBUS => End::Bus,
            s => return Err(io::Error::other(format!("the case ended with signal {s}"))),
        };
        let mut area = vec![0; XSAVE_MAX];
        let len = self.xstate(false, &mut area)?;
        area.truncate(len);
        let mut regs = case.regs.clone();
        regs.gpr = [
            u.rax, u.rcx, u.rdx, u.rbx, u.rsp, u.rbp, u.rsi, u.rdi, u.r8, u.r9, u.r10, u.r11,
            u.r12, u.r13, u.r14, u.r15,
        ];
        regs.rip = u.rip;
        regs.flags = u.eflags & FLAGS;
        get_fpu(&mut regs, &area);
        let mut data = vec![0; DATA_LEN];
        // SAFETY: our mapping, of this size; the child is stopped.
        unsafe { ptr::copy_nonoverlapping(self.data, data.as_mut_ptr(), DATA_LEN) };
        Ok(Outcome { end, regs, data })
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: our own child and mappings.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, &raw mut status, 0);
            libc::munmap(self.code.cast(), 0x1000);
            libc::munmap(self.data.cast(), DATA_LEN);
        }
    }
}

/// A 16-bit segment in this process's LDT; `contents` is 0 for data and 2 for code.
fn local_descriptor(index: u32, base: u64, limit: u32, contents: u32) -> bool {
    // struct user_desc: entry, base, limit, flags (contents 2:1, useable 6).
    let d = [index, base as u32, limit, contents << 1 | 1 << 6];
    // SAFETY: writes one descriptor of this process, which nothing uses yet.
    unsafe { libc::syscall(libc::SYS_modify_ldt, 1, d.as_ptr(), size_of_val(&d)) == 0 }
}

/// Into an XSAVE area in standard form (SDM 1, 13.4): legacy region, header, AVX at 576.
fn put_fpu(r: &Regs, a: &mut [u8]) {
    a[0..2].copy_from_slice(&r.fcw.to_le_bytes());
    a[2..4].copy_from_slice(&r.fsw.to_le_bytes());
    a[4] = r.ftw;
    a[5..24].fill(0);
    a[24..28].copy_from_slice(&r.mxcsr.to_le_bytes());
    for i in 0..8 {
        a[32 + 16 * i..40 + 16 * i].copy_from_slice(&r.st[i][0].to_le_bytes());
        a[40 + 16 * i..48 + 16 * i].copy_from_slice(&(r.st[i][1] & 0xFFFF).to_le_bytes());
    }
    for i in 0..16 {
        for w in 0..2 {
            let at = 160 + 16 * i + 8 * w;
            a[at..at + 8].copy_from_slice(&r.ymm[i][w].to_le_bytes());
            let at = 576 + 16 * i + 8 * w;
            a[at..at + 8].copy_from_slice(&r.ymm[i][2 + w].to_le_bytes());
        }
    }
    let bv = u64::from_le_bytes(word(a, 512)) | 7;
    a[512..520].copy_from_slice(&bv.to_le_bytes());
}

fn word(a: &[u8], at: usize) -> [u8; 8] {
    let mut w = [0; 8];
    w.copy_from_slice(&a[at..at + 8]);
    w
}

fn get_fpu(r: &mut Regs, a: &[u8]) {
    let q = |at: usize| u64::from_le_bytes(word(a, at));
    r.fcw = q(0) as u16;
    r.fsw = (q(0) >> 16) as u16;
    r.ftw = a[4];
    r.mxcsr = q(24) as u32;
    for i in 0..8 {
        r.st[i] = [q(32 + 16 * i), q(40 + 16 * i) & 0xFFFF];
    }
    // A component in its initial state need not have been written.
    let bv = q(512);
    for i in 0..16 {
        for w in 0..2 {
            r.ymm[i][w] = if bv & 2 != 0 { q(160 + 16 * i + 8 * w) } else { 0 };
            r.ymm[i][2 + w] = if bv & 4 != 0 { q(576 + 16 * i + 8 * w) } else { 0 };
        }
    }
    if bv & 1 == 0 {
        (r.fcw, r.fsw, r.ftw, r.st) = (0x37F, 0, 0, [[0; 2]; 8]);
    }
}
