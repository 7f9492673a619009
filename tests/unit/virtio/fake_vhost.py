# SPDX-License-Identifier: Apache-2.0
"""The kernel's vhost as far as its ioctls go: checks the order of calls that Linux demands, keeps what it is told."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Any

import pytest

from rootvisor.virtio import vhost_kernel as vk
from rootvisor.virtio.registers import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1

LOG_ALL = 1 << 26
OFFERED = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | LOG_ALL | 1 << 24 | 1 << 27 | 1 << 33


class FakeVhost:
    """Stands behind a descriptor of /dev/null; other descriptors' ioctls are the real ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, features: int = 0) -> None:
        self.fd = os.open("/dev/null", os.O_RDWR)
        self.inode = os.fstat(self.fd).st_ino
        self.features = OFFERED | features
        self.log: list[str] = []
        self.owned = False
        self.driver_features = 0
        self.regions: list[tuple[int, int, int]] = []
        self.rings: dict[int, dict[str, Any]] = {}
        self.backends: dict[int, int] = {}
        self.cid = 0
        self.serving = False
        self.refuse: dict[str, int] = {}
        self._real = fcntl.ioctl
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)

    def calls(self, name: str) -> int:
        return self.log.count(name)

    def ioctl(self, fd: int, request: int, argument: Any = 0, mutate: bool = True) -> Any:
        if os.fstat(fd).st_ino != self.inode:
            return self._real(fd, request, argument, mutate)
        name = vk._NAMES[request].removeprefix("VHOST_")
        self.log.append(name)
        if name in self.refuse:
            raise OSError(self.refuse[name], "refused")
        if not self.owned and name not in ("SET_OWNER", "GET_FEATURES"):
            raise OSError(errno.EPERM, "no owner")
        getattr(self, name.lower())(argument)
        return 0

    def running(self, index: int) -> bool:
        return self.serving or self.backends.get(index, -1) >= 0

    def ring(self, index: int) -> dict[str, Any]:
        return self.rings.setdefault(index, {})

    def set_owner(self, argument: Any) -> None:
        if self.owned:
            raise OSError(errno.EBUSY, "owned")
        self.owned = True

    def get_features(self, argument: bytearray) -> None:
        argument[:] = struct.pack("<Q", self.features)

    def set_features(self, argument: bytearray) -> None:
        self.driver_features = struct.unpack("<Q", argument)[0]
        if self.driver_features & ~self.features or self.driver_features & F_RING_PACKED:
            raise OSError(errno.EOPNOTSUPP, "features")

    def set_mem_table(self, argument: bytearray) -> None:
        count = struct.unpack_from("<I", argument)[0]
        self.regions = [struct.unpack_from("<QQQ", argument, 8 + 32 * n) for n in range(count)]

    def set_vring_num(self, argument: bytearray) -> None:
        index, size = struct.unpack("<II", argument)
        if self.running(index):
            raise OSError(errno.EBUSY, "runs")
        self.ring(index)["size"] = size

    def set_vring_base(self, argument: bytearray) -> None:
        index, base = struct.unpack("<II", argument)
        if self.running(index):
            raise OSError(errno.EBUSY, "runs")
        self.ring(index)["base"] = base

    def get_vring_base(self, argument: bytearray) -> None:
        index, _ = struct.unpack("<II", argument)
        assert not self.running(index), "the base of a running ring means nothing"
        argument[:] = struct.pack("<II", index, self.ring(index).get("base", 0))

    def set_vring_addr(self, argument: bytearray) -> None:
        index, flags, desc, used, avail, _log = struct.unpack("<IIQQQQ", argument)
        assert not flags
        self.ring(index)["addresses"] = (desc, used, avail)

    def set_vring_kick(self, argument: bytearray) -> None:
        self._file("kick", argument)

    def set_vring_call(self, argument: bytearray) -> None:
        self._file("call", argument)

    def set_vring_err(self, argument: bytearray) -> None:
        self._file("err", argument)

    def net_set_backend(self, argument: bytearray) -> None:
        index, fd = struct.unpack("<Ii", argument)
        if fd >= 0 and not self._complete(index):
            raise OSError(errno.EFAULT, "ring")
        self.backends[index] = fd

    def vsock_set_guest_cid(self, argument: bytearray) -> None:
        self.cid = struct.unpack("<Q", argument)[0]

    def vsock_set_running(self, argument: bytearray) -> None:
        wanted = bool(struct.unpack("<i", argument)[0])
        if wanted and not (self._complete(0) and self._complete(1)):
            raise OSError(errno.EFAULT, "ring")
        self.serving = wanted

    def _file(self, name: str, argument: bytearray) -> None:
        index, fd = struct.unpack("<Ii", argument)
        self.ring(index)[name] = fd

    def _complete(self, index: int) -> bool:
        """Whether the ring's addresses lie in the memory that was announced."""
        ring = self.ring(index)
        return (
            "kick" in ring
            and "size" in ring
            and all(any(base <= a < base + size for _, size, base in self.regions) for a in ring["addresses"])
        )
