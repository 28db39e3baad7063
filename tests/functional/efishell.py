"""The EFI shell on a serial console, driven as a person drives it."""

from __future__ import annotations

import re

from tests.functional.console import Console

PROMPT = "Shell> "
CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;=]*[A-Za-z]")


class EfiShell:
    """A shell at its prompt."""

    def __init__(self, console: Console, timeout: float) -> None:
        """Wait for the first prompt."""
        self.console = console
        # It counts down to looking for a script; Enter ends that at once, Escape only
        # after the time in which it could begin a longer sequence.
        console.expect("startup.nsh", timeout)
        console.send("\r")
        console.expect(PROMPT, timeout)

    def run(self, command: str, timeout: float = 60) -> str:
        """Type a command and return the text it shows, of the screen's lines."""
        self.type(command)
        shown = self.console.expect(rf"\r\n(.*){PROMPT}", timeout)[1]
        return CONTROL_SEQUENCE.sub("", shown).replace("\r", "")

    def type(self, command: str) -> None:
        """Type a command that will not come back."""
        # Each key is answered, so that none is lost in the 16 bytes of the port.
        for key in command:
            self.console.send(key)
            self.console.expect(re.escape(key), 30)
        self.console.send("\r")
