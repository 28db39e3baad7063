"""What bhyve's exit status says about the guest.  bhyve(8), EXIT STATUS."""

from __future__ import annotations

from typing import Final

from pybhyve.vmmapi import SuspendHow

RESET: Final = 0
POWEROFF: Final = 1
HALT: Final = 2
TRIPLEFAULT: Final = 3
ERROR: Final = 4
UNKNOWN: Final = 100

STATUSES: Final = {
    SuspendHow.RESET: RESET,
    SuspendHow.POWEROFF: POWEROFF,
    SuspendHow.HALT: HALT,
    SuspendHow.TRIPLEFAULT: TRIPLEFAULT,
    SuspendHow.DESTROY: ERROR,
}


def of_suspend(how: SuspendHow) -> int:
    """The exit status for how a VM's life ended."""
    return STATUSES.get(how, UNKNOWN)
