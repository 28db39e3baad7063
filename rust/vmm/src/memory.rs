//! Guest physical memory: segments, where they are mapped, and who has written where.
//!
//! All of guest-physical space is one reservation of host addresses, so the host address of a
//! guest-physical address is `base() + gpa`.  Segments (files) are mapped into it.  A byte of
//! flags for each 4 KiB page says what is there; every access checks it, so no guest address,
//! however wrong, reaches anything but guest memory.  `SAFETY.md` has the invariants.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::error::{Error, Result};

pub const PAGE_SHIFT: u32 = 12;
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// Page flag: there is memory.
pub const PRESENT: u8 = 1;
/// Page flag: guest and devices may write it.
pub const WRITABLE: u8 = 2;
/// Page flag: written since the dirty log was last cleared.
pub const DIRTY: u8 = 4;
/// Page flag: a vCPU has decoded instructions from it.
pub const CODE: u8 = 8;

/// Mapping permissions, in mmap(2)'s numbers.
pub const PROT_READ: u32 = 1;
pub const PROT_WRITE: u32 = 2;
pub const PROT_EXEC: u32 = 4;

/// Sizes of guest-physical space to try, largest first: a limit on the address space of the
/// process (`ulimit -v`) may refuse the first.  64-bit BARs lie up to 64 GiB above the RAM.
const SPANS: [u64; 3] = [1 << 40, 1 << 37, 1 << 35];

/// A range of host memory that is unmapped when dropped.
struct Mapping {
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: a Mapping only owns addresses; what is read or written there is atomic, volatile or
// a raw copy (SAFETY.md, "Guest memory").
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Map `len` bytes anywhere.
    fn new(len: usize, prot: i32, flags: i32, file: Option<&File>) -> io::Result<Mapping> {
        let fd = file.map_or(-1, |f| f.as_raw_fd());
        // SAFETY: no address is given, so no existing mapping is touched.
        let addr = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, fd, 0) };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let addr = NonNull::new(addr.cast()).expect("mmap without MAP_FIXED never returns 0");
        Ok(Mapping { addr, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, is owned by us, and no reference into it exists.
        unsafe { libc::munmap(self.addr.as_ptr().cast(), self.len) };
    }
}

/// A file of guest memory; parts of it are mapped into guest-physical space.
pub struct Segment {
    pub id: i32,
    /// Empty for system memory.
    pub name: String,
    /// Bytes; a multiple of the page size.
    pub length: u64,
    file: File,
    /// The whole segment in the host's address space, for views: a view stays what it is when
    /// the guest moves the mapping (a BAR).
    window: OnceLock<Mapping>,
}

impl Segment {
    /// Host address of the segment's first byte; valid as long as the segment.
    pub fn host(&self) -> Result<NonNull<u8>> {
        if let Some(window) = self.window.get() {
            return Ok(window.addr);
        }
        let len = self.length as usize;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let window = Mapping::new(len, prot, flags, Some(&self.file)).map_err(|cause| {
            Error::Host { what: format!("cannot map memory segment {}", self.id), cause }
        })?;
        Ok(self.window.get_or_init(|| window).addr)
    }
}

/// A part of a segment at a guest-physical address.
#[derive(Clone)]
pub struct MemMap {
    pub gpa: u64,
    pub segment: Arc<Segment>,
    pub offset: u64,
    pub length: u64,
    /// PROT_*.
    pub prot: u32,
}

#[derive(Default)]
struct Layout {
    segments: Vec<Arc<Segment>>,
    /// By rising gpa; no two overlap.
    maps: Vec<MemMap>,
}

type CodeWatcher = dyn Fn(u64, u64) + Send + Sync;

pub struct GuestMemory {
    space: Mapping,
    flags: Mapping,
    layout: Mutex<Layout>,
    code_watcher: OnceLock<Box<CodeWatcher>>,
}

mod sealed {
    pub trait Sealed {}
}

/// An integer that guest memory can hold: u8, u16, u32 or u64, little-endian.
pub trait Word: sealed::Sealed + Copy {
    /// # Safety
    /// `at` is the host address of mapped guest memory of this size.
    unsafe fn load(at: *mut u8) -> Self;
    /// # Safety
    /// As for `load`.
    unsafe fn store(self, at: *mut u8);
}

