"""The MSI-X table and pending bits of one function (PCI Local Bus 3.0, 6.8.2)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

from pybhyve.pci.pcireg import MSIX_ENTRY_SIZE, MSIX_MAX, MSIX_VECTOR_MASKED

PAGE: Final = 4096

_ENTRY: Final = struct.Struct("<QII")  # message address, data, vector control
_CTRL: Final = 12  # offset of vector control in an entry


class MsixTable:
    """``count`` vectors: the table from offset 0 of its BAR, the pending bits behind.

    ``send(address, data)`` delivers a message.  The caller keeps ``active`` (enabled in
    the capability) and ``masked`` (the whole function) and does the locking.

    deviation: bhyve loses an interrupt that is masked; here its pending bit is set, and
    it is sent when the mask goes, as the specification says.
    """

    def __init__(self, count: int, send: Callable[[int, int], None]) -> None:
        if not 1 <= count <= MSIX_MAX:
            raise ValueError(f"{count} MSI-X vectors")
        self.count = count
        self._send = send
        self.pba_offset = -(-count * MSIX_ENTRY_SIZE // PAGE) * PAGE
        self.size = self.pba_offset + -(-count // 64) * 8
        """Bytes that table and pending bits take of the BAR."""
        self.reset()

    def reset(self) -> None:
        """All vectors masked, none pending, MSI-X disabled."""
        self._table = bytearray(_ENTRY.pack(0, 0, MSIX_VECTOR_MASKED) * self.count)
        # What to send for each vector; None: it is masked.
        self._messages: list[tuple[int, int] | None] = [None] * self.count
        self._pending = 0
        self.active = False
        self.masked = False

    def read(self, offset: int, size: int) -> int:
        """``size`` bytes at ``offset`` in the BAR; what is neither reads 0."""
        if offset < self.pba_offset:
            return int.from_bytes(self._table[offset : offset + size], "little")
        shifted = self._pending >> 8 * (offset - self.pba_offset)
        return shifted & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Store into the table; the pending bits are read-only."""
        end = min(offset + size, len(self._table))
        if offset >= end:
            return
        self._table[offset:end] = value.to_bytes(size, "little")[: end - offset]
        for index in range(offset // MSIX_ENTRY_SIZE, -(-end // MSIX_ENTRY_SIZE)):
            base = index * MSIX_ENTRY_SIZE
            self._table[base] &= 0xFC  # message addresses are of dwords
            ctrl = self._table[base + _CTRL] & MSIX_VECTOR_MASKED
            self._table[base + _CTRL : base + MSIX_ENTRY_SIZE] = bytes((ctrl, 0, 0, 0))
            self._messages[index] = self._message(index)
        self.deliver_pending()

    def trigger(self, index: int) -> None:
        """Interrupt ``index`` happens: send it, or note that it is pending."""
        if not self.active or not 0 <= index < self.count:
            return
        message = self._messages[index]
        if self.masked or message is None:
            self._pending |= 1 << index
        else:
            self._send(*message)

    def _message(self, index: int) -> tuple[int, int] | None:
        address, data, ctrl = _ENTRY.unpack_from(self._table, index * MSIX_ENTRY_SIZE)
        return None if ctrl & MSIX_VECTOR_MASKED else (address, data)

    def deliver_pending(self) -> None:
        """Send what waited for a mask that is gone."""
        pending = self._pending
        if not pending or not self.active or self.masked:
            return
        for index in range(self.count):
            if pending >> index & 1:
                self._pending &= ~(1 << index)
                self.trigger(index)

    def save(self) -> dict[str, Any]:
        """Table and pending bits."""
        return {"table": bytes(self._table), "pending": self._pending}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what save() gave."""
        if len(state["table"]) != len(self._table):
            raise ValueError("MSI-X table of another size")
        self._table = bytearray(state["table"])
        self._messages = [self._message(index) for index in range(self.count)]
        self._pending = state["pending"]
