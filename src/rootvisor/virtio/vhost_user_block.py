# SPDX-License-Identifier: Apache-2.0
"""Block device (virtio 1.2, section 5.2) served by another process over vhost-user: qemu-storage-daemon."""

from __future__ import annotations

from .block import F_BLK_SIZE, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX, F_WRITE_ZEROES
from .registers import DEVICE_BLOCK
from .vhost_user import GET_QUEUE_NUM, PROTOCOL_F_MQ, VhostUserDevice, VhostUserError

F_SIZE_MAX = 1 << 1
F_GEOMETRY = 1 << 4
F_TOPOLOGY = 1 << 10
F_MQ = 1 << 12

# Not CONFIG_WCE: qemu-storage-daemon says "write through" there while it writes back, and a driver that believes it
# flushes nothing. Without that field FLUSH says that there is a cache.
_FEATURES = (
    F_SIZE_MAX
    | F_SEG_MAX
    | F_GEOMETRY
    | F_RO
    | F_BLK_SIZE
    | F_FLUSH
    | F_TOPOLOGY
    | F_DISCARD
    | F_WRITE_ZEROES
)
# struct virtio_blk_config up to the fields of write zeroes, and where the number of queues is in it.
_CONFIG_BYTES = 60
_NUM_QUEUES = 34
_QUEUE_SIZE = 256
MAX_QUEUES = 64


class VhostUserBlock(VhostUserDevice):
    """The device.

    Arguments:
        fd: socket connected to the backend, owned by the device from now on.
        queues: request queues; the backend must have been told of as many.

    Raises `ValueError` for a number of queues that cannot be, `VhostUserError` when the backend does not answer as it
    should or has fewer queues.
    """

    device_type = DEVICE_BLOCK
    drains = True

    def __init__(
        self, fd: int, queues: int = 1, *, name: str = "block", backend: str = "qemu-storage-daemon"
    ) -> None:
        if not 1 <= queues <= MAX_QUEUES:
            raise ValueError(f"a disk has 1 to {MAX_QUEUES} queues, not {queues}")
        super().__init__(
            name,
            fd,
            (_QUEUE_SIZE,) * queues,
            features=_FEATURES | (F_MQ if queues > 1 else 0),
            protocol_features=PROTOCOL_F_MQ,
            config_bytes=_CONFIG_BYTES,
            backend=backend,
        )
        try:
            offered = self.connection.query(GET_QUEUE_NUM) if self.protocol_features & PROTOCOL_F_MQ else 1
            if queues > offered:
                raise VhostUserError(f"{backend} serves {offered} queues, not {queues}")
        except VhostUserError:
            self.close()
            raise
        self._tell_queues()

    @property
    def size(self) -> int:
        """Capacity in bytes."""
        return int.from_bytes(self.config[:8], "little") * 512

    @property
    def readonly(self) -> bool:
        """Whether the backend refuses writes."""
        return bool(self.features & F_RO)

    def refresh_config(self) -> None:
        """The disk has another size, say."""
        super().refresh_config()
        self._tell_queues()

    def _tell_queues(self) -> None:
        number = len(self.queue_sizes).to_bytes(2, "little")
        self.config = self.config[:_NUM_QUEUES] + number + self.config[_NUM_QUEUES + 2 :]
