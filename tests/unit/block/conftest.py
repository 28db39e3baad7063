"""Images on disk, opened with a running event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pybhyve.block import BlockIf, BlockOptions
from pybhyve.mevent import EventLoop
from tests.unit.block.requests import SIZE

Open = Callable[..., BlockIf]


@pytest.fixture
def mevent() -> Iterator[EventLoop]:
    loop = EventLoop()
    thread = threading.Thread(target=loop.run)
    thread.start()
    yield loop
    loop.stop()
    thread.join()
    loop.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@pytest.fixture
def open_image(image: Path, mevent: EventLoop) -> Iterator[Open]:
    """``open_image(path, option=value)``, closed after the test."""
    opened = []

    def make(path: Path = image, **options: Any) -> BlockIf:
        blk = BlockIf(BlockOptions(path=str(path), **options), "test", mevent)
        opened.append(blk)
        return blk

    yield make
    for blk in opened:
        blk.close()
