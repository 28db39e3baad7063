"""The native module as its stub describes it, with real-mode guests of a few bytes."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybhyve import _vmm
from pybhyve._vmm import REGISTERS, Vcpu, Vm, VmmError

MIB = 1 << 20
RAX, RBX, RIP, CS = (REGISTERS[name] for name in ("rax", "rbx", "rip", "cs"))
LAPIC = 0xFEE00000
IOAPIC = 0xFEC00000
HPET = 0xFED00000

SPIN = b"\xeb\xfe"  # jmp $
COUNT = b"\x66\x40\xeb\xfc"  # 1: inc eax; jmp 1b


def machine(code: bytes = SPIN, maxcpus: int = 1) -> Vm:
    """1 MiB of RAM and active vCPUs, each at real-mode ``code`` at 0x1000."""
    vm = Vm(maxcpus)
    vm.create_memseg(0, "", MIB)
    vm.mmap_memseg(0, 0, 0, MIB)
    vm.write_mem(0x1000, code)
    for index in range(maxcpus):
        start_at(vm.vcpu(index), 0x1000)
        vm.activate_cpu(index)
    return vm


def start_at(vcpu: Vcpu, rip: int) -> None:
    vcpu.set_register(CS, 0)
    vcpu.set_desc(CS, 0, 0xFFFF, 0x9B)
    vcpu.set_register(RIP, rip)


@contextmanager
def refused(number: int, *words: str) -> Iterator[None]:
    """The block fails with VmmError ``number``, whose text has all ``words``."""
    with pytest.raises(VmmError) as caught:
        yield
    assert errno.errorcode.get(caught.value.errno or 0) == errno.errorcode[number]
    for word in words:
        assert word in str(caught.value)


class Runner(threading.Thread):
    """A vCPU's thread: runs it until the VM is suspended and keeps the exits."""

    def __init__(self, vcpu: Vcpu) -> None:
        super().__init__(daemon=True)
        self.vcpu = vcpu
        self.exits: list[tuple[Any, ...]] = []
        self.start()

    def run(self) -> None:
        while not self.exits or self.exits[-1][0] != _vmm.EXIT_SUSPENDED:
            self.exits.append(self.vcpu.run())

    def wait_for(self, count: int) -> None:
        wait_until(lambda: len(self.exits) >= count)


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


# -- errors and constants --------------------------------------------------------------


def test_errors_are_oserrors_with_vmm_kos_errno() -> None:
    assert issubclass(VmmError, OSError)
    with pytest.raises(OSError, match="only 0 to 1") as caught:
        Vm(2).vcpu(2)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("maxcpus", [0, 256, 1 << 31])
def test_a_vm_has_a_sensible_number_of_vcpus(maxcpus: int) -> None:
    with refused(errno.EINVAL, str(maxcpus)):
        Vm(maxcpus)


def test_numbers_are_vmm_hs() -> None:
    assert list(REGISTERS.values()) == list(range(49))
    assert (REGISTERS["rip"], REGISTERS["gdtr"], REGISTERS["tpr"]) == (20, 31, 48)
    assert (_vmm.SUSPEND_RESET, _vmm.SUSPEND_TRIPLEFAULT) == (1, 4)
    assert "unrestricted_guest" in _vmm.CAPABILITIES


# -- memory ----------------------------------------------------------------------------


def test_segments_and_maps_are_listed() -> None:
    vm = machine()
    vm.create_memseg(8, "bootrom", 0x10000)
    vm.mmap_memseg(0xFFFF8000, 8, 0x8000, 0x8000, 5)

    assert vm.memsegs() == [(0, "", MIB), (8, "bootrom", 0x10000)]
    assert vm.memmap() == [(0, 0, 0, MIB, 7), (0xFFFF8000, 8, 0x8000, 0x8000, 5)]
    vm.munmap_memseg(0xFFFF8000, 0x8000)
    assert vm.memmap() == [(0, 0, 0, MIB, 7)]


