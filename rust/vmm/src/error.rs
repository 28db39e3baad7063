//! What vmm refuses, and the errno with which vmm.ko would.

use std::fmt;
use std::io;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug)]
pub enum Error {
    /// Some byte of the range is not RAM, ROM or devmem, or may not be written.
    BadAddress {
        gpa: u64,
        len: u64,
    },
    /// An argument that cannot be right in any state of the VM.
    Invalid(String),
    Exists(String),
    /// A name, segment or capability that this VM does not have.
    NotFound(String),
    /// Not while a vCPU runs.
    Busy(String),
    /// The VM was suspended before, for the reason in the text.
    Already(String),
    /// A call to the host's kernel failed.
    Host {
        what: String,
        cause: io::Error,
    },
}

impl Error {
    /// The host call `what` has just failed.
    pub fn last_os(what: impl Into<String>) -> Self {
        Error::Host { what: what.into(), cause: io::Error::last_os_error() }
    }

    pub fn errno(&self) -> i32 {
        match self {
            Error::BadAddress { .. } => libc::EFAULT,
            Error::Invalid(_) => libc::EINVAL,
            Error::Exists(_) => libc::EEXIST,
            Error::NotFound(_) => libc::ENOENT,
            Error::Busy(_) => libc::EBUSY,
            Error::Already(_) => libc::EALREADY,
            Error::Host { cause, .. } => cause.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::BadAddress { gpa, len } => {
                write!(f, "no guest memory for {len:#x} bytes at {gpa:#x}")
            }
            Error::Invalid(what)
            | Error::Exists(what)
            | Error::NotFound(what)
            | Error::Busy(what)
            | Error::Already(what) => f.write_str(what),
            Error::Host { what, cause } => write!(f, "{what}: {cause}"),
        }
    }
}

impl std::error::Error for Error {}
