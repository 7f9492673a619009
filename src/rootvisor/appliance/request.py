# SPDX-License-Identifier: Apache-2.0
"""What the caller wants to have run in the appliance: plain data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .errors import ApplianceError

MINIMUM_MEMORY_MIB = 512
MAXIMUM_CPUS = 64


@dataclass(frozen=True)
class ApplianceKernel:
    """The appliance's own Linux: ``image`` (bzImage, or an ELF vmlinux with a PVH entry, which starts about
    0.7 s faster) and ``modules``, the folder that holds its ``modules.dep``."""

    image: str
    modules: str


@dataclass(frozen=True)
class Request:
    """A program to run in the appliance, with the caller's streams, folder and environment.

    ``streams``: file descriptors for standard input, output and error. With ``tty`` the program gets a terminal
    instead, joined to ``streams[0]`` and ``streams[1]``. ``writable``: folders that are shared read-write at the
    same path; everything else of the host is read-only, below a writable layer that is thrown away.
    ``timeout``: seconds for the whole run, None for no limit. ``ready_timeout``: seconds without a sign of life
    that count as death while the appliance starts. ``qemu_args`` and ``kernel_args`` are added to the two
    command lines (emulated devices, for instance); ``modules`` are loaded beside those that the appliance needs
    itself. ``kernel``: None for the distribution's stock kernel.
    ``picture``: (QEMU's id of a display, PNG file): written when the program asks on the port ``hardware.SCREEN_PORT``.
    ``console_fd``: a copy of what the appliance's kernel prints, for developers.
    """

    argv: Sequence[str]
    cwd: str = "/"
    env: Mapping[str, str] = field(default_factory=dict)
    streams: tuple[int, int, int] = (0, 1, 2)
    tty: bool = False
    writable: Sequence[str] = ()
    memory_mib: int = 4096
    cpus: int | None = None
    timeout: float | None = None
    ready_timeout: float = 60.0
    qemu_args: Sequence[str] = ()
    modules: Sequence[str] = ()
    kernel_args: Sequence[str] = ()
    kernel: ApplianceKernel | None = None
    console_fd: int | None = None
    picture: tuple[str, str] | None = None

    def validate(self) -> None:
        """Raise :class:`ApplianceError` for a request that cannot be carried out."""
        if not self.argv:
            raise ApplianceError("the appliance was given no program to run")
        if self.memory_mib < MINIMUM_MEMORY_MIB:
            raise ApplianceError(
                f"{self.memory_mib} MiB are too little for the appliance; it needs {MINIMUM_MEMORY_MIB} MiB or more"
            )
        if self.cpus is not None and not 1 <= self.cpus <= MAXIMUM_CPUS:
            raise ApplianceError(f"the appliance can have 1 to {MAXIMUM_CPUS} processors, not {self.cpus}")
        for text in (*self.argv, self.cwd, *self.env, *self.env.values(), *self.writable):
            if "\0" in text:
                raise ApplianceError(f"{text!r} has a NUL byte, which no argument or path may have")
        if not os.path.isabs(self.cwd):
            raise ApplianceError(f"{self.cwd}: the working folder must be an absolute path")
        for folder in self.writable:
            if not os.path.isabs(folder) or "\n" in folder:
                raise ApplianceError(f"{folder!r}: a writable folder must be an absolute path in one line")
            if not os.path.isdir(folder):
                raise ApplianceError(f"{folder}: no such folder; create it before it is shared read-write")
            if os.path.realpath(folder) == "/":
                raise ApplianceError("/: the whole host cannot be shared read-write; name a folder")
