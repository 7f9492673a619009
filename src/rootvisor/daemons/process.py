# SPDX-License-Identifier: Apache-2.0
"""One daemon process: started, watched, ended."""

from __future__ import annotations

import fcntl
import os
import select

from ..files.program import find_on_path
from .spawner import spawn

# What is kept of a daemon's messages.
_TAIL_BYTES = 4096
_PIPE_BYTES = 1 << 16
# Descriptors that a daemon gets are numbered from here on.
FIRST_FD = 3
# Above what any daemon gets: a source that is moved first cannot be overwritten by a target.
_CLEAR_OF_TARGETS = 64


class DaemonError(Exception):
    """A daemon is missing, does not start, or has ended; one line that says why, with the mend where there is one."""


def find_program(name: str, package: str, places: tuple[str, ...] = ()) -> str:
    """The path of a program. Raises `DaemonError` with the package to install."""
    found = find_on_path(name)
    if found is not None:
        return found
    for place in places:
        if os.access(place, os.X_OK):
            return place
    raise DaemonError(f"{name} is missing; apt-get install {package}")


class Daemon:
    """A running process.

    It is killed when this process ends (PR_SET_PDEATHSIG, by setpriv(1) of util-linux). A daemon that changes its user
    loses that; all of those end when their socket closes.

    Arguments:
        name: for messages.
        argv: the command; argv[0] is a path.
        fds: descriptors that it gets as numbers 3, 4, ...; this process keeps its own.

    Attributes:
        pid: its process id.
        fd: a pidfd; readable once the process has ended.

    Raises `DaemonError` when the program cannot be executed.
    """

    __slots__ = ("_stderr", "_tail", "fd", "name", "pid", "status")

    def __init__(self, name: str, argv: list[str], fds: tuple[int, ...] = ()) -> None:
        self.name = name
        self.status: int | None = None
        self._tail = b""
        if not os.access(argv[0], os.X_OK):
            raise DaemonError(f"cannot start {name}: {argv[0]} is not a program")
        setpriv = find_on_path("setpriv")
        if setpriv is not None:
            argv = [setpriv, "--pdeathsig", "KILL", "--", *argv]
        self._stderr, writer = os.pipe2(os.O_CLOEXEC)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        # A daemon that says more than anybody reads must not wait for us.
        os.set_blocking(writer, False)
        os.set_blocking(self._stderr, False)
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _CLEAR_OF_TARGETS) for fd in (null, writer, *fds)]
        targets = [0, 2, *range(FIRST_FD, FIRST_FD + len(fds))]
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for fd, target in zip(moved, targets, strict=True)]
        actions.append((os.POSIX_SPAWN_DUP2, moved[0], 1))
        try:
            self.pid = spawn(argv, actions)
        except OSError as error:
            os.close(self._stderr)
            raise DaemonError(f"cannot start {name}: {os.strerror(error.errno or 0)}") from error
        finally:
            for fd in (null, writer, *moved):
                os.close(fd)
        self.fd = os.pidfd_open(self.pid)

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._reap(0)

    def await_readable(self, fd: int, seconds: float) -> None:
        """Wait until `fd` is readable: a sign of life that the daemon gives. Raises `DaemonError`."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self.fd, select.POLLIN)
        ready = dict(poll.poll(seconds * 1000))
        if ready.get(fd, 0) & select.POLLIN:
            return
        if ready:
            raise DaemonError(self.obituary())
        raise DaemonError(f"{self.name} does not answer within {seconds:g} seconds{self._last_words()}")

    def obituary(self) -> str:
        """One line: how it ended, with the last thing that it said."""
        # Its socket closes a little before it can be waited for.
        if self._reap(1000):
            return f"{self.name} hung up{self._last_words()}"
        status = self.status or 0
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{self.name} {how}{self._last_words()}"

    def close(self, patience: float = 5.0) -> None:
        """End it: by SIGTERM, so that it can put its files in order, after `patience` seconds by SIGKILL."""
        from _signal import SIGKILL, SIGTERM  # type: ignore[import-not-found, unused-ignore]

        if self.fd < 0:
            return
        for signal, milliseconds in ((SIGTERM, int(patience * 1000)), (SIGKILL, 10000)):
            if not self._reap(0):
                break
            self._kill(signal)
            self._reap(milliseconds)
        # Its children are of its process group.
        self._kill(SIGKILL)
        os.close(self.fd)
        os.close(self._stderr)
        self.fd = self._stderr = -1

    def _kill(self, signal: int) -> None:
        try:
            os.killpg(self.pid, signal)
        except (ProcessLookupError, PermissionError):
            pass

    def _reap(self, milliseconds: int) -> bool:
        """Wait for the end; true while it still lives."""
        if self.status is not None or self.fd < 0:
            return False
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(milliseconds):
            return True
        try:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:  # somebody else waits for every child of this process
            self.status = 0
        return False

    def _last_words(self) -> str:
        while self._stderr >= 0:
            try:
                part = os.read(self._stderr, _PIPE_BYTES)
            except BlockingIOError:
                break
            if not part:
                break
            self._tail = (self._tail + part)[-_TAIL_BYTES:]
        lines = [line.strip() for line in self._tail.decode(errors="replace").splitlines()]
        words = [line for line in lines if line and not line.startswith("Failed to send ")]
        return f": {words[-1]}" if words else ""
