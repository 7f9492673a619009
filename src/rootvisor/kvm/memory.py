# SPDX-License-Identifier: Apache-2.0
"""Memory that can be shared: a memfd, its mapping, and the address of that mapping.

The address comes from /proc/self/maps: that costs a tenth of importing ctypes, which matters at every start.
"""

from __future__ import annotations

import mmap
import os

from .errors import KvmError

PAGE = 4096
_HUGE_PAGE = 2 << 20


class SharedMemory:
    """``size`` bytes of zeroed, sparse memory behind the file descriptor ``fd``, mapped as ``view``.

    ``address`` is where the mapping lies in this process (for KVM_SET_USER_MEMORY_REGION). Where the host allows it
    (``transparent_hugepage/shmem_enabled``: advise) memory comes in pages of 2 MiB, at addresses that KVM
    can map so: first touch costs a quarter, and pieces of it that are mapped elsewhere are large too.
    """

    __slots__ = ("_map", "address", "fd", "size", "view")

    def __init__(self, name: str, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create(f"rootvisor-{name}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size)
            self._map = mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            os.close(self.fd)
            raise KvmError(
                f"cannot map {size >> 20} MiB for {name}: {error.strerror}; use less memory (--memory)"
            ) from error
        if size >= _HUGE_PAGE:
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without huge pages
                pass
        self.view = memoryview(self._map)
        self.address = _mapping_address(os.fstat(self.fd).st_ino)

    def close(self) -> None:
        """Unmaps and closes; views that others still hold keep the mapping alive."""
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            pass
        os.close(self.fd)


def _mapping_address(inode: int) -> int:
    wanted = f" {inode} "
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            if "/memfd:rootvisor-" in line and wanted in line:
                return int(line[: line.index("-")], 16)
    raise KvmError("cannot find a memory mapping in /proc/self/maps; is /proc mounted?")