macro_rules! word {
    ($int:ty, $atomic:ty) => {
        impl sealed::Sealed for $int {}

        impl Word for $int {
            unsafe fn load(at: *mut u8) -> Self {
                let at: *mut $int = at.cast();
                if at.is_aligned() {
                    // SAFETY: the caller vouches for the memory; it is aligned and only
                    // accessed through atomics, raw copies or guest instructions.
                    unsafe { <$atomic>::from_ptr(at) }.load(Ordering::Acquire)
                } else {
                    // SAFETY: as above; the processor may tear it, as it may tear the guest's.
                    unsafe { at.read_unaligned() }
                }
            }

            unsafe fn store(self, at: *mut u8) {
                let at: *mut $int = at.cast();
                if at.is_aligned() {
                    // SAFETY: as in `load`.
                    unsafe { <$atomic>::from_ptr(at) }.store(self, Ordering::Release);
                } else {
                    // SAFETY: as in `load`.
                    unsafe { at.write_unaligned(self) };
                }
            }
        }
    };
}

word!(u8, AtomicU8);
word!(u16, AtomicU16);
word!(u32, AtomicU32);
word!(u64, AtomicU64);

impl GuestMemory {
    /// Reserve guest-physical space; nothing is mapped in it yet.
    pub fn new() -> Result<GuestMemory> {
        let mut refused = None;
        for span in SPANS {
            match Self::with_span(span) {
                Ok(memory) => return Ok(memory),
                Err(error) => refused = Some(error),
            }
        }
        Err(refused.expect("SPANS is not empty"))
    }

