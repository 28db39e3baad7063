"""A disk with Debian 12 installed on it, made without privilege and without a guest.

``python -m tools.disk FILE [PACKAGE...]`` writes such a disk to FILE, with more
packages than it always has.

The disk has a GPT, a FAT file system where UEFI firmware finds GRUB without knowing
this disk (``EFI/BOOT/BOOTX64.EFI``), and an ext4 root.  Everything is on the first
serial port; ``root`` logs in without a password; any Ethernet card is set up by DHCP.

Packages come through the system's own apt sources.  A finished disk is kept under
``$XDG_CACHE_HOME/pybhyve/disks`` until the recipe, that is this file, or a package's
version changes.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from tools import fetch

RELEASE: Final = "bookworm"

PACKAGES: Final = (
    *("linux-image-amd64", "initramfs-tools", "busybox", "lz4"),
    *("systemd-sysv", "systemd-resolved", "udev", "dbus", "kmod"),
    *("iproute2", "iputils-ping", "procps", "less", "pciutils"),
    *("grub-common", "grub-efi-amd64-bin"),
    *("dmidecode", "acpica-tools"),  # acpidump, to see the tables from inside
    "usr-is-merged",  # instead of usrmerge, which brings all of Perl
)

EXCLUDED: Final = (
    *("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"),
    "/usr/lib/grub/x86_64-efi/monolithic/*",
    # Drivers of what no virtual machine has: half of the kernel package.
    *(
        f"/lib/modules/*/kernel/{name}/*"
        for name in (
            *("drivers/bluetooth", "drivers/comedi", "drivers/gpu", "drivers/iio"),
            *("drivers/infiniband", "drivers/media", "drivers/net/wireless"),
            *("drivers/staging", "net/bluetooth", "net/mac80211", "net/wireless"),
            "sound",
        )
    ),
)

SECTOR: Final = 512
MIB: Final = 1 << 20
ESP_START: Final = 1 * MIB
ESP_SIZE: Final = 64 * MIB
ROOT_START: Final = ESP_START + ESP_SIZE
ROOT_SIZE: Final = 4 * 1024 * MIB
SIZE: Final = ROOT_START + ROOT_SIZE + MIB
"""Bytes, the last MiB for the second copy of the GPT; the file is sparse."""

ESP_LABEL: Final = "ESP"
ROOT_LABEL: Final = "debian-root"

_PARTITIONS: Final = f"""\
label: gpt
start={ESP_START // SECTOR}, size={ESP_SIZE // SECTOR}, type=uefi, name=ESP
start={ROOT_START // SECTOR}, size={ROOT_SIZE // SECTOR}, \
type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=root
"""

# What finds the root; the rest of GRUB lies there.
_GRUB_START: Final = f"""\
search --label {ROOT_LABEL} --set=root
set prefix=($root)/boot/grub
configfile $prefix/grub.cfg
"""

_GRUB_CFG: Final = f"""\
if serial --unit=0 --speed=115200; then
  terminal_input serial
  terminal_output serial
fi
insmod all_video
set timeout=1
menuentry "Debian GNU/Linux" {{
  linux /vmlinuz root=LABEL={ROOT_LABEL} ro console=ttyS0,115200 quiet
  initrd /initrd.img
}}
"""

FILES: Final = {
    "boot/grub/grub.cfg": _GRUB_CFG,
    "boot/grub/start.cfg": _GRUB_START,
    "etc/default/locale": "LANG=C.UTF-8\n",
    "etc/fstab": f"""\
LABEL={ROOT_LABEL} / ext4 errors=remount-ro 0 1
LABEL={ESP_LABEL} /boot/efi vfat umask=0077 0 2
""",
    "etc/hostname": "debian\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 debian\n",
    # The root file system's driver and the controllers of every disk that bhyve has:
    # a tenth of what initramfs-tools would take, and all of it has to be unpacked.
    "etc/initramfs-tools/conf.d/disk": "MODULES=list\nCOMPRESS=lz4\n",
    "usr/share/initramfs-tools/modules.d/disk": (
        "ahci\nsd_mod\nvirtio_pci\nvirtio_blk\nnvme\next4\n"
    ),
    # A processor in software on a busy host: a disk's udev rules may take a minute.
    "etc/systemd/system.conf.d/patience.conf": """\
[Manager]
DefaultTimeoutStartSec=10min
DefaultDeviceTimeoutSec=10min
""",
    "etc/systemd/network/80-ethernet.network": """\
[Match]
Type=ether

[Network]
DHCP=yes
""",
}

# In the new root, with everything installed.  grub-install would ask about disks that
# are not there yet.  A machine takes its identity when it first boots: copies of a disk
# would share it, and one DHCP lease with it.
_FINISH: Final = """\
set -e
passwd --delete root
systemctl enable systemd-networkd systemd-resolved
modules=/usr/lib/grub/x86_64-efi
mkdir -p /boot/grub/x86_64-efi /boot/efi/EFI/BOOT
cp $modules/*.mod $modules/*.lst /boot/grub/x86_64-efi
grub-mkimage --format=x86_64-efi --output=/boot/efi/EFI/BOOT/BOOTX64.EFI \\
    --prefix=/boot/grub --config=/boot/grub/start.cfg \\
    part_gpt ext2 search search_label configfile normal test serial terminal linux
: > /etc/machine-id
rm /etc/apt/apt.conf.d/99mmdebstrap
"""

# Only here do the files of the new root belong to root.
_FILL: Final = f"""\
set -e
mkdir root
tar -C root -xf root.tar
mcopy -s -i disk.img@@{ESP_START} root/boot/efi/EFI ::
rm -r root/boot/efi/EFI
mke2fs -q -t ext4 -L {ROOT_LABEL} -d root \\
    -E offset={ROOT_START},lazy_itable_init=0,assume_storage_prezeroed=1 \\
    disk.img {ROOT_SIZE // 1024}k
"""

TOOLS: Final = {
    "mmdebstrap": "mmdebstrap",
    "fakeroot": "fakeroot",
    "sfdisk": "fdisk",
    "mke2fs": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
}
"""The programs that make a disk, and the Debian packages that have them."""


class DiskError(Exception):
    """A disk that cannot be made; the message says why."""


def debian(packages: Sequence[str] = ()) -> Path:
    """The finished disk with these packages more, made if there is none.

    It is shared: start machines on a ``copy``.  Raises DiskError.
    """
    wanted = sorted({*PACKAGES, *packages})
    disks = fetch.cache_dir() / "disks"
    disks.mkdir(exist_ok=True)
    name = "-".join(["debian12", *sorted(packages)])
    with _locked(disks / f"{name}.lock"):
        earlier = sorted(disks.glob(f"{name}.*.img"), key=lambda p: p.stat().st_mtime)
        try:
            options, versions = _resolve(wanted)
        except DiskError as error:
            # Without a network, what an earlier run made is better than nothing.
            if not earlier:
                raise
            print(f"disk: {error}; using {earlier[-1]}", file=sys.stderr)
            return earlier[-1]
        recipe = Path(__file__).read_bytes()
        key = hashlib.sha256(recipe + versions.encode()).hexdigest()[:16]
        disk = disks / f"{name}.{key}.img"
        if disk not in earlier:
            _build(disk, wanted, options)
            for old in earlier:
                old.unlink()
    return disk


def missing_packages(path: str) -> list[str]:
    """The packages whose programs making a disk needs and does not find in PATH."""
    return sorted(
        {name for tool, name in TOOLS.items() if not shutil.which(tool, path=path)}
    )


def copy(disk: Path, to: Path) -> None:
    """Copy a disk, its holes too; at no cost where the file system can share."""
    to.parent.mkdir(parents=True, exist_ok=True)
    scratch = to.with_name(f".{to.name}.new")
    _run(["cp", "--reflink=auto", "--sparse=always", str(disk), str(scratch)])
    scratch.rename(to)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _resolve(packages: Sequence[str]) -> tuple[list[str], str]:
    """Apt's options and the versions that it would install on an empty disk."""
    empty = ["-oDir::State::status=/dev/null", "-oAPT::Install-Recommends=false"]
    for lists in (fetch.system_lists, fetch.own_lists):
        options = lists()
        done = subprocess.run(
            ["apt-get", *options, *empty, "--simulate", "install", *packages],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0 and fetch.sources(options, release=RELEASE):
            installed = re.findall(r"^Inst (\S+ \(\S+)", done.stdout, re.MULTILINE)
            return options, "\n".join(sorted(installed))
    reason = re.search(r"^E: .*", done.stderr, re.MULTILINE)
    raise DiskError(
        reason[0] if reason else f"apt has no sources of Debian's {RELEASE}"
    )


def _build(disk: Path, packages: Sequence[str], options: Sequence[str]) -> None:
    # Where users do not look, but may run what is there.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    if missing := missing_packages(path):
        raise DiskError(
            "making a disk needs packages that are not installed: "
            f"apt-get install {' '.join(missing)}"
        )
    print("making a disk with Debian 12: a minute or two ...", file=sys.stderr)
    # Not under the cache: who mmdebstrap becomes may not enter the user's home.
    with tempfile.TemporaryDirectory(prefix="pybhyve-disk-") as directory:
        scratch = Path(directory)
        scratch.chmod(0o755)
        _bootstrap(scratch, packages, options)
        with (scratch / "disk.img").open("wb") as image:
            image.truncate(SIZE)
        esp = [f"--offset={ESP_START // SECTOR}", "disk.img", str(ESP_SIZE // 1024)]
        environment = {**os.environ, "PATH": path}
        for command, text in (
            (["sfdisk", "--quiet", "disk.img"], _PARTITIONS),
            (["mkfs.vfat", "-F32", "-s1", "-n", ESP_LABEL, *esp], ""),
            (["fakeroot", "sh", "-c", _FILL], ""),
        ):
            _run(command, text, cwd=scratch, env=environment)
        copy(scratch / "disk.img", disk)


def _bootstrap(scratch: Path, packages: Sequence[str], options: Sequence[str]) -> None:
    """Install everything into ``root.tar``."""
    with tarfile.open(scratch / "files.tar", "w") as archive:
        for name, text in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    (scratch / "finish").write_text(_FINISH)
    # How to reach the sources, such as a proxy, is the system's apt's to say.
    acquire = _run(["apt-config", "dump", "--no-empty", "Acquire"])
    (scratch / "apt.conf").write_text(acquire)
    _run(
        [
            *("mmdebstrap", "--quiet", "--variant=minbase"),
            f"--include={','.join(packages)}",
            f"--aptopt={scratch / 'apt.conf'}",
            "--aptopt=APT::Install-Recommends false",
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED),
            # Before the kernel's package makes its initramfs.
            f"--essential-hook=tar-in {scratch / 'files.tar'} /",
            f"--customize-hook=upload {scratch / 'finish'} /finish",
            '--customize-hook=chroot "$1" sh /finish && rm "$1/finish"',
            *(RELEASE, str(scratch / "root.tar")),
            *fetch.sources(options, release=RELEASE),
        ]
    )


def _run(
    command: Sequence[str],
    text: str = "",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        check=False,
    )
    if done.returncode != 0:
        print(done.stderr, end="", file=sys.stderr)
        raise DiskError(f"{command[0]} ended with status {done.returncode}")
    return done.stdout


def main() -> int:
    """Write a disk to the file that the command line names."""
    parser = argparse.ArgumentParser(description="Make a disk with Debian 12 on it.")
    parser.add_argument("file", type=Path, help="the image to write")
    parser.add_argument("package", nargs="*", help="to install besides the usual")
    args = parser.parse_args()
    try:
        copy(debian(args.package), args.file)
    except (DiskError, fetch.FetchError, OSError) as error:
        print(f"disk: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
