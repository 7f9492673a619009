# SPDX-License-Identifier: Apache-2.0
"""The kernel's vhost, front end: devices whose rings Linux serves (include/uapi/linux/vhost.h).

Addresses that it takes are addresses of this process, so guest RAM must be mapped here (`MemoryRegion.address`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct

from .vhost import RING_FEATURES, VhostDevice, VhostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..pci.platform import GuestMemory
    from .queue import Queue

GET_FEATURES = 0x8008AF00
SET_FEATURES = 0x4008AF00
SET_OWNER = 0xAF01
SET_MEM_TABLE = 0x4008AF03
SET_VRING_NUM = 0x4008AF10
SET_VRING_ADDR = 0x4028AF11
SET_VRING_BASE = 0x4008AF12
GET_VRING_BASE = 0xC008AF12
SET_VRING_KICK = 0x4008AF20
SET_VRING_CALL = 0x4008AF21
SET_VRING_ERR = 0x4008AF22
NET_SET_BACKEND = 0x4008AF30
VSOCK_SET_GUEST_CID = 0x4008AF60
VSOCK_SET_RUNNING = 0x4004AF61

_NAMES = {
    GET_FEATURES: "VHOST_GET_FEATURES",
    SET_FEATURES: "VHOST_SET_FEATURES",
    SET_OWNER: "VHOST_SET_OWNER",
    SET_MEM_TABLE: "VHOST_SET_MEM_TABLE",
    SET_VRING_NUM: "VHOST_SET_VRING_NUM",
    SET_VRING_ADDR: "VHOST_SET_VRING_ADDR",
    SET_VRING_BASE: "VHOST_SET_VRING_BASE",
    GET_VRING_BASE: "VHOST_GET_VRING_BASE",
    SET_VRING_KICK: "VHOST_SET_VRING_KICK",
    SET_VRING_CALL: "VHOST_SET_VRING_CALL",
    SET_VRING_ERR: "VHOST_SET_VRING_ERR",
    NET_SET_BACKEND: "VHOST_NET_SET_BACKEND",
    VSOCK_SET_GUEST_CID: "VHOST_VSOCK_SET_GUEST_CID",
    VSOCK_SET_RUNNING: "VHOST_VSOCK_SET_RUNNING",
}

_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")  # struct vhost_vring_state: queue, value
_FILE = struct.Struct("<Ii")  # struct vhost_vring_file: queue, descriptor
_ADDRESSES = struct.Struct(
    "<IIQQQQ"
)  # struct vhost_vring_addr: queue, flags, descriptors, used, available, log
_REGION = struct.Struct("<QQQ8x")  # struct vhost_memory_region: guest address, size, address here


class VhostKernelError(VhostError):
    """The kernel's vhost cannot be used; one line that says in what it failed and what mends it.

    `errno` is the system call's, 0 where none was made.
    """

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.errno = number


def open_vhost(path: str, module: str) -> int:
    """Open a vhost device, /dev/vhost-net say. Raises `VhostKernelError`."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        number = error.errno or 0
        mend = f"modprobe {module}" if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO) else ""
        if number in (errno.EACCES, errno.EPERM):
            mend = f"be root, or a member of the group that {path} belongs to"
        message = f"cannot open {path}: {os.strerror(number)}" + (f"; {mend}" if mend else "")
        raise VhostKernelError(message, number) from error


