"""virtio devices on PCI: the legacy registers and the modern ones, as one device.

virtio 1.2, 4.1 (a transitional device).  bhyve: virtio.c, which has the legacy half.
``docs/virtio.md`` shows how a device is written.

BAR 0 has the legacy registers, BAR 1 MSI-X, BAR 4 the modern registers.  A notification
runs `VirtioPci.notify` on the thread of the vCPU that gave it; for one queue on one
thread at a time.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from pybhyve.options import Options
from pybhyve.pci.emul import BAR_IO, BAR_MEM32, PciAddress, PciDevice
from pybhyve.pci.pcireg import PCIY_VENDOR
from pybhyve.regs import RO, Reg, RegBlock
from pybhyve.virtio import (
    VIRTIO_F_VERSION_1,
    VIRTIO_MSI_NO_VECTOR,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    Poller,
    Ring,
    VirtQueue,
)

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.pci.bus import PciHost

log = logging.getLogger(__name__)

VIRTIO_VENDOR: Final = 0x1AF4

# 2.1: device status
VIRTIO_CONFIG_S_ACKNOWLEDGE: Final = 1
VIRTIO_CONFIG_S_DRIVER: Final = 2
VIRTIO_CONFIG_S_DRIVER_OK: Final = 4
VIRTIO_CONFIG_S_FEATURES_OK: Final = 8
VIRTIO_CONFIG_S_NEEDS_RESET: Final = 0x40
VIRTIO_CONFIG_S_FAILED: Final = 0x80

# 4.1.4.5: ISR status
VIRTIO_PCI_ISR_INTR: Final = 1
VIRTIO_PCI_ISR_CONFIG: Final = 2

# 4.1.4: types of structures
VIRTIO_PCI_CAP_COMMON_CFG: Final = 1
VIRTIO_PCI_CAP_NOTIFY_CFG: Final = 2
VIRTIO_PCI_CAP_ISR_CFG: Final = 3
VIRTIO_PCI_CAP_DEVICE_CFG: Final = 4
VIRTIO_PCI_CAP_PCI_CFG: Final = 5
CAP_LENGTH: Final = 16
PCI_CFG_BAR: Final = 4  # offsets in the capability for accesses by configuration
PCI_CFG_OFFSET: Final = 8
PCI_CFG_LENGTH: Final = 12
PCI_CFG_DATA: Final = 16

LEGACY_BAR: Final = 0
MSIX_BAR: Final = 1
MODERN_BAR: Final = 4

LEGACY_BAR_MIN: Final = 32
QUEUE_NOTIFY: Final = 16  # its place in BAR 0
CONFIG_WITHOUT_MSIX: Final = 20  # the device's configuration in BAR 0
CONFIG_WITH_MSIX: Final = 24
PFN_SHIFT: Final = 12

# Places in BAR 4.
COMMON_CFG: Final = 0x0000
ISR_CFG: Final = 0x1000
DEVICE_CFG: Final = 0x2000
NOTIFY_CFG: Final = 0x3000
REGION: Final = 0x1000
MODERN_SIZE: Final = 0x4000
NOTIFY_SHIFT: Final = 2  # each queue has a dword to write to


class LegacyRegs(RegBlock, size=CONFIG_WITHOUT_MSIX):  # 4.1.4.10
    """The legacy registers.

    deviation: bhyve takes only accesses of a register's own size.
    """

    DEVICE_FEATURES = Reg(0, 4, RO)
    DRIVER_FEATURES = Reg(4, 4)
    QUEUE_ADDRESS = Reg(8, 4)
    QUEUE_SIZE = Reg(12, 2, RO)
    QUEUE_SELECT = Reg(14, 2)
    QUEUE_NOTIFY = Reg(QUEUE_NOTIFY, 2)
    DEVICE_STATUS = Reg(18, 1)
    ISR_STATUS = Reg(19, 1, RO)


class LegacyMsixRegs(RegBlock, size=CONFIG_WITH_MSIX - CONFIG_WITHOUT_MSIX):
    """What follows them while MSI-X is on; the device's configuration moves up."""

    CONFIG_MSIX_VECTOR = Reg(0, 2)
    QUEUE_MSIX_VECTOR = Reg(2, 2)


