# SPDX-License-Identifier: Apache-2.0
"""qemu-storage-daemon: a disk image of any format of QEMU's, as a vhost-user block device (qemu-storage-daemon(1))."""

from __future__ import annotations

import os
import stat

from ..files.program import find_on_path
from .process import FIRST_FD, DaemonError, find_program
from .served import Served, start_vhost_user

NAME = "qemu-storage-daemon"
PACKAGE = "qemu-system-common"
FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")


def is_installed() -> bool:
    """Whether there is a qemu-storage-daemon here."""
    return find_on_path(NAME) is not None


def start_storage(
    path: str, *, image_format: str = "raw", readonly: bool = False, direct: bool = False, queues: int = 1
) -> Served:
    """Serve the image at `path`.

    Arguments:
        image_format: one of FORMATS, never guessed: a guest could write another format's header into a raw image.
        direct: go past the host's page cache (O_DIRECT).
        queues: request queues of the device.

    Raises `DaemonError`.
    """
    return start_vhost_user(NAME, command(_program(), path, image_format, readonly, direct, queues))


def command(
    program: str, path: str, image_format: str, readonly: bool, direct: bool, queues: int
) -> list[str]:
    """The command line; the listening socket is descriptor 3. Raises `DaemonError` for a wrong path or format."""
    if image_format not in FORMATS:
        raise DaemonError(f"no disk image format {image_format!r}; there are {', '.join(FORMATS)}")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise DaemonError(f"cannot open disk image {path}: {os.strerror(error.errno or 0)}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise DaemonError(f"disk image {path} is neither a file nor a block device")
    driver = "host_device" if stat.S_ISBLK(mode) else "file"
    # A comma in a value is written twice (qemu-storage-daemon's option syntax).
    name = os.path.abspath(path).replace(",", ",,")
    access = f"read-only={'on' if readonly else 'off'},cache.direct={'on' if direct else 'off'},discard=unmap"
    export = f"type=vhost-user-blk,id=disk,node-name=disk,writable={'off' if readonly else 'on'}"
    return [
        program,
        "--blockdev",
        f"driver={driver},node-name=file,filename={name},{access}",
        "--blockdev",
        f"driver={image_format},node-name=disk,file=file,{access}",
        "--export",
        f"{export},num-queues={queues},addr.type=fd,addr.str={FIRST_FD}",
    ]


def _program() -> str:
    return find_program(NAME, PACKAGE)
