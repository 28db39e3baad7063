"""Guests that run random bytes in every mode: bhyve neither crashes nor hangs."""

from __future__ import annotations

import time

import pytest

from tests.functional.machine import Programs, Starter
from tools import guests

SECONDS = 20  # for each mode
EACH = 2.0  # seconds until a machine that does not end by itself is ended

ENDINGS = {
    0,  # reset
    1,  # power off; also how we end it
    2,  # halt
    3,  # triple fault
}


@pytest.mark.parametrize("mode", [16, 32, 64])
@pytest.mark.parametrize("ncpus", [1, 2])
def test_random_bytes(
    start: Starter, programs: Programs, mode: int, ncpus: int
) -> None:
    begun = time.monotonic()
    seed = 0
    while time.monotonic() < begun + SECONDS / 2:
        seed += 1
        name = f"chaos-{mode}-{ncpus}-{seed}"
        kernel = guests.compile_kernel("chaos", MODE=mode, SEED=seed)
        image = ["-o", f"kernel={kernel}"]
        console = start(name, image, ncpus=ncpus, memory="32M").console
        console.expect("chaos", 30)
        if not console.ended_within(EACH):
            programs.run("bhyvectl", f"--vm={name}", "--force-poweroff")
        status = console.wait(10)

        assert status in ENDINGS, f"seed {seed}: {console.shown}"
        assert "Traceback" not in console.shown
    # One machine alone would say little.
    assert seed > 2
