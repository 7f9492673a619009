# SPDX-License-Identifier: Apache-2.0
"""Network device (virtio 1.2, section 5.1): what all of its backends share.

Queues: 0 receives, 1 transmits. Every packet has a header of 12 bytes in front (struct virtio_net_hdr, 5.1.6).
Backends: `net_tap` (a tap interface, with vhost-net or without), `net_stream` (passt's socket), `net_vhost_user`.
"""

from __future__ import annotations

import struct

from .device import VirtioDevice
from .queue import QueueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .queue import Chain, Queue

F_CSUM = 1 << 0
F_GUEST_CSUM = 1 << 1
F_MTU = 1 << 3
F_MAC = 1 << 5
F_GUEST_TSO4 = 1 << 7
F_GUEST_TSO6 = 1 << 8
F_GUEST_ECN = 1 << 9
F_HOST_TSO4 = 1 << 11
F_HOST_TSO6 = 1 << 12
F_HOST_ECN = 1 << 13
F_MRG_RXBUF = 1 << 15
F_STATUS = 1 << 16

GUEST_OFFLOADS = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN
HOST_OFFLOADS = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN

# What a feature is useless without (5.1.3.1).
_NEEDS = (
    (F_GUEST_TSO4 | F_GUEST_TSO6, F_GUEST_CSUM),
    (F_GUEST_ECN, F_GUEST_TSO4 | F_GUEST_TSO6),
    (F_HOST_TSO4 | F_HOST_TSO6, F_CSUM),
    (F_HOST_ECN, F_HOST_TSO4 | F_HOST_TSO6),
)

RX_QUEUE, TX_QUEUE = 0, 1
QUEUE_SIZE = 256
QUEUES = (QUEUE_SIZE, QUEUE_SIZE)

HEADER_BYTES = 12
_NUM_BUFFERS = 10  # offset in the header
DATA_VALID = bytes([2]) + bytes(HEADER_BYTES - 1)  # "the checksum is right"
ETHERNET_HEADER_BYTES = 14
# A segment of 64 KiB with headers, VLAN tag included.
MAX_FRAME = 65535 + ETHERNET_HEADER_BYTES + 4
MIN_MTU, MAX_MTU = 68, 65535

_LINK_UP = 1
_CONFIG = struct.Struct("<6sHHH")  # MAC address, status, queue pairs, MTU


class NetDevice(VirtioDevice):
    """Configuration and link state of a network device; mixed into each backend's device."""

    mac = bytes(6)
    mtu: int | None = None
    link_up = True

    def describe(self, mac: bytes, mtu: int | None) -> None:
        """Fill in the configuration and offer what it is about."""
        if len(mac) != 6 or mac[0] & 1:
            raise ValueError(f"not the MAC address of an interface: {mac.hex(':')}")
        if mtu is not None and not MIN_MTU <= mtu <= MAX_MTU:
            raise ValueError(f"an MTU is {MIN_MTU} to {MAX_MTU} bytes, not {mtu}")
        self.mac = mac
        self.mtu = mtu
        self.features |= F_MAC | F_STATUS | (0 if mtu is None else F_MTU)
        self._set_config()

    def accepts(self, features: int) -> bool:
        """Offloads build upon one another."""
        return not any(features & feature and not features & base for feature, base in _NEEDS)

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it out. From any thread."""
        with self.lock:
            if up != self.link_up:
                self.link_up = up
                self._set_config()
                self.config_changed()

    def save(self) -> dict[str, object]:
        """The link."""
        return {"link": self.link_up}

    def restore(self, state: dict[str, object]) -> None:
        """As the driver knows it."""
        self.link_up = bool(state["link"])
        self._set_config()

    def _set_config(self) -> None:
        self.config = _CONFIG.pack(self.mac, _LINK_UP if self.link_up else 0, 1, self.mtu or 0)


class ReceiveBuffers:
    """Chains of the receive queue, popped ahead of the packets that will go into them.

    With MRG_RXBUF a packet may fill several chains, without it has one to itself.
    """

    __slots__ = ("_chains", "_entries", "_merge", "_queue", "room")

    def __init__(self, queue: Queue, merge: bool) -> None:
        self._queue = queue
        self._merge = merge
        self._chains: list[tuple[Chain, int]] = []
        self._entries = 0
        self.room = 0

    def gather(self, needed: int) -> bool:
        """Have chains ready for `needed` bytes, or all that the ring can hold, which `room` tells; false while the
        driver has to bring more. Raises `QueueError`."""
        chains = self._chains
        while self.room < needed and (self._merge or not chains):
            chain = self._queue.pop()
            if chain is None:
                return self._entries >= self._queue.size
            writable = chain.writable
            size = len(writable[0]) if len(writable) == 1 else chain.writable_bytes()
            if size < HEADER_BYTES:
                raise QueueError(f"queue {self._queue.index}: a receive buffer of {size} bytes")
            chains.append((chain, size))
            self._entries += len(writable)
            self.room += size
        return True

    def views(self) -> list[memoryview]:
        """The buffers."""
        chains = self._chains
        if len(chains) == 1:
            return chains[0][0].writable
        return [view for chain, _ in chains for view in chain.writable]

    def deliver(self, count: int, header: bytes | None) -> None:
        """The first `count` bytes are a packet, at most `room`; `header` goes in front (it is in place if `None`), with
        the number of chains. Call `Queue.notify` later."""
        chains = self._chains
        done: list[tuple[Chain, int]] = []
        for chain, size in chains:
            self._entries -= len(chain.writable)
            self.room -= size
            if count <= size:
                done.append((chain, count))
                break
            done.append((chain, size))
            count -= size
        first = chains[0][0].writable
        del chains[: len(done)]
        buffers = len(done).to_bytes(2, "little")
        if header is None:
            _put(first, _NUM_BUFFERS, buffers)
        else:
            _put(first, 0, header[:_NUM_BUFFERS] + buffers)
        self._queue.push_together(done)

    def give_back(self) -> None:
        """Put the chains back into the queue as if nobody had looked."""
        for chain, _ in reversed(self._chains):
            self._queue.unpop(chain)
        self._chains.clear()
        self._entries = self.room = 0


def _put(views: list[memoryview], offset: int, data: bytes) -> None:
    """Write into buffers, however the driver cut them."""
    first = views[0]
    if offset + len(data) <= len(first):
        first[offset : offset + len(data)] = data
        return
    for view in views:
        if offset < len(view):
            count = min(len(view) - offset, len(data))
            view[offset : offset + count] = data[:count]
            data = data[count:]
            offset = 0
            if not data:
                return
        else:
            offset -= len(view)


def skip_bytes(views: list[memoryview], count: int) -> Iterator[memoryview]:
    """The views without their first `count` bytes."""
    for view in views:
        if count >= len(view):
            count -= len(view)
        elif count:
            yield view[count:]
            count = 0
        else:
            yield view
