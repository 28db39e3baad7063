"""Register blocks: one table of a chip's registers, accesses normalised once.

    class Regs(RegBlock, size=0x10):             # datasheet, section 3
        CTRL = Reg(0x00, 4)                      # 3.1 Control
        STAT = Reg(0x04, 2, W1C)                 # 3.2 Status
        INFO = Reg(0x08, 8, RO, reset=0x1234)    # 3.3 Information

    class Chip:
        def __init__(self) -> None:
            self.regs = Regs(self)

        @Regs.CTRL.write
        def _control(self, value: int) -> None:
            self.regs.CTRL = value & 0xFF

``regs.read(offset, size)`` and ``regs.write(offset, size, value)`` take any access a
guest can make.  The chip sees whole registers only: an access that covers several is
split, a narrower one is widened.  A narrow read takes its bytes from the whole
register; a narrow write is merged into the register's stored value (into zero where
ones are commands, W1C and WO).  Bytes without a register read as ``fill`` and ignore
writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, Self, TypeVar, overload

#: How a register takes a write that no handler claims.
RW: Final = 0  # stores the writable bits
RO: Final = 1  # ignores it
W1C: Final = 2  # ones clear bits
WO: Final = 3  # stores it; reads give 0

_Reader = TypeVar("_Reader", bound=Callable[[Any], int])
_Writer = TypeVar("_Writer", bound=Callable[[Any, int], None])

_MARK: Final = "_register_handlers"


class Reg:
    """One register: ``size`` bytes (1, 2, 4 or 8) at ``offset``, value after reset.

    ``mask`` are the bits that a plain write changes (RW) or can clear (W1C).  In a
    :class:`RegBlock` instance the attribute is the stored value, an int.
    """

    __slots__ = ("index", "kind", "mask", "name", "offset", "reset", "size")

    def __init__(
        self,
        offset: int,
        size: int,
        kind: int = RW,
        *,
        reset: int = 0,
        mask: int | None = None,
    ) -> None:
        self.offset = offset
        self.size = size
        self.kind = kind
        self.reset = reset
        self.mask = (1 << 8 * size) - 1 if mask is None else mask
        self.name = ""
        self.index = -1

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, block: None, owner: type) -> Self: ...
    @overload
    def __get__(self, block: RegBlock, owner: type) -> int: ...
    def __get__(self, block: RegBlock | None, owner: type) -> Self | int:
        return self if block is None else block.values[self.index]

    def __set__(self, block: RegBlock, value: int) -> None:
        block.values[self.index] = value

    def read(self, handler: _Reader) -> _Reader:
        """Mark a method of the chip that computes this register's value."""
        _mark(handler, self, 0)
        return handler

    def write(self, handler: _Writer) -> _Writer:
        """Mark a method of the chip that takes a write, in place of the plain store."""
        if self.kind == RO:
            raise TypeError(f"{self.name} is read-only")
        _mark(handler, self, 1)
        return handler


def _mark(handler: Any, reg: Reg, slot: int) -> None:
    handler.__dict__.setdefault(_MARK, []).append((reg, slot))


class RegBlock:
    """Base of register tables; see the module's example.

    Class keywords: ``size`` of the block in bytes; ``fill``, the byte read where no
    register is.
    """

    SIZE: ClassVar[int]
    FILL: ClassVar[int]
    REGS: ClassVar[tuple[Reg, ...]]
    _at: ClassVar[list[Reg | None]]  # by byte offset

    def __init_subclass__(cls, *, size: int, fill: int = 0) -> None:
        super().__init_subclass__()
        cls.SIZE = size
        cls.FILL = fill
        cls.REGS = tuple(reg for reg in vars(cls).values() if isinstance(reg, Reg))
        cls._at = [None] * size
        for index, reg in enumerate(cls.REGS):
            reg.index = index
            for at in range(reg.offset, reg.offset + reg.size):
                if at >= size or cls._at[at] is not None:
                    raise TypeError(f"{cls.__name__}.{reg.name} does not fit")
                cls._at[at] = reg

    def __init__(self, chip: object) -> None:
        self.values = [reg.reset for reg in self.REGS]
        self._readers: list[Callable[[], int] | None] = [None] * len(self.REGS)
        self._writers: list[Callable[[int], None] | None] = [None] * len(self.REGS)
        for name in dir(type(chip)):
            for reg, slot in getattr(getattr(type(chip), name), _MARK, ()):
                # A chip may have several blocks, each with handlers in it.
                if reg in self.REGS:
                    (self._writers if slot else self._readers)[reg.index] = getattr(
                        chip, name
                    )

    def read(self, offset: int, size: int) -> int:
        """The value of ``size`` bytes at ``offset``, whatever the guest chose."""
        reg = self._at[offset] if offset < self.SIZE else None
        if reg is not None and reg.offset == offset and reg.size == size:
            return self._read_reg(reg)
        value = done = 0
        while done < size:
            at = offset + done
            reg = self._at[at] if at < self.SIZE else None
            if reg is None:
                part, count = self.FILL, 1
            else:
                skip = at - reg.offset
                count = min(reg.size - skip, size - done)
                part = self._read_reg(reg) >> 8 * skip & (1 << 8 * count) - 1
            value |= part << 8 * done
            done += count
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Store ``size`` bytes of ``value`` at ``offset``, whatever the guest chose."""
        reg = self._at[offset] if offset < self.SIZE else None
        if reg is not None and reg.offset == offset and reg.size == size:
            self._write_reg(reg, value)
            return
        done = 0
        while done < size:
            at = offset + done
            reg = self._at[at] if at < self.SIZE else None
            if reg is None:
                done += 1
                continue
            skip = at - reg.offset
            count = min(reg.size - skip, size - done)
            ones = (1 << 8 * count) - 1
            whole = (value >> 8 * done & ones) << 8 * skip
            if reg.kind == RW:
                whole |= self.values[reg.index] & ~(ones << 8 * skip)
            self._write_reg(reg, whole)
            done += count

    def reset(self) -> None:
        """Every register to its value after reset."""
        self.values[:] = [reg.reset for reg in self.REGS]

    def save(self) -> dict[str, int]:
        """The stored values by register name."""
        return {reg.name: self.values[reg.index] for reg in self.REGS}

    def restore(self, state: dict[str, int]) -> None:
        """Take back what :meth:`save` gave; KeyError when a register is missing."""
        self.values[:] = [state[reg.name] for reg in self.REGS]

    def _read_reg(self, reg: Reg) -> int:
        handler = self._readers[reg.index]
        if handler is not None:
            return handler()
        return 0 if reg.kind == WO else self.values[reg.index]

    def _write_reg(self, reg: Reg, value: int) -> None:
        handler = self._writers[reg.index]
        if handler is not None:
            handler(value)
        elif reg.kind == RW:
            kept = self.values[reg.index] & ~reg.mask
            self.values[reg.index] = kept | value & reg.mask
        elif reg.kind == W1C:
            self.values[reg.index] &= ~(value & reg.mask)
        elif reg.kind == WO:
            self.values[reg.index] = value
