# SPDX-License-Identifier: Apache-2.0
"""Find, fetch, build and cache kernel images.

`find` gives what is on this machine, `ensure` fetches or builds what is not, `list_kernels` shows the cache,
`prune_kernels` removes what is out of date, but nothing that somebody holds. Errors are `KernelError`, one line each.
"""

from __future__ import annotations

from .cache import cache_dir
from .catalogue import NAMES, at_path, build, ensure, find, list_kernels, prune_kernels
from .image import vmlinux_of
from .kernel import Kernel, KernelError, Progress, no_progress
from .prune import Removed, hold

__all__ = [
    "NAMES",
    "Kernel",
    "KernelError",
    "Progress",
    "Removed",
    "at_path",
    "build",
    "cache_dir",
    "ensure",
    "find",
    "hold",
    "list_kernels",
    "no_progress",
    "prune_kernels",
    "vmlinux_of",
]
