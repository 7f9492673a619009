# SPDX-License-Identifier: Apache-2.0
"""Memory balloon (virtio 1.2, section 5.5): the guest gives memory back to the host, and gets it again.

Queues: 0 pages for the balloon, 1 pages out of it, then, as far as negotiated, statistics and free pages. (Section
5.5.2 numbers these 2 and 4; Linux and every VMM count only the ones that are there.)
"""

from __future__ import annotations

import struct

from .device import RING_FEATURES, VirtioDevice
from .queue import QueueError
from .registers import DEVICE_BALLOON

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .queue import Chain, Queue

F_STATS_VQ = 1 << 1
F_DEFLATE_ON_OOM = 1 << 2
F_REPORTING = 1 << 5

PAGE = 4096
INFLATE_QUEUE, DEFLATE_QUEUE = 0, 1
_QUEUE_SIZE = 128
_CONFIG = struct.Struct("<IIII")  # pages wanted, pages held, free page hint command, poison value
_ACTUAL = 4
_STATISTIC = struct.Struct("<HQ")
# A request of Linux names 256 pages; more than this is nobody's.
_MAX_PAGES = 1 << 16
_MAX_STATISTICS = 64

# VIRTIO_BALLOON_S_*.
STATISTICS = (
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kill",
    "allocation_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
)


