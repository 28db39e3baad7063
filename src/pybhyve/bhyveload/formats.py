"""Which kernel format a file has, and the plan of what it becomes in memory."""

from __future__ import annotations

import os
from pathlib import Path

from pybhyve.bhyveload import elf, linux, multiboot, multiboot2, pvh
from pybhyve.bhyveload.image import MAX_KERNEL_SIZE, Image, read_file
from pybhyve.bhyveload.plan import CpuState, LoadPlan
from pybhyve.errors import ImageError


def make_plan(
    kernel: Path,
    initrd: Path | None,
    cmdline: str | None,
    env: list[str],
    lowmem: int,
    highmem: int,
) -> tuple[LoadPlan, CpuState]:
    """What goes where in a VM with so much memory, and the state of vCPU 0.

    The format is found out: Linux bzImage, ELF with a PVH entry, Multiboot 2 or 1.
    Without a command line the kernel gets one that makes Linux talk on com1; the
    ``name=value`` words of ``env`` follow it.  Raises ImageError.
    """
    plan = LoadPlan(lowmem, highmem)
    initrd_data = None
    if initrd is not None:
        try:
            initrd_data = read_file(initrd, max(lowmem, highmem))
        except ImageError as error:
            raise ImageError(f"initrd {initrd}") from error
    try:
        image = Image(read_file(kernel, MAX_KERNEL_SIZE))
        state = _place(plan, image, kernel.name, initrd_data, cmdline, env)
    except ImageError as error:
        raise ImageError(f"kernel {kernel}") from error
    return plan, state


def _place(
    plan: LoadPlan,
    image: Image,
    name: str,
    initrd: bytes | None,
    cmdline: str | None,
    env: list[str],
) -> CpuState:
    if linux.recognise(image):
        line = _line(linux.DEFAULT_CMDLINE if cmdline is None else cmdline, *env)
        return linux.load(plan, image, initrd, line)
    if elf.recognise(image):
        file = elf.parse(image)
        entry = pvh.entry_point(image, file)
        if entry is not None:
            line = _line(linux.DEFAULT_CMDLINE if cmdline is None else cmdline, *env)
            return pvh.load(plan, image, file, entry, initrd, line)
    # A multiboot kernel's first word is its own name, as GRUB gives it.
    line = _line(name, cmdline or "", *env)
    if (header2 := multiboot2.find(image)) is not None:
        return multiboot2.load(plan, image, header2, initrd, line)
    if (header := multiboot.find(image)) is not None:
        return multiboot.load(plan, image, header, initrd, line)
    raise ImageError(
        "is not a kernel: neither a Linux bzImage, nor an ELF file with a PVH entry,"
        " nor a multiboot image"
    )


def _line(*words: str) -> bytes:
    line = os.fsencode(" ".join(word for word in words if word))
    if b"\0" in line:
        raise ImageError("a command line cannot contain a NUL character")
    return line
