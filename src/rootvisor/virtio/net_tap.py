# SPDX-License-Identifier: Apache-2.0
"""Network devices on a tap interface: the kernel's vhost-net moves the packets, or this process does."""

from __future__ import annotations

import os
import select

from .device import RING_FEATURES
from .net import (
    ETHERNET_HEADER_BYTES,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    F_MRG_RXBUF,
    HEADER_BYTES,
    MAX_FRAME,
    QUEUES,
    RX_QUEUE,
    NetDevice,
    ReceiveBuffers,
)
from .registers import DEVICE_NET
from .tap import Tap
from .vhost_kernel import NET_SET_BACKEND, VhostKernelDevice, VhostKernelError, open_vhost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .queue import Queue

VHOST_DEVICE = "/dev/vhost-net"

_IOV_MAX = 1024
_PACKETS_PER_ROUND = 64
_PACKETS_PER_INTERRUPT = 16
_VLAN_BYTES = 4
_DEFAULT_MTU = 1500


def tap_net(fd: int, mac: bytes, *, mtu: int | None = None, name: str = "net") -> NetDevice:
    """The best device for a tap interface: with vhost-net where this process may use it."""
    try:
        vhost = open_vhost(VHOST_DEVICE, "vhost_net")
    except VhostKernelError:
        return TapNet(fd, mac, mtu=mtu, name=name)
    return VhostTapNet(fd, vhost, mac, mtu=mtu, name=name)


class TapNet(NetDevice):
    """A device that moves packets itself, one system call each.

    Arguments:
        fd: the tap interface (`tap.open_tap`), owned by the device from now on.
        mac: the guest's address, six bytes.
        mtu: told to the driver; `None` says nothing, and the driver takes 1500.

    Raises `TapError` when the descriptor is no tap interface, `ValueError` for an address or MTU that cannot be.
    """

    device_type = DEVICE_NET

    def __init__(self, fd: int, mac: bytes, *, mtu: int | None = None, name: str = "net") -> None:
        self.tap = tap = Tap(fd)
        super().__init__(name, RING_FEATURES | F_MRG_RXBUF | tap.features, QUEUES)
        self.describe(mac, mtu)
        self.vectors = 3
        self._buffers: ReceiveBuffers | None = None
        self._scratch = memoryview(bytearray(HEADER_BYTES + MAX_FRAME))
        self._largest = 0

    def activate(self, queues: Sequence[Queue | None], features: int) -> None:
        """Have the kernel give what the driver takes."""
        self.tap.set_offloads(features)
        frame = (self.mtu or _DEFAULT_MTU) + ETHERNET_HEADER_BYTES + _VLAN_BYTES
        large = features & (F_GUEST_TSO4 | F_GUEST_TSO6)
        self._largest = HEADER_BYTES + (MAX_FRAME if large else frame)
        super().activate(queues, features)

    def start_queue(self, queue: Queue) -> None:
        """Receive into a queue, or send from it."""
        if queue.index == RX_QUEUE:
            self._buffers = ReceiveBuffers(queue, bool(self.driver_features & F_MRG_RXBUF))
        super().start_queue(queue)

    def stop_queue(self, queue: Queue) -> None:
        """Leave a queue."""
        super().stop_queue(queue)
        if queue.index == RX_QUEUE:
            self._buffers = None
            self.worker.unwatch(self.tap.fd)

    def set_dma(self, enabled: bool) -> None:
        """Bus mastering went off: no buffer is held any more."""
        if not enabled and self._buffers is not None:
            self._buffers.give_back()
            self.worker.unwatch(self.tap.fd)
        super().set_dma(enabled)

    def handle_queue(self, queue: Queue) -> None:
        """Room for packets, or packets."""
        if queue.index == RX_QUEUE:
            queue.quiet()
            self.worker.watch(self.tap.fd, select.POLLIN, self._ready)
        else:
            self._transmit(queue)

    def close(self) -> None:
        """Stop and let go of the interface."""
        super().close()
        self.tap.close()

    def _ready(self, events: int) -> None:
        queue, buffers = self.queues[RX_QUEUE], self._buffers
        if queue is None or buffers is None:
            return
        for _ in range(_PACKETS_PER_ROUND):
            while not buffers.gather(self._largest):
                if not queue.listen():
                    self.worker.unwatch(self.tap.fd)
                    queue.notify()
                    return
            views = buffers.views()
            room = buffers.room
            if len(views) >= _IOV_MAX:
                views = views[: _IOV_MAX - 1]
                room = sum(map(len, views))
            try:
                # The kernel cuts what does not fit; with room for all of it we notice.
                count = os.readv(self.tap.fd, [*views, self._scratch])
            except BlockingIOError:
                break
            except OSError:  # the interface is down; its driver says so with every read
                self.worker.unwatch(self.tap.fd)
                break
            if HEADER_BYTES < count <= room:
                buffers.deliver(count, None)
        queue.notify()

    def _transmit(self, queue: Queue) -> None:
        fd = self.tap.fd
        while True:
            queue.quiet()
            done = 0
            while (chain := queue.pop()) is not None:
                views = chain.readable
                if len(views) > _IOV_MAX:
                    views = [memoryview(b"".join(views))]
                try:
                    queue.counters.bytes += os.writev(fd, views)
                except OSError:  # the interface is down, or the packet is none: networks lose packets
                    pass
                queue.push(chain, 0)
                done += 1
                if done % _PACKETS_PER_INTERRUPT == 0:
                    queue.notify()
            more = queue.listen()
            queue.notify()
            if not more:
                return


class VhostTapNet(VhostKernelDevice, NetDevice):
    """A device whose packets the kernel moves between rings and interface.

    Arguments as for `TapNet`; `vhost` is /dev/vhost-net (`open_vhost`), owned by the device too. Raises
    `VhostKernelError` in addition.
    """

    device_type = DEVICE_NET

    def __init__(self, fd: int, vhost: int, mac: bytes, *, mtu: int | None = None, name: str = "net") -> None:
        try:
            self.tap = tap = Tap(fd)
        except Exception:
            os.close(vhost)
            raise
        try:
            VhostKernelDevice.__init__(self, name, vhost, QUEUES, backend="vhost-net", features=F_MRG_RXBUF)
        except VhostKernelError:
            tap.close()
            raise
        self.features |= tap.features
        self.describe(mac, mtu)

    def set_up(self, features: int) -> None:
        """Have the kernel give what the driver takes."""
        self.tap.set_offloads(features)
        super().set_up(features)

    def start_ring(self, queue: Queue, base: int) -> None:
        """Connect the ring to the interface."""
        super().start_ring(queue, base)
        self.vhost.set_file(NET_SET_BACKEND, queue.index, self.tap.fd)

    def stop_ring(self, index: int) -> int:
        """Disconnect the ring; packets under way are finished."""
        self.vhost.set_file(NET_SET_BACKEND, index, -1)
        return super().stop_ring(index)

    def close(self) -> None:
        """Stop and let go of the interface."""
        super().close()
        self.tap.close()
