# SPDX-License-Identifier: Apache-2.0
"""Where this program's own things are: the cache, and the source tree that inner processes import."""

from __future__ import annotations

import os
from pathlib import Path

import rootvisor
from rootvisor.cli.errors import UserError


def cache_dir() -> Path:
    """The cache folder: `$ROOTVISOR_CACHE`, else `rootvisor` in `$XDG_CACHE_HOME` or `~/.cache`. Not created
    here.
    """
    own = os.environ.get("ROOTVISOR_CACHE")
    if own:
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):
        return Path(base) / "rootvisor"
    return Path.home() / ".cache" / "rootvisor"


def make_cache_dir(*parts: str) -> Path:
    """A folder of the cache, created when it is not there; `UserError` when that fails."""
    folder = cache_dir().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the cache folder {folder}: {(error.strerror or str(error)).lower()}",
            "set ROOTVISOR_CACHE to a folder that you can write",
        ) from error
    return folder


def source_root() -> Path:
    """The folder that holds the package `rootvisor` (for `sys.path` of inner processes)."""
    return Path(rootvisor.__file__).resolve().parent.parent
