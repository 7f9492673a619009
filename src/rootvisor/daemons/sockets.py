# SPDX-License-Identifier: Apache-2.0
"""Sockets between a VM and its daemons that nobody else can connect to, and that leave nothing behind."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class PrivateFolder:
    """A folder for one program's sockets and pipes, named by chance; gone with everything in it on exit of `with`.

    `mode` 0o711 lets other users use what they know the name of: a daemon that gave its rights away.
    """

    __slots__ = ("_names", "path")

    def __init__(self, mode: int = 0o700) -> None:
        parent = os.environ.get("XDG_RUNTIME_DIR") if mode == 0o700 else None
        if not parent or not os.access(parent, os.W_OK):
            parent = os.environ.get("TMPDIR") or "/tmp"
        self.path = os.path.join(parent, f"rootvisor-{os.urandom(16).hex()}")
        os.mkdir(self.path, 0o700)
        os.chmod(self.path, mode)
        self._names: list[str] = []

    def __enter__(self) -> PrivateFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._names:
            try:
                os.unlink(name)
            except OSError:
                pass
        try:
            os.rmdir(self.path)
        except OSError:
            pass

    def name(self, name: str) -> str:
        """The path of a file in the folder, to be removed with it."""
        path = os.path.join(self.path, name)
        self._names.append(path)
        return path


def connected_listener() -> tuple[int, int]:
    """(our end of a connection, the listening socket in whose queue it waits for the daemon to accept it).

    The socket's name is gone already, so that this is the only connection there will ever be.
    """
    import _socket  # the module behind socket, a tenth of its import time

    kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC
    with PrivateFolder() as folder:
        listener, connection = _socket.socket(_socket.AF_UNIX, kind), _socket.socket(_socket.AF_UNIX, kind)
        folder.name("s")
        # An address has room for 107 bytes, which a folder's path may exceed.
        place = os.open(folder.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            address = f"/proc/self/fd/{place}/s"
            listener.bind(address)
            listener.listen(1)
            connection.connect(address)
        finally:
            os.close(place)
    return connection.detach(), listener.detach()


def connected_pair() -> tuple[int, int]:
    """Two connected stream sockets."""
    import _socket

    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    return ours.detach(), theirs.detach()
