# SPDX-License-Identifier: Apache-2.0
"""Which kernel image a run uses: a path, `stock`, `mshv`, or the default."""

from __future__ import annotations

import os
from pathlib import Path

from rootvisor import kernels
from rootvisor.boot.errors import BootError
from rootvisor.boot.kernel import ELF, probe_kernel
from rootvisor.boot.multiboot import is_multiboot
from rootvisor.cli.description import KernelImage
from rootvisor.cli.errors import UserError, usage_error
from rootvisor.cli.output import Progress

NAMES = ("mshv", "stock")
"""Kernels that have a name; everything else that `--kernel` takes is a path."""

DEFAULT = "mshv"


def choose_kernel(
    wanted: str | None, *, progress: Progress, build: bool, bare_metal: bool = False
) -> KernelImage:
    """The kernel for `--kernel`; builds or fetches a named one that is not on this machine when `build` is true.

    Without `build` such a kernel has an empty image path. `UserError` when there is none, and for a multiboot
    kernel unless `bare_metal` allows one.
    """
    name = wanted or DEFAULT
    if name not in NAMES:
        return _from_path(name, build, bare_metal)
    kernel = found_kernel(name)
    if kernel is not None:
        return kernel
    if not build:
        return KernelImage(image="", vmlinux=None, name=name, version="")
    return make_kernel(name, progress)


def found_kernel(name: str) -> KernelImage | None:
    """The kernel of that name if it is on this machine, else None."""
    try:
        kernel = kernels.find(name)
    except kernels.KernelError as error:
        raise _user_error(error) from error
    return None if kernel is None else as_image(kernel)


def make_kernel(name: str, progress: Progress, refresh: bool = False) -> KernelImage:
    """Build or fetch the kernel of that name; with `refresh` the mirror is asked for a newer one.

    `UserError` when that fails.
    """
    return as_image(cached_kernel(name, progress, refresh))


def cached_kernel(name: str, progress: Progress, refresh: bool = False) -> kernels.Kernel:
    """The same kernel as the cache has it."""
    try:
        return kernels.ensure(name, progress, refresh=refresh)
    except kernels.KernelError as error:
        raise _user_error(error) from error


def make_from_tree(folder: str, progress: Progress) -> KernelImage:
    """Build the `mshv` configuration from a source tree of the user's; `UserError` when that fails."""
    try:
        return as_image(kernels.build(Path(folder).absolute(), progress))
    except kernels.KernelError as error:
        raise _user_error(error) from error


def known_kernels() -> list[KernelImage]:
    """Every kernel on this machine that has a name here, the one that a run takes first of its name."""
    return [as_image(kernel) for kernel in kernels.list_kernels()]


def prune_kernels(dry: bool) -> list[kernels.Removed]:
    """Remove kernels that no name stands for any more; `UserError` when that fails."""
    try:
        return kernels.prune_kernels(dry=dry)
    except kernels.KernelError as error:
        raise _user_error(error) from error


def as_image(kernel: kernels.Kernel) -> KernelImage:
    """A kernel of the cache, as the description has it."""
    return KernelImage(
        image=str(kernel.image),
        vmlinux=None if kernel.vmlinux is None else str(kernel.vmlinux),
        name=kernel.name,
        version=kernel.version,
        modules=None if kernel.modules is None else str(kernel.modules),
    )


def _user_error(error: kernels.KernelError) -> UserError:
    """The same error with an exit status."""
    return UserError(error.message, error.mend)


def _from_path(text: str, build: bool, bare_metal: bool) -> KernelImage:
    """A kernel image that the user named. With `build` its ELF image, which starts faster, is taken out of it."""
    path = os.path.abspath(text)
    if is_multiboot(path):
        if not bare_metal:
            raise usage_error(
                f"{text} is no Linux but a multiboot kernel", f"rootvisor run --as guest --kernel {text}"
            )
        return KernelImage(image=path, vmlinux=None, name=os.path.basename(path), version="", multiboot=True)
    try:
        facts = probe_kernel(path)
    except BootError as error:
        raise usage_error(str(error)) from error
    elf = path if facts.kind == ELF else None
    if build and elf is None:
        try:
            unpacked = kernels.vmlinux_of(Path(path))
        except kernels.KernelError:
            unpacked = None  # the bzImage boots as well
        elf = None if unpacked is None else str(unpacked)
    modules = f"/lib/modules/{facts.version}" if facts.version else ""
    return KernelImage(
        image=path,
        vmlinux=elf,
        name=os.path.basename(path),
        version=facts.version or "",
        modules=modules if modules and os.path.isdir(modules) else None,
    )
