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
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, TypeVar, overload

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
    :class:`RegBlock` instance the attribute is the stored value, an int: no data
    descriptor, so that the instance's own attribute hides it.
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
        return self if block is None else self.reset

    if TYPE_CHECKING:

        def __set__(self, block: RegBlock, value: int) -> None: ...

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
        self.reset()
        self._reads = [self._plain_read(reg) for reg in self.REGS]
        self._writes = [self._plain_write(reg) for reg in self.REGS]
        for name in dir(type(chip)):
            for reg, slot in getattr(getattr(type(chip), name), _MARK, ()):
                # A chip may have several blocks, each with handlers in it.
                if reg in self.REGS:
                    (self._writes if slot else self._reads)[reg.index] = getattr(
                        chip, name
                    )
        # What nearly all accesses are: one whole register.
        places = [(reg.offset, reg.size) for reg in self.REGS]
        self._whole_reads = dict(zip(places, self._reads, strict=True))
        self._whole_writes = dict(zip(places, self._writes, strict=True))

    def read(self, offset: int, size: int) -> int:
        """The value of ``size`` bytes at ``offset``, whatever the guest chose."""
        whole = self._whole_reads.get((offset, size))
        if whole is not None:
            return whole()
        value = done = 0
        while done < size:
            at = offset + done
            reg = self._at[at] if at < self.SIZE else None
            if reg is None:
                part, count = self.FILL, 1
            else:
                skip = at - reg.offset
                count = min(reg.size - skip, size - done)
                part = self._reads[reg.index]() >> 8 * skip & (1 << 8 * count) - 1
            value |= part << 8 * done
            done += count
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Store ``size`` bytes of ``value`` at ``offset``, whatever the guest chose."""
        whole = self._whole_writes.get((offset, size))
        if whole is not None:
            whole(value)
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
            merged = (value >> 8 * done & ones) << 8 * skip
            if reg.kind == RW:
                merged |= getattr(self, reg.name) & ~(ones << 8 * skip)
            self._writes[reg.index](merged)
            done += count

    def reset(self) -> None:
        """Every register to its value after reset."""
        for reg in self.REGS:
            setattr(self, reg.name, reg.reset)

    def save(self) -> dict[str, int]:
        """The stored values by register name."""
        return {reg.name: getattr(self, reg.name) for reg in self.REGS}

    def restore(self, state: dict[str, int]) -> None:
        """Take back what :meth:`save` gave; KeyError when a register is missing."""
        for name, value in [(reg.name, state[reg.name]) for reg in self.REGS]:
            setattr(self, name, value)

    def _plain_read(self, reg: Reg) -> Callable[[], int]:
        if reg.kind == WO:
            return lambda: 0
        return partial(getattr, self, reg.name)

    def _plain_write(self, reg: Reg) -> Callable[[int], None]:
        name, mask = reg.name, reg.mask

        def store(value: int) -> None:
            setattr(self, name, getattr(self, name) & ~mask | value & mask)

        def clear(value: int) -> None:
            setattr(self, name, getattr(self, name) & ~(value & mask))

        def ignore(_value: int) -> None:
            pass

        writers: dict[int, Callable[[int], None]] = {
            RW: store,
            RO: ignore,
            W1C: clear,
            WO: partial(setattr, self, name),
        }
        return writers[reg.kind]
