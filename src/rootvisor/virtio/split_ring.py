# SPDX-License-Identifier: Apache-2.0
"""Split virtqueues (virtio 1.2, section 2.7).

Areas: descriptors (16 bytes each); driver area `flags, idx, ring[size], used_event` of 16-bit words; device area
`flags, idx` of 16-bit words, `(id, length)[size]` of 32-bit words, `avail_event`.
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

_NO_INTERRUPT = 1  # driver area flags
_NO_NOTIFY = 1  # device area flags


class SplitQueue(Queue):
    """The split ring format."""

    __slots__ = ("_avail", "_desc", "_mask", "_next", "_signalled", "_used", "_used16", "_used_index")

    def _lay_out(self) -> None:
        index, addresses = self.index, self.addresses
        size = self.size
        if not size or size & size - 1:
            raise QueueError(f"queue {index}: a split ring of {size} entries")
        self._mask = size - 1
        self._desc = self._area("descriptor table", addresses.desc, DESCRIPTOR_BYTES * size, 16)
        self._avail = self._area("driver area", addresses.driver, 6 + 2 * size, 2).cast("H")
        used = self._area("device area", addresses.device, 6 + 8 * size, 4)
        self._used16 = used.cast("H")
        self._used = used[: 4 + 8 * size].cast("I")
        self._next = 0
        self._used_index = 0
        self._signalled = 0

    def save(self) -> list[int]:
        """The next available index, the next used index, and the one that the driver was last told of."""
        return [self._next, self._used_index, self._signalled]

    def restore(self, position: Sequence[int]) -> None:
        """As saved."""
        self._next, self._used_index, self._signalled = self._position(position, (0x10000,) * 3)

    def idle(self) -> bool:
        """Used and available index agree."""
        return self._avail[1] == self._used16[1]

    def pop(self) -> Chain | None:
        """The next request of the available ring, or `None`."""
        avail = self._avail
        following = self._next
        waiting = avail[1] - following & 0xFFFF
        if not waiting or not self.dma:
            return None
        if waiting > self.size:
            raise QueueError(f"queue {self.index}: available index jumps by {waiting}")
        head = avail[2 + (following & self._mask)]
        chain = Chain(head)
        try:
            address, length, flags, _ = unpack_descriptor(self._desc, (head & self._mask) * DESCRIPTOR_BYTES)
            if flags == DESC_WRITE and length and head < self.size:  # all that receive queues have
                chain.writable.append(self._buffer(address, length))
            else:
                self._walk(chain, head)
        except ValueError as error:
            raise self._bad_address(error) from error
        self._next = following + 1 & 0xFFFF
        return chain

    def unpop(self, chain: Chain) -> None:
        """Give back the request popped last."""
        self._next = self._next - 1 & 0xFFFF

    def push(self, chain: Chain, written: int) -> None:
        """Complete a request."""
        index = self._used_index
        slot = 1 + 2 * (index & self._mask)
        self._used[slot] = chain.head
        self._used[slot + 1] = written
        # The entry is in place before the index that publishes it: x86 keeps the order of stores.
        self._used_index = index = index + 1 & 0xFFFF
        self._used16[1] = index
        counters = self.counters
        counters.completions += 1
        counters.bytes += written

    def push_together(self, done: Sequence[tuple[Chain, int]]) -> None:
        """Complete requests; one store of the index publishes them all."""
        index, used, mask = self._used_index, self._used, self._mask
        total = 0
        for chain, written in done:
            slot = 1 + 2 * (index & mask)
            used[slot] = chain.head
            used[slot + 1] = written
            total += written
            index += 1
        self._used_index = index = index & 0xFFFF
        self._used16[1] = index
        counters = self.counters
        counters.completions += len(done)
        counters.bytes += total

    def quiet(self) -> None:
        """Ask for no kicks."""
        if not self._event_idx:
            self._used16[0] = _NO_NOTIFY

    def listen(self) -> bool:
        """Ask for a kick; true when a request is there already."""
        if self._event_idx:
            self._used16[2 + 4 * self.size] = self._next
        else:
            self._used16[0] = 0
        full_barrier()
        return self._avail[1] != self._next and self.dma

    def _wants_interrupt(self) -> bool:
        new, old = self._used_index, self._signalled
        if new == old:
            return False
        self._signalled = new
        full_barrier()
        if not self._event_idx:
            return not self._avail[0] & _NO_INTERRUPT
        event = self._avail[2 + self.size]
        return (new - event - 1 & 0xFFFF) < (new - old & 0xFFFF)

    def _walk(self, chain: Chain, index: int) -> None:
        size = self.size
        for _ in range(size):
            if index >= size:
                raise QueueError(f"queue {self.index}: descriptor {index} of {size}")
            address, length, flags, following = unpack_descriptor(self._desc, index * DESCRIPTOR_BYTES)
            if flags & DESC_INDIRECT:
                self._walk_indirect(chain, self._indirect_table(address, length, flags))
                return
            self._append(chain, address, length, flags)
            if not flags & DESC_NEXT:
                return
            index = following
        raise QueueError(f"queue {self.index}: the descriptors form a loop")

    def _walk_indirect(self, chain: Chain, table: memoryview) -> None:
        count = len(table) // DESCRIPTOR_BYTES
        index = 0
        for _ in range(count):
            if index >= count:
                raise QueueError(f"queue {self.index}: indirect descriptor {index} of {count}")
            address, length, flags, following = unpack_descriptor(table, index * DESCRIPTOR_BYTES)
            if flags & DESC_INDIRECT:
                self._nested(flags)
            self._append(chain, address, length, flags)
            if not flags & DESC_NEXT:
                return
            index = following
        raise QueueError(f"queue {self.index}: the indirect descriptors form a loop")
