"""virtio-blk: a disk (virtio 1.2, 5.2).  bhyve: pci_virtio_block.c.

One queue.  A read that the host's cache can answer is done where the guest asked for
it; everything else goes to block_if's threads.
"""

from __future__ import annotations

import errno
import hashlib
import struct
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pybhyve.block import BlockIf, BlockOptions, Done
from pybhyve.options import key
from pybhyve.pci.emul import PciAddress
from pybhyve.pci.pcireg import PCIC_STORAGE
from pybhyve.pci.registry import pci_device
from pybhyve.pci.virtio import VIRTIO_VENDOR, VirtioPci
from pybhyve.virtio import Chain, Segments, VirtQueue, split, total
from pybhyve.vmmapi import Iov, Vm, map_iov, release_iov

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.pci.bus import PciHost

VIRTIO_DEV_BLOCK: Final = 0x1001
VIRTIO_ID_BLOCK: Final = 2
RINGSZ: Final = 128

# 5.2.3: feature bits
VIRTIO_BLK_F_SEG_MAX: Final = 1 << 2
VIRTIO_BLK_F_RO: Final = 1 << 5
VIRTIO_BLK_F_BLK_SIZE: Final = 1 << 6
VIRTIO_BLK_F_FLUSH: Final = 1 << 9
VIRTIO_BLK_F_TOPOLOGY: Final = 1 << 10
VIRTIO_BLK_F_CONFIG_WCE: Final = 1 << 11
VIRTIO_BLK_F_DISCARD: Final = 1 << 13
VIRTIO_BLK_F_WRITE_ZEROES: Final = 1 << 14

# 5.2.6: types of requests
VIRTIO_BLK_T_IN: Final = 0
VIRTIO_BLK_T_OUT: Final = 1
VIRTIO_BLK_T_FLUSH: Final = 4
VIRTIO_BLK_T_FLUSH_OUT: Final = 5  # of 0.9
VIRTIO_BLK_T_GET_ID: Final = 8
VIRTIO_BLK_T_DISCARD: Final = 11
VIRTIO_BLK_T_WRITE_ZEROES: Final = 13
VIRTIO_BLK_T_BARRIER: Final = 1 << 31  # of 0.9, which says nothing

VIRTIO_BLK_S_OK: Final = b"\0"
VIRTIO_BLK_S_IOERR: Final = b"\1"
VIRTIO_BLK_S_UNSUPP: Final = b"\2"

VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP: Final = 1

SECTOR: Final = 512  # what every number of sectors counts, whatever blk_size is
ID_BYTES: Final = 20
MAX_RANGE_SECTORS: Final = (16 << 20) // SECTOR  # to discard or zero by one request
# A driver may name the same memory in every segment: an hour's work in one request,
# and no pause while it lasts.
MAX_BYTES: Final = 256 << 20

# 5.2.4: capacity, size_max, seg_max, geometry (3), blk_size, topology (4), writeback,
# unused, num_queues, discard (3), write zeroes (3), unused
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBxHIIIIIBxxx")
WRITEBACK: Final = 32  # the offset of the only writable byte
_HEADER: Final = struct.Struct("<I4xQ")  # type, reserved, sector
_RANGE: Final = struct.Struct("<QII")  # sector, number of sectors, flags


class VirtioBlockOptions(BlockOptions):
    """``pci.B.S.F.…`` of ``virtio-blk``."""

    ser: str | None = key(
        None, doc="Serial number, up to 20 characters; made from path if not given."
    )


