"""Machines under test: the installed programs, and what they started."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.functional.console import Console
from tools import guests

BOOT_TIMEOUT = 240  # seconds; an interpreted boot on a busy machine

PROGRAM_DIR = Path(sys.executable).parent  # where bhyve and bhyvectl are installed


@dataclass(frozen=True, slots=True)
class Programs:
    """The installed programs, with a run directory of their own."""

    env: Mapping[str, str]
    logs: Path

    def bhyve(self, *args: str, enter: Sequence[str] = ()) -> Console:
        """Start bhyve on a terminal, by way of ``enter``, a command's beginning."""
        name = re.sub(r"[^A-Za-z0-9.-]", "_", args[-1] if args else "none")
        numbered = (self.logs / f"{name}.{i}.log" for i in itertools.count())
        log = next(path for path in numbered if not path.exists())
        return Console([*enter, str(PROGRAM_DIR / "bhyve"), *args], log, self.env)

    def run(
        self, program: str, *args: str, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, without a terminal."""
        return subprocess.run(
            [PROGRAM_DIR / program, *args],
            env={**os.environ, **self.env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


@dataclass(slots=True)
class Machine:
    """A started virtual machine."""

    name: str
    guest: guests.Guest | None
    ncpus: int
    console: Console


Starter = Callable[..., Machine]
