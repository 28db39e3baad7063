"""Initial file systems for Linux guests: cpio "newc" archives, made without privilege.

``python -m tools.initramfs OUT [PROGRAM...]`` writes Debian's static busybox with an
``/init`` that ends in a shell on the console; PROGRAMs go to ``/bin``, and those that
are kernel modules (``.ko``) are loaded in their order before the shell starts.

Format: Linux Documentation/driver-api/early-userspace/buffer-format.rst.  The same
content always gives the same bytes: no times, no owners, inode numbers in order.
"""

from __future__ import annotations

import argparse
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools import fetch

MAGIC: Final = b"070701"
TRAILER: Final = "TRAILER!!!"
HEADER_SIZE: Final = 110  # the magic and 13 fields of 8 hexadecimal digits

SHELL_MARKER: Final = "Welcome to bhyve"
"""What /init prints first: user space runs."""
PROMPT: Final = "bhyve# "
"""The shell's prompt."""

# What busybox's init runs.  A shell that ends powers the guest off; so do poweroff,
# reboot and halt, which init obeys after two seconds of goodbyes (-f: at once).
_INITTAB: Final = """\
::sysinit:/etc/rc
::once:/bin/busybox sh -c 'setsid cttyhack sh -l; poweroff'
::ctrlaltdel:/bin/busybox reboot
"""

_RC: Final = f"""\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox echo "{SHELL_MARKER}: $(/bin/busybox uname -sr), \
$(/bin/busybox nproc) CPU(s)"
/bin/busybox --install -s /bin
hostname bhyve
mkdir -p /dev/pts && mount -t devpts pts /dev/pts
while read module; do insmod "/lib/modules/$module"; done < /etc/modules
echo "To leave: poweroff or reboot here, or Ctrl-] q for the virtual machine itself."
"""

_MODULE_DEPENDS: Final = re.compile(rb"\0depends=([^\0]*)\0")  # in section .modinfo

_PROFILE: Final = f"PS1='{PROMPT}'\n"


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of an archive; ``path`` has no leading slash."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)

    @classmethod
    def directory(cls, path: str, mode: int = 0o755) -> Entry:
        """A directory."""
        return cls(path, stat.S_IFDIR | mode)

    @classmethod
    def file(cls, path: str, data: bytes, mode: int = 0o644) -> Entry:
        """A regular file."""
        return cls(path, stat.S_IFREG | mode, data)

    @classmethod
    def link(cls, path: str, target: str) -> Entry:
        """A symbolic link."""
        return cls(path, stat.S_IFLNK | 0o777, target.encode())

    @classmethod
    def character(cls, path: str, major: int, minor: int) -> Entry:
        """A character device."""
        return cls(path, stat.S_IFCHR | 0o600, device=(major, minor))


def pack(entries: Iterable[Entry]) -> bytes:
    """The archive of the entries, in their order."""
    out = bytearray()
    inode = 0
    for inode, entry in enumerate(entries, 1):
        _append(out, entry, inode)
    _append(out, Entry(TRAILER, 0), inode + 1)
    return bytes(out)


def _append(out: bytearray, entry: Entry, inode: int) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        *(inode, entry.mode, 0, 0, links, 0, len(entry.data)),
        *(0, 0, *entry.device, len(name), 0),
    )
    out += MAGIC + b"".join(b"%08x" % field for field in fields)
    out += name
    out += bytes(-len(out) % 4)
    out += entry.data
    out += bytes(-len(out) % 4)


def unpack(archive: bytes) -> Iterator[Entry]:
    """The entries of an archive.  Raises ValueError where it is not one."""
    at = 0
    while True:
        header = archive[at : at + HEADER_SIZE]
        if header[:6] != MAGIC or len(header) < HEADER_SIZE:
            raise ValueError(f"no cpio header at offset {at}")
        fields = [int(header[i : i + 8], 16) for i in range(6, HEADER_SIZE, 8)]
        mode, size, major, minor, name_size = (fields[i] for i in (1, 6, 9, 10, 11))
        name_end = at + HEADER_SIZE + name_size
        path = archive[at + HEADER_SIZE : name_end - 1].decode()
        if path == TRAILER:
            return
        data = name_end + -name_end % 4
        yield Entry(path, mode, archive[data : data + size], (major, minor))
        at = data + size
        at += -at % 4


