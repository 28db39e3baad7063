"""Sizes of memory as users write them."""

from __future__ import annotations

import pytest

from pybhyve.vmmapi.memory import GB, KB, MB, parse_memsize, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256", 256 * MB),
        ("0x100", 256 * MB),
        ("1048575", 1048575 * MB),
        ("1048576", 1048576),
        ("256M", 256 * MB),
        ("256m", 256 * MB),
        ("512mb", 512 * MB),
        ("1G", GB),
        ("4194304k", 4 * GB),
        ("1T", 1 << 40),
        ("4096b", 4096),
        ("0x40000000", GB),
    ],
)
def test_size(text, size):
    assert parse_memsize(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "x", "M", "1.5G", "1 G", "1X", "0x", "16E", "1GG", "0M"]
)
def test_no_size(text):
    with pytest.raises(ValueError, match=r"number|expected"):
        parse_memsize(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(512, "512"), (4 * KB, "4K"), (256 * MB, "256M"), (3 * GB // 2, "1.5G")],
)
def test_size_as_text(size, text):
    assert size_text(size) == text
