# SPDX-License-Identifier: Apache-2.0
"""Which kernel image a run uses: a path, `stock`, `mshv`, or the default."""

from __future__ import annotations

import os

from rootvisor.boot.errors import BootError
from rootvisor.boot.kernel import ELF, probe_kernel
from rootvisor.cli.description import KernelImage
from rootvisor.cli.errors import UserError, usage_error
from rootvisor.cli.output import Progress

NAMES = ("mshv", "stock")
DEFAULT = "mshv"


def choose_kernel(wanted: str | None, *, progress: Progress, build: bool) -> KernelImage:
    """The kernel for `--kernel`; builds or fetches a named one that is not cached when `build` is true.

    Without `build` such a kernel has an empty image path. `UserError` when there is none.
    """
    name = wanted or DEFAULT
    if name in NAMES:
        return _named(name, progress, build)
    return _from_path(name)


def _from_path(text: str) -> KernelImage:
    """A kernel image that the user named."""
    path = os.path.abspath(text)
    try:
        facts = probe_kernel(path)
    except BootError as error:
        raise usage_error(str(error)) from error
    return KernelImage(
        image=path,
        vmlinux=path if facts.kind == ELF else None,
        name=os.path.basename(path),
        version=facts.version or "",
    )


def _named(name: str, progress: Progress, build: bool) -> KernelImage:
    """`stock` or `mshv`, from the cache or made now."""
    raise UserError(f"the kernel {name} cannot be had yet", "give --kernel PATH")
