# SPDX-License-Identifier: Apache-2.0
"""qemu-storage-daemon: a raw or qcow2 disk image as a vhost-user block device (qemu-storage-daemon(1))."""

from __future__ import annotations

import os
import stat

from ..files.program import find_on_path
from .process import FIRST_FD, DaemonError, find_program
from .qcow2 import Qcow2Error, chain
from .served import Served, start_vhost_user

NAME = "qemu-storage-daemon"
PACKAGE = "qemu-system-common"
FORMATS = ("raw", "qcow2")


def is_installed() -> bool:
    """Whether there is a qemu-storage-daemon here."""
    return find_on_path(NAME) is not None


def start_storage(
    path: str,
    *,
    image_format: str = "raw",
    readonly: bool = False,
    direct: bool = False,
    queues: int = 1,
    backing_files: bool = False,
) -> Served:
    """Serve the image at `path`.

    Arguments:
        image_format: one of FORMATS, never guessed: a guest could write another format's header into a raw image.
        direct: go past the host's page cache (O_DIRECT).
        queues: request queues of the device.
        backing_files: a qcow2 image may stand on others, each of which has to say the next one's format.

    Raises `DaemonError`.
    """
    argv = command(_program(), path, image_format, readonly, direct, queues, backing_files)
    return start_vhost_user(NAME, argv)


def command(
    program: str,
    path: str,
    image_format: str,
    readonly: bool,
    direct: bool,
    queues: int,
    backing_files: bool = False,
) -> list[str]:
    """The command line; the listening socket is descriptor 3. Raises `DaemonError` for a wrong path or format, and for
    an image that stands on files which were not asked for.
    """
    if image_format not in FORMATS:
        raise DaemonError(f"no disk image format {image_format!r}; there are {', '.join(FORMATS)}")
    images = [(path, image_format)]
    _check(path)
    if image_format == "qcow2":
        try:
            images = chain(path, backing_files=backing_files)
        except Qcow2Error as error:
            raise DaemonError(str(error)) from error
    argv = [program]
    # From the last backing file to the image: a node refers to nodes that are there.
    for index in reversed(range(len(images))):
        image, kind = images[index]
        driver = "host_device" if stat.S_ISBLK(_check(image)) else "file"
        read_only = readonly or index > 0
        # A comma in a value is written twice (qemu-storage-daemon's option syntax).
        name = os.path.abspath(image).replace(",", ",,")
        access = f"read-only={_switch(read_only)},cache.direct={_switch(direct)},discard=unmap"
        argv += ["--blockdev", f"driver={driver},node-name=file{index},filename={name},{access}"]
        argv += ["--blockdev", _format_node(kind, index, index + 1 < len(images), read_only, direct)]
    export = f"type=vhost-user-blk,id=disk,node-name=disk0,writable={_switch(not readonly)}"
    return [*argv, "--export", f"{export},num-queues={queues},addr.type=fd,addr.str={FIRST_FD}"]


def _format_node(kind: str, index: int, backed: bool, readonly: bool, direct: bool) -> str:
    """The node that reads the format, in JSON: no other syntax can say that there is no backing file, whatever the
    header says when the daemon reads it.
    """
    behind = f'"disk{index + 1}"' if backed else "null"
    backing = f'"backing":{behind},' if kind == "qcow2" else ""
    return (
        f'{{"driver":"{kind}","node-name":"disk{index}","file":"file{index}",{backing}"discard":"unmap",'
        f'"read-only":{_boolean(readonly)},"cache":{{"direct":{_boolean(direct)}}}}}'
    )


def _switch(value: bool) -> str:
    return "on" if value else "off"


def _boolean(value: bool) -> str:
    return "true" if value else "false"


def _check(path: str) -> int:
    """The file's mode. Raises `DaemonError` when it is no image."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise DaemonError(f"cannot open disk image {path}: {os.strerror(error.errno or 0)}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise DaemonError(f"disk image {path} is neither a file nor a block device")
    return mode


def _program() -> str:
    return find_program(NAME, PACKAGE)
