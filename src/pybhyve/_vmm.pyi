"""The native module: what FreeBSD keeps in vmm.ko, and the silicon.

Private: only :mod:`pybhyve.vmmapi` imports it.  Every method may be called from any
thread.  Methods that wait (``run``, and register access to a running vCPU) release
the interpreter lock.
"""

from typing import Any, Final, Self, final

from typing_extensions import Buffer

__version__: Final[str]

class VmmError(OSError):
    """An operation that vmm refuses; ``errno`` is the one vmm.ko would return."""

# Reasons of Vm.suspend, in vmm.h's numbers.
SUSPEND_NONE: Final = 0
SUSPEND_RESET: Final = 1
SUSPEND_POWEROFF: Final = 2
SUSPEND_HALT: Final = 3
SUSPEND_TRIPLEFAULT: Final = 4
SUSPEND_DESTROY: Final = 5

# Exit codes of Vcpu.run: element 0 of the tuple.  The numbers are vmm.h's.
EXIT_INOUT: Final = (
    0  # (EXIT_INOUT, port, size, value) OUT; value None: IN, answer with complete()
)
EXIT_BOGUS: Final = 2  # (EXIT_BOGUS,) run again (a kick)
EXIT_RDMSR: Final = 3  # (EXIT_RDMSR, msr): answer with complete() or inject_exception()
EXIT_WRMSR: Final = (
    4  # (EXIT_WRMSR, msr, value): answer with complete(0) or inject_exception()
)
EXIT_HLT: Final = 5  # (EXIT_HLT,)
EXIT_MTRAP: Final = 6  # (EXIT_MTRAP,) one instruction done
EXIT_PAUSE: Final = 7  # (EXIT_PAUSE,)
EXIT_INST_EMUL: Final = 9  # (EXIT_INST_EMUL, gpa, size, value) MMIO write; value None: read, answer with complete()
EXIT_IOAPIC_EOI: Final = 13  # (EXIT_IOAPIC_EOI, vector)
EXIT_SUSPENDED: Final = 14  # (EXIT_SUSPENDED, how) once every active vCPU's run() has noticed
EXIT_DEBUG: Final = (
    21  # (EXIT_DEBUG,) the vCPU is suspended: run() comes back at once or after resume
)
EXIT_BPT: Final = 23  # (EXIT_BPT, inst_length)
EXIT_DB: Final = 25  # (EXIT_DB, dr6)
EXIT_IPI: Final = (
    24  # (EXIT_IPI, mode, vector, [destination vcpus]); mode 5 INIT, 6 SIPI
)

# Capabilities, names of vm_capability_name2type().
CAPABILITIES: Final[tuple[str, ...]]
# VM_REG_* in vmm.h's order: name ("rax" ... "tpr") -> number.
REGISTERS: Final[dict[str, int]]

@final
class MemView(Buffer):
    """A window on guest memory; supports the buffer protocol and keeps the memory alive.

    It shows a piece of a segment and goes on showing that when the segment is mapped
    elsewhere or nowhere.  Pages of a writable window are marked dirty, and translated
    code on them is dropped, when the last buffer taken from it is released: hold one for
    an access, not for good.
    """

    def __len__(self) -> int: ...

@final
class Vcpu:
    """One virtual CPU."""

    @property
    def id(self) -> int: ...
    def run(self) -> tuple[Any, ...]:
        """Run the guest until userland must act; one of the EXIT_* tuples.

        VmmError EINVAL while the vCPU is not active, EBUSY while another thread runs it.
        """

    def complete(self, value: int) -> None:
        """Give the value of the IN, MMIO read or RDMSR that run() returned for.

        OUT, MMIO writes and WRMSR need no call: the next run() goes on behind them.
        """

    def kick(self) -> None:
        """Make a run() that is under way, or the next one, return EXIT_BOGUS."""

    def reset(self) -> None:
        """Power-on state of a processor (bhyve's vcpu_reset())."""

    def init(self) -> None:
        """What INIT leaves of a processor: MTRRs, other MSRs and the FPU stay."""

    def get_register(self, reg: int) -> int: ...
    def set_register(self, reg: int, value: int) -> None: ...
    def get_desc(self, reg: int) -> tuple[int, int, int]:
        """Base, limit and access word of a segment register, LDTR, TR, GDTR or IDTR.

        Access: type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16.
        """

    def set_desc(self, reg: int, base: int, limit: int, access: int) -> None: ...
    def get_capability(self, name: str) -> int:
        """VmmError ENOENT where this engine does not have the capability."""

    def set_capability(self, name: str, value: int) -> None: ...
    def get_x2apic_state(self) -> int: ...
    def set_x2apic_state(self, state: int) -> None: ...
    def inject_exception(
        self, vector: int, error_code: int | None = None, restart: bool = True
    ) -> None: ...
    def inject_nmi(self) -> None: ...
    def get_intinfo(self) -> tuple[int, int]: ...
    def set_intinfo(self, info: int) -> None: ...
    def gla2gpa(self, gla: int, prot: int = 1) -> int | None:
        """Walk the guest's page tables as supervisor; None where nothing is mapped."""

    def get_stats(self) -> dict[str, int]: ...
    def save(self) -> dict[str, Any]:
        """The whole state as plain values, with ``version``."""

    def restore(self, state: dict[str, Any]) -> None: ...

