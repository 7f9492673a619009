# SPDX-License-Identifier: Apache-2.0
"""Devices whose rings somebody else serves: the kernel (`vhost_kernel`) or another process (`vhost_user`).

The kick eventfd is signalled by the platform (ioeventfd) and the call eventfd raises the interrupt there, so that no
request passes through Python.
"""

from __future__ import annotations

import os
import time

from .device import VirtioDevice
from .registers import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .queue import Queue

# What a backend may offer about rings. Its other bits there are not the driver's business: logging of dirty pages, or
# addresses behind an IOMMU. A reset of a single queue is not in these protocols.
RING_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_RING_PACKED

_DRAIN_SECONDS = 10
_DRAIN_STEP = 0.0005

# "Descriptor 0, wrap counter 1", for the available and the used side of a packed ring.
_PACKED_START = 0x8000_8000


class VhostError(Exception):
    """The backend cannot be used or is gone; one line that says in what it failed."""


class VhostDevice(VirtioDevice):
    """What the two kinds of backends have in common: when which ring runs, and from where it goes on.

    Arguments:
        rings: how many queues, from 0 on, are the backend's (default all); the others come to `handle_queue`.

    `drains`: every request is answered soon, and the backend may go on with it after it gave its ring back.
    """

    drains = False

    def __init__(
        self, name: str, features: int, queue_sizes: Sequence[int], *, rings: int | None = None
    ) -> None:
        self._rings = len(queue_sizes) if rings is None else rings
        super().__init__(name, features, queue_sizes)
        self._running: set[int] = set()
        self._bases: dict[int, int] = {}
        self._failing = False

    # What a backend provides. All of these raise `VhostError`.

    def set_up(self, features: int) -> None:
        """DRIVER_OK: the negotiated features and guest RAM."""
        raise NotImplementedError

    def start_ring(self, queue: Queue, base: int) -> None:
        """Serve `queue` from `base` on, as `stop_ring` returned it."""
        raise NotImplementedError

    def stop_ring(self, index: int) -> int:
        """Leave the ring alone, at once; returns where it can go on."""
        raise NotImplementedError

    # Life of a device.

    def serves(self, index: int) -> bool:
        """The queues behind the backend's."""
        return index >= self._rings

    def activate(self, queues: Sequence[Queue | None], features: int) -> None:
        """Give memory and rings to the backend."""
        try:
            self.set_up(features)
        except VhostError as error:
            self.lost(str(error))
            return
        super().activate(queues, features)

    def start_queue(self, queue: Queue) -> None:
        """Have the backend serve a ring."""
        super().start_queue(queue)
        if queue.dma:
            self._start(queue)

    def stop_queue(self, queue: Queue) -> None:
        """Have the backend leave a ring alone; it has done so when this returns, unless it is gone."""
        super().stop_queue(queue)
        self._stop(queue.index)
        self._bases.pop(queue.index, None)

    def reset(self) -> None:
        """Forget the rings' positions, too."""
        super().reset()
        self._bases.clear()

    def set_dma(self, enabled: bool) -> None:
        """Bus mastering went on or off: the backend stops where it is, and goes on from there."""
        super().set_dma(enabled)
        for queue in self.queues:
            if queue is None:
                continue
            if enabled:
                self._start(queue)
            else:
                self._stop(queue.index)

    def pause(self) -> None:
        """Wait for requests under way, where the backend goes on with them after its ring has been stopped.

        Raises `VhostError` when they do not end.
        """
        if not self.drains:
            return
        waiting = [queue for queue in self.queues if queue is not None and queue.index in self._running]
        for queue in waiting:
            # The driver may have been stopped between its request and its kick.
            os.eventfd_write(queue.kick_fd, 1)
        deadline = time.monotonic() + _DRAIN_SECONDS
        while not all(queue.idle() for queue in waiting):
            if self.ended():
                return
            if time.monotonic() > deadline:
                raise VhostError(
                    f"{self.name}: requests are under way for more than {_DRAIN_SECONDS} seconds"
                )
            time.sleep(_DRAIN_STEP)

    def ended(self) -> bool:
        """Whether the backend is gone."""
        return False

    def save_ring(self, queue: Queue) -> list[int]:
        """Where the backend stopped; nothing for a ring that never ran."""
        if self.serves(queue.index):
            return super().save_ring(queue)
        return [self._bases[queue.index]] if queue.index in self._bases else []

    def has_served(self) -> bool:
        """Whether the driver has given the backend anything to do since it took the device into use; while paused."""
        return any(base != self._initial_base for base in self._bases.values())

    @property
    def _initial_base(self) -> int:
        return _PACKED_START if self.driver_features & F_RING_PACKED else 0

    def restore_ring(self, queue: Queue, position: list[int]) -> None:
        """Where the backend will start."""
        if self.serves(queue.index):
            super().restore_ring(queue, position)
        elif position:
            if len(position) != 1 or not isinstance(position[0], int) or not 0 <= position[0] < 1 << 32:
                raise ValueError(f"queue {queue.index}: not a position of a backend: {position!r}")
            self._bases[queue.index] = position[0]

    def handle_queue(self, queue: Queue) -> None:
        """Nothing: kicks go to the backend."""

    def lost(self, reason: str) -> None:
        """The backend failed: so does the device."""
        if not self._failing:
            self._failing = True
            self.fail(reason)
            self._failing = False

    def _start(self, queue: Queue) -> None:
        index = queue.index
        if index >= self._rings or index in self._running:
            return
        self._running.add(index)
        try:
            self.start_ring(queue, self._bases.get(index, self._initial_base))
            if index in self._bases:
                # A kick may have been lost while nobody listened.
                os.eventfd_write(queue.kick_fd, 1)
        except VhostError as error:
            self.lost(str(error))

    def _stop(self, index: int) -> None:
        if index not in self._running:
            return
        self._running.discard(index)
        try:
            self._bases[index] = self.stop_ring(index)
        except VhostError as error:
            self.lost(str(error))
