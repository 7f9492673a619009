# SPDX-License-Identifier: Apache-2.0
"""A daemon and our end of the socket to it."""

from __future__ import annotations

import os

from .process import Daemon, DaemonError
from .sockets import connected_listener

# VHOST_USER_GET_FEATURES (1), protocol version 1, no payload: a question that may be asked at any time.
_QUESTION = (1).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(4)
_ANSWER_BYTES = 20
START_SECONDS = 60.0


class Served:
    """What a device needs: `take_socket` gives it the connection, `daemon` is the process behind.

    Close the device first, then this.
    """

    __slots__ = ("_socket", "daemon")

    def __init__(self, daemon: Daemon, connection: int) -> None:
        self.daemon = daemon
        self._socket = connection

    def take_socket(self) -> int:
        """The connected socket, whose owner is the caller from now on. Once."""
        fd, self._socket = self._socket, -1
        if fd < 0:
            raise ValueError(f"the socket of {self.daemon.name} is taken")
        return fd

    def await_answer(self, seconds: float = START_SECONDS) -> None:
        """Wait until the vhost-user backend answers. Raises `DaemonError`, and then everything is closed."""
        try:
            await_features(self.daemon, self._socket, seconds)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hang up and end the daemon."""
        fd, self._socket = self._socket, -1
        if fd >= 0:
            os.close(fd)
        self.daemon.close()


def start_vhost_user(name: str, argv: list[str], seconds: float = START_SECONDS) -> Served:
    """Start a daemon that accepts a vhost-user front end on the listening socket 3, and wait until it answers.

    Raises `DaemonError`.
    """
    served = spawn_vhost_user(name, argv)
    served.await_answer(seconds)
    return served


def spawn_vhost_user(name: str, argv: list[str]) -> Served:
    """Start such a daemon without waiting for it; see `Served.await_answer`. Raises `DaemonError`."""
    connection, listener = connected_listener()
    try:
        daemon = Daemon(name, argv, (listener,))
    except BaseException:
        os.close(connection)
        raise
    finally:
        os.close(listener)
    return Served(daemon, connection)


def await_features(daemon: Daemon, connection: int, seconds: float) -> None:
    """Wait until a vhost-user backend says what it offers. Raises `DaemonError`."""
    try:
        os.write(connection, _QUESTION)
        got = 0
        while got < _ANSWER_BYTES:
            daemon.await_readable(connection, seconds)
            part = os.read(connection, _ANSWER_BYTES - got)
            if not part:
                raise DaemonError(daemon.obituary())
            got += len(part)
    except OSError as error:  # the connection was reset
        raise DaemonError(daemon.obituary()) from error
