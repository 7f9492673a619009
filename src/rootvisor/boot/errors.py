# SPDX-License-Identifier: Apache-2.0
"""What can go wrong before a partition runs; every message is one line: what happened, and the mend."""

from __future__ import annotations


class BootError(Exception):
    """The files or sizes that the user gave cannot boot a partition; the message fits one line."""


class KernelImageError(BootError):
    """The kernel image is missing, is no x86-64 Linux kernel, is damaged, or does not fit."""


class InitrdError(BootError):
    """The initial ramdisk is missing or does not fit."""


class InitramfsError(BootError):
    """The initial ramdisk cannot be assembled: a module, busybox or the cache is missing."""