def busybox(programs: Iterable[Path] = (), modules: Iterable[Path] = ()) -> bytes:
    """Debian's busybox with an /init that ends in a shell.

    ``programs`` go to /bin; ``modules`` are loaded in their order, see
    `modules_with_dependencies`.
    """
    static = fetch.package("busybox-static").file("bin/busybox")
    modules = list(modules)
    directories = [
        "bin",
        "dev",
        "etc",
        "lib",
        "lib/modules",
        "proc",
        "root",
        "sys",
        "tmp",
    ]
    return pack(
        [
            *map(Entry.directory, directories),
            Entry.character("dev/console", 5, 1),
            Entry.file("bin/busybox", static.read_bytes(), 0o755),
            Entry.link("init", "bin/busybox"),
            Entry.file("etc/inittab", _INITTAB.encode()),
            Entry.file("etc/rc", _RC.encode(), 0o755),
            Entry.file("etc/profile", _PROFILE.encode()),
            Entry.file("etc/modules", "".join(f"{m.name}\n" for m in modules).encode()),
            *(Entry.file(f"lib/modules/{m.name}", m.read_bytes()) for m in modules),
            *(Entry.file(f"bin/{p.name}", p.read_bytes(), 0o755) for p in programs),
        ]
    )


def modules_with_dependencies(tree: Path, names: Iterable[str]) -> list[Path]:
    """The files of kernel modules and of all they need, in an order to load them.

    ``tree`` is a kernel's directory below /lib/modules; a module that is built into the
    kernel is left out.  Raises FetchError where one is not there.
    """
    files = {_module_name(path.stem): path for path in tree.glob("kernel/**/*.ko")}
    builtin = (tree / "modules.builtin").read_text().split()
    done = {_module_name(Path(path).stem) for path in builtin}
    order: list[Path] = []

    def add(name: str) -> None:
        if name in done:
            return
        done.add(name)
        if name not in files:
            raise fetch.FetchError(f"no module {name} in {tree}")
        info = _MODULE_DEPENDS.search(files[name].read_bytes())
        for needed in info[1].decode().split(",") if info and info[1] else ():
            add(_module_name(needed))
        order.append(files[name])

    for name in names:
        add(_module_name(name))
    return order


def _module_name(stem: str) -> str:
    """Files and dependencies disagree about dashes."""
    return stem.replace("-", "_")


def subset(archive: bytes, wanted: Iterable[str]) -> bytes:
    """Only the ``wanted`` paths of an archive, the directories above and links to them.

    A path counts for all below it.
    """
    keep = tuple(wanted)
    targets = {path.rpartition("/")[2] for path in keep}

    def kept(entry: Entry) -> bool:
        if stat.S_ISDIR(entry.mode):
            return any(f"{path}/".startswith(f"{entry.path}/") for path in keep)
        if stat.S_ISLNK(entry.mode):
            return entry.data.decode().rpartition("/")[2] in targets
        return any(f"{entry.path}/".startswith(f"{path}/") for path in keep)

    return pack(entry for entry in unpack(archive) if kept(entry))


def main() -> int:
    """Write the busybox file system."""
    parser = argparse.ArgumentParser(description="Write a busybox initramfs.")
    parser.add_argument("out", type=Path)
    parser.add_argument("program", type=Path, nargs="*")
    args = parser.parse_args()
    try:
        modules = [path for path in args.program if path.suffix == ".ko"]
        programs = [path for path in args.program if path.suffix != ".ko"]
        args.out.write_bytes(busybox(programs, modules))
    except (fetch.FetchError, OSError) as error:
        print(f"initramfs: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
