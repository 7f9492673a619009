# SPDX-License-Identifier: Apache-2.0
"""A deterministic writer of cpio archives in the "newc" form that Linux unpacks at boot.

Source: kernel ``Documentation/driver-api/early-userspace/buffer-format.rst``. Equal calls give equal bytes:
owner 0, time 0, inode numbers in the order of the calls.
"""

from __future__ import annotations

import stat

_MAGIC = b"070701"
_TRAILER = b"TRAILER!!!"
_MAX_BYTES = 0xFFFFFFFF


class CpioWriter:
    """Collects entries; parents of an entry are made where the archive has none yet. Paths are absolute."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._known: set[str] = {"/"}
        self._inode = 0

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory, once."""
        if path not in self._known:
            self._parents(path)
            self._known.add(path)
            self._entry(path, stat.S_IFDIR | mode, b"")

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file of at most 4 GiB - 1."""
        if len(content) > _MAX_BYTES:
            raise ValueError(f"{path}: {len(content)} bytes do not fit a newc archive")
        self._parents(path)
        self._entry(path, stat.S_IFREG | mode, content)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._parents(path)
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node."""
        self._parents(path)
        self._entry(path, stat.S_IFCHR | mode, b"", major, minor)

    def finish(self) -> bytes:
        """The whole archive; its length is a multiple of 4, so that another may follow."""
        self._inode = -1
        self._entry("/" + _TRAILER.decode(), 0, b"")
        archive = b"".join(self._parts)
        self._parts = []
        return archive

    def _parents(self, path: str) -> None:
        parent = path.rpartition("/")[0] or "/"
        self.directory(parent)

    def _entry(self, path: str, mode: int, content: bytes, major: int = 0, minor: int = 0) -> None:
        self._inode += 1
        name = path.lstrip("/").encode() + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name), 0)
        header = _MAGIC + b"".join(b"%08X" % field for field in fields) + name
        self._parts += [header, bytes(-len(header) % 4), content, bytes(-len(content) % 4)]
