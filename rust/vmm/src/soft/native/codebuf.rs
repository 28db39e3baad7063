//! Memory for generated code, writable at one address and executable at another.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

/// Stubs start at multiples of this.
const ALIGN: usize = 16;

/// One anonymous file with two mappings.  The file has no name and no other user, and the
/// writable mapping is only ever written by `push`, behind everything that has been handed out:
/// no byte changes once it can be executed.
pub struct CodeBuf {
    write: NonNull<u8>,
    exec: NonNull<u8>,
    size: usize,
    used: usize,
}

// SAFETY: the mappings belong to this value alone and live as long as it does.
unsafe impl Send for CodeBuf {}

impl CodeBuf {
    /// Room for `size` bytes, which take memory as they are used.
    pub fn new(size: usize) -> io::Result<CodeBuf> {
        let file = anonymous_file()?;
        file.set_len(size as u64)?;
        let write = map(&file, size, libc::PROT_READ | libc::PROT_WRITE)?;
        match map(&file, size, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(exec) => Ok(CodeBuf { write, exec, size, used: 0 }),
            Err(e) => {
                unmap(write, size);
                Err(e)
            }
        }
    }

    /// Bytes left.
    pub fn room(&self) -> usize {
        self.size - self.used
    }

    /// Address at which the next code will run.
    pub fn next(&self) -> u64 {
        self.exec.as_ptr() as u64 + self.used as u64
    }

    /// Take `code` in; its executable address, or None if there is no room.
    pub fn push(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let end = self.used + code.len().next_multiple_of(ALIGN);
        if end > self.size {
            return None;
        }
        // SAFETY: `end` is inside both mappings.  These bytes have never been executed, so no
        // stale copy of them can be in an instruction cache.
        unsafe {
            ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(self.used).as_ptr(), code.len());
            let at = self.exec.add(self.used);
            self.used = end;
            Some(at)
        }
    }
}

impl Drop for CodeBuf {
    fn drop(&mut self) {
        unmap(self.write, self.size);
        unmap(self.exec, self.size);
    }
}

fn anonymous_file() -> io::Result<File> {
    let create = |flags| {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"pybhyve-code".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor, ours.
        Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    };
    // Kernels since 6.3 want to be told that the file will be executed; older ones refuse the flag.
    create(libc::MFD_CLOEXEC | libc::MFD_EXEC).or_else(|_| create(libc::MFD_CLOEXEC))
}

fn map(file: &File, size: usize, prot: i32) -> io::Result<NonNull<u8>> {
    // SAFETY: no address is given, so no existing mapping is touched.
    let p =
        unsafe { libc::mmap(ptr::null_mut(), size, prot, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    match NonNull::new(p.cast()) {
        Some(at) if p != libc::MAP_FAILED => Ok(at),
        _ => Err(io::Error::last_os_error()),
    }
}

fn unmap(at: NonNull<u8>, size: usize) {
    // SAFETY: `at` is a mapping of `size` bytes made by `map`, owned by the caller, who drops it.
    unsafe { libc::munmap(at.as_ptr().cast(), size) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_where_it_cannot_be_written() {
        let mut buf = CodeBuf::new(1 << 20).unwrap();
        // mov eax, imm32; ret
        let first = buf.push(&[0xB8, 1, 0, 0, 0, 0xC3]).unwrap();
        let second = buf.push(&[0xB8, 2, 0, 0, 0, 0xC3]).unwrap();

        for (at, want) in [(first, 1), (second, 2)] {
            // SAFETY: the bytes are a function of this type.
            let f: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(at) };
            assert_eq!(f(), want);
        }
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let code: Vec<&str> = maps.lines().filter(|l| l.contains("pybhyve-code")).collect();
        assert!(code.iter().any(|l| l.contains(" r-xs ")));
        assert!(!code.iter().any(|l| l.contains("wx")));
    }

    #[test]
    fn a_full_buffer_refuses() {
        let mut buf = CodeBuf::new(1 << 20).unwrap();
        let page = [0xC3; 4096];
        while buf.room() > 0 {
            buf.push(&page).unwrap();
        }

        assert!(buf.push(&[0xC3]).is_none());
    }
}
