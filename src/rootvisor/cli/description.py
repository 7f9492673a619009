# SPDX-License-Identifier: Apache-2.0
"""What a run is, as plain data: `RunOptions` is what the user asked for, `RunDescription` what the machine is
given.

Nothing here opens a file or looks at the host. `RunDescription.document` is the contract with
`rootvisor.machine.main.run`; docs/develop/run-description.md describes every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VERSION = 1
"""Version of the run description document; a reader refuses any other."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A raw image file that the root partition sees as a virtio disk."""

    path: str
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class CommandRequest:
    """A program for the root partition's userland: arguments, folder, environment, and whether it has a
    terminal. It finds `job` in a file (`cli.ramdisk.JOB`).
    """

    argv: tuple[str, ...]
    cwd: str
    env: Mapping[str, str]
    tty: bool
    job: bytes = b""


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A kernel found on this machine: a bzImage or ELF file, and the ELF `vmlinux` beside it if any.

    `modules` is the folder of its modules (None for a kernel that needs none); only the initial ramdisk uses
    it. `multiboot`: no Linux, but a bare-metal kernel by the multiboot specification.
    """

    image: str
    vmlinux: str | None
    name: str
    version: str
    modules: str | None = None
    multiboot: bool = False


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The command line of `run`, parsed and not yet checked against the host.

    `kernel` is `stock`, `mshv` or a path; None means the default. `rootfs` is `host`, `none` or a folder.
    """

    kernel: str | None = None
    vps: int = 1
    memory_bytes: int = 1 << 30
    rootfs: str = "host"
    initrd: str | None = None
    append: str = ""
    scheduler: str = "hypervisor"
    engine: str = "auto"
    trace: str | None = None
    timeout_s: float | None = None
    disks: tuple[Disk, ...] = ()
    devices: tuple[str, ...] = ("console", "rng", "fs", "disk")
    console_log: str | None = None
    on_reboot: str = "exit"
    verbose: bool = False
    debug: bool = False
    report: str | None = None
    watch_deposits: bool = False
    child_timers: bool = False
    command: tuple[str, ...] | None = None
    role: str = "root"
    hardware: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    screenshot: str | None = None


@dataclass(frozen=True, slots=True)
class RunDescription:
    """Everything that the machine needs to know about one run. Paths are absolute."""

    kernel: KernelImage
    initrds: tuple[str, ...]
    append: str
    vps: int
    memory_bytes: int
    rootfs: str | None
    rootfs_path: str | None
    command: CommandRequest | None
    tty: bool
    disks: tuple[Disk, ...]
    devices: tuple[str, ...]
    scheduler: str
    trace: str | None
    timeout_s: float | None
    console_log: str | None
    on_reboot: str
    report: str | None = None
    watch_deposits: bool = False
    child_timers: bool = False
    verbose: bool = False
    file_server: tuple[str, ...] | None = None
    role: str = "root"
    assigned: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    screen_port: str | None = None
    display: bool = False
    version: int = field(default=VERSION)

    def document(self) -> dict[str, Any]:
        """The description as JSON-able data, the form in which `rootvisor.machine.main.run` takes it."""
        command = self.command
        return {
            "version": self.version,
            "kernel": {
                "image": self.kernel.image,
                "vmlinux": self.kernel.vmlinux,
                "name": self.kernel.name,
                "version": self.kernel.version,
                "multiboot": self.kernel.multiboot,
            },
            "role": self.role,
            "hide": list(self.hide),
            "initrds": list(self.initrds),
            "append": self.append,
            "vps": self.vps,
            "memory_bytes": self.memory_bytes,
            "rootfs": self.rootfs,
            "rootfs_path": self.rootfs_path,
            "file_server": None if self.file_server is None else list(self.file_server),
            "command": None
            if command is None
            else {
                "argv": list(command.argv),
                "cwd": command.cwd,
                "env": dict(command.env),
                "tty": command.tty,
            },
            "tty": self.tty,
            "disks": [{"path": disk.path, "readonly": disk.readonly} for disk in self.disks],
            "devices": list(self.devices),
            "assigned": list(self.assigned),
            "screen_port": self.screen_port,
            "display": self.display,
            "scheduler": self.scheduler,
            "trace": self.trace,
            "timeout_s": self.timeout_s,
            "console_log": self.console_log,
            "on_reboot": self.on_reboot,
            "report": self.report,
            "watch_deposits": self.watch_deposits,
            "child_timers": self.child_timers,
            "verbose": self.verbose,
        }
