# SPDX-License-Identifier: Apache-2.0
"""virtiofsd behind the root's virtio-fs device: a process with a connected socket and no file in the file system."""

from __future__ import annotations

import os

from ..hypervisor.errors import HypervisorError


class FileServer:
    """Runs ``command``; in it ``{fd}`` becomes the number of the listening socket. ``connection`` is the front end's
    socket."""

    __slots__ = ("_pid", "connection")

    def __init__(self, command: list[str]) -> None:
        import _socket  # the module behind socket, a tenth of its import time

        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        listener.bind(b"")  # Linux picks an unused abstract address: nothing to clean up, whatever happens
        listener.listen(1)
        os.set_inheritable(listener.fileno(), True)
        argv = [part.replace("{fd}", str(listener.fileno())) for part in command]
        null = os.open("/dev/null", os.O_RDWR)
        try:
            self._pid = os.posix_spawn(
                argv[0],
                argv,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, null, 0),
                    (os.POSIX_SPAWN_DUP2, null, 1),
                    (os.POSIX_SPAWN_DUP2, null, 2),
                ],
                setpgroup=0,  # Ctrl-C is for us alone
            )
        except OSError as error:
            raise HypervisorError(f"cannot start {argv[0]}: {error.strerror}; is it installed?") from error
        finally:
            os.close(null)
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        connection.connect(listener.getsockname())
        listener.close()
        self.connection = connection.detach()

    def close(self) -> None:
        """Ends the server: it stops by itself when its connection closes, and is killed if not."""
        from _signal import SIGKILL  # type: ignore[import-not-found, unused-ignore]

        if not self._pid:
            return
        try:
            os.killpg(self._pid, SIGKILL)
        except ProcessLookupError:
            pass
        try:
            os.waitpid(self._pid, 0)
        except ChildProcessError:
            pass
        self._pid = 0
