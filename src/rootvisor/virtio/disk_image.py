# SPDX-License-Identifier: Apache-2.0
"""A raw disk image: a regular file or a block device on the host, read and written at byte offsets."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SECTOR_BYTES = 512
_IOV_MAX = 1024
_ZEROES = bytes(1 << 20)

# fallocate(2) is not in `os`, but the kernel offers the same for regular files as ioctls (fs/ioctl.c:
# ioctl_preallocate): struct space_resv is s16 type, s16 whence, s64 start, s64 length, 24 bytes unused.
_SPACE = struct.Struct("<hh4xqq24x")
_FS_IOC_UNRESVSP64 = 0x4030582B  # punch a hole, keep the size
_FS_IOC_ZERO_RANGE = 0x40305839
# Block devices: u64 start, u64 length.
_BLOCK_RANGE = struct.Struct("<QQ")
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F


class DiskError(Exception):
    """The image cannot be used; the message says why and what mends it."""


def open_image(path: str, *, readonly: bool) -> int:
    """A descriptor of the image, locked for as long as it is open (flock(2)): by one who writes or by many who read.

    Raises `DiskError` when it cannot be opened, or somebody else's lock is in the way. Locks are advice: they keep
    Rootvisor's machines apart. A file system without them gives none.
    """
    try:
        # Never wait for the other end of a FIFO.
        flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(path, flags)
    except OSError as error:
        hint = "" if readonly else "; open it read-only or mend its permissions"
        hint = hint if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) else ""
        raise DiskError(f"cannot open disk image {path}: {os.strerror(error.errno or 0)}{hint}") from error
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(fd)
            user = "written by another machine" if readonly else "in use by another machine"
            raise DiskError(
                f"disk image {path} is {user}; it can be shared with readonly=on in all of them"
            ) from error
    return fd


class DiskImage:
    """An open image of a whole number of 512-byte sectors, locked as `open_image` says.

    Raises `DiskError` when the file cannot be opened, is neither a file nor a block device, or has no sector.
    """

    def __init__(self, path: str, *, readonly: bool = False) -> None:
        self.readonly = readonly
        self.fd = open_image(path, readonly=readonly)
        mode = os.fstat(self.fd).st_mode
        self._is_device = stat.S_ISBLK(mode)
        if not self._is_device and not stat.S_ISREG(mode):
            os.close(self.fd)
            raise DiskError(f"disk image {path} is neither a file nor a block device")
        self.size = os.lseek(self.fd, 0, os.SEEK_END) // SECTOR_BYTES * SECTOR_BYTES
        if not self.size:
            os.close(self.fd)
            raise DiskError(f"disk image {path} is empty; give it a size with truncate -s")

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all buffers from `offset` on. Raises `OSError`, EIO also where the file has become shorter."""
        self._all(os.preadv, offset, buffers)

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all buffers at `offset`. Raises `OSError`."""
        self._all(os.pwritev, offset, buffers)

    def flush(self) -> None:
        """Everything written so far is on stable storage when this returns. Raises `OSError`."""
        os.fdatasync(self.fd)

    def discard(self, offset: int, length: int) -> None:
        """The bytes are of no use any more; a host that cannot free them keeps them. Raises `OSError`."""
        try:
            self._range(_BLKDISCARD, _FS_IOC_UNRESVSP64, offset, length)
        except OSError as error:
            if not _is_unsupported(error):
                raise

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the bytes zero, freeing their space if `unmap`. Raises `OSError`."""
        try:
            self._range(_BLKZEROOUT, _FS_IOC_UNRESVSP64 if unmap else _FS_IOC_ZERO_RANGE, offset, length)
            return
        except OSError as error:
            if not _is_unsupported(error):
                raise
        while length:
            count = os.pwrite(self.fd, memoryview(_ZEROES)[: min(length, len(_ZEROES))], offset)
            offset += count
            length -= count

    def close(self) -> None:
        """Close the file."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _all(self, transfer: _Transfer, offset: int, buffers: Sequence[memoryview]) -> None:
        index = 0
        while index < len(buffers):
            batch = buffers[index : index + _IOV_MAX]
            index += len(batch)
            want = sum(map(len, batch))
            count = transfer(self.fd, batch, offset)
            if count < want:
                self._rest(transfer, offset, batch, count)
            offset += want

    def _rest(self, transfer: _Transfer, offset: int, batch: Sequence[memoryview], count: int) -> None:
        """Go on after a short transfer, buffer by buffer."""
        done = 0
        for view in batch:
            end = done + len(view)
            while count < end:
                moved = transfer(self.fd, [view[count - done :]], offset + count)
                if not moved:
                    raise OSError(errno.EIO, "disk image ends early")
                count += moved
            done = end

    def _range(self, device_request: int, file_request: int, offset: int, length: int) -> None:
        if self._is_device:
            fcntl.ioctl(self.fd, device_request, _BLOCK_RANGE.pack(offset, length))
        else:
            fcntl.ioctl(self.fd, file_request, _SPACE.pack(0, os.SEEK_SET, offset, length))


def _is_unsupported(error: OSError) -> bool:
    return error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)


if TYPE_CHECKING:
    from collections.abc import Callable

    _Transfer = Callable[[int, Sequence[memoryview], int], int]
