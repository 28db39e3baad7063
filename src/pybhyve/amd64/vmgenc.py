"""The VM generation counter: a guest sees by it that it is not the one it was.

Microsoft, "Virtual Machine Generation ID".  16 random bytes in a page that the guest
can only read; a new run of the VM has new ones.  bhyve: vmgenc.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pybhyve.amd64.acpi import Aml
from pybhyve.amd64.acpi.aml import package, string
from pybhyve.amd64.bootrom import BOOTROM_BASE
from pybhyve.device import Device
from pybhyve.errors import DeviceError
from pybhyve.vmmapi import PAGE_SIZE, VM_BOOTROM, VmmError

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

ID_SIZE: Final = 16
TESTDEV_IOMEM: Final = 0x10000  # pc-testdev has the firmware region's first bytes
PROT_READ: Final = 1
GPE: Final = "_E00"  # pm.GPE_VMGENC
CHANGED: Final = 0x80


class Vmgenc(Device):
    """The page, and ``GENC``.

    deviation: bhyve puts it where pc-testdev's memory is, if there is one.
    """

    def __init__(self, machine: Machine) -> None:
        """DeviceError: ROM and variables leave no page."""
        self._ctx = machine.ctx
        offset = TESTDEV_IOMEM if machine.options.lpc_pc_testdev else 0
        self._gpa = BOOTROM_BASE + offset
        try:
            machine.vm.mmap_memseg(self._gpa, VM_BOOTROM, offset, PAGE_SIZE, PROT_READ)
        except VmmError as error:
            raise DeviceError(
                "boot ROM and variables leave no page for the VM generation counter: "
                "use smaller ones, or -o acpi_tables=false"
            ) from error
        self._id = machine.random_bytes(ID_SIZE)
        self._ctx.write(self._gpa, self._id)

    def reset(self) -> None:
        """The identifier stays."""
        self._ctx.write(self._gpa, self._id)

    def save(self) -> dict[str, Any]:
        """The identifier."""
        return {"version": 1, "id": self._id}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave: the guest goes on, it does not begin anew."""
        if state["version"] != 1 or len(state["id"]) != ID_SIZE:
            raise ValueError(f"vmgenc: unknown state version {state['version']}")
        self._id = bytes(state["id"])
        self._ctx.write(self._gpa, self._id)

    def dsdt(self, aml: Aml) -> None:
        r"""``GENC`` with its address, and the event that says the contents changed."""
        with aml.device("GENC"):
            # A method, because the specification's name is too long for an _HID.
            with aml.method("_HID"):
                aml.return_(string("Bhyve_V_Gen_Counter_V1"))
            aml.name("_CID", string("VM_Gen_Counter"))
            aml.name("_UID", 0)
            aml.name("_DDN", string("VM_Gen_Counter"))
            aml.name("ADDR", package([self._gpa & 0xFFFFFFFF, self._gpa >> 32]))
        with aml.scope(r"\_GPE"), aml.method(GPE):
            aml.notify(r"\_SB.GENC", CHANGED)