    fn with_span(span: u64) -> Result<GuestMemory> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let pages = (span >> PAGE_SHIFT) as usize;
        let reserve = |len, prot| {
            Mapping::new(len, prot, flags, None).map_err(|cause| Error::Host {
                what: format!("cannot reserve {} GiB of addresses (ulimit -v?)", span >> 30),
                cause,
            })
        };
        Ok(GuestMemory {
            space: reserve(span as usize, libc::PROT_NONE)?,
            flags: reserve(pages, libc::PROT_READ | libc::PROT_WRITE)?,
            layout: Mutex::default(),
            code_watcher: OnceLock::new(),
        })
    }

    /// Host address of guest-physical address 0.
    ///
    /// Whoever dereferences `base() + gpa` has seen PRESENT set for that page; the page then
    /// stays accessible for the life of this object (see `unmap`).
    pub fn base(&self) -> *mut u8 {
        self.space.addr.as_ptr()
    }

    /// Bytes of guest-physical space.
    pub fn span(&self) -> u64 {
        self.space.len as u64
    }

    /// The flags of page 0; one byte for each page of `span()`.
    pub fn page_flags(&self) -> *const AtomicU8 {
        self.flags.addr.as_ptr().cast_const().cast()
    }

    /// Flags of page number `page` (gpa >> 12); 0 outside of guest-physical space.
    pub fn flags(&self, page: u64) -> u8 {
        if page < self.flags.len as u64 {
            self.page_flag_word(page).load(Ordering::Relaxed)
        } else {
            0
        }
    }

    /// The flags of page number `page`, for setting DIRTY and CODE.
    ///
    /// # Panics
    /// Outside of guest-physical space.
    pub fn page_flag_word(&self, page: u64) -> &AtomicU8 {
        assert!(page < self.flags.len as u64);
        // SAFETY: in bounds of a mapping that lives as long as self and is only used as atomics.
        unsafe { AtomicU8::from_ptr(self.flags.addr.as_ptr().add(page as usize)) }
    }

    /// The function to call with (gpa, length) after bytes on a CODE page have changed.  Once.
    pub fn set_code_watcher(&self, watcher: impl Fn(u64, u64) + Send + Sync + 'static) {
        let first = self.code_watcher.set(Box::new(watcher)).is_ok();
        assert!(first, "the code watcher is set once, when the VM is made");
    }

    /// Note that instructions are about to be decoded from the page at `gpa`.
    pub fn set_code(&self, gpa: u64) {
        // A full barrier: see `written`.
        self.page_flag_word(gpa >> PAGE_SHIFT).fetch_or(CODE, Ordering::SeqCst);
    }

    fn pages(gpa: u64, len: u64) -> std::ops::RangeInclusive<u64> {
        gpa >> PAGE_SHIFT..=(gpa + len - 1) >> PAGE_SHIFT
    }

    /// Host address of `len` bytes whose pages all have the flags `need`.
    fn host_with(&self, gpa: u64, len: u64, need: u8) -> Option<NonNull<u8>> {
        let end = gpa.checked_add(len)?;
        if end > self.span() {
            return None;
        }
        if len != 0 && Self::pages(gpa, len).any(|page| self.flags(page) & need != need) {
            return None;
        }
        // SAFETY: gpa <= span, so this stays inside (or one past) the reservation.
        Some(unsafe { self.space.addr.add(gpa as usize) })
    }

    /// Host address of `len` bytes of guest memory; `None` unless all of them are present.
    pub fn host(&self, gpa: u64, len: u64) -> Option<NonNull<u8>> {
        self.host_with(gpa, len, PRESENT)
    }

    /// Copy guest memory to `into`.  Aligned 1, 2, 4 and 8 bytes are read in one piece.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<()> {
        let len = into.len();
        let bad = Error::BadAddress { gpa, len: len as u64 };
        let from = self.host(gpa, len as u64).ok_or(bad)?.as_ptr();
        // SAFETY: host() has checked all `len` bytes at `from`.
        unsafe {
            match len {
                1 => into[0] = u8::load(from),
                2 => into.copy_from_slice(&u16::load(from).to_le_bytes()),
                4 => into.copy_from_slice(&u32::load(from).to_le_bytes()),
                8 => into.copy_from_slice(&u64::load(from).to_le_bytes()),
                _ => ptr::copy_nonoverlapping(from, into.as_mut_ptr(), len),
            }
        }
        Ok(())
    }

    /// A device's write.  Aligned 1, 2, 4 and 8 bytes are written in one piece.
    ///
    /// # Errors
    /// `BadAddress`, and nothing is written, when a page is absent or ROM.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<()> {
        self.copy_in(gpa, from, PRESENT | WRITABLE)
    }

    /// A loader's write: like `write`, and to ROM as well.
    pub fn write_rom(&self, gpa: u64, from: &[u8]) -> Result<()> {
        self.copy_in(gpa, from, PRESENT)
    }

    fn copy_in(&self, gpa: u64, from: &[u8], need: u8) -> Result<()> {
        let len = from.len() as u64;
        let to = self.host_with(gpa, len, need).ok_or(Error::BadAddress { gpa, len })?.as_ptr();
        // SAFETY: host_with() has checked all `len` bytes at `to`.
        unsafe {
            match *from {
                [b] => b.store(to),
                [a, b] => u16::from_le_bytes([a, b]).store(to),
                [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).store(to),
                [a, b, c, d, e, f, g, h] => {
                    u64::from_le_bytes([a, b, c, d, e, f, g, h]).store(to);
                }
                _ => ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()),
            }
        }
        self.written(gpa, len);
        Ok(())
    }

    /// Read an integer; in one piece when aligned.  `None` where there is no memory.
    pub fn load<T: Word>(&self, gpa: u64) -> Option<T> {
        let at = self.host(gpa, size_of::<T>() as u64)?;
        // SAFETY: host() has checked the whole integer.
        Some(unsafe { T::load(at.as_ptr()) })
    }

    /// Write an integer as a device does; in one piece when aligned.  `None` where there is no
    /// memory or only ROM.
    pub fn store<T: Word>(&self, gpa: u64, value: T) -> Option<()> {
        let len = size_of::<T>() as u64;
        let at = self.host_with(gpa, len, PRESENT | WRITABLE)?;
        // SAFETY: host_with() has checked the whole integer.
        unsafe { value.store(at.as_ptr()) };
        self.written(gpa, len);
        Some(())
    }

    /// Bookkeeping after bytes have been written by other means than `write`: marks pages
    /// dirty and has the vCPUs drop code that was decoded from them.
    pub fn written(&self, gpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        // A vCPU sets CODE, then reads the bytes it decodes; we wrote the bytes, then read CODE.
        // With a full barrier on both sides one of the two sees the other.
        fence(Ordering::SeqCst);
        let mut code = false;
        for page in Self::pages(gpa, len) {
            let flags = self.flags(page);
            code |= flags & CODE != 0;
            if flags & (PRESENT | DIRTY) == PRESENT {
                self.page_flag_word(page).fetch_or(DIRTY, Ordering::Relaxed);
            }
        }
        if code && let Some(watcher) = self.code_watcher.get() {
            watcher(gpa, len);
        }
    }

    /// `written` for `len` bytes at `offset` of a segment, wherever it is mapped now.
    pub fn segment_written(&self, segment: &Segment, offset: u64, len: u64) {
        let hits: Vec<(u64, u64)> = self
            .layout()
            .maps
            .iter()
            .filter(|m| m.segment.id == segment.id)
            .filter_map(|m| {
                let start = offset.max(m.offset);
                let end = (offset + len).min(m.offset + m.length);
                (start < end).then(|| (m.gpa + start - m.offset, end - start))
            })
            .collect();
        for (gpa, len) in hits {
            self.written(gpa, len);
        }
    }

    /// One byte a page: 1 where it was written since the last clear.
    ///
    /// With `clear` the vCPUs must forget that they have marked pages: `Vm::dirty_pages`.
    pub fn dirty_pages(&self, gpa: u64, len: u64, clear: bool) -> Result<Vec<u8>> {
        let end = gpa.checked_add(len).filter(|end| *end <= self.span());
        if len == 0 || end.is_none() || !(gpa | len).is_multiple_of(PAGE_SIZE) {
            return Err(Error::Invalid(format!(
                "a dirty log needs whole pages inside guest memory, not {len:#x} bytes at {gpa:#x}"
            )));
        }
        Ok(Self::pages(gpa, len)
            .map(|page| {
                let word = self.page_flag_word(page);
                let flags = match clear {
                    true => word.fetch_and(!DIRTY, Ordering::Relaxed),
                    false => word.load(Ordering::Relaxed),
                };
                u8::from(flags & DIRTY != 0)
            })
            .collect())
    }

    fn layout(&self) -> MutexGuard<'_, Layout> {
        self.layout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Make segment `id`: `length` bytes of `file`, or of a new memfd.
    ///
    /// # Errors
    /// `Invalid`: a length that is no multiple of 4096 or more than the file has, or a segment
    /// of this id with another length; `Exists`: a segment of this id and length.
    pub fn create_segment(
        &self,
        id: i32,
        name: &str,
        length: u64,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        if length == 0 || !length.is_multiple_of(PAGE_SIZE) || i64::try_from(length).is_err() {
            return Err(Error::Invalid(format!(
                "memory segment {id}: {length:#x} bytes is not a multiple of 4096"
            )));
        }
        let mut layout = self.layout();
        if let Some(old) = layout.segments.iter().find(|s| s.id == id) {
            return Err(if old.length == length {
                Error::Exists(format!("memory segment {id} exists"))
            } else {
                Error::Invalid(format!("memory segment {id} exists with {:#x} bytes", old.length))
            });
        }
        let file = match file {
            Some(fd) => fd
                .try_clone_to_owned()
                .map(File::from)
                .map_err(|cause| Error::Host { what: format!("memory segment {id}"), cause })?,
            None => anonymous_file(name, length)?,
        };
        let host = |cause| Error::Host { what: format!("memory segment {id}"), cause };
        let size = file.metadata().map_err(host)?.len();
        if size < length {
            return Err(Error::Invalid(format!(
                "memory segment {id}: its file has {size:#x} bytes, not {length:#x}"
            )));
        }
        // A file that shrinks under us kills the process (SIGBUS).  A memfd lets us forbid it;
        // any other file refuses the seal and is its owner's to keep.
        // SAFETY: plain system call on a descriptor that we own.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
        layout.segments.push(Arc::new(Segment {
            id,
            name: name.to_owned(),
            length,
            file,
            window: OnceLock::new(),
        }));
        Ok(())
    }

    pub fn segment(&self, id: i32) -> Result<Arc<Segment>> {
        let layout = self.layout();
        let found = layout.segments.iter().find(|s| s.id == id).cloned();
        found.ok_or_else(|| Error::NotFound(format!("there is no memory segment {id}")))
    }

    pub fn segments(&self) -> Vec<Arc<Segment>> {
        self.layout().segments.clone()
    }

    /// By rising gpa.
    pub fn maps(&self) -> Vec<MemMap> {
        self.layout().maps.clone()
    }

    /// The mapping that holds all `len` bytes at `gpa`.
    pub fn map_at(&self, gpa: u64, len: u64) -> Result<MemMap> {
        let layout = self.layout();
        let end = gpa.checked_add(len);
        let inside = |m: &&MemMap| m.gpa <= gpa && end.is_some_and(|end| end <= m.gpa + m.length);
        layout.maps.iter().find(inside).cloned().ok_or(Error::BadAddress { gpa, len })
    }

    /// Map part of a segment.  vCPUs cache what they know of a page: `Vm::mmap_memseg`.
    ///
    /// # Errors
    /// `Invalid`: not whole pages, or outside of the segment or of guest-physical space;
    /// `NotFound`: no such segment; `Exists`: something is mapped there.
    pub fn map(&self, gpa: u64, id: i32, offset: u64, length: u64, prot: u32) -> Result<()> {
        let segment = self.segment(id)?;
        let what =
            || format!("memory segment {id}, {length:#x} bytes from {offset:#x} at {gpa:#x}");
        if prot & PROT_READ == 0 || prot & !(PROT_READ | PROT_WRITE | PROT_EXEC) != 0 {
            return Err(Error::Invalid(format!("{}: bad protection {prot:#x}", what())));
        }
        if length == 0 || !(gpa | offset | length).is_multiple_of(PAGE_SIZE) {
            return Err(Error::Invalid(format!("{}: not whole pages", what())));
        }
        if offset.checked_add(length).is_none_or(|end| end > segment.length) {
            return Err(Error::Invalid(format!("{}: beyond the segment's end", what())));
        }
        if gpa.checked_add(length).is_none_or(|end| end > self.span()) {
            return Err(Error::Invalid(format!(
                "{}: guest-physical space ends at {:#x}",
                what(),
                self.span()
            )));
        }
        let mut layout = self.layout();
        let at = layout.maps.partition_point(|m| m.gpa + m.length <= gpa);
        if let Some(old) = layout.maps.get(at).filter(|m| m.gpa < gpa + length) {
            return Err(Error::Exists(format!(
                "{}: memory segment {} is mapped at {:#x}",
                what(),
                old.segment.id,
                old.gpa
            )));
        }
        self.replace(gpa, length, libc::MAP_SHARED, Some((&segment.file, offset)))?;
        let flags = if prot & PROT_WRITE != 0 { PRESENT | WRITABLE } else { PRESENT };
        for page in Self::pages(gpa, length) {
            self.page_flag_word(page).store(flags, Ordering::SeqCst);
        }
        layout.maps.insert(at, MemMap { gpa, segment, offset, length, prot });
        Ok(())
    }

    /// Undo a `map` with the same address and length.
    ///
    /// Leaves anonymous memory behind: a thread that has just seen PRESENT may still be reading
    /// or writing, and must meet memory, not a hole.
    pub fn unmap(&self, gpa: u64, length: u64) -> Result<()> {
        let mut layout = self.layout();
        let at = layout.maps.iter().position(|m| m.gpa == gpa && m.length == length);
        let at = at.ok_or_else(|| {
            Error::Invalid(format!("no mapping of {length:#x} bytes at {gpa:#x}"))
        })?;
        for page in Self::pages(gpa, length) {
            self.page_flag_word(page).store(0, Ordering::SeqCst);
        }
        self.replace(gpa, length, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
        layout.maps.remove(at);
        Ok(())
    }

    /// Bytes of all segments that the host keeps in memory or in a file's blocks.
    pub fn resident(&self) -> u64 {
        let blocks = |s: &Arc<Segment>| s.file.metadata().map_or(0, |m| m.blocks() * 512);
        self.segments().iter().map(blocks).sum()
    }

    /// Zero all system memory (the segments without a name).
    pub fn clear_sysmem(&self) -> Result<()> {
        for segment in self.segments().iter().filter(|s| s.name.is_empty()) {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let length = segment.length as libc::off_t;
            // SAFETY: plain system call on a descriptor that the segment owns.
            if unsafe { libc::fallocate(segment.file.as_raw_fd(), mode, 0, length) } != 0 {
                // A file system that cannot punch holes.
                let host = segment.host()?;
                // SAFETY: the window is `length` bytes and lives as long as the segment.
                unsafe { ptr::write_bytes(host.as_ptr(), 0, segment.length as usize) };
            }
            self.segment_written(segment, 0, segment.length);
        }
        Ok(())
    }

    /// Put other memory at `gpa`; other threads see either the old or the new.
    fn replace(&self, gpa: u64, len: u64, kind: i32, file: Option<(&File, u64)>) -> Result<()> {
        let (fd, offset) = file.map_or((-1, 0), |(f, offset)| (f.as_raw_fd(), offset));
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = kind | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let offset = offset as libc::off_t;
        // SAFETY: the callers have checked that the range lies inside our reservation, which
        // nothing but guest memory uses.
        let addr = unsafe {
            let at = self.base().add(gpa as usize);
            libc::mmap(at.cast(), len as usize, prot, flags, fd, offset)
        };
        if addr == libc::MAP_FAILED {
            return Err(Error::last_os(format!("cannot map {len:#x} bytes at {gpa:#x}")));
        }
        Ok(())
    }
}

