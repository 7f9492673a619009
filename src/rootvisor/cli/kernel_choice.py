# SPDX-License-Identifier: Apache-2.0
"""Which kernel image a run uses: a path, `stock`, `mshv`, or the default."""

from __future__ import annotations

import os

from rootvisor.boot.errors import BootError
from rootvisor.boot.kernel import ELF, probe_kernel
from rootvisor.cli.description import KernelImage
from rootvisor.cli.errors import UserError, usage_error
from rootvisor.cli.output import Progress
from rootvisor.kernels.cache import records
from rootvisor.kernels.kernel import Kernel, KernelError

NAMES = ("mshv", "stock")
DEFAULT = "mshv"


def choose_kernel(wanted: str | None, *, progress: Progress, build: bool) -> KernelImage:
    """The kernel for `--kernel`; builds or fetches a named one that is not cached when `build` is true.

    Without `build` such a kernel has an empty image path. `UserError` when there is none.
    """
    name = wanted or DEFAULT
    if name not in NAMES:
        return _from_path(name)
    kernel = cached_kernel(name)
    if kernel is not None:
        return kernel
    if not build:
        return KernelImage(image="", vmlinux=None, name=name, version="")
    return make_kernel(name, progress)


def cached_kernel(name: str) -> KernelImage | None:
    """The kernel of that name in the cache, None when there is none."""
    for kernel, _facts in records():
        if kernel.name == name:
            return as_image(kernel)
    return None


def make_kernel(name: str, progress: Progress, rebuild: bool = False) -> KernelImage:
    """Build or fetch the kernel of that name; `UserError` when that fails."""
    raise UserError(f"the kernel {name} cannot be had yet", "give --kernel PATH")


def as_image(kernel: Kernel) -> KernelImage:
    """A kernel of the cache, as the description has it."""
    return KernelImage(
        image=str(kernel.image),
        vmlinux=None if kernel.vmlinux is None else str(kernel.vmlinux),
        name=kernel.name,
        version=kernel.version,
        modules=None if kernel.modules is None else str(kernel.modules),
    )


def kernel_error(error: KernelError) -> UserError:
    """The same error with an exit status."""
    return UserError(error.message, error.mend)


def _from_path(text: str) -> KernelImage:
    """A kernel image that the user named."""
    path = os.path.abspath(text)
    try:
        facts = probe_kernel(path)
    except BootError as error:
        raise usage_error(str(error)) from error
    modules = f"/lib/modules/{facts.version}" if facts.version else ""
    return KernelImage(
        image=path,
        vmlinux=path if facts.kind == ELF else None,
        name=os.path.basename(path),
        version=facts.version or "",
        modules=modules if modules and os.path.isdir(modules) else None,
    )
