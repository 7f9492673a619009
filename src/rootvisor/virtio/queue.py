# SPDX-License-Identifier: Apache-2.0
"""Virtqueues: what split and packed rings have in common (virtio 1.2, section 2.6)."""

from __future__ import annotations

import struct
from _thread import allocate_lock

from .registers import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, F_EVENT_IDX, F_INDIRECT_DESC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..pci.platform import GuestMemory

DESCRIPTOR_BYTES = 16
# address, length, flags, next (split ring) resp. address, length, id, flags (packed ring).
unpack_descriptor = struct.Struct("<QIHH").unpack_from

# An indirect table may be longer than its queue: Linux builds such tables, and so IOV_MAX is the limit here.
INDIRECT_LIMIT = 1024

_barrier = allocate_lock()


def full_barrier() -> None:
    """Order earlier stores before later loads.

    x86 keeps all other orders by itself; taking a free lock is a locked instruction there.
    """
    if _barrier.acquire(False):
        _barrier.release()


class QueueError(Exception):
    """The driver's ring is malformed. The device stops and asks for a reset."""


class QueueCounters:
    """What a queue has done since the device was made; kept over resets."""

    __slots__ = ("bytes", "completions", "interrupts", "kicks")

    def __init__(self) -> None:
        self.kicks = 0
        self.completions = 0
        self.interrupts = 0
        self.bytes = 0


class Chain:
    """One request: the driver's buffers, first those to read, then those to write, as views of guest RAM.

    `head` is what goes back to the driver, `slots` how many ring entries the chain takes (packed rings).
    """

    __slots__ = ("head", "readable", "slots", "writable")

    def __init__(self, head: int) -> None:
        self.head = head
        self.slots = 1
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []

    def readable_bytes(self) -> int:
        """How many bytes the driver gave."""
        return sum(map(len, self.readable))

    def writable_bytes(self) -> int:
        """How many bytes the driver has room for."""
        return sum(map(len, self.writable))

    def read(self, limit: int) -> bytes:
        """The first `limit` readable bytes, fewer when there are fewer."""
        if len(self.readable) == 1:
            return bytes(self.readable[0][:limit])
        data = bytearray()
        for view in self.readable:
            data += view[: limit - len(data)]
            if len(data) == limit:
                break
        return bytes(data)

    def write(self, data: bytes) -> int:
        """Fill the writable buffers from their start; returns how much of `data` fitted."""
        done = 0
        for view in self.writable:
            count = min(len(view), len(data) - done)
            view[:count] = data[done : done + count]
            done += count
            if done == len(data):
                break
        return done


class QueueAddresses:
    """Where the driver put a queue: size in entries and the three areas' guest physical addresses."""

    __slots__ = ("desc", "device", "driver", "size")

    def __init__(self, size: int, desc: int, driver: int, device: int) -> None:
        self.size = size
        self.desc = desc
        self.driver = driver
        self.device = device


