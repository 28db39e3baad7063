"""Tests in a network namespace of their own, in which anybody may make interfaces."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000


def _enter(network: bool) -> None:
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | (CLONE_NEWNET if network else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def in_namespace(
    test: Callable[..., None], network: bool = True
) -> Callable[..., None]:
    """Run a test in a child that has its own network, with no interface but lo.

    Without ``network`` it has the host's, and no say over it.
    """

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _enter(network)
                test(*args, **kwargs)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(pid, 0)

        assert status == 0, "see the traceback of the child"

    return run
