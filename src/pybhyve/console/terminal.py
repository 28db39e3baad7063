"""A terminal in raw mode, put back whatever becomes of this process.

Restored by :meth:`RawTerminal.restore`, at the interpreter's exit, and on the signals
that end a process.  For the ends that no handler sees (SIGKILL, SIGSEGV, abort()) a
small shell waits on a pipe and restores the modes when this process is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import termios
from types import FrameType
from typing import Any, Final

# Those whose default is to end the process and that others send: a terminal in raw
# mode sends none itself.
FATAL_SIGNALS: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
)

_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6

# The line "done" means that the modes are back already.  In a session of its own the
# shell sees no signal of the terminal, and may still set its modes.
_GUARD: Final = 'read -r done || stty "$1" <&3'


def make_raw(fd: int) -> list[Any]:
    """Put the terminal ``fd`` into raw mode; returns the modes it had."""
    saved = termios.tcgetattr(fd)
    raw = termios.tcgetattr(fd)
    raw[_IFLAG] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    raw[_OFLAG] &= ~termios.OPOST
    raw[_LFLAG] &= ~(
        termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN
    )
    raw[_CFLAG] &= ~(termios.CSIZE | termios.PARENB)
    raw[_CFLAG] |= termios.CS8 | termios.CLOCAL
    raw[_CC][termios.VMIN] = 1
    raw[_CC][termios.VTIME] = 0
    termios.tcsetattr(fd, termios.TCSANOW, raw)
    return saved


class RawTerminal:
    """Raw mode on the terminal ``fd`` from construction until :meth:`restore`.

    To be made on the main thread, which is Python's rule for signal handlers.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._guard = self._start_guard(fd)
        self._saved: list[Any] | None = make_raw(fd)
        self._previous = {
            signo: signal.signal(signo, self._die)
            for signo in FATAL_SIGNALS
            if signal.getsignal(signo) is not signal.SIG_IGN
        }
        # Stopped and continued, the shell has set its own modes in between.
        self._previous[signal.SIGCONT] = signal.signal(signal.SIGCONT, self._continue)
        atexit.register(self.restore)

    def restore(self) -> None:
        """Put the modes and the signal handlers back; harmless when done already."""
        if self._saved is None:
            return
        saved, self._saved = self._saved, None
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(self._fd, termios.TCSADRAIN, saved)
        for signo, previous in self._previous.items():
            # Someone who took the signal over after us keeps it.
            if signal.getsignal(signo) in (self._die, self._continue):
                signal.signal(signo, previous)
        with contextlib.suppress(OSError):
            self._guard.communicate(b"done\n")
        atexit.unregister(self.restore)

    @staticmethod
    def _start_guard(fd: int) -> subprocess.Popen[bytes]:
        # The host's own stty and sh, with arguments that are all ours.
        modes = subprocess.run(
            ["stty", "-g"],  # noqa: S607
            stdin=fd,
            capture_output=True,
            check=True,
        ).stdout.strip()
        tty = os.dup(fd)
        try:
            return subprocess.Popen(  # noqa: S603
                ["sh", "-c", f"exec 3<&{tty}; {_GUARD}", "sh", modes],  # noqa: S607
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(tty,),
                start_new_session=True,
            )
        finally:
            os.close(tty)

    def _die(self, signo: int, _frame: FrameType | None) -> None:
        self.restore()
        signal.signal(signo, signal.SIG_DFL)
        os.kill(os.getpid(), signo)

    def _continue(self, _signo: int, _frame: FrameType | None) -> None:
        if self._saved is not None:
            with contextlib.suppress(termios.error):
                make_raw(self._fd)


def say(text: str) -> None:
    """A line for the person at the terminal, which may be in raw mode."""
    sys.stderr.write(text + "\r\n")
    sys.stderr.flush()