@final
class Vm:
    """A virtual machine: memory, vCPUs and in-kernel devices."""

    def __new__(cls, maxcpus: int = 1) -> Self: ...

    # -- memory ----------------------------------------------------------------------
    def create_memseg(self, segid: int, name: str, length: int, fd: int = -1) -> None:
        """A segment of ``length`` bytes (multiple of 4096) in file ``fd``, or in a new memfd.

        System memory has no name.  VmmError EEXIST for a segment that is there already,
        EINVAL where it has another length or the file is too short.
        """

    def mmap_memseg(
        self, gpa: int, segid: int, offset: int, length: int, prot: int = 7
    ) -> None:
        """Map part of a segment into the guest; prot: 1 read, 2 write, 4 execute.

        A guest write to a mapping without write permission is an EXIT_INST_EMUL.
        VmmError ENOENT without such a segment, EEXIST where something is mapped, EINVAL
        for a range that is not whole pages or outside of the segment or of guest memory.
        """

    def munmap_memseg(self, gpa: int, length: int) -> None:
        """Undo an mmap_memseg with the same address and length; else VmmError EINVAL."""

    def memsegs(self) -> list[tuple[int, str, int]]: ...
    def memmap(self) -> list[tuple[int, int, int, int, int]]:
        """Mappings (gpa, segid, offset, length, prot), by rising gpa."""

    def read_mem(self, gpa: int, length: int) -> bytes:
        """VmmError EFAULT when any of the range is not RAM, ROM or devmem."""

    def write_mem(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write RAM, and ROM as well; VmmError EFAULT, and nothing written, elsewhere."""

    def view(self, gpa: int, length: int, writable: bool = False) -> MemView:
        """VmmError EFAULT when the range is not inside one mapping, or in ROM to write."""

    def view_memseg(
        self, segid: int, offset: int, length: int, writable: bool = False
    ) -> MemView:
        """A window on a segment, mapped or not (a frame buffer behind a BAR).

        VmmError ENOENT without such a segment, EINVAL beyond its end.
        """

    def dirty_pages(self, gpa: int, length: int, clear: bool = False) -> bytes:
        """One byte a page: 1 where guest or device wrote since the last clear.

        VmmError EINVAL unless gpa and length are multiples of 4096.
        """

    # -- vCPUs -----------------------------------------------------------------------
    @property
    def maxcpus(self) -> int: ...
    def vcpu(self, index: int) -> Vcpu: ...
    def set_topology(
        self, sockets: int, cores: int, threads: int, maxcpus: int = 0
    ) -> None: ...
    def get_topology(self) -> tuple[int, int, int, int]: ...
    def activate_cpu(self, index: int) -> None: ...
    def suspend_cpu(self, index: int) -> None: ...
    def resume_cpu(self, index: int) -> None: ...
    def suspend_all_cpus(self) -> None: ...
    def resume_all_cpus(self) -> None: ...
    def active_cpus(self) -> list[int]: ...
    def debug_cpus(self) -> list[int]: ...
    def suspended_cpus(self) -> list[int]: ...
    def suspend(self, how: int) -> None:
        """End the VM's life for a reason; VmmError EALREADY when it has ended already."""

    def suspended(self) -> int:
        """The reason for which the VM's life has ended; SUSPEND_NONE while it lasts."""

    def set_translate_after(self, runs: int | None) -> None:
        """Translate a block of 64-bit code after ``runs`` (0 to 65534); None: never."""

    def reinit(self) -> None:
        """Devices, vCPUs and RAM as newly created; VmmError EBUSY while a vCPU runs."""

    # -- interrupts ------------------------------------------------------------------
    def lapic_irq(self, vcpu: int, vector: int) -> None: ...
    def lapic_local_irq(self, vcpu: int, lvt: int) -> None: ...
    def lapic_msi(self, addr: int, msg: int) -> None: ...
    def ioapic_assert_irq(self, pin: int) -> None: ...
    def ioapic_deassert_irq(self, pin: int) -> None: ...
    def ioapic_pulse_irq(self, pin: int) -> None: ...
    def ioapic_pincount(self) -> int: ...
    def isa_assert_irq(self, atpic_irq: int, ioapic_irq: int) -> None:
        """ioapic_irq -1: only the PIC."""

    def isa_deassert_irq(self, atpic_irq: int, ioapic_irq: int) -> None: ...
    def isa_pulse_irq(self, atpic_irq: int, ioapic_irq: int) -> None: ...
    def isa_set_irq_trigger(self, atpic_irq: int, level: bool) -> None: ...
    def kernemu_read(self, vcpu: int, gpa: int, size: int) -> int:
        """Read the in-kernel LAPIC, IOAPIC or HPET as an MMIO of ``vcpu``."""

    def kernemu_write(self, vcpu: int, gpa: int, size: int, value: int) -> None: ...

    # -- time ------------------------------------------------------------------------
    def rtc_read(self, offset: int) -> int: ...
    def rtc_write(self, offset: int, value: int) -> None: ...
    def rtc_gettime(self) -> int: ...
    def rtc_settime(self, secs: int) -> None: ...
    def hpet_capabilities(self) -> int: ...
    def now(self) -> int:
        """Nanoseconds of this VM's clock; stands still while the clock is paused."""

    def wait_halt(self, seen: int, seconds: float) -> int:
        """Wait until a vCPU has gone to sleep since a count of that was ``seen``.

        At most for ``seconds``; gives the count, which begins with 0.
        """

    def pause_clock(self) -> None:
        """Have time stand still: on return no in-kernel device acts of itself."""

    def resume_clock(self) -> None: ...

    # -- state -----------------------------------------------------------------------
    def vm_stats(self) -> dict[str, int]: ...
    def save_devices(self) -> dict[str, Any]:
        """Clock and in-kernel devices (vlapic, vioapic, ...), each with ``version``."""

    def restore_devices(self, state: dict[str, Any]) -> None: ...
