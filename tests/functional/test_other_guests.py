"""Guests that are not 64-bit Linux: a 32-bit kernel and two memory testers."""

from __future__ import annotations

import re

import pytest

from tests.functional.machine import BOOT_TIMEOUT, Starter
from tools import guests


def test_installer_kernel_reaches_a_shell(start: Starter) -> None:
    guest = guests.find("debian12-i386")
    console = start("i386", guest.image().options(), guest=guest).console
    console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)

    assert re.fullmatch(r"Linux 6\.1\.0-\d+-686 i686\n", console.run("uname -srm"))
    assert console.run("echo $((6 * 7))") == "42\n"


@pytest.mark.parametrize("name", ["memtest86plus-x64", "memtest86plus-ia32"])
def test_memory_tester_runs(start: Starter, name: str) -> None:
    guest = guests.find(name)
    console = start(name, guest.image().options(), guest=guest, memory="64M").console
    console.expect("Memtest86", BOOT_TIMEOUT)
    # The screen is drawn with cursor movements; these are drawn once a test runs.
    console.expect("Status: Testing", BOOT_TIMEOUT)
    console.expect(r"#0 +\[Address test", BOOT_TIMEOUT)
    console.expect(r"#[1-9]", BOOT_TIMEOUT)

    assert not re.search(r"Errors: [1-9]", console.shown)