def test_wrong_segments_and_maps_are_refused() -> None:
    vm = machine()
    with refused(errno.EEXIST, "segment 0"):
        vm.create_memseg(0, "", MIB)
    with refused(errno.EINVAL, "0x100000"):
        vm.create_memseg(0, "", 2 * MIB)
    with refused(errno.EINVAL, "4096"):
        vm.create_memseg(1, "", 1000)
    with refused(errno.EBADF):
        vm.create_memseg(1, "", MIB, 1 << 20)
    with refused(errno.EEXIST, "mapped at 0x0"):
        vm.mmap_memseg(0x1000, 0, 0, 0x1000)
    with refused(errno.ENOENT, "segment 3"):
        vm.mmap_memseg(MIB, 3, 0, 0x1000)
    with refused(errno.EINVAL, "protection"):
        vm.mmap_memseg(MIB, 0, 0, 0x1000, 0)
    with refused(errno.EINVAL):
        vm.munmap_memseg(0, 0x1000)


def test_a_segment_in_a_file_is_that_file() -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, MIB)
    vm = Vm()
    with refused(errno.EINVAL, "0x100000 bytes, not 0x200000"):
        vm.create_memseg(0, "", 2 * MIB, fd)
    vm.create_memseg(0, "", MIB, fd)
    vm.mmap_memseg(0, 0, 0, MIB)
    with mmap.mmap(fd, MIB) as shared:
        os.close(fd)
        shared[0x123:0x127] = b"host"
        vm.write_mem(0x223, b"vmm")

        assert vm.read_mem(0x123, 4) == b"host"
        assert shared[0x223:0x226] == b"vmm"


@given(
    st.integers(0, MIB - 1),
    st.binary(max_size=9000),
    st.sampled_from([bytes, bytearray]),
)
def test_what_is_written_is_read(gpa: int, data: bytes, kind: type) -> None:
    vm = machine()
    if gpa + len(data) <= MIB:
        vm.write_mem(gpa, kind(data))
        assert vm.read_mem(gpa, len(data)) == data
    else:
        with refused(errno.EFAULT):
            vm.write_mem(gpa, kind(data))


@pytest.mark.parametrize(
    ("gpa", "length"),
    [(MIB, 1), (MIB - 1, 2), (1 << 52, 1), ((1 << 64) - 1, 1), (0, 1 << 62)],
)
def test_there_is_nothing_outside_of_memory(gpa: int, length: int) -> None:
    vm = machine()
    with refused(errno.EFAULT, f"{gpa:#x}"):
        vm.read_mem(gpa, length)
    with refused(errno.EFAULT):
        vm.view(gpa, length)


def test_loaders_write_rom() -> None:
    vm = machine()
    vm.create_memseg(8, "bootrom", 0x1000)
    vm.mmap_memseg(0xFFFFF000, 8, 0, 0x1000, 5)
    vm.write_mem(0xFFFFFFF0, memoryview(b"\xea\x5b"))
    assert vm.read_mem(0xFFFFFFF0, 2) == b"\xea\x5b"


def test_a_view_is_guest_memory() -> None:
    vm = machine()
    with memoryview(vm.view(0x2000, 16, writable=True)) as window:
        assert (len(window), window.readonly, window.format) == (16, False, "B")
        window[3:6] = b"abc"
        assert vm.read_mem(0x2000, 8) == b"\0\0\0abc\0\0"
        vm.write_mem(0x2000, b"x")
        assert window[0] == ord("x")


def test_a_view_is_read_only_unless_asked() -> None:
    view = machine().view(0x2000, 16)
    assert len(view) == 16
    with memoryview(view) as window:
        assert window.readonly
        with pytest.raises(TypeError, match="read-only"):
            window[0] = 1
    with (
        Path(os.devnull).open("rb") as null,
        pytest.raises(TypeError, match="read-write"),
    ):
        null.readinto(view)