class CommonRegs(RegBlock, size=0x38):  # 4.1.4.3
    """``struct virtio_pci_common_cfg``; 64-bit addresses are written in halves."""

    DEVICE_FEATURE_SELECT = Reg(0x00, 4)
    DEVICE_FEATURE = Reg(0x04, 4, RO)
    DRIVER_FEATURE_SELECT = Reg(0x08, 4)
    DRIVER_FEATURE = Reg(0x0C, 4)
    CONFIG_MSIX_VECTOR = Reg(0x10, 2)
    NUM_QUEUES = Reg(0x12, 2, RO)
    DEVICE_STATUS = Reg(0x14, 1)
    CONFIG_GENERATION = Reg(0x15, 1, RO)
    QUEUE_SELECT = Reg(0x16, 2)
    QUEUE_SIZE = Reg(0x18, 2)
    QUEUE_MSIX_VECTOR = Reg(0x1A, 2)
    QUEUE_ENABLE = Reg(0x1C, 2)
    QUEUE_NOTIFY_OFF = Reg(0x1E, 2, RO)
    QUEUE_DESC = Reg(0x20, 8)
    QUEUE_DRIVER = Reg(0x28, 8)
    QUEUE_DEVICE = Reg(0x30, 8)


OptionsT = TypeVar("OptionsT", bound=Options)


