# SPDX-License-Identifier: Apache-2.0
"""Sockets for the appliance's processes, none of which leaves a file behind."""

from __future__ import annotations

import errno
import os
import socket

from .errors import ApplianceError


def served_connection() -> tuple[socket.socket, socket.socket]:
    """A listening socket for a server and the one connection that it will accept first.

    The name is abstract (unix(7)), so nothing remains, and whoever finds it comes too late: with a backlog of 0
    only one connection waits to be accepted, and either that is ours or our connect fails and we take another
    name.
    """
    for _ in range(20):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(b"\0rootvisor-" + os.urandom(16).hex().encode())
            client.setblocking(False)
            listener.listen(0)
            client.connect(listener.getsockname())
        except OSError as error:
            listener.close()
            client.close()
            if error.errno not in (errno.EAGAIN, errno.EADDRINUSE):
                raise ApplianceError(f"cannot create a socket: {error.strerror}") from error
        else:
            client.setblocking(True)
            return listener, client
    raise ApplianceError("cannot create a private socket: another program connects to every one; end it")


def memory_file(name: str, *parts: bytes) -> int:
    """A file that exists only as long as a descriptor is open; gives the descriptor."""
    fd = os.memfd_create(name)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(fd, rest) :]
    except OSError as error:
        os.close(fd)
        raise ApplianceError(
            f"no memory for the initial ramdisk: {error.strerror}; end other programs"
        ) from error
    return fd
