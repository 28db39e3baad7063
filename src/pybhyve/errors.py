"""Every error that a pybhyve program reports, and the exit status it ends with.

::

    BhyveError                        4    set-up failed, or the VM cannot go on
    ├── UsageError                    1    the command line cannot be understood
    ├── OptionError                  64    an option is malformed (EX_USAGE)
    ├── HostError                    71    the host refuses what VMs need (EX_OSERR)
    ├── ConfigError                   4    a configuration variable or file is wrong
    ├── NotAvailableError             4    in bhyve's manual, not in this version
    ├── DeviceError                   4    a device cannot be set up
    ├── ImageError                    4    a kernel or initrd cannot be loaded
    ├── GuestAbortError             134    the VM ends by SIGABRT, as bhyve's abort()
    └── VmError                       4    something about a VM as a named thing
        ├── VmNameError               4    not a name a VM can have
        ├── VmExistsError             4    create: the name is taken
        ├── VmNotFoundError           4    open: no such VM
        ├── VmBusyError               4    another process has the VM
        └── MemorySizeError           4    the memory asked for cannot be had

What a guest does is never an error: it is logged and gets the answer hardware gives.
A cause is chained (``raise … from``), not repeated: `one_line` prints the whole chain.
"""

from __future__ import annotations

import errno
from typing import ClassVar, Final

EX_USAGE: Final = 64
EX_OSERR: Final = 71


class BhyveError(Exception):
    """Set-up failed, or the VM cannot go on; the message says what the user can do."""

    status: ClassVar[int] = 4


class UsageError(BhyveError):
    """The command line cannot be understood; the usage text follows the message."""

    status = 1


class OptionError(BhyveError):
    """The argument of a command line option is malformed."""

    status = EX_USAGE


class HostError(BhyveError):
    """The host operating system refuses something that every VM needs."""

    status = EX_OSERR


class ConfigError(BhyveError):
    """A configuration variable or a configuration file is wrong."""


class NotAvailableError(BhyveError):
    """Something that bhyve's manual has and this version has not."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not available in this version")


class DeviceError(BhyveError):
    """A device cannot be set up as it is configured."""


class ImageError(BhyveError):
    """A kernel, or a file that goes with it, cannot be loaded."""


class GuestAbortError(BhyveError):
    """The VM ends at what the guest did, as the user asked (``x86.strictio``)."""

    status = 134


class VmError(BhyveError):
    """An operation on a VM, as a named thing, is refused."""

    errno: ClassVar[int] = errno.EINVAL


class VmNameError(VmError):
    """Not a name that a VM can have."""


class VmExistsError(VmError):
    """A VM of this name exists already."""

    errno = errno.EEXIST


class VmNotFoundError(VmError):
    """No VM has this name."""

    errno = errno.ENOENT


class VmBusyError(VmError):
    """Another process runs, loads or destroys the VM."""

    errno = errno.EBUSY


class MemorySizeError(VmError):
    """The memory asked for cannot be had."""

    errno = errno.ENOMEM


def one_line(error: BaseException) -> str:
    """The error and its causes on one line, outermost first."""
    parts: list[str] = []
    link: BaseException | None = error
    while link is not None and len(parts) < 10:
        if isinstance(link, OSError) and link.strerror:
            text = link.strerror
        else:
            text = str(link) or type(link).__name__
        parts.append(" ".join(text.split()))
        link = link.__cause__
    return printable(": ".join(parts))


def printable(text: str) -> str:
    """A text that may quote anything, without what would change a terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )
