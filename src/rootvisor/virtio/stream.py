# SPDX-License-Identifier: Apache-2.0
"""Host descriptors read and written without blocking, and without O_NONBLOCK.

Standard streams share their open file description with the shell that started us: O_NONBLOCK set on them would break
the shell. So pipes and sockets are asked per call (RWF_NOWAIT, preadv2(2) and pwritev2(2)), terminals are reopened for
a description of our own, and what allows neither gets writes so small that POLLOUT promises they do not block.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# PIPE_BUF: POLLOUT on a pipe means that a whole page is free.
_SAFE_WRITE = 4096
# WAKEUP_CHARS of the kernel's line discipline.
_SAFE_TERMINAL_WRITE = 256
# pwritev2 and preadv2 take this as "at the current position".
_CURRENT = -1

_PLAIN = 0  # a read or write may take its time: regular files
_NOWAIT = 1
_OWN_NONBLOCKING = 2
_SMALL = 3


class InputStream:
    """The reading side of a descriptor, of which it keeps a duplicate."""

    def __init__(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        self.fd = -1
        self._mode = _NOWAIT if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else _PLAIN
        if os.isatty(fd):
            # Somebody else may read the terminal between our POLLIN and our read.
            self.fd = _reopen(fd, os.O_RDONLY)
        if self.fd < 0:
            self.fd = os.dup(fd)

    def read_into(self, buffers: Sequence[memoryview]) -> int | None:
        """Read after POLLIN or POLLHUP: bytes read, 0 at the end of the stream, `None` when nothing is there.

        An error of the descriptor counts as its end.
        """
        try:
            if self._mode == _NOWAIT:
                try:
                    return os.preadv(self.fd, buffers, _CURRENT, os.RWF_NOWAIT)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ESPIPE, errno.EINVAL):
                        raise
                    self._mode = _PLAIN
            return os.readv(self.fd, buffers)
        except BlockingIOError:
            return None
        except OSError:
            return 0

    def close(self) -> None:
        """Close the duplicate."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class OutputStream:
    """The writing side of a descriptor, of which it keeps a duplicate."""

    def __init__(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        self.fd = -1
        self._limit = _SAFE_WRITE
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            self._mode = _NOWAIT
        elif os.isatty(fd):
            self._mode = _OWN_NONBLOCKING
            self._limit = _SAFE_TERMINAL_WRITE
            self.fd = _reopen(fd, os.O_WRONLY)
            if self.fd < 0:
                self._mode = _SMALL
        else:
            self._mode = _PLAIN
        if self.fd < 0:
            self.fd = os.dup(fd)

    def write(self, buffers: Sequence[memoryview]) -> int:
        """Write what goes without blocking; returns the bytes taken, 0 when POLLOUT must be awaited.

        Raises `OSError` when the descriptor takes nothing any more (EPIPE, EIO).
        """
        try:
            if self._mode == _NOWAIT:
                try:
                    return os.pwritev(self.fd, buffers, _CURRENT, os.RWF_NOWAIT)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ESPIPE, errno.EINVAL):
                        raise
                    self._mode = _SMALL
                    return 0
            if self._mode != _SMALL:
                return os.writev(self.fd, buffers)
            return os.write(self.fd, buffers[0][: self._limit])
        except BlockingIOError:
            return 0

    @property
    def small(self) -> bool:
        """Whether POLLOUT must be seen before each write."""
        return self._mode == _SMALL

    def close(self) -> None:
        """Close the duplicate; the stream is broken from then on."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def advance(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `buffers` after their first `count` bytes."""
    for index, view in enumerate(buffers):
        if count < len(view):
            return [view[count:], *buffers[index + 1 :]]
        count -= len(view)
    return []


def _reopen(fd: int, mode: int) -> int:
    """A non-blocking description of our own for the terminal at `fd`; -1 where there is none to be had."""
    try:
        return os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # another user's terminal, or no /proc
        return -1
