# SPDX-License-Identifier: Apache-2.0
"""A network driver for tests: puts buffers out, sends frames, puts received frames together."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

from rootvisor.virtio.net import F_MRG_RXBUF, HEADER_BYTES, RX_QUEUE, TX_QUEUE
from tests.unit.virtio.guest_side import Guest, wait_until

MAC = bytes.fromhex("525400123456")
PEER = bytes.fromhex("020000000001")
ETHERTYPE = 0x88B5  # IEEE 802: for local experiments


def frame(content: bytes, destination: bytes = PEER, source: bytes = MAC) -> bytes:
    return destination + source + ETHERTYPE.to_bytes(2, "big") + content


class NetDriver:
    """Rings of 256 entries, or of `size`."""

    def __init__(self, guest: Guest, features: int, *, buffer_bytes: int = 2048, size: int = 256) -> None:
        self.guest = guest
        self.merge = bool(features & F_MRG_RXBUF)
        self.buffer_bytes = buffer_bytes
        self.buffers: dict[int, int] = {}
        self.headers: list[bytes] = []
        self._parts: list[tuple[int, int]] = []
        guest.start(features, (size, size))

    def offer(self, count: int) -> None:
        """Put buffers into the receive queue."""
        for _ in range(count):
            gpa = self.guest.memory.allocate(self.buffer_bytes)
            self.buffers[self.guest.rings[RX_QUEUE].add([(gpa, self.buffer_bytes, True)])] = gpa
        self.guest.kick(RX_QUEUE)

    def send(self, content: bytes, *, cut: Sequence[int] = (), header: bytes = bytes(HEADER_BYTES)) -> None:
        """Put a frame into the transmit queue, cut into buffers at the offsets given (header included)."""
        data = header + content
        gpa = self.guest.memory.place(data)
        edges = [0, *cut, len(data)]
        ring = self.guest.rings[TX_QUEUE]
        ring.add([(gpa + a, b - a, False) for a, b in pairwise(edges)])
        self.guest.kick(TX_QUEUE)

    def sent(self, count: int) -> None:
        """Wait until so many frames are taken."""
        done: list[tuple[int, int]] = []

        def finished() -> bool:
            done.extend(self.guest.rings[TX_QUEUE].used())
            return len(done) >= count

        wait_until(finished)
        assert len(done) == count

    def received(self) -> list[bytes]:
        """Frames that have come since."""
        memory = self.guest.memory
        self._parts += self.guest.rings[RX_QUEUE].used()
        frames = []
        while self._parts:
            head = self._parts[0][0]
            header = memory.read(self.buffers[head], HEADER_BYTES)
            # Without merging vhost-net leaves the number as it is.
            count = struct.unpack_from("<H", header, 10)[0] if self.merge else 1
            assert 1 <= count <= len(self._parts), "a packet was seen in part"
            parts, self._parts = self._parts[:count], self._parts[count:]
            data = b"".join(memory.read(self.buffers[head], length) for head, length in parts)
            self.headers.append(header)
            frames.append(data[HEADER_BYTES:])
        return frames

    def receive(self, count: int) -> list[bytes]:
        """Wait for frames."""
        frames: list[bytes] = []

        def arrived() -> bool:
            frames.extend(self.received())
            return len(frames) >= count

        wait_until(arrived)
        return frames
