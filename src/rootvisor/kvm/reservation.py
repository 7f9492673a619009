# SPDX-License-Identifier: Apache-2.0
"""A range of this process' addresses that belongs to one guest: nothing is behind it until a piece of a file is mapped.

KVM sees whatever is mapped at the moment: its MMU notifier follows every change, and a change is in force for every
processor when the system call returns. Touching a piece without access makes KVM_RUN fail with EFAULT.
"""

from __future__ import annotations

import os

from .errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_NOTHING = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
#: So that KVM can use pages of every size.
_ALIGNMENT = 1 << 30
_FAILED = (1 << 64) - 1
_MADV_DONTNEED, _MADV_POPULATE_READ = 4, 22
#: bit 63 of an entry of /proc/self/pagemap, by its last byte
_PRESENT = bytes(128) + b"\1" * 128


def _library() -> Any:
    """The C library, called with the interpreter's lock held: it costs less than to win it back."""
    import ctypes

    library = ctypes.PyDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_size_t
    library.mmap.argtypes = (
        ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    )  # fmt: skip
    library.munmap.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
    library.mprotect.argtypes = library.madvise.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    return library


class Reservation:
    """``size`` bytes of addresses from ``address`` on, aligned to 1 GiB, without access. Offsets and sizes in bytes,
    multiples of 4096."""

    __slots__ = ("_errno", "_madvise", "_mmap", "_mprotect", "_munmap", "address", "size")

    def __init__(self, size: int) -> None:
        import ctypes

        self.size = size
        library = _library()
        self._mmap, self._munmap = library.mmap, library.munmap
        self._mprotect, self._madvise = library.mprotect, library.madvise
        self._errno = ctypes.get_errno
        start: int = self._mmap(0, size + _ALIGNMENT, _PROT_NONE, _NOTHING, -1, 0)
        if start == _FAILED:
            raise KvmError(
                f"cannot reserve {size >> 30} GiB of addresses for a partition: {os.strerror(self._errno())}; "
                "is there a limit (ulimit -v)?"
            )
        self.address = (start + _ALIGNMENT - 1) & -_ALIGNMENT
        if self.address > start:
            self._munmap(start, self.address - start)
        end = start + size + _ALIGNMENT
        if end > self.address + size:
            self._munmap(self.address + size, end - self.address - size)

    def map_file(self, offset: int, size: int, fd: int, fd_offset: int, writable: bool) -> None:
        """Shares ``size`` bytes of the file ``fd`` at ``offset``. OSError: ENOMEM at vm.max_map_count pieces."""
        protection = _PROT_READ | _PROT_WRITE if writable else _PROT_READ
        flags = _MAP_SHARED | _MAP_FIXED
        if self._mmap(self.address + offset, size, protection, flags, fd, fd_offset) == _FAILED:
            self._fail()

    def clear(self, offset: int, size: int) -> None:
        """Takes a piece away; on return no processor has access. OSError as for :meth:`map_file`."""
        if self._mmap(self.address + offset, size, _PROT_NONE, _NOTHING | _MAP_FIXED, -1, 0) == _FAILED:
            self._fail()

    def forbid(self, offset: int, size: int) -> None:
        """Like :meth:`clear`, but needs no room for one more piece where no piece is cut in two."""
        if self._mprotect(self.address + offset, size, _PROT_NONE):
            self._fail()

    def touched(self, offset: int, pages: int) -> bytes:
        """A byte for each page, 1 if it is in this process' page tables: KVM has it only then."""
        with open("/proc/self/pagemap", "rb", buffering=0) as table:
            table.seek((self.address + offset >> 12) * 8)
            entries = table.read(pages * 8)
        return entries[7::8].translate(_PRESENT).ljust(pages, b"\0")

    def untouch(self, offset: int, size: int) -> None:
        """Takes a piece of a file out of the page tables; its contents and its rights stay."""
        self._madvise(self.address + offset, size, _MADV_DONTNEED)

    def touch(self, offset: int, size: int) -> None:
        """Puts a piece of a file into the page tables (Linux 5.14; nothing before)."""
        self._madvise(self.address + offset, size, _MADV_POPULATE_READ)

    def close(self) -> None:
        """Gives the addresses back; the machine that used them is closed."""
        if self.address:
            self._munmap(self.address, self.size)
            self.address = 0

    def _fail(self) -> None:
        number = self._errno()
        raise OSError(number, os.strerror(number))
