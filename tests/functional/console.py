"""A program on a terminal of its own, driven as a person drives it: read, then type."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL = 3000  # characters of the log that a failure shows


class ConsoleError(AssertionError):
    """What was waited for did not come; the console's last lines follow."""


class Console:
    """The terminal of a running program; the file ``log`` has all it has shown."""

    def __init__(
        self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self._terminal, inner = pty.openpty()
        self._inner = inner
        self._log = log.open("wb")
        self._unread = ""
        self._shown = ""
        self._failed: str | None = None
        self.process = subprocess.Popen(
            command,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )

    @property
    def shown(self) -> str:
        """Everything that the console has shown and that was read."""
        return self._shown

    def terminal_modes(self) -> list[object]:
        """What tcgetattr says of the program's terminal."""
        return list(termios.tcgetattr(self._inner))

    def expect(self, pattern: str, timeout: float) -> re.Match[str]:
        """Read until the regular expression matches; what is before it counts as read.

        Raises ConsoleError after ``timeout`` seconds, or when the program has ended.
        From then on every call does, at once: nobody knows what the screen is about.
        """
        if self._failed is not None:
            raise ConsoleError(f"failed before: {self._failed}")
        compiled = re.compile(pattern, re.DOTALL)
        deadline = time.monotonic() + timeout
        while True:
            if match := compiled.search(self._unread):
                self._unread = self._unread[match.end() :]
                return match
            ended = self.process.poll()
            if not self._read(min(deadline - time.monotonic(), 0.5)):
                if ended is not None:
                    raise self._failure(f"exit status {ended} before {pattern!r}")
                if time.monotonic() > deadline:
                    raise self._failure(f"no {pattern!r} in {timeout:.0f} s")

    def send(self, text: str) -> None:
        """Type."""
        data = text.encode()
        while data:
            # The other side may be slow to read, and may have to write first.
            ready, writable, _ = select.select([self._terminal], [self._terminal], [])
            if ready:
                self._read(0)
            if writable:
                data = data[os.write(self._terminal, data[:256]) :]

    def run(self, command: str, timeout: float = 60) -> str:
        """Type a command to a shell and return what it prints; its status must be 0."""
        # The quotes keep the echo of what is typed from looking like its result.
        self.send(f"echo BE''GIN; {command}; echo EN''D$?\n")
        match = self.expect(r"BEGIN\r+\n(.*)END(\d+)\r+\n", timeout)
        if match[2] != "0":
            raise self._failure(f"{command!r} ended with status {match[2]}")
        return re.sub(r"\r+\n", "\n", match[1])

    def ended_within(self, seconds: float) -> bool:
        """Read until the program ends, or for that long; whether it has ended."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read(0.1)
        return self.process.poll() is not None

    def wait(self, timeout: float) -> int:
        """Read until the program ends; its exit status."""
        if not self.ended_within(timeout):
            raise self._failure(f"still running after {timeout:.0f} s")
        while self._read(0):
            pass
        return self.process.returncode

    def close(self) -> None:
        """End the program, whatever it does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._terminal)
        os.close(self._inner)
        self._log.close()

    def _read(self, timeout: float) -> bool:
        ready, _, _ = select.select([self._terminal], [], [], max(timeout, 0))
        if not ready:
            return False
        data = os.read(self._terminal, 65536)
        self._log.write(data)
        self._log.flush()
        text = data.decode(errors="replace")
        self._unread += text
        self._shown += text
        return True

    def _failure(self, what: str) -> ConsoleError:
        self._failed = what
        return ConsoleError(f"{what}; whole log: {self.log}\n{self._shown[-TAIL:]}")