def test_a_writable_view_is_not_of_rom() -> None:
    vm = machine()
    vm.create_memseg(8, "bootrom", 0x2000)
    vm.mmap_memseg(0xFFFFE000, 8, 0, 0x2000, prot=5)

    assert len(vm.view(0xFFFFE000, 16)) == 16
    with pytest.raises(VmmError) as error:
        vm.view(0xFFFFE000, 16, writable=True)
    assert error.value.errno == errno.EFAULT


def test_init_leaves_what_a_reset_does_not() -> None:
    vcpu = machine().vcpu(0)
    state = vcpu.save()
    set_up = {"mtrr_def_type": 0xC06}
    state["cpu"]["msr"] |= set_up
    vcpu.restore(state)

    vcpu.init()

    cpu = vcpu.save()["cpu"]
    assert cpu["rip"] == 0xFFF0
    assert not cpu["wait_sipi"]
    assert set_up.items() <= cpu["msr"].items()

    vcpu.reset()

    assert vcpu.save()["cpu"]["msr"]["mtrr_def_type"] == 0


def test_a_view_keeps_its_memory() -> None:
    vm = machine()
    window = memoryview(vm.view(0x2000, 4, writable=True))
    vm.munmap_memseg(0, MIB)
    window[:] = b"kept"
    vm.mmap_memseg(0x10000000, 0, 0, MIB)
    assert vm.read_mem(0x10002000, 4) == b"kept"
    del vm
    gc.collect()
    assert bytes(window) == b"kept"


def test_a_segment_is_seen_whether_mapped_or_not() -> None:
    vm = machine()
    vm.create_memseg(9, "framebuffer", 0x4000)
    with memoryview(vm.view_memseg(9, 0x1000, 0x1000, writable=True)) as window:
        window[5] = 7
        vm.mmap_memseg(0xC0000000, 9, 0, 0x4000)
        assert vm.read_mem(0xC0001005, 1) == b"\7"
    assert vm.dirty_pages(0xC0000000, 0x4000) == bytes([0, 1, 0, 0])
    with refused(errno.EINVAL, "0x4000 bytes"):
        vm.view_memseg(9, 0x3000, 0x1001)
    with refused(errno.ENOENT):
        vm.view_memseg(10, 0, 1)


def test_dirty_pages() -> None:
    vm = machine(b"\xc6\x06\x00\x50\x01" + SPIN)  # mov byte [0x5000], 1
    vm.dirty_pages(0, MIB, clear=True)
    vm.write_mem(0x1FFF, b"ab")
    window = memoryview(vm.view(0x7000, 0x1000, writable=True))
    assert vm.dirty_pages(0x7000, 0x1000) == b"\0"
    window.release()
    runner = Runner(vm.vcpu(0))
    wait_until(lambda: vm.read_mem(0x5000, 1) == b"\1")

    assert vm.dirty_pages(0, 0x9000, clear=True) == bytes([0, 1, 1, 0, 0, 1, 0, 1, 0])
    assert vm.dirty_pages(0, 0x9000) == bytes(9)
    with refused(errno.EINVAL, "whole pages"):
        vm.dirty_pages(0x10, 0x1000)
    vm.suspend(_vmm.SUSPEND_DESTROY)
    runner.join()


def test_clearing_the_dirty_log_catches_the_next_write() -> None:
    vm = machine(b"\xfe\x06\x00\x50\xeb\xfa")  # 1: inc byte [0x5000]; jmp 1b
    runner = Runner(vm.vcpu(0))
    for _ in range(20):
        wait_until(lambda: vm.dirty_pages(0x5000, 0x1000, clear=True) == b"\1")
    vm.suspend(_vmm.SUSPEND_DESTROY)
    runner.join()


def test_code_that_a_view_changes_runs_anew() -> None:
    vm = machine(COUNT)
    vcpu = vm.vcpu(0)
    runner = Runner(vcpu)
    wait_until(lambda: vcpu.get_register(RAX) > 10)
    with memoryview(vm.view(0x1000, 4, writable=True)) as code:
        code[1] = 0x43  # inc ebx
    wait_until(lambda: vcpu.get_register(RBX) > 10)
    vm.write_mem(0x1001, b"\x40")
    still = vcpu.get_register(RAX)
    wait_until(lambda: vcpu.get_register(RAX) > still)
    vm.suspend(_vmm.SUSPEND_DESTROY)
    runner.join()


