# SPDX-License-Identifier: Apache-2.0
"""What a kernel is to the rest of Rootvisor, the package's error, and how progress is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class KernelError(Exception):
    """A kernel cannot be had: `message` says what happened, `mend` what to do next (may be empty)."""

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        """The one line that is shown: message, then mend."""
        return f"{self.message}; {self.mend}" if self.mend else self.message


class OfflineError(KernelError):
    """The package mirror cannot be reached."""


class DiskFullError(KernelError):
    """There is no space left, or not enough."""


class Progress(Protocol):
    """Called while something takes long.

    `stage` is a short text without a full stop ("building Linux 7.3"); it changes when a new step begins. `done`
    counts towards `total` in units of the stage (bytes, compiled files); `total` is None when the end is not
    known. Calls come often (up to 20 per second): who prints lines prints one per stage.
    """

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """One step further."""
        ...


def no_progress(stage: str, done: int, total: int | None) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel image on this machine, ready to boot. All paths are absolute.

    `name` is `stock`, `mshv`, `local` (built from a tree of the user's) or the path that the user gave; `version`
    is what `uname -r` will say. `image` is the file as it was built or given (a bzImage, or an ELF `vmlinux`);
    `vmlinux` the uncompressed ELF image of the same kernel, which boots faster (None where it cannot be had).
    `modules` is the folder `.../lib/modules/VERSION`, None for a kernel without modules. `config` is its
    `.config`, `origin` says in words where it comes from.
    """

    name: str
    version: str
    image: Path
    vmlinux: Path | None = None
    modules: Path | None = None
    config: Path | None = None
    origin: str = ""
