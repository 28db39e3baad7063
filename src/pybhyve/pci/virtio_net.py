"""virtio-net: a network interface (virtio 1.2, 5.1).  bhyve: pci_virtio_net.c.

Frames move on the event loop's thread, many for each time it is woken; a vCPU only
tells it that there is something to do.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any, Final

from pybhyve.net import (
    FRAME_MAX,
    HEADER_LEGACY,
    HEADER_MRG,
    OFFLOAD_CSUM,
    OFFLOAD_ECN,
    OFFLOAD_TSO4,
    OFFLOAD_TSO6,
    NetOptions,
    generate_mac,
    open_backend,
)
from pybhyve.options import integer, key
from pybhyve.pci.emul import PciAddress
from pybhyve.pci.pcireg import PCIC_NETWORK
from pybhyve.pci.registry import pci_device
from pybhyve.pci.virtio import VIRTIO_VENDOR, VirtioPci
from pybhyve.virtio import (
    VIRTIO_F_NOTIFY_ON_EMPTY,
    VIRTIO_F_VERSION_1,
    Chain,
    VirtQueue,
    total,
)
from pybhyve.vmmapi import map_iov, release_iov

if TYPE_CHECKING:
    from pybhyve.bhyverun.machine import Machine
    from pybhyve.pci.bus import PciHost

VIRTIO_DEV_NET: Final = 0x1000
VIRTIO_ID_NETWORK: Final = 1

RXQ: Final = 0
TXQ: Final = 1
CTLQ: Final = 2
RINGSZ: Final = 1024
CTL_RINGSZ: Final = 64

# 5.1.3: feature bits
VIRTIO_NET_F_CSUM: Final = 1 << 0
VIRTIO_NET_F_GUEST_CSUM: Final = 1 << 1
VIRTIO_NET_F_CTRL_GUEST_OFFLOADS: Final = 1 << 2
VIRTIO_NET_F_MTU: Final = 1 << 3
VIRTIO_NET_F_MAC: Final = 1 << 5
VIRTIO_NET_F_GUEST_TSO4: Final = 1 << 7
VIRTIO_NET_F_GUEST_TSO6: Final = 1 << 8
VIRTIO_NET_F_GUEST_ECN: Final = 1 << 9
VIRTIO_NET_F_HOST_TSO4: Final = 1 << 11
VIRTIO_NET_F_HOST_TSO6: Final = 1 << 12
VIRTIO_NET_F_HOST_ECN: Final = 1 << 13
VIRTIO_NET_F_MRG_RXBUF: Final = 1 << 15
VIRTIO_NET_F_STATUS: Final = 1 << 16
VIRTIO_NET_F_CTRL_VQ: Final = 1 << 17
VIRTIO_NET_F_CTRL_RX: Final = 1 << 18
VIRTIO_NET_F_CTRL_MAC_ADDR: Final = 1 << 23

_OFFLOADS: Final = (
    (VIRTIO_NET_F_GUEST_CSUM, OFFLOAD_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, OFFLOAD_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, OFFLOAD_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, OFFLOAD_ECN),
)

# 5.1.4: configuration
CONFIG: Final = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu
VIRTIO_NET_S_LINK_UP: Final = 1
MAC_SIZE: Final = 6

# 5.1.6.5: the control queue; class and command
CTRL_RX_MODES: Final = ((0, 0), (0, 1))  # promiscuous, all multicasts
CTRL_MAC_TABLE_SET: Final = (1, 0)
CTRL_MAC_ADDR_SET: Final = (1, 1)
CTRL_GUEST_OFFLOADS_SET: Final = (5, 0)
CTRL_OK: Final = 0
CTRL_ERR: Final = 1
CTRL_READ: Final = 16  # bytes of a command that matter

NUM_BUFFERS: Final = 10  # its place in the header
MTU_DEFAULT: Final = 1500
MTU_MIN: Final = 46
MTU_MAX: Final = 65535
# Frames in one go, before others on the event loop have theirs.
RX_BUDGET: Final = 64
TX_BUDGET: Final = 64


class VirtioNetOptions(NetOptions):
    """``pci.B.S.F.…`` of ``virtio-net``."""

    mtu: int | None = key(
        None,
        parse=integer(MTU_MIN, MTU_MAX),
        doc="The MTU that the guest is told to use, in bytes.",
    )


@pci_device("virtio-net", options=VirtioNetOptions)
class PciVirtioNet(VirtioPci[VirtioNetOptions]):
    """Two queues of frames, and one of control.

    deviation: bhyve has no control queue, and offers checksums and segmentation for
    netmap alone.
    """

    FEATURES = (
        VIRTIO_NET_F_MAC
        | VIRTIO_NET_F_STATUS
        | VIRTIO_NET_F_MRG_RXBUF
        | VIRTIO_NET_F_CSUM
        | VIRTIO_NET_F_HOST_TSO4
        | VIRTIO_NET_F_HOST_TSO6
        | VIRTIO_NET_F_HOST_ECN
        | VIRTIO_NET_F_GUEST_CSUM
        | VIRTIO_NET_F_GUEST_TSO4
        | VIRTIO_NET_F_GUEST_TSO6
        | VIRTIO_NET_F_GUEST_ECN
        | VIRTIO_NET_F_CTRL_VQ
        | VIRTIO_NET_F_CTRL_RX
        | VIRTIO_NET_F_CTRL_MAC_ADDR
        | VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
        | VIRTIO_F_NOTIFY_ON_EMPTY
    )

    def __init__(
        self,
        machine: Machine,
        host: PciHost,
        address: PciAddress,
        options: VirtioNetOptions,
    ) -> None:
        super().__init__(
            machine,
            host,
            address,
            options,
            queues=(RINGSZ, RINGSZ, CTL_RINGSZ),
            config_size=CONFIG.size,
        )
        self.set_ids(
            VIRTIO_VENDOR,
            VIRTIO_DEV_NET,
            class_=PCIC_NETWORK,
            subclass=0,
            subvendor=VIRTIO_VENDOR,
            subdevice=VIRTIO_ID_NETWORK,
        )
        self.add_rom(options.rom)
        if options.mtu is not None:
            self.offered |= VIRTIO_NET_F_MTU
        self._mtu = options.mtu or MTU_DEFAULT
        self._mac_at_reset = options.mac or generate_mac(
            address.slot, address.func, machine.ctx.name
        )
        self._mac = self._mac_at_reset
        self._offloads = 0
        self._loop = machine.mevent
        self._vm = machine.ctx.vm
        self._work = threading.Lock()
        """Held while frames move."""
        self._buffer = memoryview(bytearray(FRAME_MAX))
        self._waiting = 0  # bytes of a frame in it that the guest had no room for
        self._header = HEADER_LEGACY
        self._merge = False
        self._tx_soon = False  # _transmit is about to be called
        self._backend = open_backend(options, machine.mevent, machine.vm.now, self._mtu)

    # -- registers and notifications: a vCPU's thread --------------------------------

    def device_config(self) -> bytes:
        """MAC address, link, number of queue pairs, MTU."""
        status = VIRTIO_NET_S_LINK_UP if self._backend.link_up else 0
        return CONFIG.pack(self._mac, status, 1, self._mtu)

    def device_config_written(self, offset: int, data: bytes) -> None:
        """A legacy driver sets its MAC address here (5.1.4.1)."""
        if not self.has(VIRTIO_F_VERSION_1):
            mac = bytearray(self._mac)
            for at, byte in enumerate(data, offset):
                if at < MAC_SIZE:
                    mac[at] = byte
            self._mac = bytes(mac)

    def features_negotiated(self) -> None:
        """The form of frames follows from the features."""
        self._offloads = self.negotiated
        self._loop.call_soon_threadsafe(self._configure)

    def notify(self, vq: VirtQueue) -> None:
        """Wake whoever moves frames."""
        if vq.index == TXQ:
            if not self._tx_soon:
                self._tx_soon = True
                self._loop.call_soon_threadsafe(self._transmit)
        elif vq.index == RXQ:
            self._loop.call_soon_threadsafe(self._refilled)
        else:
            self._control(vq)

    def _control(self, vq: VirtQueue) -> None:
        while (chain := vq.getchain()) is not None:
            ack = self._command(vq.read(chain.readable, CTRL_READ))
            vq.relchain(chain, vq.write(chain.writable, bytes((ack,))))
        vq.endchains(used_all_avail=True)

    def _command(self, command: bytes) -> int:
        what, data = tuple(command[:2]), command[2:]
        if what == CTRL_MAC_ADDR_SET and len(data) >= MAC_SIZE:
            with self.lock:
                self._mac = data[:MAC_SIZE]
        elif what == CTRL_GUEST_OFFLOADS_SET and len(data) >= 8:
            self._offloads = int.from_bytes(data[:8], "little") & self.negotiated
            self._loop.call_soon_threadsafe(self._configure)
        elif what not in CTRL_RX_MODES and what != CTRL_MAC_TABLE_SET:
            return CTRL_ERR
        # Every frame is passed on, which satisfies any mode and table (5.1.6.5.1).
        return CTRL_OK

    # -- frames: the event loop's thread ---------------------------------------------

    def _configure(self) -> None:
        with self._work:
            self._set_form()

    def _set_form(self) -> None:
        """Set what frames look like, and lose one that looks as they did before."""
        modern = self.has(VIRTIO_F_VERSION_1)
        self._merge = self.has(VIRTIO_NET_F_MRG_RXBUF)
        self._header = HEADER_MRG if modern or self._merge else HEADER_LEGACY
        self._backend.set_header(self._header)
        self._waiting = 0
        offloads = sum(bit for feature, bit in _OFFLOADS if self._offloads & feature)
        # The features depend on each other (5.1.3.1), whatever a driver takes.
        if not offloads & (OFFLOAD_TSO4 | OFFLOAD_TSO6):
            offloads &= ~OFFLOAD_ECN
        self._backend.set_offloads(offloads if offloads & OFFLOAD_CSUM else 0)

    def _refilled(self) -> None:
        """There are buffers to receive into."""
        with self._work:
            if not self._paused:
                self.queues[RXQ].kick_disable()
                self._backend.enable_receive()
        if self._waiting:
            self._receive()

    def _receive(self) -> None:
        """Frames have come."""
        with self._work:
            vq = self.queues[RXQ]
            if self._paused or vq.ring is None:
                self._backend.disable_receive()
                return
            for _ in range(RX_BUDGET):
                length = self._waiting or self._backend.receive(self._buffer)
                if not length:
                    break
                self._waiting = 0
                if not self._deliver(vq, length):
                    self._waiting = length
                    self._backend.disable_receive()
                    break
            vq.endchains(used_all_avail=bool(self._waiting))

    def _deliver(self, vq: VirtQueue, length: int) -> bool:
        """Give the guest the frame in the buffer; False: it has no room for it."""
        chains = self._room(vq, length if self._merge else 1)
        if not chains:
            return False
        if not self._merge and total(chains[-1].writable) < length:
            vq.retchains(len(chains))
            return True  # lost: one chain is all that it may have
        buffer = self._buffer
        if self._header == HEADER_MRG:
            buffer[NUM_BUFFERS:HEADER_MRG] = len(chains).to_bytes(2, "little")
        write_mem = self._vm.write_mem
        released = []
        done = 0
        for chain in chains:
            start = done
            for addr, room in chain.writable:
                end = done + room
                if end >= length:
                    write_mem(addr, buffer[done:length])
                    done = length
                    break
                write_mem(addr, buffer[done:end])
                done = end
            released.append((chain, done - start))
        vq.relchains(released)
        return True

    def _room(self, vq: VirtQueue, length: int) -> list[Chain]:
        """Chains for a frame; without enough of them, notifications are on again."""
        chains = vq.getchains(length)
        if not chains:
            vq.kick_enable()
            chains = vq.getchains(length)
            if chains:
                vq.kick_disable()
        return chains

    def _transmit(self) -> None:
        """The guest has frames to send."""
        with self._work:
            self._tx_soon = False
            vq = self.queues[TXQ]
            if self._paused or vq.ring is None:
                return
            vq.kick_disable()
            for _ in range(TX_BUDGET):
                chain = _getchain(vq)
                if chain is None:
                    break
                self._send(chain)
                vq.relchain(chain, 0)
            else:
                self._tx_soon = True
                self._loop.call_soon_threadsafe(self._transmit)
            vq.endchains(used_all_avail=not self._tx_soon)

    def _send(self, chain: Chain) -> None:
        # The guest chooses the length; a frame that is too long is lost.
        if total(chain.readable) <= FRAME_MAX:
            iov = map_iov(self._vm, chain.readable)
            self._backend.send(iov)
            release_iov(iov)

    def _link_changed(self) -> None:
        self.config_changed()

    # -- life ------------------------------------------------------------------------

    def start(self) -> None:
        """Plug the cable in."""
        self._backend.start(self._receive, self._link_changed)

    def drain(self) -> None:
        """Wait for the frame that is on its way."""
        with self._work:
            pass

    def halt(self) -> None:
        """Unplug the cable."""
        self._backend.close()

    def reset_state(self) -> None:
        """No frames before there are queues again."""
        self._backend.disable_receive()
        self._mac = self._mac_at_reset

    def save_state(self) -> dict[str, Any]:
        """The address, and what the driver turned off; frames may get lost."""
        return {"mac": self._mac, "offloads": self._offloads}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take back what save_state() gave."""
        self._mac = bytes(state["mac"])
        self._offloads = state["offloads"]
        self._set_form()


def _getchain(vq: VirtQueue) -> Chain | None:
    """The next chain; without one, notifications are on again."""
    chain = vq.getchain()
    if chain is None:
        vq.kick_enable()
        chain = vq.getchain()
        if chain is not None:
            vq.kick_disable()
    return chain
