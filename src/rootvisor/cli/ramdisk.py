# SPDX-License-Identifier: Apache-2.0
"""The initial ramdisk of a run: busybox, the agent and kernel modules (cached), and what this run is to do."""

from __future__ import annotations

import os

from rootvisor.boot.busybox import find_busybox
from rootvisor.boot.errors import BootError
from rootvisor.boot.initramfs import (
    ROOTFS_NONE,
    ROOTFS_VIRTIOFS,
    STREAMS_PORTS,
    STREAMS_TTY,
    InitRequest,
    build_base,
    request_archive,
)
from rootvisor.cli.description import CommandRequest, KernelImage
from rootvisor.cli.errors import UserError
from rootvisor.cli.paths import cache_dir

ROOT_TAG = "root"
"""Tag of the virtiofs share that is the root file system of a root partition, and of a guest in it."""

JOB = "/run/rootvisor/job"
"""Where a command finds the bytes that came with it."""
_JOB_IN_RAMDISK = "/rootvisor/job"
_MODULES_IN_RAMDISK = "/rootvisor/python-modules"

_DRIVERS = {
    "console": ("virtio_pci", "virtio_console"),
    "rng": ("virtio_pci", "virtio_rng"),
    "fs": ("virtio_pci", "virtiofs", "overlay"),
    "disk": ("virtio_pci", "virtio_blk"),
    "net": ("virtio_pci", "virtio_net"),
}
"""What each device needs in the root partition; built-in drivers are left out by `boot.modules`."""


def modules_for(devices: tuple[str, ...]) -> list[str]:
    """Names of the kernel modules for the devices of a run, each once."""
    return list(dict.fromkeys(name for device in devices for name in _DRIVERS[device]))


def base_archive(kernel: KernelImage, devices: tuple[str, ...]) -> str:
    """Path of the cached part of the ramdisk; `UserError` when it cannot be made."""
    folder = str(cache_dir() / "initramfs")
    modules = modules_for(devices) if kernel.modules else []
    try:
        return build_base(find_busybox(folder), kernel.modules, modules, folder)
    except BootError as error:
        raise UserError(str(error)) from error


def request_part(
    command: CommandRequest | None, rootfs: str | None, devices: tuple[str, ...], modules: str | None = None
) -> bytes:
    """The part of the ramdisk that says what this run is to do; `UserError` for what cannot be passed on.

    `modules`: path of an archive that a VMM's modules are imported from (`archived_modules`).
    """
    if command is None:
        raise AssertionError("a run with the agent has a command")
    console = "console" in devices
    request = InitRequest(
        rootfs=ROOTFS_VIRTIOFS if rootfs else ROOTFS_NONE,
        tag=ROOT_TAG,
        argv=command.argv,
        cwd=command.cwd,
        environment=tuple(sorted(command.env.items())),
        streams=STREAMS_PORTS if console and not command.tty else STREAMS_TTY,
        tty="hvc0" if console else "ttyS0",
        control=console,
    )
    files = {_JOB_IN_RAMDISK: command.job} if command.job else {}
    if modules is not None:
        files[_MODULES_IN_RAMDISK] = os.fsencode(modules)
    try:
        return request_archive(request, files)
    except BootError as error:
        raise UserError(str(error)) from error
