# SPDX-License-Identifier: Apache-2.0
"""Memory of this process that a partition can be given, and whose address is known.

The address comes from /proc/self/maps: importing ctypes costs much more, and starts are what users wait for.
"""

from __future__ import annotations

import mmap
import os

from .abi import PAGE
from .errors import MshvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class Memory:
    """``size`` bytes of shared memory behind the file descriptor ``fd``: zeroed, and sparse until touched.

    ``view`` is the memory, writable; ``address`` is where it lies in this process. Other processes (vhost-user back
    ends) can map ``fd``. With ``fd`` given, that file (a memfd, or one in /dev/shm or hugetlbfs) is mapped from
    ``offset`` on and stays the caller's. ``huge_pages`` asks the kernel for 2 MiB pages where it has them.

    MshvError when there is not enough memory; ValueError when ``size`` or ``offset`` is not a multiple of 4096.
    """

    __slots__ = ("_map", "_owned", "address", "fd", "size", "view")

    def __init__(
        self,
        size: int,
        *,
        name: str = "guest",
        fd: int | None = None,
        offset: int = 0,
        huge_pages: bool = False,
    ) -> None:
        if size <= 0 or size % PAGE or offset % PAGE:
            raise ValueError(f"size {size:#x} and offset {offset:#x} must be multiples of {PAGE}")
        self.size = size
        self._owned = fd is None
        try:
            if fd is None:
                fd = os.memfd_create(f"mshv-{name}", os.MFD_CLOEXEC)
                self.fd = fd
                os.ftruncate(fd, size)
            self.fd = fd
            inode = os.fstat(fd).st_ino
            before = [] if self._owned else _addresses(inode, size, offset)
            self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        except (OSError, OverflowError) as error:
            if self._owned and fd is not None:
                os.close(fd)
            raise MshvError("mmap", getattr(error, "errno", None) or 12) from error
        if huge_pages:
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without transparent huge pages
                pass
        self.view = memoryview(self._map)
        addresses = [one for one in _addresses(inode, size, offset) if one not in before]
        if not addresses:
            self.close()
            raise MshvError("mmap", 2, mend="mount /proc: a mapping's address is read from /proc/self/maps")
        self.address = addresses[0]

    def discard(self, offset: int = 0, size: int | None = None) -> None:
        """Gives the pages back to the kernel: they read as zero afterwards, for the guest too."""
        self._map.madvise(mmap.MADV_REMOVE, offset, self.size - offset if size is None else size)

    def close(self) -> None:
        """Unmaps the memory; a partition that still has it sees the pages vanish. Views that are held keep it."""
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            pass
        if self._owned and self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _addresses(inode: int, size: int, offset: int) -> list[int]:
    """Where ``size`` bytes of the file from ``offset`` on are mapped.

    The kernel merges neighbouring mappings of one file, so that a line may begin earlier or end later than ours.
    """
    found = []
    wanted = f" {inode} "
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            if wanted not in line:
                continue
            # 7f12e4000000-7f12e4200000 rw-s 00000000 00:01 1034  /memfd:mshv-guest (deleted)
            where, _rights, begins, _device, number = line.split(None, 5)[:5]
            first, end = (int(part, 16) for part in where.split("-"))
            skip = offset - int(begins, 16)
            if int(number) == inode and skip >= 0 and skip + size <= end - first:
                found.append(first + skip)
    return found
