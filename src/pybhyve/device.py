"""What the machine asks of a device, whatever bus it sits on.

All methods have harmless defaults; a device overrides what concerns it.  The machine
walks its devices in the order of their registration to start, resume, reset and
restore, and in reverse order to pause, save and halt.
"""

from __future__ import annotations

from typing import Any


class Device:
    """A device of a machine.

    Life: built and attached while the machine is set up; `start` once; then any number
    of `pause`/`resume` pairs and `reset`; `halt` once.  `save` and `restore` are only
    called between `pause` and `resume`, or before `start`.
    """

    acpi_scope: str = "_SB"
    """Where in the DSDT `dsdt` writes: ``_SB``, ``ISA`` (below the ISA bridge, or in
    ``_SB`` where there is none), or ``PCxx`` for PCI bus xx."""

    acpi_resources: tuple[bytes, ...] = ()
    """Ports and memory that no ACPI device claims, as resource descriptors; the DSDT
    reserves them."""

    def start(self) -> None:
        """Begin to work.  Main thread; all devices are attached, no vCPU runs yet."""

    def pause(self) -> None:
        """Come to rest: on return no work is under way and none begins.

        Any thread but a vCPU's; all vCPUs are stopped.
        """

    def resume(self) -> None:
        """Go on after `pause`, or with what `restore` brought.  vCPUs are stopped."""

    def reset(self) -> None:
        """Take the state after power-on, guest-written settings included.

        All vCPUs are stopped and the device is paused, or not yet started.
        """

    def halt(self) -> None:
        """End: give host resources back.  Main thread; no vCPU runs any more.

        Also called for a device of a set-up that failed, so `start` may not have been.
        """

    def save(self) -> dict[str, Any]:
        """The whole state as plain values (numbers, strings, bytes, lists, dicts).

        With a ``"version"``, except that a device without state gives ``{}``.
        """
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take a state that `save` gave, of a device that is configured the same.

        Raises ValueError for a version, or values, that `save` never gives.
        """

    def dsdt(self, aml: Any) -> None:  # the builder comes with ACPI
        """Write what ACPI's DSDT says about the device, if anything."""
