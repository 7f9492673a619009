# SPDX-License-Identifier: Apache-2.0
"""Kernels by name: `stock`, `mshv`, or the path of an image."""

from __future__ import annotations

from pathlib import Path

from . import mshv, prune, stock
from .cache import locked, records
from .image import probe, vmlinux_of
from .kernel import Kernel, Progress, no_progress
from .versions import version_key

NAMES = (stock.NAME, mshv.NAME)
"""Names that `find` and `ensure` know; everything else is a path."""


def find(name: str) -> Kernel | None:
    """The kernel `name` if it is on this machine already; touches no network and builds nothing.

    For `stock` an installed cloud kernel counts too; for `mshv` a kernel built with the present configuration, the
    newest source first. Raises `KernelError` for a path that is not a kernel.
    """
    if name == stock.NAME:
        return _newest_cached(stock.NAME) or stock.installed("*-cloud-amd64")
    if name == mshv.NAME:
        return _newest_cached(mshv.NAME, fragment=mshv.fragment_hash())
    return at_path(Path(name))


def ensure(name: str, progress: Progress = no_progress, *, refresh: bool = False) -> Kernel:
    """The kernel `name`, fetched or built if it is not on this machine.

    With `refresh` the mirror is asked for a newer one. Raises `KernelError` with one line that says what to do.
    """
    if not refresh or name not in NAMES:
        kernel = find(name)
        if kernel is not None:
            return kernel
    what = "fetching the stock kernel" if name == stock.NAME else "building the mshv kernel"
    with locked(name, progress, what):
        if not refresh:
            kernel = find(name)  # the one that held the lock may have made it
            if kernel is not None:
                return kernel
        made = stock.fetch(progress, refresh) if name == stock.NAME else mshv.build_newest(progress, refresh)
        prune.prune({name: find(name) or made})
        return made


def prune_kernels(*, dry: bool = False) -> list[prune.Removed]:
    """Remove the kernels that `find` does not give any more; with `dry` only say which. Raises `KernelError`."""
    chosen = {name: kernel for name in NAMES if (kernel := find(name)) is not None}
    return prune.prune(chosen, dry=dry)


def build(source: Path | None = None, progress: Progress = no_progress) -> Kernel:
    """Build the `mshv` kernel anew if the mirror has a newer source, or from a tree of the user's.

    Raises `KernelError`.
    """
    if source is None:
        return ensure(mshv.NAME, progress, refresh=True)
    with locked(mshv.LOCAL_NAME, progress, "building a kernel"):
        return mshv.build_tree(source, progress)


def list_kernels() -> list[Kernel]:
    """Every kernel in the cache, by name and then newest first; the one that `find` gives stands first of its name."""
    kernels = [kernel for kernel, _ in records()]
    kernels.sort(key=lambda kernel: version_key(kernel.version), reverse=True)
    chosen = [kernel for name in NAMES if (kernel := find(name)) is not None]
    rest = [kernel for kernel in kernels if kernel not in chosen]
    return sorted([*chosen, *rest], key=lambda kernel: kernel.name)


def at_path(path: Path) -> Kernel:
    """A kernel image of the user's. Raises `KernelError`: missing, unreadable, not a kernel."""
    path = path.expanduser().absolute()
    facts = probe(path)
    modules = Path("/lib/modules") / facts.version
    return Kernel(
        str(path),
        facts.version,
        path,
        vmlinux_of(path),
        modules if facts.version and modules.is_dir() else None,
        None,
        "given by path",
    )


def _newest_cached(name: str, **facts: str) -> Kernel | None:
    found = [
        (kernel, record)
        for kernel, record in records()
        if kernel.name == name and all(record.get(key) == value for key, value in facts.items())
    ]
    newest = max(
        found, key=lambda pair: version_key(pair[1].get("source_version") or pair[0].version), default=None
    )
    return newest[0] if newest else None
