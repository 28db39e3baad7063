"""The vCPU threads: one each, from activation to the end of the VM.

A thread that is not to run its vCPU (an AP before its SIPI, all of them during a pause)
waits here.  bhyve: fbsdrun_addcpu() and fbsdrun_start_thread().
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping

from pybhyve.errors import BhyveError
from pybhyve.vmmapi import SuspendHow, Vcpu, Vm

log = logging.getLogger(__name__)

BSP = 0
# A vCPU that somebody else resumed (a debugger, bhyvectl) is noticed after this long.
PARK_SECONDS = 0.1


class VcpuThreads:
    """The threads of a VM's vCPUs."""

    def __init__(
        self,
        vm: Vm,
        ncpu: int,
        affinity: Mapping[int, Collection[int]],
        loop: Callable[[Vcpu], SuspendHow],
        done: Callable[[SuspendHow | BhyveError], None],
    ) -> None:
        """``loop`` runs a vCPU until the VM ends; ``done`` is told once, from a thread.

        ``affinity`` has the host CPUs of the vCPUs that are pinned.
        """
        self._vm = vm
        self._affinity = affinity
        self._loop = loop
        self._done = done
        self._changed = threading.Condition()
        self._parked: set[int] = set()
        self._pausing = False
        self._debugged: frozenset[int] = frozenset()
        self._threads = [
            threading.Thread(target=self._run, args=(vm.vcpu(index),), daemon=True)
            for index in range(ncpu)
        ]

    def start(self) -> None:
        """Activate all vCPUs, suspended, and start their threads."""
        for index, thread in enumerate(self._threads):
            self._vm.activate_cpu(index)
            self._vm.suspend_cpu(index)
            thread.name = f"vcpu {index}"
            thread.start()

    def resume_cpu(self, index: int) -> None:
        """Let one suspended vCPU run."""
        with self._changed:
            if self._pausing:  # it runs when the pause ends
                self._debugged -= {index}
                return
            self._vm.resume_cpu(index)
            self._changed.notify_all()

    def suspend_cpu(self, index: int) -> None:
        """Stop one vCPU until `resume_cpu`."""
        with self._changed:
            if self._pausing:
                self._debugged |= {index}
                return
            self._vm.suspend_cpu(index)

    def pause(self) -> None:
        """Stop all vCPUs; on return none runs the guest or is in a device.

        Any thread but a vCPU's.
        """
        with self._changed:
            if self._pausing:
                return
            self._debugged = frozenset(self._vm.debug_cpus())
            self._pausing = True
            self._vm.suspend_all_cpus()
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: all(
                    index in self._parked or not thread.is_alive()
                    for index, thread in enumerate(self._threads)
                )
            )

    def resume(self) -> None:
        """Let the vCPUs that `pause` stopped run again."""
        with self._changed:
            if not self._pausing:
                return
            self._pausing = False
            for index in range(len(self._threads)):
                if index not in self._debugged:
                    self._vm.resume_cpu(index)
            self._changed.notify_all()

    def is_suspended(self, index: int) -> bool:
        """Whether one vCPU waits for `resume_cpu`, a pause apart."""
        with self._changed:
            if self._pausing:
                return index in self._debugged
            return index in self._vm.debug_cpus()

    @property
    def debugged(self) -> frozenset[int]:
        """The vCPUs that stay suspended when the pause ends."""
        return self._debugged

    @debugged.setter
    def debugged(self, vcpus: frozenset[int]) -> None:
        self._debugged = vcpus

    def park(self, vcpu: Vcpu) -> None:
        """Wait on a vCPU's thread until it may be worth running the vCPU again."""
        with self._changed:
            self._parked.add(vcpu.id)
            self._changed.notify_all()
            if self._pausing:
                self._changed.wait_for(lambda: not self._pausing)
            elif vcpu.id in self._vm.debug_cpus():
                self._changed.wait(PARK_SECONDS)
            self._parked.discard(vcpu.id)

    def join(self, seconds: float) -> bool:
        """Wait for all threads to end; whether they did."""
        with self._changed:
            self._pausing = False
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(seconds)
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, vcpu: Vcpu) -> None:
        try:
            if hosts := self._affinity.get(vcpu.id):
                self._pin(vcpu.id, hosts)
            how = self._loop(vcpu)
            if vcpu.id == BSP:
                self._done(how)
        except BhyveError as error:
            self._done(error)
        except Exception as error:
            log.debug("vcpu thread failed vcpu=%d", vcpu.id, exc_info=True)
            failure = BhyveError(f"vcpu {vcpu.id}: internal error")
            failure.__cause__ = error
            self._done(failure)
        finally:
            with self._changed:
                self._changed.notify_all()

    @staticmethod
    def _pin(index: int, hosts: Collection[int]) -> None:
        try:
            os.sched_setaffinity(0, hosts)
        except OSError as error:
            cpus = ",".join(str(cpu) for cpu in sorted(hosts))
            raise BhyveError(f"vcpu {index}: cannot run on host CPUs {cpus}") from error
