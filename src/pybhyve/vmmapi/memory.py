"""Where guest RAM is, and how its size is written."""

from __future__ import annotations

import re
from typing import Final

from pybhyve.config import parse_int

KB: Final = 1 << 10
MB: Final = 1 << 20
GB: Final = 1 << 30
PAGE_SIZE: Final = 4096

LOWMEM_LIMIT: Final = 3 * GB
"""RAM below 4 GiB ends here at the latest; PCI windows and firmware follow."""
HIGHMEM_BASE: Final = 4 * GB
"""The rest of RAM begins here."""

_SUFFIXES: Final = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SIZE = re.compile(r"(.*?)([bkmgtpe]?)b?", re.IGNORECASE | re.DOTALL)


def parse_memsize(text: str) -> int:
    """A memory size in bytes: ``512`` (MiB), ``0x40000000``, ``2G``, ``1536m``.

    A bare number below 1048576 is in MiB, others are in bytes.  Raises ValueError where
    the text is no number with one of these suffixes, or does not fit 64 bits.
    """
    try:
        size = parse_int(text)
        if 0 <= size < MB:
            size *= MB
    except ValueError:
        match = _SIZE.fullmatch(text)
        if match is None:
            raise
        number, suffix = match.groups()
        size = parse_int(number) << _SUFFIXES[suffix.lower()]
    if not 0 < size < 1 << 64:
        raise ValueError("expected a size above 0 and below 16 EiB")
    return size


def size_text(size: int) -> str:
    """A size as people write it: ``256M``, ``1.5G``."""
    for shift, suffix in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.4g}{suffix}"
    return str(size)
