# SPDX-License-Identifier: Apache-2.0
"""Find, fetch, build and cache kernel images.

`find` gives what is on this machine, `ensure` fetches or builds what is not, `list_kernels` shows the cache. Errors
are `KernelError`, one line each.
"""

from __future__ import annotations

from .cache import cache_dir
from .catalogue import NAMES, at_path, build, ensure, find, list_kernels
from .image import vmlinux_of
from .kernel import Kernel, KernelError, Progress, no_progress

__all__ = [
    "NAMES",
    "Kernel",
    "KernelError",
    "Progress",
    "at_path",
    "build",
    "cache_dir",
    "ensure",
    "find",
    "list_kernels",
    "no_progress",
    "vmlinux_of",
]