# -- running ---------------------------------------------------------------------------


def test_ports_exit_and_are_answered() -> None:
    # mov al, 0x42; out 0x80, al; in ax, 0x84; mov dx, 0x3f8; out dx, eax; jmp $
    vm = machine(b"\xb0\x42\xe6\x80\xe5\x84\xba\xf8\x03\x66\xef" + SPIN)
    vcpu = vm.vcpu(0)

    assert vcpu.run() == (_vmm.EXIT_INOUT, 0x80, 1, 0x42)
    assert vcpu.run() == (_vmm.EXIT_INOUT, 0x84, 2, None)
    vcpu.complete(0xBEEF)
    assert vcpu.run() == (_vmm.EXIT_INOUT, 0x3F8, 4, 0xBEEF)


def test_what_is_not_memory_exits_as_mmio() -> None:
    # mov ax, 0xf000; mov ds, ax; mov byte [0xffff], 7 (0xfffff is RAM); mov ax, 0xffff;
    # mov ds, ax; mov ax, [0x10]; mov [0x12], ax; jmp $
    vm = machine(
        b"\xb8\x00\xf0\x8e\xd8\xc6\x06\xff\xff\x07\xb8\xff\xff\x8e\xd8"
        b"\xa1\x10\x00\xa3\x12\x00" + SPIN
    )
    vcpu = vm.vcpu(0)

    assert vcpu.run() == (_vmm.EXIT_INST_EMUL, 0x100000, 2, None)
    assert vm.read_mem(0xFFFFF, 1) == b"\7"
    vcpu.complete(0x1234)
    assert vcpu.run() == (_vmm.EXIT_INST_EMUL, 0x100002, 2, 0x1234)


def test_a_write_to_rom_is_userlands() -> None:
    # mov ax, 0xa000; mov ds, ax; mov al, [0]; mov [0], al; jmp $
    vm = Vm()
    vm.create_memseg(0, "", MIB)
    vm.create_memseg(8, "bootrom", 0x1000)
    vm.mmap_memseg(0, 0, 0, 0xA0000)
    vm.mmap_memseg(0xA0000, 8, 0, 0x1000, 5)
    vm.write_mem(0xA0000, b"\x55")
    vm.write_mem(0x1000, b"\xb8\x00\xa0\x8e\xd8\xa0\x00\x00\xa2\x00\x00" + SPIN)
    start_at(vm.vcpu(0), 0x1000)
    vm.activate_cpu(0)
    assert vm.vcpu(0).run() == (_vmm.EXIT_INST_EMUL, 0xA0000, 1, 0x55)


def test_a_kick_is_never_lost() -> None:
    vm = machine()
    vcpu = vm.vcpu(0)
    vcpu.kick()
    assert vcpu.run() == (_vmm.EXIT_BOGUS,)
    runner = Runner(vcpu)
    for count in range(1, 200):
        vcpu.kick()
        runner.wait_for(count)
    vm.suspend(_vmm.SUSPEND_DESTROY)
    runner.join()
    assert runner.exits[-1] == (_vmm.EXIT_SUSPENDED, _vmm.SUSPEND_DESTROY)
    assert set(runner.exits[:-1]) == {(_vmm.EXIT_BOGUS,)}


def test_an_inactive_vcpu_does_not_run() -> None:
    vm = Vm(2)
    with refused(errno.EINVAL, "vCPU 1"):
        vm.vcpu(1).run()
    vm.activate_cpu(1)
    assert vm.active_cpus() == [1]
    with refused(errno.EBUSY, "vCPU 1"):
        vm.activate_cpu(1)


