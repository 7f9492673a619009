# SPDX-License-Identifier: Apache-2.0
"""What every virtio device is: type, features, queues, configuration bytes, one worker thread."""

from __future__ import annotations

import os
import select

from .queue import Chain, Queue, QueueCounters, QueueError
from .registers import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_RING_RESET, F_VERSION_1
from .worker import Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..pci.platform import GuestMemory

# What the library does for every device whose rings it serves itself.
RING_FEATURES = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_RING_PACKED | F_RING_RESET

# In a long run of requests the driver hears of the first ones before the last is done.
_REQUESTS_PER_INTERRUPT = 16


class VirtioDevice:
    """Base of all devices. Subclasses fill the attributes in and override `handle_queue`.

    Every method is called with `lock` held, except `read_config` (which must be quick and need no lock) and `close`.

    Attributes:
        name: for threads, messages and statistics.
        device_type: section 5 of the specification.
        features: everything offered, as a mask.
        queue_sizes: maximum entries per queue, powers of two.
        vectors: MSI-X vectors worth having; with fewer than queues + 1 Linux shares one among all queues, which
            saves the guest the set-up of the others.
        config: the device configuration structure as it reads now.
        memory: guest RAM, once the device sits behind a transport.
        on_failure: called with a reason when the device asked for a reset.
    """

    name = "virtio"
    device_type = 0

    def __init__(self, name: str, features: int, queue_sizes: Sequence[int]) -> None:
        self.name = name
        self.features = features
        self.queue_sizes = tuple(queue_sizes)
        self.vectors = len(self.queue_sizes) + 1
        self.config = b""
        self.memory: GuestMemory | None = None
        self.on_failure: Callable[[str], None] | None = None
        self.counters = tuple(QueueCounters() for _ in self.queue_sizes)
        self.driver_features = 0
        self.queues: list[Queue | None] = [None] * len(self.queue_sizes)
        self.active = False
        self.worker = Worker(name, self._defect)
        self.lock = self.worker.lock
        # Set by the transport.
        self.config_changed: Callable[[], None] = _nothing
        self.request_reset: Callable[[], None] = _nothing

    def serves(self, index: int) -> bool:
        """Whether requests of queue `index` come to `handle_queue`; another process or the kernel may serve it."""
        return True

    def accepts(self, features: int) -> bool:
        """Whether the device works with this subset of its features (FEATURES_OK)."""
        return True

    def read_config(self, offset: int, size: int) -> int:
        """Driver's read of the configuration structure; zeros behind its end."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Driver's write of the configuration structure."""

    def activate(self, queues: Sequence[Queue | None], features: int) -> None:
        """DRIVER_OK: serve the enabled queues with the negotiated features."""
        self.driver_features = features
        self.active = True
        self.worker.start()
        for queue in queues:
            # A queue that cannot be started may have ended it all.
            if queue is not None and self.active:
                self.start_queue(queue)

    def start_queue(self, queue: Queue) -> None:
        """Serve one more queue (enabled at DRIVER_OK or after a queue reset)."""
        self.queues[queue.index] = queue
        if self.serves(queue.index):
            self.worker.watch(queue.kick_fd, select.POLLIN, lambda events: self._kicked(queue))
            # Requests may have been made available before anyone watched.
            os.eventfd_write(queue.kick_fd, 1)

    def stop_queue(self, queue: Queue) -> None:
        """Forget a queue; after return no request of it is touched."""
        self.queues[queue.index] = None
        if self.serves(queue.index):
            self.worker.unwatch(queue.kick_fd)

    def reset(self) -> None:
        """Forget every queue and all that the driver said; after return no guest memory is touched."""
        self.active = False
        for queue in self.queues:
            if queue is not None:
                self.stop_queue(queue)

    def set_dma(self, enabled: bool) -> None:
        """Bus mastering went on or off: off, no queue gives requests."""
        for queue in self.queues:
            if queue is not None:
                queue.dma = enabled
                if enabled and self.serves(queue.index):
                    os.eventfd_write(queue.kick_fd, 1)

    def pause(self) -> None:
        """Come to an end with requests under way, before the transport takes the rings away (`set_dma`)."""

    def save(self) -> dict[str, object]:
        """The device's own state besides its rings, as plain data; while paused."""
        return {}

    def restore(self, state: dict[str, object]) -> None:
        """Take saved state, before `activate`. Raises `ValueError`."""

    def save_ring(self, queue: Queue) -> list[int]:
        """Where a ring stands; while paused."""
        return queue.save()

    def restore_ring(self, queue: Queue, position: list[int]) -> None:
        """Where a ring goes on, before `activate`. Raises `ValueError`."""
        queue.restore(position)

    def handle_queue(self, queue: Queue) -> None:
        """The driver kicked `queue`. The default takes every request to `handle_request`."""
        while True:
            queue.quiet()
            done = 0
            while (chain := queue.pop()) is not None:
                queue.push(chain, self.handle_request(queue, chain))
                done += 1
                if done % _REQUESTS_PER_INTERRUPT == 0:
                    queue.notify()
            more = queue.listen()
            queue.notify()
            if not more:
                return

    def handle_request(self, queue: Queue, chain: Chain) -> int:
        """Serve one request; returns the number of bytes written into its buffers."""
        raise NotImplementedError

    def fail(self, reason: str) -> None:
        """Stop, and tell the driver that only a reset helps."""
        self.reset()
        self.request_reset()
        if self.on_failure is not None:
            self.on_failure(f"{self.name}: {reason}")

    def close(self) -> None:
        """End the worker and let go of host resources. The device is of no use any more."""
        with self.lock:
            self.reset()
        self.worker.stop()

    def _kicked(self, queue: Queue) -> None:
        try:
            kicks = os.eventfd_read(queue.kick_fd)
        except BlockingIOError:
            return
        if self.queues[queue.index] is not queue:
            return
        queue.counters.kicks += kicks
        try:
            self.handle_queue(queue)
        except QueueError as error:
            self.fail(str(error))

    def _defect(self, error: Exception) -> None:
        if isinstance(error, QueueError):  # met while something of the host's was ready
            self.fail(str(error))
            return
        self.fail(f"internal error: {type(error).__name__}: {error}")


def _nothing() -> None:
    """What a device without a transport calls."""
