"""Where PCI interrupt lines go: an IOAPIC pin, and a PIRQ of the LPC bridge.

Intel 82371AB (PIIX4) datasheet, 4.1.10, and its successors for PIRQE to PIRQH.
bhyve: pci_irq.c.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pybhyve.amd64.ioapic import IoapicPins
from pybhyve.device import Device

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine

PIRQS: Final = 8
PIRQ_DIS: Final = 0x80
PIRQ_IRQ: Final = 0x0F

# The ISA interrupts a PIRQ may be routed to: 3-7, 9-12, 14, 15.
PERMITTED_IRQS: Final = 0xDEF8
SCI_IRQ: Final = 9


class IntxRoute(NamedTuple):
    """Where one function's INTA to INTD goes."""

    pin: int  # 1 to 4
    ioapic_pin: int  # -1: none
    pirq: int  # 0 to 7


class PirqRouter(Device):
    """The PIRQ registers, and how many functions hold each line.

    Its registers are in the LPC bridge's configuration space, but the lines work
    without a bridge.
    """

    def __init__(self, machine: Machine) -> None:
        self._vm = machine.vm
        self._lock = threading.Lock()
        # A boot ROM has the routing built in, so it must be the same fixed one.
        self._firmware = machine.options.bootrom is not None
        self._pins = IoapicPins(machine.vm.ioapic_pincount(), self._firmware)
        self._regs = bytearray([PIRQ_DIS] * PIRQS)
        self._regs_at_reset = bytes(self._regs)
        self._active = [0] * PIRQS  # functions that assert each PIRQ
        self._pirq_uses = [0] * PIRQS
        # IRQ 2 is the cascade; 0, 1, 8 and 13 are wired on the board.
        self._irq_uses = [0] * 16
        self.reserve(SCI_IRQ)

    def reserve(self, irq: int) -> None:
        """Count a user of an ISA interrupt, so that PCI rather shares another."""
        self._irq_uses[irq] += 1

    def route(self, slot: int, pin: int) -> IntxRoute:
        """Choose where INTA (1) to INTD (4) of a slot goes.  Set-up only."""
        ioapic_pin = self._pins.alloc(slot, pin)
        if self._firmware:
            pirq = (4 + slot + pin) % PIRQS
        else:
            pirq = min(range(PIRQS), key=self._pirq_uses.__getitem__)
        self._pirq_uses[pirq] += 1
        if self._regs[pirq] & PIRQ_DIS:
            permitted = [irq for irq in range(16) if PERMITTED_IRQS >> irq & 1]
            irq = min(permitted, key=self._irq_uses.__getitem__)
            self._irq_uses[irq] += 1
            self._regs[pirq] = irq
            self._regs_at_reset = bytes(self._regs)
            self._vm.isa_set_irq_trigger(irq, True)
        return IntxRoute(pin, ioapic_pin, pirq)

    def irq(self, pirq: int) -> int:
        """The ISA interrupt that PIRQ 0 to 7 is routed to; 255: none."""
        reg = self._regs[pirq]
        return 255 if reg & PIRQ_DIS else reg & PIRQ_IRQ

    def used(self, pirq: int) -> bool:
        """Whether any function is routed to PIRQ 0 to 7."""
        return self._pirq_uses[pirq] > 0

    def read(self, pirq: int) -> int:
        """The routing register of PIRQ 0 to 7."""
        return self._regs[pirq]

    def write(self, pirq: int, value: int) -> None:
        """A guest's write to the routing register of PIRQ 0 to 7.

        An interrupt that is not permitted disables the routing.
        """
        value &= PIRQ_DIS | PIRQ_IRQ
        if not PERMITTED_IRQS >> (value & PIRQ_IRQ) & 1:
            value |= PIRQ_DIS
        with self._lock:
            if self._active[pirq]:
                self._drive(pirq, False)
            self._regs[pirq] = value
            if self._active[pirq]:
                self._drive(pirq, True)

    def set_level(self, route: IntxRoute, level: bool) -> None:
        """A function raises or lowers its line.  Any thread."""
        if route.ioapic_pin >= 0:
            if level:
                self._vm.ioapic_assert_irq(route.ioapic_pin)
            else:
                self._vm.ioapic_deassert_irq(route.ioapic_pin)
        with self._lock:
            self._active[route.pirq] += 1 if level else -1
            if self._active[route.pirq] == (1 if level else 0):
                self._drive(route.pirq, level)

    def _drive(self, pirq: int, level: bool) -> None:
        reg = self._regs[pirq]
        if reg & PIRQ_DIS:
            return
        if level:
            self._vm.isa_assert_irq(reg & PIRQ_IRQ, -1)
        else:
            self._vm.isa_deassert_irq(reg & PIRQ_IRQ, -1)

    def reset(self) -> None:
        """The routing of set-up; no line is held, each function has let go."""
        self._regs[:] = self._regs_at_reset
        self._active = [0] * PIRQS
        for reg in self._regs:
            if not reg & PIRQ_DIS:
                self._vm.isa_set_irq_trigger(reg & PIRQ_IRQ, True)

    def save(self) -> dict[str, Any]:
        """Registers and holders of each line."""
        return {"version": 1, "regs": bytes(self._regs), "active": list(self._active)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave; the lines themselves are the PIC's state."""
        if state["version"] != 1 or len(state["regs"]) != PIRQS:
            raise ValueError(f"pirq: unknown state version {state['version']}")
        self._regs[:] = state["regs"]
        self._active = list(state["active"])
