"""ACPI power management with Linux's own drivers: button, sleep, soft off, reset."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests.functional.console import Console
from tests.functional.machine import BOOT_TIMEOUT, Starter
from tools import guests

KEY_POWER = 116  # linux/input-event-codes.h


@pytest.fixture
def boot(start: Starter):
    """A Debian kernel at its prompt, with the driver of the power button."""

    def boot(name: str, cmdline: str = "", ncpus: int = 1) -> Console:
        guest = guests.find("debian12-cloud")
        image = [
            *guest.image(modules=["button", "evdev"]).options(),
            *("-o", f"cmdline={guest.cmdline} quiet {cmdline}"),
        ]
        console = start(name, image, guest=guest, ncpus=ncpus).console
        console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)
        return console

    return boot


def press(console: Console) -> None:
    os.kill(console.process.pid, signal.SIGTERM)


def events(console: Console) -> list[tuple[int, int, int]]:
    """Type, code and value of what came from the button since the last call."""
    text = console.run(
        "cp /tmp/events /tmp/seen; : > /tmp/events; "
        'hexdump -v -e \'24/1 "%02x" "\\n"\' /tmp/seen'
    )
    found = []
    for line in text.split():
        event = bytes.fromhex(line)
        kind, code = (int.from_bytes(event[at : at + 2], "little") for at in (16, 18))
        found.append((kind, code, int.from_bytes(event[20:24], "little")))
    return found


def watch_button(console: Console) -> None:
    device = console.run(
        "grep -A 4 'Name=\"Power Button' /proc/bus/input/devices | "
        "grep -o 'event[0-9]*'"
    ).strip()
    # A press before it is open is nobody's.
    console.run(
        f"cat /dev/input/{device} >> /tmp/events & "
        f"until ls -l /proc/$!/fd | grep -q {device}; do sleep 0.1; done",
        60,
    )


def test_sigterm_presses_the_power_button(boot) -> None:
    console = boot("button")
    watch_button(console)
    for _time in range(2):
        press(console)
        console.run("while [ ! -s /tmp/events ]; do sleep 0.1; done; sleep 0.5", 60)

        assert events(console) == [
            (1, KEY_POWER, 1),
            (0, 0, 0),
            (1, KEY_POWER, 0),
            (0, 0, 0),
        ]

    sci = console.run("cat /proc/interrupts | grep acpi")
    assert re.match(r" *9: +2 ", sci), sci

    console.send("poweroff -f\n")

    assert console.wait(60) == 1


def test_sleep_states(boot) -> None:
    """No S3, as the machine says; what Linux does without the firmware works."""
    console = boot("sleep", ncpus=2)

    assert "(supports S0 S5)" in console.run("dmesg | grep 'ACPI: PM: .*S0'")
    assert console.run("cat /sys/power/mem_sleep") == "[s2idle]\n"

    console.send("echo freeze > /sys/power/state; echo aw''ake\n")
    # A press that comes before it sleeps does not wake it.
    presses = 0
    while "\nawake" not in console.shown and presses < 30:
        console.ended_within(3)
        press(console)
        presses += 1
    console.expect("awake", 10)

    assert console.run("nproc") == "2\n"


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("acpi", 0),  # the FADT's reset register
        ("kbd", 0),  # the 8042's pulse
        ("pci", 0),  # ports 0xcf8 and 0xcf9
        ("triple", 3),
    ],
)
def test_ways_to_reset(boot, how: str, status: int) -> None:
    console = boot(how, f"reboot={how}")
    console.send("reboot -f\n")

    assert console.wait(60) == status