def test_one_thread_runs_a_vcpu() -> None:
    vm = machine(b"\x66\xff\x06\x00\x05\xeb\xf9")  # 1: inc dword [500h]; jmp 1b
    vcpu = vm.vcpu(0)
    runner = Runner(vcpu)
    # Whoever calls run() first has the vCPU, and this guest never lets go of it.
    wait_until(lambda: vm.read_mem(0x500, 4) != bytes(4))
    with refused(errno.EBUSY, "vCPU 0"):
        vcpu.run()
    with refused(errno.EBUSY, "vCPU 0"):
        vm.reinit()
    vm.suspend(_vmm.SUSPEND_RESET)
    runner.join()
    assert vm.suspended_cpus() == [0]
    vm.reinit()
    assert (vm.suspended_cpus(), vm.active_cpus()) == ([], [])
    assert vm.read_mem(0x1000, 2) == b"\0\0"


def test_a_suspended_vcpu_is_told_once_then_sleeps() -> None:
    vm = machine(COUNT)
    vcpu = vm.vcpu(0)
    vm.suspend_cpu(0)
    runner = Runner(vcpu)
    runner.wait_for(1)
    time.sleep(0.05)
    assert runner.exits == [(_vmm.EXIT_DEBUG,)]
    assert vm.debug_cpus() == [0]
    assert vcpu.get_register(RAX) == 0
    vm.resume_cpu(0)
    wait_until(lambda: vcpu.get_register(RAX) > 0)
    vm.suspend_all_cpus()
    runner.wait_for(2)
    vm.resume_all_cpus()
    with refused(errno.EINVAL):
        vm.resume_cpu(0)
    vm.suspend(_vmm.SUSPEND_POWEROFF)
    runner.join()


def test_the_end_is_told_when_every_vcpu_has_left() -> None:
    vm = machine(maxcpus=2)
    first = Runner(vm.vcpu(0))
    assert vm.suspended() == _vmm.SUSPEND_NONE
    vm.suspend(_vmm.SUSPEND_HALT)
    assert vm.suspended() == _vmm.SUSPEND_HALT
    with refused(errno.EALREADY):
        vm.suspend(_vmm.SUSPEND_RESET)
    time.sleep(0.05)
    assert first.exits == []
    second = Runner(vm.vcpu(1))
    for runner in (first, second):
        runner.join()
        assert runner.exits == [(_vmm.EXIT_SUSPENDED, _vmm.SUSPEND_HALT)]
    with refused(errno.EINVAL):
        vm.suspend(_vmm.SUSPEND_NONE)
    with refused(errno.EINVAL):
        vm.suspend(6)


# -- vCPU state ------------------------------------------------------------------------


def test_registers_and_descriptors() -> None:
    vcpu = Vm().vcpu(0)
    vcpu.set_register(REGISTERS["r15"], (1 << 64) - 1)
    vcpu.set_desc(REGISTERS["gdtr"], 0x1234, 0x7F, 0)
    vcpu.set_register(REGISTERS["tpr"], 5)

    assert vcpu.get_register(REGISTERS["r15"]) == (1 << 64) - 1
    assert vcpu.get_desc(REGISTERS["gdtr"]) == (0x1234, 0x7F, 0)
    assert vcpu.get_register(REGISTERS["tpr"]) == 5
    vcpu.reset()
    assert vcpu.get_register(RIP) == 0xFFF0
    assert vcpu.get_desc(CS)[0] == 0xFFFF0000
    for bad in (49, 1000, REGISTERS["gdtr"]):
        with refused(errno.EINVAL, str(bad)):
            vcpu.get_register(bad)
    with refused(errno.EINVAL):
        vcpu.get_desc(RAX)
    for value in (-1, 1 << 64):
        with pytest.raises(OverflowError):
            vcpu.set_register(RAX, value)


def test_registers_of_a_running_vcpu() -> None:
    vm = machine(COUNT)
    vcpu = vm.vcpu(0)
    runner = Runner(vcpu)
    wait_until(lambda: vcpu.get_register(RAX) > 0)
    vcpu.set_register(RAX, 1 << 40)
    assert vcpu.get_register(RAX) >> 32 in (0, 1 << 8)
    wait_until(lambda: vcpu.get_register(RAX) != vcpu.get_register(RAX))
    vm.suspend(_vmm.SUSPEND_DESTROY)
    runner.join()


