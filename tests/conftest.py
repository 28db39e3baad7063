"""What the whole test suite shares."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden anew from what the code gives now",
    )


@pytest.fixture(scope="session")
def iasl() -> Callable[..., str]:
    """Debian's ACPI compiler: ``iasl(directory, *arguments)`` gives its output."""
    from tools import fetch

    return _program(fetch.package("acpica-tools").file("usr/bin/iasl"))


@pytest.fixture(scope="session")
def dmidecode() -> Callable[..., str]:
    """Debian's reader of SMBIOS: ``dmidecode(directory, *arguments)``, its output."""
    from tools import fetch

    return _program(fetch.package("dmidecode").file("usr/sbin/dmidecode"))


def _program(program: Path) -> Callable[..., str]:
    def run(directory: Path, *arguments: str) -> str:
        done = subprocess.run(
            [program, *arguments],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run
