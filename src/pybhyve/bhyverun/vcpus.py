"""The vCPU threads: one each, from activation to the end of the VM.

bhyve: fbsdrun_addcpu() and fbsdrun_start_thread().
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final

from pybhyve.errors import BhyveError
from pybhyve.vmmapi import SuspendHow, Vcpu, Vm, VmmError

log = logging.getLogger(__name__)

BSP: Final = 0


class VcpuThreads:
    """The threads of a VM's vCPUs.

    Each runs its vCPU by ``loop`` until the VM ends.  To pause, every thread is made to
    come here: `pause` kicks the vCPUs, and ``loop`` calls `rest` when its vCPU comes
    back without anything to do.
    """

    def __init__(
        self,
        vm: Vm,
        ncpu: int,
        affinity: Mapping[int, Collection[int]],
        loop: Callable[[Vcpu], SuspendHow],
        done: Callable[[SuspendHow | BhyveError], None],
    ) -> None:
        """``done`` is told, on a vCPU's thread, how the VM ended or why it must.

        ``affinity`` has the host CPUs of the vCPUs that are pinned.
        """
        self._vm = vm
        self._affinity = affinity
        self._loop = loop
        self._done = done
        self._changed = threading.Condition()
        self._pausing = False
        self._running = set(range(ncpu))  # threads that are neither at rest nor over
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(vm.vcpu(index),),
                daemon=True,
            )
            for index in range(ncpu)
        ]

    def start(self) -> None:
        """Activate all vCPUs, suspended, and start their threads."""
        self.activate()
        for thread in self._threads:
            thread.start()

    def activate(self) -> None:
        """Have all vCPUs of a VM as newly created wait for their start."""
        for index in range(len(self._threads)):
            self._vm.activate_cpu(index)
            self._vm.suspend_cpu(index)

    def pause(self) -> None:
        """Bring all threads to rest: on return none runs the guest or is in a device.

        Any thread but a vCPU's.
        """
        with self._changed:
            self._pausing = True
            for index in range(len(self._threads)):
                self._vm.vcpu(index).kick()
            self._changed.wait_for(lambda: not self._running)

    def resume(self) -> None:
        """Let the threads go on."""
        with self._changed:
            self._pausing = False
            self._changed.notify_all()

    def rest(self, vcpu: Vcpu) -> None:
        """Wait, on a vCPU's thread, while there is a pause."""
        with self._changed:
            self._running.discard(vcpu.id)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._pausing)
            self._running.add(vcpu.id)

    def join(self, seconds: float) -> bool:
        """Wait for the threads of a VM that has ended; whether all are over."""
        self.resume()
        end = time.monotonic() + seconds
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, vcpu: Vcpu) -> None:
        name = f"vcpu {vcpu.id}"
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
        try:
            if hosts := self._affinity.get(vcpu.id):
                self._pin(vcpu.id, hosts)
            how = self._loop(vcpu)
            if vcpu.id == BSP:
                self._done(how)
        except BhyveError as error:
            self._done(error)
        except VmmError as error:
            self._done(BhyveError(f"vm_run error {error}, errno {error.errno}"))
        except Exception as error:
            failure = BhyveError(f"vcpu {vcpu.id}: internal error")
            failure.__cause__ = error
            self._done(failure)
        finally:
            with self._changed:
                self._running.discard(vcpu.id)
                self._changed.notify_all()

    @staticmethod
    def _pin(index: int, hosts: Collection[int]) -> None:
        try:
            os.sched_setaffinity(0, hosts)
        except OSError as error:
            cpus = ",".join(str(cpu) for cpu in sorted(hosts))
            raise BhyveError(f"vcpu {index}: cannot run on host CPUs {cpus}") from error