def test_capabilities() -> None:
    vcpu = Vm().vcpu(0)
    assert vcpu.get_capability("unrestricted_guest") == 1
    assert vcpu.get_capability("hlt_exit") == 0
    for name in _vmm.CAPABILITIES:
        vcpu.set_capability(name, 1)
        assert vcpu.get_capability(name) == 1
    with refused(errno.ENOENT, "warp"):
        vcpu.get_capability("warp")
    with refused(errno.EINVAL):
        vcpu.set_capability("unrestricted_guest", 0)


def test_topology_and_x2apic() -> None:
    vm = Vm(4)
    vcpu = vm.vcpu(0)
    vcpu.set_register(RAX, 77)
    vm.set_topology(1, 2, 2)
    assert vcpu.get_x2apic_state() == 0
    vcpu.set_x2apic_state(1)

    assert vm.get_topology() == (1, 2, 2, 4)
    assert vcpu.get_x2apic_state() == 1
    assert vcpu.get_register(RAX) == 77
    with refused(errno.EINVAL, "5 sockets"):
        vm.set_topology(5, 1, 1)
    with refused(errno.EINVAL):
        vcpu.set_x2apic_state(2)


def test_an_init_ipi_is_the_senders_exit() -> None:
    vm = machine(maxcpus=2)
    vcpu = vm.vcpu(0)
    vcpu.set_capability("ipi_exit", 1)
    vm.kernemu_write(0, LAPIC + 0xF0, 4, 0x1FF)
    vm.kernemu_write(0, LAPIC + 0x310, 4, 1 << 24)
    vm.kernemu_write(0, LAPIC + 0x300, 4, 0x4500)
    vm.kernemu_write(0, LAPIC + 0x300, 4, 0x4699)
    assert vcpu.run() == (_vmm.EXIT_IPI, 5, 0, [1])
    assert vcpu.run() == (_vmm.EXIT_IPI, 6, 0x99, [1])


def test_injection_wants_an_exception() -> None:
    vm = machine()
    vm.vcpu(0).inject_exception(6)
    vm.vcpu(0).inject_nmi()
    with refused(errno.EINVAL, "32"):
        vm.vcpu(0).inject_exception(32)


def test_addresses_are_themselves_without_paging() -> None:
    assert machine().vcpu(0).gla2gpa(0x1234) == 0x1234


def test_statistics_count() -> None:
    vm = machine(b"\xe6\x80" + SPIN)
    vcpu = vm.vcpu(0)
    vcpu.run()
    vcpu.kick()
    vcpu.run()
    stats = vcpu.get_stats()
    assert stats["number of vm exits handled in userspace"] == 2
    assert stats["vcpu total runtime"] > 0
    assert vm.vm_stats()["Resident memory"] >= 0x1000


# -- devices and time ------------------------------------------------------------------


def test_in_kernel_devices_answer() -> None:
    vm = machine()
    assert vm.kernemu_read(0, LAPIC + 0x30, 4) == 0x60010
    vm.kernemu_write(0, IOAPIC, 4, 1)
    assert vm.kernemu_read(0, IOAPIC + 0x10, 4) == 0x1F0011
    assert vm.kernemu_read(0, HPET + 4, 4) == 59604644
    assert vm.hpet_capabilities() >> 32 == 59604644
    assert vm.ioapic_pincount() == 32
    with refused(errno.EINVAL, "0xfec01000"):
        vm.kernemu_read(0, IOAPIC + 0x1000, 4)
    with refused(errno.EINVAL, "3"):
        vm.kernemu_read(0, LAPIC, 3)


