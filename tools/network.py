"""Networks for guests: a namespace in which everybody is root over the interfaces."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# It holds the namespaces open, and says when they are there.
_HOLD = "print(flush=True); import sys; sys.stdin.read()"

# A name server to which every name is 192.0.2.7.
_NAME_SERVER = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
while True:
    query, client = server.recvfrom(512)
    end = query.index(0, 12) + 5
    answer = bytes.fromhex("c00c 0001 0001 0000003c 0004 c0000207")
    is_a = query[end - 4 : end - 2] == bytes((0, 1))
    header = query[:2] + bytes.fromhex("8180 0001") + bytes((0, is_a, 0, 0, 0, 0))
    server.sendto(header + query[12:end] + (answer if is_a else b""), client)
"""


class NetworkError(Exception):
    """A command inside of a network failed, or there can be no network."""


class Network:
    """A network namespace of its own, with ``lo`` up and nothing else.

    NetworkError: the host gives its users no namespaces.
    """

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", *("--map-root-user", "--net", "--mount"), *_python(_HOLD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._started: list[subprocess.Popen[str]] = []
        if self._holder.stdout is None or not self._holder.stdout.readline():
            raise NetworkError("this host has no namespaces for its users")
        self.run("ip", "link", "set", "lo", "up")

    @property
    def enter(self) -> Sequence[str]:
        """The beginning of a command that is to run inside."""
        pid = str(self._holder.pid)
        namespaces = ["--user", "--net", "--mount", "--preserve-credentials"]
        return ["nsenter", "--target", pid, *namespaces, "--"]

    def run(self, *command: str, timeout: float = 60) -> str:
        """Run a command inside to its end; what it prints.  NetworkError: it fails."""
        done = subprocess.run(
            [*self.enter, *command],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode != 0:
            raise NetworkError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command inside, which ends with the network at the latest."""
        process = subprocess.Popen(
            [*self.enter, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def serve_names(self, resolv_conf: Path) -> None:
        """Have a name server inside; ``resolv_conf`` is a file to write."""
        resolv_conf.write_text("nameserver 127.0.0.1\n")
        self.run("mount", "--bind", str(resolv_conf), "/etc/resolv.conf")
        self.start(*_python(_NAME_SERVER))

    def close(self) -> None:
        """End everything inside."""
        for process in self._started:
            process.kill()
            process.communicate()
        self._holder.communicate()


def _python(program: str) -> list[str]:
    return [sys.executable, "-c", program]
