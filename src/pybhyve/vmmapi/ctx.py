"""One VM: the native one, its memory layout, and its directory.  libvmmapi's vmctx."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, Self

from pybhyve._vmm import MemView, Vcpu, Vm, VmmError
from pybhyve.errors import MemorySizeError, VmError
from pybhyve.vmmapi.exits import SuspendHow
from pybhyve.vmmapi.memory import HIGHMEM_BASE, LOWMEM_LIMIT, PAGE_SIZE, size_text
from pybhyve.vmmapi.registry import VmDir

VM_MAXCPU: Final = 254
"""The most vCPUs a VM can have: xAPIC ids are 8 bits, 255 is everybody."""
DOMAINS_MAX: Final = 8  # NUMA domains; segment ids 0 to 7 are theirs
VM_BOOTROM: Final = 8
VM_FRAMEBUFFER: Final = 9
VM_PCIROM: Final = 10
"""Segment ids of device memory; RAM has one id for each NUMA domain, from 0."""


class VmPhase(Enum):
    """What a VM's memory and registers are."""

    CREATED = "created"  # empty
    LOADED = "loaded"  # a loader has prepared them for a first run
    RUNNING = "running"  # used up, by a process that runs or was killed
    ENDED = "ended"  # what the last run left, to look at


class VmCtx:
    """A VM that this process has: nobody else can run, load or destroy it."""

    def __init__(self, directory: VmDir, maxcpus: int) -> None:
        """Wrap a VM's directory; use `create` or `open`."""
        self.directory = directory
        self.vm = Vm(maxcpus)
        self.lowmem_size = 0
        """Bytes of RAM from address 0."""
        self.highmem_size = 0
        """Bytes of RAM from 4 GiB."""
        self._segments: list[int] = []  # sizes, by NUMA domain
        self._wired: list[mmap.mmap] = []
        self.phase = VmPhase.CREATED
        self.ended = SuspendHow.NONE
        """How the last run ended."""

    # -- life ------------------------------------------------------------------------

    @classmethod
    def create(cls, name: str, maxcpus: int = 1) -> Self:
        """Make a VM.

        Raises VmExistsError, VmNameError, or VmError where the host refuses.
        """
        return cls(VmDir.create(name), maxcpus)

    @classmethod
    def open(cls, name: str, maxcpus: int | None = None, reinit: bool = False) -> Self:
        """Take a VM as its last process left it: memory, registers and topology.

        ``maxcpus``: how many vCPUs it gets, if not as many as it had.  The in-kernel
        devices come back only with as many as they had.  ``reinit``: take it as newly
        created instead.  Raises VmNotFoundError, VmBusyError, or VmError for a
        directory that cannot be used.
        """
        directory = VmDir.open(name)
        try:
            if reinit:
                directory.discard()
            state = directory.load_state() or {}
            saved = int(state.get("maxcpus", 1))
            if not 0 < saved <= VM_MAXCPU:
                raise ValueError(f"{saved} vCPUs")  # noqa: TRY301  # with its likes
            ctx = cls(directory, maxcpus or saved)
            ctx._restore(state)
        except (
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            OverflowError,
            VmmError,
        ) as error:
            directory.close()
            raise VmError(
                f"the state of VM '{name}' is damaged: destroy the VM"
            ) from error
        except BaseException:
            directory.close()
            raise
        return ctx

    @property
    def name(self) -> str:
        """The name of the VM."""
        return self.directory.name

    def close(self) -> None:
        """Let other processes have the VM, which stays."""
        self.directory.close()

    def destroy(self) -> None:
        """Remove the VM."""
        self.directory.destroy()

    # -- memory ----------------------------------------------------------------------

    def setup_memory(self, size: int, domains: Sequence[int] = ()) -> None:
        """Give the guest ``size`` bytes of RAM, or the sum of ``domains``.

        The domains follow each other in the guest's address space; RAM that would be
        above 3 GiB begins at 4 GiB instead.  A VM that has RAM already, of the same
        sizes, keeps it with its contents.  Raises MemorySizeError.
        """
        sizes = [*domains] or [size]
        if len(sizes) > DOMAINS_MAX:
            raise MemorySizeError(f"at most {DOMAINS_MAX} NUMA domains have memory")
        for each in sizes:
            if each % PAGE_SIZE:
                raise MemorySizeError(
                    f"memory.size {each} is not a multiple of {PAGE_SIZE} bytes"
                )
        if self._segments:
            if self._segments != sizes:
                raise MemorySizeError(
                    f"VM '{self.name}' has {size_text(sum(self._segments))} of memory, "
                    f"not {size_text(sum(sizes))}"
                )
            return
        self.directory.make_memory(sum(sizes))
        low = high = 0
        for segid, length in enumerate(sizes):
            fd = self.directory.open_memory(_segment_file(segid), length)
            try:
                self.vm.create_memseg(segid, "", length, fd)
                below = min(length, LOWMEM_LIMIT - low)
                if below:
                    self.vm.mmap_memseg(low, segid, 0, below)
                if length > below:
                    gpa = HIGHMEM_BASE + high
                    self.vm.mmap_memseg(gpa, segid, below, length - below)
            except VmmError as error:
                raise MemorySizeError(
                    f"Unable to setup memory ({error.errno})"
                ) from error
            finally:
                os.close(fd)
            low += below
            high += length - below
        self._segments = sizes
        self.lowmem_size = low
        self.highmem_size = high

    def wire_memory(self) -> None:
        """Lock guest RAM in host memory; MemorySizeError where the host refuses."""
        libc = ctypes.CDLL(None, use_errno=True)
        for segid, length in enumerate(self._segments):
            fd = self.directory.open_memory(_segment_file(segid), length)
            try:
                # A lock on any mapping keeps the pages of the file in memory.
                area = mmap.mmap(fd, length)
            finally:
                os.close(fd)
            address = ctypes.addressof(ctypes.c_char.from_buffer(area))
            if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(length)):
                number = ctypes.get_errno()
                raise MemorySizeError(
                    f"memory.wired: cannot lock {size_text(length)} "
                    "(see the limit in ulimit -l)"
                ) from OSError(number, os.strerror(number))
            self._wired.append(area)

    def map_gpa(self, gpa: int, length: int, writable: bool = False) -> MemView:
        """A view of guest memory; VmmError EFAULT unless it is inside one mapping."""
        return self.vm.view(gpa, length, writable)

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of guest memory; VmmError EFAULT where there is none."""
        return self.vm.read_mem(gpa, length)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Change guest memory; VmmError EFAULT where there is none."""
        self.vm.write_mem(gpa, data)

    # -- vCPUs -----------------------------------------------------------------------

    def vcpu(self, index: int) -> Vcpu:
        """A virtual CPU; ValueError or VmmError EINVAL from `Vm.maxcpus` on."""
        return self.vm.vcpu(index)

    def suspend(self, how: SuspendHow) -> None:
        """End the VM's life; nothing happens where it has ended already."""
        try:
            self.vm.suspend(how)
        except VmmError as error:
            if error.errno != errno.EALREADY:
                raise

    # -- between processes -----------------------------------------------------------

    def save_loaded(self) -> None:
        """Keep what a loader has prepared: memory layout and vCPU registers."""
        self.phase = VmPhase.LOADED
        self._save(devices=None)

    def save_running(self) -> None:
        """Keep that what the loader prepared is used up."""
        self.phase = VmPhase.RUNNING
        self._save(devices=None)

    def save_ended(self, how: SuspendHow) -> None:
        """Keep how a run ended and what it left, for bhyvectl to look at."""
        self.phase = VmPhase.ENDED
        self.ended = how
        self._save(devices=self.vm.save_devices())

    def save_changes(self) -> None:
        """Keep what was changed in a VM that does not run."""
        # A VM that has yet to run gets its devices, and their number of vCPUs, then.
        ended = self.phase is VmPhase.ENDED
        self._save(devices=self.vm.save_devices() if ended else None)

    def _save(self, devices: dict[str, Any] | None) -> None:
        sockets, cores, threads, _ = self.vm.get_topology()
        self.directory.save_state(
            {
                "maxcpus": self.vm.maxcpus,
                "topology": [sockets, cores, threads],
                "memory": self._segments,
                "phase": self.phase.value,
                "ended": int(self.ended),
                "vcpus": [
                    self.vm.vcpu(index).save() for index in range(self.vm.maxcpus)
                ],
                "devices": devices,
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self.phase = VmPhase(state["phase"])
        self.ended = SuspendHow(state["ended"])
        if sizes := [int(size) for size in state["memory"]]:
            if not self.directory.has_memory():
                raise VmError(
                    f"VM '{self.name}' has lost its memory, the host was restarted: "
                    "destroy the VM"
                )
            self.setup_memory(0, sizes)
        for index, vcpu in enumerate(state["vcpus"][: self.vm.maxcpus]):
            self.vm.vcpu(index).restore(vcpu)
        if len(state["vcpus"]) == self.vm.maxcpus:
            sockets, cores, threads = state["topology"]
            self.vm.set_topology(sockets, cores, threads)
            if state["devices"] is not None:
                self.vm.restore_devices(state["devices"])


def _segment_file(segid: int) -> str:
    return f"sysmem{segid}" if segid else "sysmem"
