"""What the three programs have in common: how errors and the log reach the user."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Final

from pybhyve.errors import BhyveError, GuestAbortError, UsageError, one_line, printable

LOG: Final = logging.getLogger("pybhyve")


def run_program(
    name: str,
    main: Callable[[Sequence[str]], int],
    argv: Sequence[str] | None,
    usage: str,
    failure: int = BhyveError.status,
) -> int:
    """Run a program's ``main`` and report what it raises; the exit status.

    Every error is one line, ``name: message: cause``, on standard error; with
    PYBHYVE_TRACEBACK=1 in the environment its traceback comes first.  A UsageError
    brings the usage text.  ``failure`` is the status of errors that have none of
    their own: bhyve's 4 is not every program's.
    """
    # As any other program: Ctrl-C ends it, without a traceback.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        # File names and arguments need not be text: they leave as they came.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    handler = _start_log(name)
    try:
        status = main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read our output has left; what is buffered has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failure
    except BhyveError as error:
        _report(name, error)
        if isinstance(error, UsageError):
            sys.stderr.write(usage)
        if isinstance(error, GuestAbortError):
            sys.stdout.flush()
            signal.raise_signal(signal.SIGABRT)
        return failure if error.status == BhyveError.status else error.status
    except Exception as error:
        _report(f"{name}: internal error", error)
        return failure
    else:
        return status
    finally:
        LOG.removeHandler(handler)
        LOG.propagate = True
        signal.signal(signal.SIGINT, interrupt)


def set_log_level(level: str) -> None:
    """The least that the log shows: debug, info, warning or error."""
    LOG.setLevel(level.upper())


class _Formatter(logging.Formatter):
    """Messages that may quote anything."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's
        """As logging does, without what would change a terminal."""
        return printable(super().formatMessage(record))


def _start_log(name: str) -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(f"{name}: %(message)s"))
    if sys.stderr.isatty():
        handler.terminator = "\r\n"  # the terminal may be raw: the guest's console
    LOG.addHandler(handler)
    LOG.propagate = False
    LOG.setLevel(logging.WARNING)
    return handler


def _report(name: str, error: BaseException) -> None:
    if os.environ.get("PYBHYVE_TRACEBACK") == "1":
        traceback.print_exception(error)
    sys.stderr.write(f"{name}: {one_line(error)}\n")