class Balloon(VirtioDevice):
    """The device.

    Arguments:
        size: bytes that the balloon shall hold at first.
        give_back: called with (guest physical address, bytes): whole pages inside one region of RAM, which the guest
            does not use. What is there may go; it reads as zeroes, or as it was. On the device's thread.
        deflate_on_oom: whether the guest may take pages out by itself rather than kill a process.
        reporting: whether the guest tells of free pages all the time, without being asked for them.
        statistics: whether `request_statistics` works.
    """

    device_type = DEVICE_BALLOON

    def __init__(
        self,
        size: int,
        give_back: Callable[[int, int], None],
        *,
        deflate_on_oom: bool = True,
        reporting: bool = True,
        statistics: bool = True,
        name: str = "balloon",
    ) -> None:
        features = RING_FEATURES | (F_DEFLATE_ON_OOM if deflate_on_oom else 0)
        features |= (F_REPORTING if reporting else 0) | (F_STATS_VQ if statistics else 0)
        super().__init__(name, features, (_QUEUE_SIZE,) * (2 + reporting + statistics))
        self.vectors = 2
        self._give_back = give_back
        self._wanted = _pages(size)
        self._actual = 0
        self._reported: list[tuple[int, int]] = []
        self._statistics: dict[str, int] = {}
        self._statistics_asked = False
        self._statistics_chain: Chain | None = None
        self._on_statistics: Callable[[dict[str, int]], None] | None = None
        self._set_config()

    @property
    def size(self) -> int:
        """Bytes that the balloon shall hold."""
        return self._wanted * PAGE

    @property
    def actual(self) -> int:
        """Bytes that it holds, as the driver says."""
        return self._actual * PAGE

    @property
    def statistics(self) -> dict[str, int]:
        """What the driver told last, by the names in `STATISTICS`; memory in bytes."""
        return dict(self._statistics)

    def resize(self, size: int) -> None:
        """Ask the driver for a balloon of `size` bytes. From any thread. Raises `ValueError`."""
        with self.lock:
            self._wanted = _pages(size)
            self._set_config()
            self.config_changed()

    def request_statistics(self, told: Callable[[dict[str, int]], None] | None = None) -> None:
        """Ask the driver how its memory is used; `told` is called on the device's thread when it answers.

        From any thread.
        """
        with self.lock:
            self._on_statistics = told
            self._statistics_asked = True
            queue = self._statistics_queue()
            chain, self._statistics_chain = self._statistics_chain, None
            if queue is not None and chain is not None:
                queue.push(chain, 0)
                queue.notify()

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The driver tells how many pages the balloon holds."""
        if offset == _ACTUAL and size == 4:
            self._actual = value
            self._set_config()

    def start_queue(self, queue: Queue) -> None:
        """Serve a queue; the one of free pages is about addresses, not contents."""
        if queue.index == _index(self.driver_features, F_REPORTING):
            queue.observe(self._report)
        super().start_queue(queue)

    def stop_queue(self, queue: Queue) -> None:
        """A request that waits goes with its queue."""
        super().stop_queue(queue)
        if queue is self._statistics_queue() or queue.index == _index(self.driver_features, F_STATS_VQ):
            self._statistics_chain = None

    def reset(self) -> None:
        """A new driver has no page in the balloon yet."""
        super().reset()
        self._statistics_chain = None
        self._statistics_asked = False
        self._reported.clear()
        self._actual = 0
        self._set_config()

    def set_dma(self, enabled: bool) -> None:
        """The request that waits for the next question waits in its queue."""
        if not enabled:
            queue = self._statistics_queue()
            chain, self._statistics_chain = self._statistics_chain, None
            if queue is not None and chain is not None:
                queue.unpop(chain)
        super().set_dma(enabled)

    def save(self) -> dict[str, object]:
        """Sizes."""
        return {"wanted": self._wanted, "actual": self._actual}

    def restore(self, state: dict[str, Any]) -> None:
        """As saved."""
        self._wanted, self._actual = _pages(state["wanted"] * PAGE), int(state["actual"]) & 0xFFFFFFFF
        self._set_config()

    def handle_queue(self, queue: Queue) -> None:
        """Statistics are the one request that is not answered at once."""
        if queue is self._statistics_queue():
            self._read_statistics(queue)
        else:
            super().handle_queue(queue)

    def handle_request(self, queue: Queue, chain: Chain) -> int:
        """Pages come, go, or are free."""
        if queue.index == INFLATE_QUEUE:
            self._inflate(queue, chain)
        elif queue.index == _index(self.driver_features, F_REPORTING):
            reported, self._reported = self._reported, []
            for address, length in reported:
                # The driver tells of whole pages; of others nothing can be given back.
                if not address % PAGE and not length % PAGE:
                    self._return(queue, address, length)
        return 0

    def _inflate(self, queue: Queue, chain: Chain) -> None:
        size = chain.readable_bytes()
        if size > 4 * _MAX_PAGES:
            raise QueueError(f"queue {queue.index}: {size // 4} pages in one request")
        data = chain.read(size)
        numbers = sorted(set(memoryview(data[: size & ~3]).cast("I")))
        start = end = -1
        for number in numbers:
            if number != end:
                self._return(queue, start * PAGE, (end - start) * PAGE)
                start = number
            end = number + 1
        self._return(queue, start * PAGE, (end - start) * PAGE)

    def _return(self, queue: Queue, address: int, length: int) -> None:
        """Give back what is RAM of a range, one region after another."""
        if not length:
            return
        assert self.memory is not None
        for region in self.memory.regions:
            first, last = max(address, region.gpa), min(address + length, region.gpa + region.size)
            if first < last:
                queue.counters.bytes += last - first
                self._give_back(first, last - first)

    def _report(self, address: int, length: int) -> None:
        self._reported.append((address, length))

    def _statistics_queue(self) -> Queue | None:
        index = _index(self.driver_features, F_STATS_VQ)
        return self.queues[index] if index >= 0 else None

    def _read_statistics(self, queue: Queue) -> None:
        """The driver gives one request; it comes back with every question and returns with the answer."""
        while True:
            queue.quiet()
            while (chain := queue.pop()) is not None:
                if self._statistics_chain is not None:
                    queue.push(self._statistics_chain, 0)
                self._statistics_chain = chain
                self._take_statistics(chain)
            more = queue.listen()
            queue.notify()
            if not more:
                return

    def _take_statistics(self, chain: Chain) -> None:
        data = chain.read(_STATISTIC.size * _MAX_STATISTICS)
        usable = len(data) - len(data) % _STATISTIC.size
        found = {
            STATISTICS[tag]: value
            for tag, value in _STATISTIC.iter_unpack(data[:usable])
            if tag < len(STATISTICS)
        }
        if found or not self._statistics_asked:
            self._statistics = found
        if self._statistics_asked:
            self._statistics_asked = False
            told, self._on_statistics = self._on_statistics, None
            if told is not None:
                told(dict(found))

    def _set_config(self) -> None:
        self.config = _CONFIG.pack(self._wanted, self._actual, 0, 0)


def _index(features: int, feature: int) -> int:
    """The queue that a feature brings, -1 without it."""
    if not features & feature:
        return -1
    return 2 + bool(feature == F_REPORTING and features & F_STATS_VQ)


def _pages(size: int) -> int:
    pages = size // PAGE
    if not 0 <= pages <= 0xFFFFFFFF:
        raise ValueError(f"a balloon cannot have {size} bytes")
    return pages