class VirtioPci(PciDevice[OptionsT], ABC):
    """Base of virtio devices.

    A subclass's ``__init__`` calls this one, then `PciDevice.set_ids`; it has `notify`
    and, where it concerns it, the other methods under "what a device overrides".
    `queues` are its queues.

    Locks: ``lock`` (registers) after a queue's ``run_lock``, before ``irq_lock``; the
    device's own come before or after ``lock``, but not both.
    """

    FEATURES: ClassVar[int] = 0
    """Feature bits that the device has whatever its options are."""

    POLLED: ClassVar[tuple[int, ...]] = ()
    """Queues that a thread looks at while they are busy; see `Poller`."""

    TRANSPORT_FEATURES: ClassVar[int] = (
        # deviation: bhyve offers INDIRECT_DESC for some devices, the others for none.
        VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX
    )

    def __init__(
        self,
        machine: Machine,
        host: PciHost,
        address: PciAddress,
        options: OptionsT,
        *,
        queues: tuple[int, ...],
        config_size: int,
    ) -> None:
        """``queues``: the size of each; ``config_size``: of `device_config`."""
        super().__init__(machine, host, address, options)
        self.lock = threading.RLock()
        self.offered = self.FEATURES | self.TRANSPORT_FEATURES
        """What the driver can have; a device adds to it before it starts."""
        self.negotiated = 0
        """What the driver has taken."""
        self.queues = [
            VirtQueue(machine.ctx, index, size, self._interrupt_queue, self._stopped)
            for index, size in enumerate(queues)
        ]
        self._pollers = {
            index: Poller(
                machine.ctx.vm,
                self.queues[index],
                self.run_queue,
                f"{self.NAME} {address} {index}",
            )
            for index in self.POLLED
        }
        self._config_size = config_size
        self._status = 0
        self._isr = 0
        self._generation = 0
        self._config_vector = VIRTIO_MSI_NO_VECTOR
        self._driver_features = 0  # as written, before FEATURES_OK
        self._paused = False
        self._leftover: list[Ring] = []  # before a reset, with chains that are out
        self._legacy = LegacyRegs(self)
        self._legacy_msix = LegacyMsixRegs(self)
        self._common = CommonRegs(self)
        self.add_bar(LEGACY_BAR, BAR_IO, max(24 + config_size, LEGACY_BAR_MIN))
        if machine.options.virtio_msix:
            self.add_msix(len(queues) + 1, MSIX_BAR)
        self.add_msi(1)
        self.add_intx()
        self._add_modern()
        self._select(0)

    def _add_modern(self) -> None:
        self.add_bar(MODERN_BAR, BAR_MEM32, MODERN_SIZE)
        for cfg_type, offset, length in (
            (VIRTIO_PCI_CAP_COMMON_CFG, COMMON_CFG, CommonRegs.SIZE),
            (VIRTIO_PCI_CAP_ISR_CFG, ISR_CFG, 1),
            (VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE_CFG, self._config_size),
        ):
            if length:  # not every device has a configuration
                self._add_structure(cfg_type, offset, length)
        self._add_structure(
            VIRTIO_PCI_CAP_NOTIFY_CFG,
            NOTIFY_CFG,
            len(self.queues) << NOTIFY_SHIFT,
            (1 << NOTIFY_SHIFT).to_bytes(4, "little"),
        )
        # bar, padding, offset and length are the driver's, and the data.
        writable = b"\0\0\xff\0\0\0" + b"\xff" * 12
        self._pci_cfg = self._add_structure(
            VIRTIO_PCI_CAP_PCI_CFG, 0, 0, bytes(4), writable
        )

    def _add_structure(
        self,
        cfg_type: int,
        offset: int,
        length: int,
        more: bytes = b"",
        writable: bytes = b"",
    ) -> int:
        """A ``struct virtio_pci_cap`` (4.1.4)."""
        bar = MODERN_BAR if length else 0
        body = bytes((CAP_LENGTH + len(more), cfg_type, bar, 0, 0, 0))
        body += offset.to_bytes(4, "little") + length.to_bytes(4, "little") + more
        return self.add_capability(PCIY_VENDOR, body, writable)

    # -- what a device overrides -----------------------------------------------------

    @abstractmethod
    def notify(self, vq: VirtQueue) -> None:
        """The driver says that there are chains: take all of them.

        On a vCPU's thread, or that of a `Poller`; it must not wait.  For one queue on
        one thread at a time.
        """

    def device_config(self) -> bytes:
        """The device's configuration now, ``config_size`` bytes."""
        return b""

    def device_config_written(self, offset: int, data: bytes) -> None:
        """The driver wrote to the configuration, all of it inside."""

    def features_negotiated(self) -> None:
        """`negotiated` has changed."""

    def reset_state(self) -> None:
        """The driver resets the device, or the machine is reset.

        Chains that are out may be released later or never: nobody sees them any more.
        """

    def drain(self) -> None:
        """For a pause: wait until no chain is out that somebody works on."""

    def save_state(self) -> dict[str, Any]:
        """The device's own state, beside the transport's."""
        return {}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take back what save_state() gave; `negotiated` is there already."""

    # -- what a device calls ---------------------------------------------------------

    def config_changed(self) -> None:
        """Tell the driver that `device_config` gives something else.  Any thread."""
        with self.lock:
            self._generation = self._generation + 1 & 0xFF
            if self._status & VIRTIO_CONFIG_S_DRIVER_OK:
                self._interrupt(self._config_vector, VIRTIO_PCI_ISR_CONFIG)

    def has(self, feature: int) -> bool:
        """Whether a feature bit is negotiated."""
        return bool(self.negotiated & feature)

    # -- accesses --------------------------------------------------------------------

    def bar_read(self, index: int, offset: int, size: int) -> int:
        """Any access that is inside the BAR."""
        if index == LEGACY_BAR:
            return self._read_legacy(offset, size)
        region, offset = offset & -REGION, offset & REGION - 1
        if index == MODERN_BAR and region == COMMON_CFG:
            with self.lock:
                return self._common.read(offset, size)
        if index == MODERN_BAR and region == DEVICE_CFG:
            return self._read_config(offset, size)
        if index == MODERN_BAR and region == ISR_CFG and offset == 0:
            return self._take_isr()
        return 0

    def bar_write(self, index: int, offset: int, size: int, value: int) -> None:
        """Any access that is inside the BAR."""
        if index == LEGACY_BAR:
            if offset == QUEUE_NOTIFY and size == 2:
                self._kick(value)
            else:
                self._write_legacy(offset, size, value)
        elif index == MODERN_BAR:
            region, offset = offset & -REGION, offset & REGION - 1
            if region == NOTIFY_CFG:
                self._kick(offset >> NOTIFY_SHIFT)
            elif region == COMMON_CFG:
                with self.lock:
                    self._common.write(offset, size, value)
            elif region == DEVICE_CFG:
                self._write_config(offset, size, value)

    def _read_legacy(self, offset: int, size: int) -> int:
        # An access may go across the borders between the parts.
        value = done = 0
        while done < size:
            at = offset + done
            base, end, block = self._legacy_part(at)
            count = min(end - at, size - done)
            if block is None:
                part = self._read_config(at - base, count)
            else:
                with self.lock:
                    part = block.read(at - base, count)
            value |= part << 8 * done
            done += count
        return value

    def _write_legacy(self, offset: int, size: int, value: int) -> None:
        done = 0
        while done < size:
            at = offset + done
            base, end, block = self._legacy_part(at)
            count = min(end - at, size - done)
            part = value >> 8 * done & (1 << 8 * count) - 1
            if block is None:
                self._write_config(at - base, count, part)
            else:
                with self.lock:
                    block.write(at - base, count, part)
            done += count

    def _legacy_part(self, at: int) -> tuple[int, int, RegBlock | None]:
        """Beginning, end and registers of what is at ``at``; None: configuration."""
        if at < CONFIG_WITHOUT_MSIX:
            return 0, CONFIG_WITHOUT_MSIX, self._legacy
        if not self.msix_enabled():
            return CONFIG_WITHOUT_MSIX, 1 << 16, None
        if at < CONFIG_WITH_MSIX:
            return CONFIG_WITHOUT_MSIX, CONFIG_WITH_MSIX, self._legacy_msix
        return CONFIG_WITH_MSIX, 1 << 16, None

    def _read_config(self, offset: int, size: int) -> int:
        with self.lock:
            return int.from_bytes(
                self.device_config()[offset : offset + size], "little"
            )

    def _write_config(self, offset: int, size: int, value: int) -> None:
        inside = min(size, self._config_size - offset)
        if inside > 0:
            data = value.to_bytes(size, "little")[:inside]
            with self.lock:
                self.device_config_written(offset, data)

    # -- accesses by configuration space (4.1.4.9) -----------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """As `PciDevice`; the data of the access capability are a BAR's."""
        at = offset - self._pci_cfg - PCI_CFG_DATA
        if 0 <= at < 4 and (target := self._pci_cfg_target()) is not None:
            where, length = target
            if at == 0 and size >= length:
                return self.bar_read(MODERN_BAR, where, length)
        return super().config_read(offset, size)

    def config_written(self, offset: int, size: int) -> None:
        """A write to the data of the access capability goes to a BAR."""
        at = offset - self._pci_cfg - PCI_CFG_DATA
        if at == 0 and (target := self._pci_cfg_target()) is not None:
            where, length = target
            if size >= length:
                value = super().config_read(offset, length)
                self.bar_write(MODERN_BAR, where, length, value)

    def _pci_cfg_target(self) -> tuple[int, int] | None:
        """Offset and length of the access that the driver has set up, if it can be."""
        get, cap = super().config_read, self._pci_cfg
        where = get(cap + PCI_CFG_OFFSET, 4)
        length = get(cap + PCI_CFG_LENGTH, 4)
        if (
            get(cap + PCI_CFG_BAR, 1) != MODERN_BAR
            or length not in (1, 2, 4)
            or where % length
            or where + length > MODERN_SIZE
        ):
            return None
        return where, length

    # -- notifications and interrupts ------------------------------------------------

    def _kick(self, index: int) -> None:
        if (poller := self._pollers.get(index)) is not None:
            poller.notified()
        elif index < len(self.queues):
            self.run_queue(self.queues[index])
        else:
            log.debug("%s: queue %d notify out of range", self.NAME, index)

    def run_queue(self, vq: VirtQueue) -> None:
        """Have `notify` called for a queue, here or by the thread that is in it."""
        vq.kicked = True
        while vq.kicked and not self._paused and vq.run_lock.acquire(blocking=False):
            try:
                vq.kicked = False
                self.notify(vq)
            finally:
                vq.run_lock.release()

    def _interrupt_queue(self, vq: VirtQueue) -> None:
        self._interrupt(vq.vector, VIRTIO_PCI_ISR_INTR)

    def _interrupt(self, vector: int, isr: int) -> None:
        if self.msix_enabled():
            self.generate_msix(vector)
            return
        with self.irq_lock:
            self._isr |= isr
            self.generate_msi(0)
            self.intx_assert()

    @LegacyRegs.ISR_STATUS.read
    def _take_isr(self) -> int:
        with self.irq_lock:
            isr, self._isr = self._isr, 0
            self.intx_deassert()
        return isr

    def _stopped(self, vq: VirtQueue, why: str) -> None:
        """A queue stopped because of its driver (2.1.2)."""
        log.debug("%s: queue %d: %s; driver confused?", self.NAME, vq.index, why)
        with self.lock:
            # A legacy driver does not know the bit.
            if self.negotiated & VIRTIO_F_VERSION_1:
                self._status |= VIRTIO_CONFIG_S_NEEDS_RESET
                if self._status & VIRTIO_CONFIG_S_DRIVER_OK:
                    self._interrupt(self._config_vector, VIRTIO_PCI_ISR_CONFIG)

    # -- registers -------------------------------------------------------------------

    def _queue(self) -> VirtQueue | None:
        selected = self._common.QUEUE_SELECT
        return self.queues[selected] if selected < len(self.queues) else None

    @LegacyRegs.QUEUE_SELECT.write
    @CommonRegs.QUEUE_SELECT.write
    def _select(self, index: int) -> None:
        """Show a queue in the registers that every queue has."""
        common, legacy = self._common, self._legacy
        common.QUEUE_SELECT = legacy.QUEUE_SELECT = index
        vq = self._queue()
        vector = vq.vector if vq is not None else VIRTIO_MSI_NO_VECTOR
        common.QUEUE_SIZE = legacy.QUEUE_SIZE = vq.size if vq is not None else 0
        common.QUEUE_MSIX_VECTOR = self._legacy_msix.QUEUE_MSIX_VECTOR = vector
        common.QUEUE_ENABLE = int(vq is not None and vq.enabled)
        common.QUEUE_NOTIFY_OFF = index if vq is not None else 0
        common.QUEUE_DESC = vq.desc if vq is not None else 0
        common.QUEUE_DRIVER = vq.avail if vq is not None else 0
        common.QUEUE_DEVICE = vq.used if vq is not None else 0
        legacy.QUEUE_ADDRESS = common.QUEUE_DESC >> PFN_SHIFT & 0xFFFFFFFF

    @LegacyRegs.DEVICE_FEATURES.read
    def _legacy_features(self) -> int:
        return self.offered & 0xFFFFFFFF

    @LegacyRegs.DRIVER_FEATURES.write
    def _legacy_negotiate(self, value: int) -> None:
        self._legacy.DRIVER_FEATURES = value & self.offered & 0xFFFFFFFF
        self._driver_features = self._legacy.DRIVER_FEATURES
        self._negotiate(self._driver_features)

    @LegacyRegs.QUEUE_ADDRESS.write
    def _legacy_queue_address(self, pfn: int) -> None:
        vq = self._queue()
        if vq is None:
            return
        self._leave(vq.disable())
        # deviation: 0 is an address in bhyve; the specification stops the queue.
        if pfn:
            vq.enable_legacy(pfn << PFN_SHIFT)
        else:
            vq.desc = vq.avail = vq.used = 0
        self._select(vq.index)

    @LegacyRegs.QUEUE_NOTIFY.read
    def _no_notification(self) -> int:
        return 0

    @LegacyRegs.QUEUE_NOTIFY.write
    def _legacy_notify(self, index: int) -> None:
        self._kick(index)

    @LegacyMsixRegs.CONFIG_MSIX_VECTOR.read
    @CommonRegs.CONFIG_MSIX_VECTOR.read
    def _get_config_vector(self) -> int:
        return self._config_vector

    @LegacyMsixRegs.CONFIG_MSIX_VECTOR.write
    @CommonRegs.CONFIG_MSIX_VECTOR.write
    def _set_config_vector(self, vector: int) -> None:
        self._config_vector = self._valid_vector(vector)

    @LegacyMsixRegs.QUEUE_MSIX_VECTOR.write
    @CommonRegs.QUEUE_MSIX_VECTOR.write
    def _set_queue_vector(self, vector: int) -> None:
        vq = self._queue()
        if vq is not None:
            vq.vector = self._valid_vector(vector)
            self._select(vq.index)

    def _valid_vector(self, vector: int) -> int:
        count = self.msix.count if self.msix is not None else 0
        return vector if vector < count else VIRTIO_MSI_NO_VECTOR

    @CommonRegs.DEVICE_FEATURE.read
    def _device_feature(self) -> int:
        return self.offered >> 32 * min(self._common.DEVICE_FEATURE_SELECT, 2) & (
            0xFFFFFFFF
        )

    @CommonRegs.DRIVER_FEATURE.read
    def _get_driver_feature(self) -> int:
        return self._driver_features >> 32 * min(
            self._common.DRIVER_FEATURE_SELECT, 2
        ) & (0xFFFFFFFF)

    @CommonRegs.DRIVER_FEATURE.write
    def _set_driver_feature(self, value: int) -> None:
        select = self._common.DRIVER_FEATURE_SELECT
        # 3.1.1: features do not change once they are accepted.
        if select < 2 and not self._status & VIRTIO_CONFIG_S_FEATURES_OK:
            shift = 32 * select
            self._driver_features &= ~(0xFFFFFFFF << shift)
            self._driver_features |= value << shift

    @CommonRegs.NUM_QUEUES.read
    def _num_queues(self) -> int:
        return len(self.queues)

    @CommonRegs.CONFIG_GENERATION.read
    def _config_generation(self) -> int:
        return self._generation

    @CommonRegs.QUEUE_SIZE.write
    def _set_queue_size(self, size: int) -> None:
        vq = self._queue()
        if vq is not None and not vq.enabled:
            vq.size = size
            self._select(vq.index)

    @CommonRegs.QUEUE_ENABLE.write
    def _queue_enable(self, value: int) -> None:
        vq = self._queue()
        if vq is not None and value == 1 and not vq.enabled:
            vq.enable()
            self._select(vq.index)

    @CommonRegs.QUEUE_DESC.write
    def _queue_desc(self, address: int) -> None:
        vq = self._queue()
        if vq is not None and not vq.enabled:
            self._common.QUEUE_DESC = vq.desc = address

    @CommonRegs.QUEUE_DRIVER.write
    def _queue_driver(self, address: int) -> None:
        vq = self._queue()
        if vq is not None and not vq.enabled:
            self._common.QUEUE_DRIVER = vq.avail = address

    @CommonRegs.QUEUE_DEVICE.write
    def _queue_device(self, address: int) -> None:
        vq = self._queue()
        if vq is not None and not vq.enabled:
            self._common.QUEUE_DEVICE = vq.used = address

    @LegacyRegs.DEVICE_STATUS.read
    @CommonRegs.DEVICE_STATUS.read
    def _get_status(self) -> int:
        if self._status or not self._leftover:
            return self._status
        # 2.4.2: a driver that reads 0 can have its memory back.
        self._leftover = [r for r in self._leftover if r.taken != r.returned]
        return VIRTIO_CONFIG_S_NEEDS_RESET if self._leftover else 0

    @LegacyRegs.DEVICE_STATUS.write
    @CommonRegs.DEVICE_STATUS.write
    def _set_status(self, status: int) -> None:
        if status == 0:
            self._reset_transport()
            self.reset_state()
            return
        if status & ~self._status & VIRTIO_CONFIG_S_FEATURES_OK:
            wanted = self._driver_features
            if wanted & ~self.offered or not wanted & VIRTIO_F_VERSION_1:
                status &= ~VIRTIO_CONFIG_S_FEATURES_OK
            else:
                self._negotiate(wanted)
        # A driver cannot take this back (2.1.2).
        self._status = status | self._status & VIRTIO_CONFIG_S_NEEDS_RESET

    def _negotiate(self, features: int) -> None:
        self.negotiated = features
        for vq in self.queues:
            vq.features = features
        self.features_negotiated()

    def _leave(self, ring: Ring | None) -> None:
        """Remember rings whose buffers somebody may still write to."""
        if ring is not None:
            self._leftover.append(ring)

    def _reset_transport(self) -> None:
        for vq in self.queues:
            self._leave(vq.reset())
            vq.features = 0
        self._status = 0
        self._config_vector = VIRTIO_MSI_NO_VECTOR
        self._driver_features = self.negotiated = 0
        self._legacy.reset()
        self._legacy_msix.reset()
        self._common.reset()
        self._select(0)
        with self.irq_lock:
            self._isr = 0
            self.intx_deassert()

    # -- life ------------------------------------------------------------------------

    def pause(self) -> None:
        """Let notifications wait and finish what is under way."""
        for poller in self._pollers.values():
            poller.stop()
        self._paused = True
        for vq in self.queues:
            with vq.run_lock:  # whoever is in notify() comes out
                pass
        self.drain()

    def resume(self) -> None:
        """Look at what came meanwhile."""
        self._paused = False
        for vq in self.queues:
            if vq.ring is not None:
                self.run_queue(vq)

    def halt(self) -> None:
        """End threads; a device that overrides this calls it first."""
        for poller in self._pollers.values():
            poller.close()

    def reset_device(self) -> None:
        """The transport and the device, as after power-on."""
        with self.lock:
            self._reset_transport()
            self._leftover.clear()
            self._generation = 0
            self.reset_state()

    def save_device(self) -> dict[str, Any]:
        """Transport, queues, and what the device itself has."""
        with self.lock:
            return {
                "version": 1,
                "status": self._status,
                "isr": self._isr,
                "generation": self._generation,
                "config_vector": self._config_vector,
                "driver_features": self._driver_features,
                "negotiated": self.negotiated,
                "registers": [
                    self._legacy.save(),
                    self._legacy_msix.save(),
                    self._common.save(),
                ],
                "queues": [vq.save() for vq in self.queues],
                "state": self.save_state(),
            }

    def restore_device(self, state: dict[str, Any]) -> None:
        """Take back what save_device() gave."""
        if state["version"] != 1 or len(state["queues"]) != len(self.queues):
            raise ValueError(f"{self.NAME}: unknown state")
        with self.lock:
            self._status = state["status"]
            self._isr = state["isr"]
            self._generation = state["generation"]
            self._config_vector = state["config_vector"]
            self._driver_features = state["driver_features"]
            for block, saved in zip(
                (self._legacy, self._legacy_msix, self._common),
                state["registers"],
                strict=True,
            ):
                block.restore(saved)
            for vq, saved in zip(self.queues, state["queues"], strict=True):
                vq.restore(saved)
            self._leftover.clear()
            self._negotiate(state["negotiated"])
            self.restore_state(state["state"])
