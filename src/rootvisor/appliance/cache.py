# SPDX-License-Identifier: Apache-2.0
"""Files that the appliance keeps in the cache."""

from __future__ import annotations

import contextlib
import os
import time

from rootvisor.boot.whole_file import write_whole
from rootvisor.kernels import cache_dir

from .errors import ApplianceError

_KEPT_SECONDS = 30 * 24 * 3600


def folder() -> str:
    """Where they are (not created)."""
    return str(cache_dir() / "appliance")


def load(name: str) -> bytes | None:
    """The content of ``name``, None when it is not there."""
    path = os.path.join(folder(), name)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        return None
    with contextlib.suppress(OSError):  # somebody else's cache may be read-only
        os.utime(path)
    return data


def store(name: str, data: bytes) -> None:
    """Write ``data`` under ``name``, whole or not at all, and drop what has not been used for a month.

    Raises :class:`ApplianceError`: no room, no permission.
    """
    try:
        os.makedirs(folder(), exist_ok=True)
        write_whole(os.path.join(folder(), name), data)
        _drop_unused()
    except OSError as error:
        raise ApplianceError(
            f"cannot write the cache {folder()}: {error.strerror}; make room there or set ROOTVISOR_CACHE"
        ) from error


def _drop_unused() -> None:
    oldest = time.time() - _KEPT_SECONDS
    for entry in os.scandir(folder()):
        with contextlib.suppress(FileNotFoundError):  # another run was quicker
            if entry.is_file() and entry.stat().st_mtime < oldest:
                os.unlink(entry.path)