/// A memfd of `length` bytes that cannot shrink.
fn anonymous_file(name: &str, length: u64) -> Result<File> {
    let label =
        std::ffi::CString::new(format!("guest-{}", if name.is_empty() { "sysmem" } else { name }))
            .map_err(|_| Error::Invalid("a segment's name has no NUL in it".into()))?;
    // SAFETY: `label` is a C string; the result is checked and then owned by one File.
    let file = unsafe {
        let fd = libc::memfd_create(label.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        if fd < 0 {
            return Err(Error::last_os("cannot make a file for guest memory"));
        }
        File::from_raw_fd(fd)
    };
    file.set_len(length).map_err(|cause| Error::Host {
        what: format!("cannot make a file of {length:#x} bytes for guest memory"),
        cause,
    })?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const RWX: u32 = PROT_READ | PROT_WRITE | PROT_EXEC;

    /// 2 MiB of RAM at 0, 64 KiB of ROM at 4 GiB - 64 KiB.
    fn machine() -> GuestMemory {
        let mem = GuestMemory::new().unwrap();
        mem.create_segment(0, "", 2 * MIB, None).unwrap();
        mem.create_segment(8, "bootrom", 0x1_0000, None).unwrap();
        mem.map(0, 0, 0, 2 * MIB, RWX).unwrap();
        mem.map(0xffff_0000, 8, 0, 0x1_0000, PROT_READ | PROT_EXEC).unwrap();
        mem
    }

    fn read<const N: usize>(mem: &GuestMemory, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        mem.read(gpa, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        let mem = machine();
        mem.write(0xffd, b"across a page").unwrap();
        assert_eq!(&read::<13>(&mem, 0xffd), b"across a page");
        assert_eq!(mem.load::<u32>(0xffd), Some(u32::from_le_bytes(*b"acro")));
        mem.store(0x2000, 0x1122_3344_5566_7788_u64).unwrap();
        assert_eq!(mem.load::<u16>(0x2002), Some(0x5566));
        assert_eq!(mem.load::<u8>(0x2007), Some(0x11));
    }

    #[test]
    fn holes_and_ends_are_errors() {
        let mem = machine();
        let mut byte = [0];
        for gpa in [2 * MIB, 0xfffe_ffff, 1 << 32, mem.span(), mem.span() - 1, u64::MAX] {
            assert!(mem.read(gpa, &mut byte).is_err(), "{gpa:#x}");
            assert!(mem.write(gpa, &byte).is_err(), "{gpa:#x}");
            assert_eq!(mem.load::<u64>(gpa), None, "{gpa:#x}");
            assert_eq!(mem.host(gpa, 1), None, "{gpa:#x}");
        }
        assert_eq!(mem.write(2 * MIB - 1, b"ab").unwrap_err().errno(), libc::EFAULT);
        assert_eq!(read::<1>(&mem, 2 * MIB - 1), [0], "nothing of a bad write is done");
        assert_eq!(mem.flags(u64::MAX), 0);
    }

    #[test]
    fn rom_is_written_by_loaders_only() {
        let mem = machine();
        assert_eq!(mem.write(0xffff_fff0, b"\xea").unwrap_err().errno(), libc::EFAULT);
        assert_eq!(mem.store(0xffff_fff0, 0xea_u8), None);
        mem.write_rom(0xffff_fff0, b"\xea").unwrap();
        assert_eq!(mem.load::<u8>(0xffff_fff0), Some(0xea));
    }

    #[test]
    fn one_segment_at_two_addresses_is_one_memory() {
        let mem = machine();
        mem.map(0x1_0000_0000, 0, MIB, MIB, RWX).unwrap();
        mem.write(0x1_0000_0010, b"high").unwrap();
        assert_eq!(&read::<4>(&mem, MIB + 0x10), b"high");
    }

    #[test]
    fn maps_do_not_overlap() {
        let mem = machine();
        let errno = |gpa, length| mem.map(gpa, 0, 0, length, RWX).unwrap_err().errno();
        assert_eq!(errno(0, MIB), libc::EEXIST);
        assert_eq!(errno(MIB, 2 * MIB), libc::EEXIST);
        assert_eq!(errno(4 * MIB, 4 * MIB), libc::EINVAL, "beyond the segment");
        assert_eq!(errno(4 * MIB, 0x800), libc::EINVAL, "not whole pages");
        assert_eq!(errno(mem.span(), MIB), libc::EINVAL, "beyond guest-physical space");
        assert_eq!(mem.map(4 * MIB, 7, 0, MIB, RWX).unwrap_err().errno(), libc::ENOENT);
        mem.map(2 * MIB, 0, 0, MIB, RWX).unwrap();
        let gpas: Vec<_> = mem.maps().iter().map(|m| m.gpa).collect();
        assert_eq!(gpas, [0, 2 * MIB, 0xffff_0000]);
    }

    #[test]
    fn unmapped_memory_is_gone_but_its_content_is_not() {
        let mem = machine();
        mem.write(0x5000, b"kept").unwrap();
        assert_eq!(mem.unmap(0, MIB).unwrap_err().errno(), libc::EINVAL, "not a whole mapping");
        mem.unmap(0, 2 * MIB).unwrap();
        assert_eq!(mem.load::<u8>(0x5000), None);
        mem.map(0, 0, 0, 2 * MIB, RWX).unwrap();
        assert_eq!(&read::<4>(&mem, 0x5000), b"kept");
    }

    #[test]
    fn segments_are_made_once() {
        let mem = machine();
        let errno = |id, length| mem.create_segment(id, "", length, None).unwrap_err().errno();
        assert_eq!(errno(0, 2 * MIB), libc::EEXIST);
        assert_eq!(errno(0, MIB), libc::EINVAL);
        assert_eq!(errno(1, 0), libc::EINVAL);
        assert_eq!(errno(1, 4095), libc::EINVAL);
        assert_eq!(errno(1, 1 << 63), libc::EINVAL);
    }

    #[test]
    fn a_file_must_be_long_enough_and_cannot_shrink() {
        use std::os::fd::AsFd;
        let mem = machine();
        let file = anonymous_file("test", MIB).unwrap();
        assert_eq!(
            mem.create_segment(1, "", 2 * MIB, Some(file.as_fd())).unwrap_err().errno(),
            libc::EINVAL
        );
        mem.create_segment(1, "", MIB, Some(file.as_fd())).unwrap();
        assert!(file.set_len(0).is_err(), "sealed");
    }

    #[test]
    fn dirty_pages_are_logged_until_cleared() {
        let mem = machine();
        assert_eq!(mem.dirty_pages(0, 0x4000, false).unwrap(), [0; 4]);
        mem.write(0x1fff, b"ab").unwrap();
        mem.read(0x3000, &mut [0; 8]).unwrap();
        assert_eq!(mem.dirty_pages(0, 0x4000, true).unwrap(), [0, 1, 1, 0]);
        assert_eq!(mem.dirty_pages(0, 0x4000, false).unwrap(), [0; 4]);
        for (gpa, len) in [(0, 0), (1, 0x1000), (0, 1), (mem.span(), 0x1000), (!0xfff, 0x1000)] {
            assert_eq!(mem.dirty_pages(gpa, len, false).unwrap_err().errno(), libc::EINVAL);
        }
    }

    #[test]
    fn a_write_to_code_is_reported_after_it_is_done() {
        let mem = Arc::new(machine());
        let (send, writes) = mpsc::channel();
        let seen = Arc::downgrade(&mem);
        mem.set_code_watcher(move |gpa, len| {
            let byte = seen.upgrade().unwrap().load::<u8>(gpa);
            send.send((gpa, len, byte)).unwrap();
        });
        mem.set_code(0x3000);
        mem.write(0x2ff0, &[0x90; 8]).unwrap();
        mem.write(0x2ffc, &[0x91; 8]).unwrap();
        mem.store(0x3100, 0x92_u8).unwrap();
        drop(mem);
        let writes: Vec<_> = writes.iter().collect();
        assert_eq!(writes, [(0x2ffc, 8, Some(0x91)), (0x3100, 1, Some(0x92))]);
    }

    #[test]
    fn a_view_outlives_its_mapping() {
        let mem = machine();
        mem.write(0x1000, b"view").unwrap();
        let map = mem.map_at(0x1000, 4).unwrap();
        let host = map.segment.host().unwrap();
        mem.unmap(0, 2 * MIB).unwrap();
        // SAFETY: offset 0x1000 is inside the segment, which `map` keeps.
        assert_eq!(unsafe { u32::load(host.as_ptr().add(0x1000)) }, u32::from_le_bytes(*b"view"));
        mem.map(4 * MIB, 0, 0, 2 * MIB, RWX).unwrap();
        mem.segment_written(&map.segment, 0x1000, 4);
        assert_eq!(mem.dirty_pages(4 * MIB, 0x3000, false).unwrap(), [0, 1, 0]);
    }

    #[test]
    fn cleared_ram_is_zero_and_rom_stays() {
        let mem = machine();
        mem.write(0x1234, b"x").unwrap();
        mem.write_rom(0xffff_0000, b"rom").unwrap();
        mem.clear_sysmem().unwrap();
        assert_eq!(mem.load::<u8>(0x1234), Some(0));
        assert_eq!(&read::<3>(&mem, 0xffff_0000), b"rom");
    }

    #[test]
    fn access_races_with_unmapping_harmlessly() {
        let mem = machine();
        let (rounds, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while done.load(Ordering::Relaxed) == 0 {
                        let _ = mem.write(0x8000, &[1; 4096]);
                        let _ = mem.read(0x8000, &mut [0; 4096]);
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            while rounds.load(Ordering::Relaxed) < 1000 {
                mem.unmap(0, 2 * MIB).unwrap();
                mem.map(0, 0, 0, 2 * MIB, RWX).unwrap();
            }
            done.store(1, Ordering::Relaxed);
        });
    }

    proptest! {
        #[test]
        fn no_address_reaches_beyond_memory(gpa: u64, near in 0..4_u64, len in 0..9000_usize) {
            let mem = machine();
            let edges = [0, 2 * MIB, 0xffff_0000, mem.span()];
            for gpa in [gpa, gpa % mem.span(), edges[near as usize].wrapping_sub(gpa % 9000)] {
                let end = gpa.checked_add(len as u64);
                let inside = |lo, hi| lo <= gpa && end.is_some_and(|end| end <= hi);
                let empty = len == 0 && gpa <= mem.span();
                let readable = inside(0, 2 * MIB) || inside(0xffff_0000, 1 << 32) || empty;
                let mut bytes = vec![0; len];
                prop_assert_eq!(mem.read(gpa, &mut bytes).is_ok(), readable);
                let writable = inside(0, 2 * MIB) || empty;
                prop_assert_eq!(mem.write(gpa, &bytes).is_ok(), writable);
            }
        }
    }
}
