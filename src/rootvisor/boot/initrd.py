# SPDX-License-Identifier: Apache-2.0
"""Put the initial ramdisk into guest memory.

An initial ramdisk may consist of several cpio archives one after the other; Linux unpacks them in order and a
later file replaces an earlier one (kernel ``Documentation/driver-api/early-userspace/buffer-format.rst``).
"""

from __future__ import annotations

import os
import stat

from .errors import InitrdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_MIB = 1 << 20
_PAGE = 4096
_ALIGN = 4  # archives start on 4-byte boundaries; Linux skips zero bytes between them


class Initrd:
    """Where the ramdisk lies: ``gpa`` (page aligned) and ``size`` in bytes."""

    __slots__ = ("gpa", "size")

    def __init__(self, gpa: int, size: int) -> None:
        self.gpa = gpa
        self.size = size


def load_initrd(
    parts: Sequence[str | bytes], ram: memoryview, floor_gpa: int, limit_gpa: int
) -> Initrd | None:
    """Load ``parts`` (paths of archives, or archives themselves) one behind the other, as high as they go.

    ``ram`` is guest memory from GPA 0; the ramdisk ends below ``limit_gpa`` and stays at or above
    ``floor_gpa`` (the kernel's ``end_gpa``). Returns None for no parts. Raises :class:`InitrdError`: missing,
    unreadable, does not fit.
    """
    sources: list[tuple[int, int, str | bytes]] = []  # (fd or -1, size, part)
    try:
        total = 0
        for part in parts:
            if isinstance(part, str):
                fd, size = _open(part)
            else:
                fd, size = -1, len(part)
            sources.append((fd, size, part))
            total += size + -size % _ALIGN
        if not total:
            return None
        limit = min(limit_gpa, len(ram))
        gpa = (limit - total) & -_PAGE
        if gpa < floor_gpa:
            names = ", ".join(part for part in parts if isinstance(part, str)) or "the initial ramdisk"
            raise InitrdError(
                f"{names}: {total // _MIB + 1} MiB of initial ramdisk do not fit: of {len(ram) // _MIB} MiB "
                f"of memory the kernel leaves {max(limit - floor_gpa, 0) // _MIB} MiB; "
                "give the partition more memory"
            )
        position = gpa
        for fd, size, part in sources:
            target = ram[position : position + size]
            if isinstance(part, str):
                _read_into(part, fd, target)
            else:
                target[:] = part
            position += size + -size % _ALIGN
        return Initrd(gpa, position - gpa)
    finally:
        for fd, _, _ in sources:
            if fd >= 0:
                os.close(fd)


def _open(path: str) -> tuple[int, int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise InitrdError(f"{path}: no such initial ramdisk; check --initrd") from error
    except OSError as error:
        raise InitrdError(f"{path}: cannot open the initial ramdisk: {error.strerror}") from error
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return fd, status.st_size
    os.close(fd)
    what = "is a directory" if stat.S_ISDIR(status.st_mode) else "is not a regular file"
    if stat.S_ISREG(status.st_mode):
        what = "is empty"
    raise InitrdError(f"{path}: {what}; --initrd takes a cpio archive, compressed or not")


def _read_into(path: str, fd: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        try:
            count = os.preadv(fd, [target[done:]], done)
        except OSError as error:
            raise InitrdError(f"{path}: cannot read the initial ramdisk: {error.strerror}") from error
        if not count:
            raise InitrdError(f"{path}: the initial ramdisk became shorter while it was read; try again")
        done += count
