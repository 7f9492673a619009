# SPDX-License-Identifier: Apache-2.0
"""Socket device (virtio 1.2, section 5.10), served by the kernel's vhost-vsock.

Queues: 0 and 1 packets to and from the guest, which the kernel moves; 2 events, of which there is one: after a restore
every connection is gone.
"""

from __future__ import annotations

import errno
import struct

from .registers import DEVICE_VSOCK
from .vhost_kernel import (
    VSOCK_SET_GUEST_CID,
    VSOCK_SET_RUNNING,
    VhostKernelDevice,
    VhostKernelError,
    open_vhost,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .queue import Queue

DEVICE = "/dev/vhost-vsock"
# 0 to 2 are hypervisor, local and host; the last one means "any" (5.10.4).
FIRST_CID = 3
LAST_CID = 0xFFFF_FFFE

F_SEQPACKET = 1 << 1

_QUEUE_SIZE = 256
_EVENT_QUEUE_SIZE = 16
_EVENT_QUEUE = 2
_PACKET_QUEUES = (0, 1)
_EVENT_TRANSPORT_RESET = bytes(4)


def open_vhost_vsock() -> int:
    """A descriptor for `Vsock`. Raises `VhostKernelError`: what is missing, and what mends it."""
    return open_vhost(DEVICE, "vhost_vsock")


class Vsock(VhostKernelDevice):
    """The device.

    Arguments:
        cid: the guest's address, 3 to 0xFFFFFFFE; nobody else on this host may have it.
        fd: /dev/vhost-vsock, owned by the device from now on (`open_vhost_vsock`).

    Raises `ValueError` for a cid that no guest can have, `VhostKernelError` when the kernel refuses.
    """

    device_type = DEVICE_VSOCK

    def __init__(self, cid: int, fd: int, *, name: str = "vsock") -> None:
        if not FIRST_CID <= cid <= LAST_CID:
            raise ValueError(f"a guest's cid is {FIRST_CID} to {LAST_CID}, not {cid}")
        super().__init__(
            name,
            fd,
            (_QUEUE_SIZE, _QUEUE_SIZE, _EVENT_QUEUE_SIZE),
            backend="vhost-vsock",
            features=F_SEQPACKET,
            rings=len(_PACKET_QUEUES),
        )
        self.config = struct.pack("<Q", cid)
        self._serving = False
        self._tell_reset = False
        try:
            self.vhost.set_u64(VSOCK_SET_GUEST_CID, cid)
        except VhostKernelError as error:
            self.close()
            if error.errno == errno.EADDRINUSE:
                raise VhostKernelError(f"another guest has cid {cid}; choose another one") from error
            raise

    def start_ring(self, queue: Queue, base: int) -> None:
        """The kernel serves both packet queues or none."""
        super().start_ring(queue, base)
        if self._running.issuperset(_PACKET_QUEUES) and not self._serving:
            self._run(True)

    def stop_ring(self, index: int) -> int:
        """Both queues stop when the first one has to."""
        if self._serving:
            self._run(False)
        return super().stop_ring(index)

    def restore(self, state: dict[str, object]) -> None:
        """The kernel knows nothing of connections that there were: the driver hears that all are gone (5.10.6.6.1)."""
        self._tell_reset = True

    def handle_queue(self, queue: Queue) -> None:
        """Buffers for events wait in the queue until there is one."""
        if queue.index != _EVENT_QUEUE or not self._tell_reset:
            return
        chain = queue.pop()
        if chain is None:
            queue.listen()
            return
        queue.push(chain, chain.write(_EVENT_TRANSPORT_RESET))
        self._tell_reset = False
        queue.notify()

    def reset(self) -> None:
        """A new driver has no connection yet."""
        super().reset()
        self._tell_reset = False

    def _run(self, running: bool) -> None:
        self.vhost.call(VSOCK_SET_RUNNING, struct.pack("<i", running))
        self._serving = running
