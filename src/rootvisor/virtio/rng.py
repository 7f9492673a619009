# SPDX-License-Identifier: Apache-2.0
"""Entropy device (virtio 1.2, section 5.4): one queue of buffers to fill with random bytes."""

from __future__ import annotations

import os

from .device import RING_FEATURES, VirtioDevice
from .registers import DEVICE_RNG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .queue import Chain, Queue

_QUEUE_SIZE = 8
# A device may fill less than it is offered; Linux asks for a few dozen bytes at a time.
_MAX_BYTES = 4096


class Rng(VirtioDevice):
    """Random bytes of the host's kernel."""

    device_type = DEVICE_RNG

    def __init__(self, *, name: str = "rng") -> None:
        super().__init__(name, RING_FEATURES, (_QUEUE_SIZE,))

    def handle_request(self, queue: Queue, chain: Chain) -> int:
        """Fill the buffers."""
        return chain.write(os.getrandom(min(chain.writable_bytes(), _MAX_BYTES)))