class Queue:
    """An enabled virtqueue, device side. Used only with the device's lock held.

    `kick_fd` is the eventfd that the driver's notifications signal. While `dma` is off (bus mastering is disabled)
    the queue looks empty. `SplitQueue` and `PackedQueue` implement the ring.

    Raises `QueueError` when the areas are misaligned or outside guest RAM.
    """

    __slots__ = (
        "_buffer",
        "_event_idx",
        "_indirect",
        "_interrupt",
        "_view",
        "addresses",
        "call_fd",
        "counters",
        "dma",
        "index",
        "kick_fd",
        "size",
    )

    def __init__(
        self,
        memory: GuestMemory,
        index: int,
        addresses: QueueAddresses,
        features: int,
        *,
        kick_fd: int = -1,
        interrupt: Callable[[], None] | None = None,
        call_fd: Callable[[], int] | None = None,
        counters: QueueCounters | None = None,
    ) -> None:
        self.index = index
        self.size = addresses.size
        self.addresses = addresses
        self.kick_fd = kick_fd
        self.call_fd = call_fd
        self.counters = counters or QueueCounters()
        self.dma = True
        self._view = memory.view
        self._buffer: Callable[[int, int], memoryview] = memory.view
        self._interrupt = interrupt
        self._indirect = bool(features & F_INDIRECT_DESC)
        self._event_idx = bool(features & F_EVENT_IDX)
        self._lay_out()

    def _lay_out(self) -> None:
        """Find the ring's areas. Raises `QueueError`."""
        raise NotImplementedError

    def save(self) -> list[int]:
        """Where the ring stands, as `restore` takes it; no request may be popped and not pushed."""
        raise NotImplementedError

    def restore(self, position: Sequence[int]) -> None:
        """Go on where another queue with these areas was saved. Raises `ValueError`."""
        raise NotImplementedError

    def pop(self) -> Chain | None:
        """The next request, or `None`."""
        raise NotImplementedError

    def unpop(self, chain: Chain) -> None:
        """Give back the request popped last, untouched; it will be popped again."""
        raise NotImplementedError

    def push(self, chain: Chain, written: int) -> None:
        """Complete a request into whose writable buffers `written` bytes went. Call `notify` after a batch."""
        raise NotImplementedError

    def push_together(self, done: Sequence[tuple[Chain, int]]) -> None:
        """Complete requests, each with the bytes written, so that the driver sees all of them or none yet."""
        raise NotImplementedError

    def notify(self) -> None:
        """Interrupt the driver if it wants to hear of what was pushed since the last call."""
        if self._wants_interrupt():
            self.counters.interrupts += 1
            if self._interrupt is not None:
                self._interrupt()

    def idle(self) -> bool:
        """Whether the driver has got back everything that it gave, as far as memory tells."""
        raise NotImplementedError

    def quiet(self) -> None:
        """Ask the driver for no kicks: the device is looking anyway."""
        raise NotImplementedError

    def listen(self) -> bool:
        """Ask the driver for a kick with the next request; true when one is there already."""
        raise NotImplementedError

    def _wants_interrupt(self) -> bool:
        raise NotImplementedError

    def _position(self, saved: Sequence[int], limits: Sequence[int]) -> list[int]:
        """Saved numbers, each checked to be below its limit."""
        if len(saved) != len(limits) or not all(
            isinstance(number, int) and 0 <= number < limit
            for number, limit in zip(saved, limits, strict=True)
        ):
            raise ValueError(f"queue {self.index}: not a position in its ring: {saved!r}")
        return list(saved)

    def _area(self, name: str, gpa: int, length: int, alignment: int) -> memoryview:
        if gpa % alignment:
            raise QueueError(f"queue {self.index}: {name} at {gpa:#x} is not aligned to {alignment} bytes")
        try:
            return self._view(gpa, length)
        except ValueError as error:
            raise QueueError(f"queue {self.index}: {name} at {gpa:#x} is outside guest RAM") from error

    def observe(self, seen: Callable[[int, int], None]) -> None:
        """Have `seen` called with address and length of each buffer, for devices to which these are the data."""
        view = self._view

        def viewed(address: int, length: int) -> memoryview:
            found = view(address, length)
            seen(address, length)
            return found

        self._buffer = viewed

    def _append(self, chain: Chain, address: int, length: int, flags: int) -> None:
        """Add one buffer to a chain, readable ones first."""
        if not flags & DESC_WRITE:
            if chain.writable:
                raise QueueError(f"queue {self.index}: a readable buffer follows a writable one")
            if length:
                chain.readable.append(self._buffer(address, length))
        elif length:
            chain.writable.append(self._buffer(address, length))

    def _indirect_table(self, address: int, length: int, flags: int) -> memoryview:
        if not self._indirect or flags & DESC_NEXT:
            raise QueueError(f"queue {self.index}: indirect descriptor not negotiated or chained")
        if not length or length % DESCRIPTOR_BYTES or length > INDIRECT_LIMIT * DESCRIPTOR_BYTES:
            raise QueueError(f"queue {self.index}: indirect table of {length} bytes")
        return self._view(address, length)

    def _nested(self, flags: int) -> None:
        if flags & DESC_INDIRECT:
            raise QueueError(f"queue {self.index}: indirect descriptor inside an indirect table")

    def _bad_address(self, error: ValueError) -> QueueError:
        return QueueError(f"queue {self.index}: {error}")