def test_interrupt_lines_have_ends() -> None:
    vm = machine()
    vm.ioapic_assert_irq(31)
    vm.ioapic_deassert_irq(31)
    vm.ioapic_pulse_irq(0)
    vm.isa_assert_irq(4, 4)
    vm.isa_deassert_irq(4, 4)
    vm.isa_pulse_irq(15, -1)
    vm.isa_set_irq_trigger(11, level=True)
    vm.lapic_irq(0, 0x30)
    vm.lapic_msi(0xFEE00000, 0x31)
    vm.lapic_local_irq(-1, 1)
    for bad in (
        lambda: vm.ioapic_assert_irq(32),
        lambda: vm.isa_assert_irq(16, -1),
        lambda: vm.isa_pulse_irq(3, 32),
        lambda: vm.isa_pulse_irq(3, -2),
        lambda: vm.isa_set_irq_trigger(0, level=True),
        lambda: vm.lapic_irq(0, 15),
        lambda: vm.lapic_irq(1, 0x30),
        lambda: vm.lapic_irq(0, 256),
        lambda: vm.lapic_local_irq(0, 7),
    ):
        with refused(errno.EINVAL):
            bad()


def test_the_rtc_keeps_cells_and_time() -> None:
    vm = machine()
    vm.rtc_write(0x34, 0xA5)
    assert vm.rtc_read(0x34) == 0xA5
    vm.rtc_settime(1_700_000_000)
    assert vm.rtc_gettime() in range(1_700_000_000, 1_700_000_005)
    with refused(errno.EINVAL):
        vm.rtc_read(128)
    with refused(errno.EINVAL):
        vm.rtc_write(0, 1)


def test_the_clock_can_stand_still() -> None:
    vm = Vm()
    assert vm.now() < vm.now()
    vm.pause_clock()
    now = vm.now()
    time.sleep(0.01)
    assert vm.now() == now
    vm.resume_clock()
    assert now <= vm.now() < now + 10_000_000_000


# -- save and restore ------------------------------------------------------------------


def test_a_saved_vm_goes_on_in_another() -> None:
    vm = machine(COUNT, maxcpus=2)
    vm.suspend_cpu(1)
    vcpu = vm.vcpu(0)
    runner = Runner(vcpu)
    wait_until(lambda: vcpu.get_register(RAX) > 1000)
    vm.suspend_cpu(0)
    runner.wait_for(1)
    vm.pause_clock()
    vm.rtc_write(0x40, 0x77)
    devices = vm.save_devices()
    cpus = [vm.vcpu(i).save() for i in range(2)]
    assert isinstance(devices["version"], int)
    assert isinstance(cpus[0]["version"], int)

    copy = machine(COUNT, maxcpus=2)
    copy.pause_clock()
    copy.restore_devices(devices)
    for index, state in enumerate(cpus):
        copy.vcpu(index).restore(state)
    assert copy.save_devices() == devices
    assert [copy.vcpu(i).save() for i in range(2)] == cpus
    assert copy.debug_cpus() == [0, 1]
    assert copy.rtc_read(0x40) == 0x77

    saved = vcpu.get_register(RAX)
    copied = copy.vcpu(0)
    assert copied.get_register(RAX) == saved
    copy.resume_clock()
    copy.resume_cpu(0)
    other = Runner(copied)
    wait_until(lambda: copied.get_register(RAX) != saved)
    for machine_ in (vm, copy):
        machine_.suspend(_vmm.SUSPEND_DESTROY)
        machine_.vcpu(1).run()
    runner.join()
    other.join()


@pytest.mark.parametrize("wrong", [{}, {"version": 1}, {"version": "one"}])
def test_what_is_not_a_state_is_refused(wrong: dict[str, Any]) -> None:
    vm = machine()
    with refused(errno.EINVAL, "state"):
        vm.restore_devices(wrong)
    with refused(errno.EINVAL, "state"):
        vm.vcpu(0).restore(wrong)


def test_a_state_of_another_version_is_refused() -> None:
    vm = machine()
    with refused(errno.EINVAL, "version 99"):
        vm.restore_devices(vm.save_devices() | {"version": 99})
    with refused(errno.EINVAL, "version 99"):
        vm.vcpu(0).restore(vm.vcpu(0).save() | {"version": 99})