@pci_device("virtio-blk", options=VirtioBlockOptions)
class PciVirtioBlock(VirtioPci[VirtioBlockOptions]):
    """A disk with the features of bhyve's, and write zeroes."""

    FEATURES = (
        VIRTIO_BLK_F_SEG_MAX
        | VIRTIO_BLK_F_BLK_SIZE
        | VIRTIO_BLK_F_FLUSH
        | VIRTIO_BLK_F_TOPOLOGY
        | VIRTIO_BLK_F_CONFIG_WCE
    )
    POLLED = (0,)

    def __init__(
        self,
        machine: Machine,
        host: PciHost,
        address: PciAddress,
        options: VirtioBlockOptions,
    ) -> None:
        super().__init__(
            machine,
            host,
            address,
            options,
            queues=(RINGSZ,),
            config_size=_CONFIG.size,
        )
        self.set_ids(
            VIRTIO_VENDOR,
            VIRTIO_DEV_BLOCK,
            class_=PCIC_STORAGE,
            subclass=0,
            subvendor=VIRTIO_VENDOR,
            subdevice=VIRTIO_ID_BLOCK,
        )
        self.add_boot_device(options.bootindex)
        self._vm = machine.ctx.vm
        self._writeback = True  # as the driver sets it
        self._cached = True  # whether a write that is done may be in a cache
        self._blk = BlockIf(options, f"{self.NAME} {address}", machine.mevent)
        self._blk.on_resize(self.config_changed)
        self._id = _identity(options)
        if self._blk.ro:
            self.offered |= VIRTIO_BLK_F_RO
        else:
            self.offered |= VIRTIO_BLK_F_WRITE_ZEROES
            if self._blk.candelete:
                self.offered |= VIRTIO_BLK_F_DISCARD

    def device_config(self) -> bytes:
        """``struct virtio_blk_config``."""
        blk = self._blk
        logical, physical = blk.sectsz, blk.psectsz
        return _CONFIG.pack(
            blk.size // SECTOR,
            0,
            RINGSZ - 2,
            *(0, 0, 0),
            logical,
            (physical // logical).bit_length() - 1,
            blk.psectoff // logical & 0xFF,
            *(0, 0),
            self._writeback,
            1,
            *(MAX_RANGE_SECTORS, 1, logical // SECTOR),
            *(MAX_RANGE_SECTORS, 1, 0),
        )

    def device_config_written(self, offset: int, data: bytes) -> None:
        """Only the cache mode can be changed."""
        if self.has(VIRTIO_BLK_F_CONFIG_WCE) and offset <= WRITEBACK < offset + len(
            data
        ):
            self._writeback = bool(data[WRITEBACK - offset] & 1)
            self.features_negotiated()

    def features_negotiated(self) -> None:
        """A driver that cannot flush expects writes to be on the disk (5.2.6.2)."""
        flushes = VIRTIO_BLK_F_FLUSH | VIRTIO_BLK_F_CONFIG_WCE
        self._cached = self._writeback and self.has(flushes)

    # -- requests --------------------------------------------------------------------

    def notify(self, vq: VirtQueue) -> None:
        """Start every request there is."""
        while (chain := vq.getchain()) is not None:
            self._start(vq, chain)
        vq.endchains(used_all_avail=True)

    def _start(self, vq: VirtQueue, chain: Chain) -> None:
        readable, writable = chain.readable, chain.writable
        # 2.7.4: a driver may cut header, data and status as it likes; none does.
        if readable and readable[0][1] == _HEADER.size:
            header = self._vm.read_mem(readable[0][0], _HEADER.size)
            del readable[0]
        else:
            header = vq.read(readable, _HEADER.size)
            _, readable = split(readable, _HEADER.size)
        if len(header) < _HEADER.size or not writable:
            vq.reject(chain, "a request without a whole header, or without a status")
            return
        address, length = writable.pop()
        if length > 1:
            writable.append((address, length - 1))
            address += length - 1
        kind, sector = _HEADER.unpack(header)
        kind &= ~VIRTIO_BLK_T_BARRIER
        request = _Request(self._vm, vq, chain, address)
        if kind == VIRTIO_BLK_T_IN:
            self._read(request, sector * SECTOR, writable)
        elif kind == VIRTIO_BLK_T_OUT:
            self._write(request, sector * SECTOR, readable)
        elif kind in (VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_FLUSH_OUT):
            self._blk.flush(request.done)
        elif kind == VIRTIO_BLK_T_GET_ID:
            request.written = vq.write(writable, self._id)
            request.finish(VIRTIO_BLK_S_OK)
        elif kind in (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES):
            self._range(request, kind, vq.read(readable, _RANGE.size + 1))
        else:
            request.finish(VIRTIO_BLK_S_UNSUPP)

    def _read(self, request: _Request, offset: int, segments: Segments) -> None:
        length = total(segments)
        if not self._inside(offset, length):
            request.finish(VIRTIO_BLK_S_IOERR)
            return
        request.written = length
        request.iov = iov = map_iov(self._vm, segments, writable=True)
        if self._blk.read_now(iov, offset):
            request.finish(VIRTIO_BLK_S_OK)
        else:
            self._blk.read(iov, offset, request.done)

    def _write(self, request: _Request, offset: int, segments: Segments) -> None:
        if self._blk.ro or not self._inside(offset, total(segments)):
            request.finish(VIRTIO_BLK_S_IOERR)
            return
        request.iov = iov = map_iov(self._vm, segments)
        self._blk.write(iov, offset, self._changed(request))

    def _range(self, request: _Request, kind: int, data: bytes) -> None:
        """Discard or write zeroes (5.2.6.2)."""
        if len(data) != _RANGE.size:  # one range is all that the configuration allows
            request.finish(VIRTIO_BLK_S_IOERR)
            return
        sector, count, flags = _RANGE.unpack(data)
        discard = kind == VIRTIO_BLK_T_DISCARD
        known = 0 if discard else VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        if flags & ~known or (discard and not self._blk.candelete):
            request.finish(VIRTIO_BLK_S_UNSUPP)
            return
        offset, length = sector * SECTOR, count * SECTOR
        if (
            self._blk.ro
            or count > MAX_RANGE_SECTORS
            or not self._inside(offset, length)
        ):
            request.finish(VIRTIO_BLK_S_IOERR)
            return
        act = self._blk.delete if discard else self._blk.write_zeroes
        act(offset, length, self._changed(request))

    def _inside(self, offset: int, length: int) -> bool:
        """Whether bytes are whole sectors of the disk, and not too many."""
        blk = self._blk
        return (
            not (offset | length) & blk.sectsz - 1
            and offset + length <= blk.size
            and length <= MAX_BYTES
        )

    def _changed(self, request: _Request) -> Done:
        """What a request that changes the disk calls when that is done."""
        if self._cached:
            return request.done
        return partial(self._flush, request)

    def _flush(self, request: _Request, error: int) -> None:
        if error:
            request.done(error)
        else:
            self._blk.flush(request.done)

    # -- life ------------------------------------------------------------------------

    def reset_state(self) -> None:
        """The cache mode."""
        self._writeback = True
        self.features_negotiated()

    def drain(self) -> None:
        """Wait for the disk."""
        self._blk.pause()

    def resume(self) -> None:
        """Go on, with what the driver asked for meanwhile."""
        self._blk.resume()
        super().resume()

    def halt(self) -> None:
        """Give the image back."""
        super().halt()
        self._blk.close()

    def save_state(self) -> dict[str, Any]:
        """The cache mode."""
        return {"writeback": self._writeback}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take back what save_state() gave."""
        self._writeback = state["writeback"]
        self.features_negotiated()


class _Request:
    """A request under way."""

    __slots__ = ("_address", "_chain", "_vm", "_vq", "iov", "written")

    def __init__(self, vm: Vm, vq: VirtQueue, chain: Chain, address: int) -> None:
        """``address`` is that of the status."""
        self._vm = vm
        self._vq = vq
        self._chain = chain
        self._address = address
        self.iov: Iov = []
        self.written = 0  # bytes before the status, where it succeeds

    def done(self, error: int) -> None:
        """The disk has finished; on one of its threads."""
        if not error:
            self.finish(VIRTIO_BLK_S_OK)
        elif error == errno.EOPNOTSUPP:
            self.finish(VIRTIO_BLK_S_UNSUPP)
        else:
            self.finish(VIRTIO_BLK_S_IOERR)
        self._vq.endchains()

    def finish(self, status: bytes) -> None:
        """Release the chain; the caller goes on with `VirtQueue.endchains`."""
        if self.iov:
            release_iov(self.iov)
        self._vm.write_mem(self._address, status)
        self._vq.relchain(self._chain, self.written + 1)


def _identity(options: VirtioBlockOptions) -> bytes:
    """What VIRTIO_BLK_T_GET_ID gives."""
    text = options.ser
    if text is None:
        path = (options.path or "").encode()
        digest = hashlib.md5(path, usedforsecurity=False).hexdigest().upper()
        text = f"BHYVE-{digest[:4]}-{digest[4:8]}-{digest[8:12]}"
    return text.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
