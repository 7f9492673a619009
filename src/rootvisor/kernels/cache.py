# SPDX-License-Identifier: Apache-2.0
"""The folder of everything that Rootvisor fetched or built, and how several processes share it.

Finished things appear under their name by one rename, so a reader never sees half of one; writers of the same thing
take turns with a lock file. `$ROOTVISOR_CACHE` names the folder, else `$XDG_CACHE_HOME/rootvisor`, else
`~/.cache/rootvisor`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .kernel import DiskFullError, Kernel, KernelError, Progress

_MIB = 1 << 20
RECORD = "kernel.json"
"""What a folder with this file describes is a kernel."""
_PATH_FIELDS = ("image", "vmlinux", "modules", "config")


def cache_dir() -> Path:
    """The root of all caches; it may not exist yet."""
    given = os.environ.get("ROOTVISOR_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")).absolute() / "rootvisor"


def kernels_dir() -> Path:
    """The folder of kernels, made if it is not there. Raises `KernelError` where it cannot be written."""
    path = cache_dir() / "kernels"
    make_dir(path)
    return path


def make_dir(path: Path) -> Path:
    """Make a folder of the cache with its parents."""
    with storing():
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def storing() -> Iterator[None]:
    """Turns what the file system refuses while the cache is written into a `KernelError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space() from error
        raise KernelError(
            f"cannot write the cache {cache_dir()}: {error.strerror or error}",
            "set ROOTVISOR_CACHE to a folder that you can write",
        ) from error


def no_space() -> DiskFullError:
    """The error for a full disk."""
    return DiskFullError(
        f"no space left for the cache {cache_dir()}",
        "free some space there, or set ROOTVISOR_CACHE to a folder on a larger disk; what is done so far is kept",
    )


def need_space(path: Path, needed_bytes: int, what: str) -> None:
    """Refuse work that cannot fit before it has begun. (apt-get hangs for ever where it cannot store its lists.)"""
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    if free < needed_bytes:
        raise DiskFullError(
            f"{what} needs {needed_bytes // _MIB} MiB and {path} has {free // _MIB} MiB left",
            "free some space there, or set ROOTVISOR_CACHE to a folder on a larger disk",
        )


@contextmanager
def locked(name: str, progress: Progress, what: str) -> Iterator[None]:
    """Hold the lock `name` of the kernels folder; waits, and says so, while another process holds it."""
    path = kernels_dir() / f".{name}.lock"
    with storing():
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another rootvisor that is {what}", 0, None)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Remove a folder of the cache, whole or not there."""
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `target` when the block ends well, and vanishes otherwise."""
    draft = target.with_name(f".{target.name}.new")
    remove_tree(draft)
    make_dir(draft)
    try:
        with storing():
            yield draft
            remove_tree(target)
            draft.rename(target)
    finally:
        remove_tree(draft)


def write_record(folder: Path, kernel: Kernel, **facts: str) -> None:
    """Describe the kernel in `folder`; its paths are stored relative to the folder where they lie below it."""
    record: dict[str, Any] = {
        "name": kernel.name,
        "version": kernel.version,
        "origin": kernel.origin,
        **facts,
    }
    for field in _PATH_FIELDS:
        path: Path | None = getattr(kernel, field)
        if path is not None:
            record[field] = str(path.relative_to(folder) if path.is_relative_to(folder) else path)
    (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def read_record(folder: Path) -> tuple[Kernel, dict[str, str]] | None:
    """The kernel in `folder` and the facts stored with it; None if there is none or a file of it is gone."""
    try:
        record = json.loads((folder / RECORD).read_text())
        paths = {field: folder / record[field] for field in _PATH_FIELDS if record.get(field)}
        kernel = Kernel(record["name"], record["version"], origin=record["origin"], **paths)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not all(path.exists() for path in paths.values()):
        return None
    return kernel, {key: value for key, value in record.items() if isinstance(value, str)}


def kernel_in(folder: Path) -> Kernel:
    """The kernel that has just been published in `folder`."""
    record = read_record(folder)
    if record is None:
        raise KernelError(f"{folder} vanished from the cache", "try again")
    return record[0]


def records() -> list[tuple[Kernel, dict[str, str]]]:
    """Every kernel in the cache, in no order; empty when there is no cache."""
    try:
        folders = sorted((cache_dir() / "kernels").iterdir())
    except OSError:
        return []
    return [record for folder in folders if (record := read_record(folder)) is not None]
