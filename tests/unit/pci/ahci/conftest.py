"""An adapter with a disk or a CD drive in slot 3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guestside.ahci import AhciDriver, AhciPort

MIB = 1 << 20
DISK_SIZE = 4 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Every sector begins with its number."""
    path = tmp_path / "disk.img"
    path.write_bytes(
        b"".join(at.to_bytes(8, "little") * 64 for at in range(DISK_SIZE // 512))
    )
    return path


@pytest.fixture
def driver(build, image) -> Callable[..., AhciDriver]:
    """An adapter, as in ``driver(port__0__type="hd")``.

    The image is at the first port that has a type.
    """

    def make(**variables: str) -> AhciDriver:
        for name in variables:
            if name.endswith("__type"):
                path = name.replace("__type", "__path")
                variables = {path: str(image)} | variables
                break
        keys = {f"pci__0__3__0__{name}": value for name, value in variables.items()}
        return AhciDriver(build("3,ahci", memory=32 * MIB, **keys))

    return make


@pytest.fixture
def disk(driver) -> AhciPort:
    """A started port with a disk."""
    port = driver(port__0__type="hd").port(0)
    port.start()
    return port


@pytest.fixture
def cd(driver) -> AhciPort:
    """A started port with a CD drive."""
    port = driver(port__0__type="cd").port(0)
    port.start()
    return port
