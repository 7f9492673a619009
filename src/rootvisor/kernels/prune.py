# SPDX-License-Identifier: Apache-2.0
"""Removes kernels that nothing asks for by name any more: older versions, and builds of an older configuration.

A run holds the record of its kernel with a shared lock (:func:`hold`), by which it is known to be in use.
"""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

from .cache import RECORD, cache_dir, records, remove_tree, storing
from .kernel import Kernel

_EXTRACTED_KEPT_S = 30 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Removed:
    """What went, or would go."""

    name: str
    version: str
    path: Path
    size_bytes: int


def hold(image: Path) -> int | None:
    """A descriptor that keeps the kernel with this image in the cache as long as it is open; None where it is none of
    the cache's, or the cache cannot be locked. It is inherited by what this process starts."""
    try:
        fd = os.open(image.parent / RECORD, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    os.set_inheritable(fd, True)
    return fd


def prune(chosen: dict[str, Kernel], *, dry: bool = False) -> list[Removed]:
    """Remove the kernels with a name in ``chosen`` that are not the one chosen, and not in use.

    ELF images that were taken out of kernels of the user's go a month after their last use. Kernels from source trees
    of the user's stay. With ``dry`` nothing is removed. Raises `KernelError`: no permission.
    """
    removed = []
    for kernel, _facts in records():
        folder = kernel.image.parent
        keep = chosen.get(kernel.name)
        if keep is None or folder == keep.image.parent or _in_use(folder):
            continue
        removed.append(Removed(kernel.name, kernel.version, folder, _size(folder)))
    oldest = time.time() - _EXTRACTED_KEPT_S
    for path in sorted((cache_dir() / "kernels" / "extracted").glob("*.elf")):
        status = path.stat()
        if status.st_mtime < oldest:
            removed.append(Removed("image", path.stem, path, status.st_size))
    if not dry:
        with storing():
            for one in removed:
                if one.path.is_dir():
                    # without its record it is no kernel any more, even when the rest cannot be removed
                    (one.path / RECORD).unlink(missing_ok=True)
                    remove_tree(one.path)
                else:
                    one.path.unlink(missing_ok=True)
    return removed


def _in_use(folder: Path) -> bool:
    try:
        fd = os.open(folder / RECORD, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _size(folder: Path) -> int:
    """Bytes that a folder takes on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
