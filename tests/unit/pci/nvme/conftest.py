"""Controllers with a disk, and their drivers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guestside.nvme import NvmeDriver
from tests.guestside.pci import PciFunction

SLOT = 4
SIZE = 1 << 20

Attach = Callable[..., NvmeDriver]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@pytest.fixture
def attach(build, image: Path) -> Iterator[Attach]:
    """``attach(option=value, …)``: a driver of a controller, its event loop running."""
    threads = []

    def make(**options: str) -> NvmeDriver:
        if "ram" not in options:
            options = {"path": str(image), **options}
        variables = {f"pci__0__{SLOT}__0__{k}": v for k, v in options.items()}
        machine = build(f"{SLOT},nvme", memory=64 << 20, **variables)
        thread = threading.Thread(target=machine.mevent.run)
        thread.start()
        threads.append((machine, thread))
        return NvmeDriver(PciFunction(machine, SLOT))

    yield make
    for machine, thread in threads:
        machine.mevent.stop()
        thread.join()


@pytest.fixture
def driver(attach: Attach) -> NvmeDriver:
    driver = attach()
    driver.enable()
    return driver
