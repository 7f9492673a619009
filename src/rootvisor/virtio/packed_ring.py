# SPDX-License-Identifier: Apache-2.0
"""Packed virtqueues (virtio 1.2, section 2.8).

Areas: the descriptor ring (16 bytes each, used and available entries in the same place); driver and device area are
event suppression structures of two 16-bit words: `offset and wrap counter, flags`.
"""

from __future__ import annotations

from .queue import (
    DESCRIPTOR_BYTES,
    Chain,
    Queue,
    QueueError,
    full_barrier,
    unpack_descriptor,
)
from .registers import DESC_INDIRECT, DESC_NEXT, DESC_WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_AVAILABLE = 1 << 7
_USED = 1 << 15

_KIND = DESC_NEXT | DESC_WRITE | DESC_INDIRECT

# Event suppression flags (2.8.10).
_EVENTS_ALL = 0
_EVENTS_NONE = 1
_EVENTS_AT_DESCRIPTOR = 2


class PackedQueue(Queue):
    """The packed ring format."""

    __slots__ = (
        "_desc",
        "_desc16",
        "_desc32",
        "_device_event",
        "_driver_event",
        "_next",
        "_unsignalled",
        "_used_next",
        "_used_wrap",
        "_wrap",
    )

    def _lay_out(self) -> None:
        index, addresses = self.index, self.addresses
        if not 0 < self.size <= 32768:
            raise QueueError(f"queue {index}: a packed ring of {self.size} entries")
        self._desc = self._area("descriptor ring", addresses.desc, DESCRIPTOR_BYTES * self.size, 16)
        self._desc16 = self._desc.cast("H")
        self._desc32 = self._desc.cast("I")
        self._driver_event = self._area("driver area", addresses.driver, 4, 4).cast("H")
        self._device_event = self._area("device area", addresses.device, 4, 4).cast("H")
        self._next = 0
        self._wrap = True
        self._used_next = 0
        self._used_wrap = True
        self._unsignalled = 0

    def save(self) -> list[int]:
        """The next available entry and its wrap counter, the next used one and its, and entries not told of yet."""
        return [self._next, int(self._wrap), self._used_next, int(self._used_wrap), self._unsignalled]

    def restore(self, position: Sequence[int]) -> None:
        """As saved."""
        limits = (self.size, 2, self.size, 2, self.size + 1)
        self._next, wrap, self._used_next, used_wrap, self._unsignalled = self._position(position, limits)
        self._wrap, self._used_wrap = bool(wrap), bool(used_wrap)

    def idle(self) -> bool:
        """The entry at which a backend would go on is not available; entries in its hands cannot be seen from here."""
        return True

    def pop(self) -> Chain | None:
        """The next request of the descriptor ring, or `None`."""
        if not self.dma or not self._available():
            return None
        address, length, buffer_id, flags = unpack_descriptor(self._desc, self._next * DESCRIPTOR_BYTES)
        chain = Chain(buffer_id)
        try:
            if flags & _KIND == DESC_WRITE and length:  # all that receive queues have
                chain.writable.append(self._buffer(address, length))
            else:
                self._walk(chain)
        except ValueError as error:
            raise self._bad_address(error) from error
        following = self._next + chain.slots
        if following >= self.size:
            following -= self.size
            self._wrap = not self._wrap
        self._next = following
        return chain

    def unpop(self, chain: Chain) -> None:
        """Give back the request popped last."""
        preceding = self._next - chain.slots
        if preceding < 0:
            preceding += self.size
            self._wrap = not self._wrap
        self._next = preceding

    def push(self, chain: Chain, written: int) -> None:
        """Complete a request."""
        index = self._used_next
        self._desc32[4 * index + 2] = written
        self._desc16[8 * index + 6] = chain.head
        flags = _AVAILABLE | _USED if self._used_wrap else 0
        # The flags publish the entry: x86 keeps the order of stores.
        self._desc16[8 * index + 7] = flags | DESC_WRITE if written else flags
        index += chain.slots
        if index >= self.size:
            index -= self.size
            self._used_wrap = not self._used_wrap
        self._used_next = index
        self._unsignalled += chain.slots
        counters = self.counters
        counters.completions += 1
        counters.bytes += written

    def push_together(self, done: Sequence[tuple[Chain, int]]) -> None:
        """Complete requests; the first one's flags, which publish them all, are stored last."""
        first = flags_of_first = -1
        desc16, desc32 = self._desc16, self._desc32
        index, wrap = self._used_next, self._used_wrap
        total = 0
        for chain, written in done:
            desc32[4 * index + 2] = written
            desc16[8 * index + 6] = chain.head
            flags = (_AVAILABLE | _USED if wrap else 0) | (DESC_WRITE if written else 0)
            if first < 0:
                first, flags_of_first = index, flags
            else:
                desc16[8 * index + 7] = flags
            total += written
            self._unsignalled += chain.slots
            index += chain.slots
            if index >= self.size:
                index -= self.size
                wrap = not wrap
        self._used_next, self._used_wrap = index, wrap
        if first >= 0:
            desc16[8 * first + 7] = flags_of_first
        counters = self.counters
        counters.completions += len(done)
        counters.bytes += total

    def quiet(self) -> None:
        """Ask for no kicks."""
        self._device_event[1] = _EVENTS_NONE

    def listen(self) -> bool:
        """Ask for a kick; true when a request is there already."""
        if self._event_idx:
            self._device_event[0] = self._next | self._wrap << 15
            self._device_event[1] = _EVENTS_AT_DESCRIPTOR
        else:
            self._device_event[1] = _EVENTS_ALL
        full_barrier()
        return self._available() and self.dma

    def _available(self) -> bool:
        flags = self._desc16[8 * self._next + 7]
        return bool(flags & _AVAILABLE) == self._wrap and bool(flags & _USED) != self._wrap

    def _wants_interrupt(self) -> bool:
        added = self._unsignalled
        if not added:
            return False
        self._unsignalled = 0
        full_barrier()
        flags = self._driver_event[1] & 3
        if flags == _EVENTS_NONE:
            return False
        if flags != _EVENTS_AT_DESCRIPTOR or not self._event_idx:
            return True
        offset = self._driver_event[0]
        event = offset & 0x7FFF
        if bool(offset >> 15) != self._used_wrap:
            event -= self.size
        new = self._used_next
        return (new - event - 1 & 0xFFFF) < (added & 0xFFFF)

    def _walk(self, chain: Chain) -> None:
        size, index = self.size, self._next
        for slots in range(1, size + 1):
            address, length, buffer_id, flags = unpack_descriptor(self._desc, index * DESCRIPTOR_BYTES)
            chain.head = buffer_id
            chain.slots = slots
            if flags & DESC_INDIRECT:
                if slots > 1:
                    raise QueueError(f"queue {self.index}: indirect descriptor inside a chain")
                self._walk_indirect(chain, self._indirect_table(address, length, flags))
                return
            self._append(chain, address, length, flags)
            if not flags & DESC_NEXT:
                return
            index = index + 1 if index + 1 < size else 0
        raise QueueError(f"queue {self.index}: a chain longer than the ring")

    def _walk_indirect(self, chain: Chain, table: memoryview) -> None:
        for offset in range(0, len(table), DESCRIPTOR_BYTES):
            address, length, _, flags = unpack_descriptor(table, offset)
            if flags & DESC_INDIRECT:
                self._nested(flags)
            self._append(chain, address, length, flags)
