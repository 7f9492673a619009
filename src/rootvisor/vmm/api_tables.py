# SPDX-License-Identifier: Apache-2.0
"""Tables of the API's bodies that are not part of a virtual machine's configuration."""

from __future__ import annotations

from .config import MAX_MEMORY
from .schema import Choice, ConfigError, Field, Flag, Integer, Path, Size, Table, Text, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .schema import Document

_AT_ONCE = "all memory is read before the guest goes on."
_URL = "A folder, as `file:///path` or as a path."


def _check_restore(restore: Document, name: Callable[[str], str]) -> None:
    if restore["prefault"] and restore["memory_restore_mode"] == "OnDemand":
        raise ConfigError(name("prefault"), "and reading memory on demand exclude each other")


REMOVE_DEVICE = Table(
    "VmRemoveDevice",
    "The device to remove.",
    (Field("id", Text(64, "NAME"), "The device's name, as in `vm.info`.", required=True),),
)

SNAPSHOT = Table(
    "VmSnapshotConfig",
    "Where a snapshot goes.",
    (Field("destination_url", Path("FOLDER"), _URL + " It is made if it is not there.", required=True),),
    shorthand="destination_url",
)

RESTORE = Table(
    "RestoreConfig",
    "Where a snapshot comes from, and how.",
    (
        Field("source_url", Path("FOLDER"), _URL, required=True),
        Field("prefault", Flag(), _AT_ONCE, default=False, inert=True),
        Field(
            "memory_restore_mode",
            Choice("Copy", "OnDemand"),
            _AT_ONCE,
            default="Copy",
            inert=True,
        ),
        Field("resume", Flag(), "Let the guest go on; without, it is paused.", default=False),
        Field("zone_updates", Unsupported("the guest's memory is one zone", list)),
        Field("net_fds", Unsupported("name the tap interface in the configuration", list)),
        Field("vfio_fds", Unsupported("devices of the machine are not passed to guests", list)),
        Field("iommufd_fd", Unsupported("devices of the machine are not passed to guests")),
    ),
    _check_restore,
    shorthand="source_url",
)

RESIZE = Table(
    "VmResize",
    "The size that a running guest should have.",
    (
        Field("desired_balloon", Size(0, MAX_MEMORY, 4096), "Bytes that the guest gives back."),
        Field("desired_vcpus", Integer(1, 4096), "Only the number that the guest has is possible."),
        Field("desired_ram", Size(1, MAX_MEMORY), "Only the size that the guest has is possible."),
    ),
)

API_SOCKET = Table(
    "ApiSocket",
    "Where the API is.",
    (
        Field("path", Path("SOCKET"), "Socket to make; only the user can connect to it."),
        Field("fd", Integer(3, 65535), "File descriptor of a socket that listens."),
    ),
    shorthand="path",
)

EVENT_MONITOR = Table(
    "EventMonitor",
    "Where events go, as JSON documents.",
    (
        Field("path", Path(), "File, FIFO or terminal; the file is made if it is not there."),
        Field("fd", Integer(1, 65535), "File descriptor that is open for writing."),
    ),
    shorthand="path",
)