class VhostKernel:
    """An open vhost device. Owns the descriptor. Every method raises `VhostKernelError`."""

    __slots__ = ("backend", "fd")

    def __init__(self, fd: int, backend: str) -> None:
        self.fd = fd
        self.backend = backend

    def call(self, request: int, argument: bytes | int = 0) -> bytes:
        """One ioctl; returns the argument as the kernel left it."""
        try:
            if isinstance(argument, int):
                fcntl.ioctl(self.fd, request, argument)
                return b""
            data = bytearray(argument)
            fcntl.ioctl(self.fd, request, data, True)
            return bytes(data)
        except OSError as error:
            name = _NAMES.get(request, f"{request:#x}")
            number = error.errno or 0
            raise VhostKernelError(f"{self.backend}: {name}: {os.strerror(number)}", number) from error

    def get_features(self) -> int:
        """What the device offers, in numbers of virtio."""
        value: int = _U64.unpack(self.call(GET_FEATURES, bytes(8)))[0]
        return value

    def set_u64(self, request: int, value: int) -> None:
        """A request that carries a 64-bit number."""
        self.call(request, _U64.pack(value))

    def set_memory(self, memory: GuestMemory) -> None:
        """Say which of our addresses are guest RAM."""
        regions = memory.regions
        if not all(region.address for region in regions):
            raise VhostKernelError(f"{self.backend}: guest RAM is not mapped in this process")
        table = struct.pack("<I4x", len(regions))
        for region in regions:
            table += _REGION.pack(region.gpa, region.size, region.address)
        self.call(SET_MEM_TABLE, table)

    def set_state(self, request: int, index: int, value: int) -> None:
        """VHOST_SET_VRING_NUM or _BASE."""
        self.call(request, _STATE.pack(index, value))

    def set_addresses(self, queue: Queue, memory: GuestMemory) -> None:
        """Where the driver put the ring."""
        addresses = queue.addresses
        areas = [_address(memory, gpa) for gpa in (addresses.desc, addresses.device, addresses.driver)]
        self.call(SET_VRING_ADDR, _ADDRESSES.pack(queue.index, 0, *areas, 0))

    def set_file(self, request: int, index: int, fd: int) -> None:
        """VHOST_SET_VRING_KICK, _CALL, _ERR or VHOST_NET_SET_BACKEND; -1 for no descriptor."""
        self.call(request, _FILE.pack(index, fd))

    def get_base(self, index: int) -> int:
        """The next entry of the available ring; the ring must be stopped."""
        base: int = _STATE.unpack(self.call(GET_VRING_BASE, _STATE.pack(index, 0)))[1]
        return base

    def close(self) -> None:
        """Close the device; the kernel stops what runs."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class VhostKernelDevice(VhostDevice):
    """A virtio device served by the kernel. A subclass starts and stops what is behind the rings.

    Arguments:
        fd: the vhost device, owned by this object from now on.
        features: device-specific features worth offering if the kernel has them.
        rings: how many queues, from 0 on, the kernel serves.

    Raises `VhostKernelError`.
    """

    def __init__(
        self,
        name: str,
        fd: int,
        queue_sizes: Sequence[int],
        *,
        backend: str,
        features: int = 0,
        rings: int | None = None,
    ) -> None:
        self.vhost = vhost = VhostKernel(fd, backend)
        self._error_fd = -1
        try:
            vhost.call(SET_OWNER)
            self.backend_features = vhost.get_features()
        except VhostKernelError:
            vhost.close()
            raise
        super().__init__(name, self.backend_features & (features | RING_FEATURES), queue_sizes, rings=rings)
        self._error_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set_up(self, features: int) -> None:
        """Features and memory; the kernel knows only features of its own."""
        assert self.memory is not None
        self.vhost.set_u64(SET_FEATURES, features & self.backend_features)
        self.vhost.set_memory(self.memory)
        self.worker.watch(self._error_fd, select.POLLIN, self._ring_error)

    def start_ring(self, queue: Queue, base: int) -> None:
        """Everything about the ring; whether it runs is the subclass' business."""
        vhost, index = self.vhost, queue.index
        assert self.memory is not None
        vhost.set_state(SET_VRING_NUM, index, queue.size)
        vhost.set_state(SET_VRING_BASE, index, base)
        vhost.set_addresses(queue, self.memory)
        vhost.set_file(SET_VRING_CALL, index, -1 if queue.call_fd is None else queue.call_fd())
        vhost.set_file(SET_VRING_ERR, index, self._error_fd)
        vhost.set_file(SET_VRING_KICK, index, queue.kick_fd)

    def stop_ring(self, index: int) -> int:
        """Where the ring can go on. A subclass has stopped it before."""
        return self.vhost.get_base(index)

    def close(self) -> None:
        """Stop and let go of the kernel's device."""
        super().close()
        self.vhost.close()
        fd, self._error_fd = self._error_fd, -1
        if fd >= 0:
            os.close(fd)

    def _ring_error(self, events: int) -> None:
        try:
            os.eventfd_read(self._error_fd)
        except BlockingIOError:
            return
        if self.active:
            self.fail("the kernel finds a ring malformed")


def _address(memory: GuestMemory, gpa: int) -> int:
    """Where a guest physical address lies in this process."""
    for region in memory.regions:
        if region.gpa <= gpa < region.gpa + region.size:
            return region.address + gpa - region.gpa
    raise VhostKernelError(f"a ring at {gpa:#x} is outside guest RAM")
