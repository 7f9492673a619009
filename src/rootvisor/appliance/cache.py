# SPDX-License-Identifier: Apache-2.0
"""The appliance's part of the cache: ``ROOTVISOR_CACHE``, or ``rootvisor`` in the user's cache folder."""

from __future__ import annotations

import contextlib
import os
import tempfile

from .errors import ApplianceError


def folder() -> str:
    """The folder for the appliance's files (not created)."""
    chosen = os.environ.get("ROOTVISOR_CACHE")
    if not chosen:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        chosen = os.path.join(base, "rootvisor")
    return os.path.join(chosen, "appliance")


def store(name: str, data: bytes) -> str:
    """Write ``data`` under ``name``, whole or not at all, and give its path.

    Raises :class:`ApplianceError`: no room, no permission.
    """
    path = os.path.join(folder(), name)
    try:
        os.makedirs(folder(), exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder())
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise ApplianceError(
            f"cannot write the cache {folder()}: {error.strerror}; make room there or set ROOTVISOR_CACHE"
        ) from error
    return path
