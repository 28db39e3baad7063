"""The queue that the tests of this directory drive."""

from __future__ import annotations

import pytest

from pybhyve.vmmapi import VmCtx
from tests.unit.virtio.rig import Rig


@pytest.fixture
def rig(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    ctx = VmCtx.create("queue")
    ctx.setup_memory(4 << 20)
    yield Rig(ctx)
    ctx.destroy()
