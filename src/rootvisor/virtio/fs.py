# SPDX-License-Identifier: Apache-2.0
"""File system device (virtio 1.2, section 5.11), served by virtiofsd over vhost-user.

Queues: 0 for high-priority requests, then the request queues.
"""

from __future__ import annotations

import struct

from .registers import DEVICE_FS
from .vhost import VhostError
from .vhost_user import VhostUserDevice

_TAG_BYTES = 36
_CONFIG = struct.Struct("<36sI")  # tag, request queues
_HIGH_PRIORITY_QUEUE_SIZE = 128
# Linux caps a request at the pages that fit into the ring: 512 entries hold a request of 1 MiB.
_REQUEST_QUEUE_SIZE = 512


class Fs(VhostUserDevice):
    """The device.

    Arguments:
        fd: socket connected to the backend (Debian 12: /usr/lib/qemu/virtiofsd, later the Rust virtiofsd).
        tag: the name to mount by, at most 36 bytes.

    A restored guest finds another virtiofsd, which knows nothing of the files that the guest knows: it would answer
    with errors, and where it has given the same number to another file, with that. So the state of a device through
    which anything was mounted is not to be had (`VhostError`).

    Raises `ValueError` for a tag that does not fit, `VhostUserError` when the backend does not answer.
    """

    device_type = DEVICE_FS

    def __init__(self, fd: int, tag: str, *, request_queues: int = 1, name: str = "fs") -> None:
        raw = tag.encode()
        if not 1 <= len(raw) <= _TAG_BYTES:
            raise ValueError(f"a file system tag has 1 to {_TAG_BYTES} bytes: {tag!r}")
        sizes = [_HIGH_PRIORITY_QUEUE_SIZE] + [_REQUEST_QUEUE_SIZE] * request_queues
        super().__init__(name, fd, sizes, backend="virtiofsd")
        self.config = _CONFIG.pack(raw, request_queues)
        self._tag = tag

    def save(self) -> dict[str, object]:
        """Nothing, if nothing was mounted; VhostError otherwise."""
        if self.has_served():
            raise VhostError(
                f"the guest has mounted the shared folder {self._tag}, and what virtiofsd knows of its files cannot be "
                "kept; unmount it and remove the device (vm.remove-device) first"
            )
        return super().save()
