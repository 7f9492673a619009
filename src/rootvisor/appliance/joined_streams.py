# SPDX-License-Identifier: Apache-2.0
"""The caller's streams joined to the inner program's, from its start to the last byte of its output."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence

from .streams import Input, Output
from .terminal import RawTerminal


class JoinedStreams:
    """A context manager: inside, the threads carry bytes and a terminal is raw.

    ``sockets``: the program's standard input, output and error, or twice its terminal (``tty``). ``reader_gone`` is
    called when nobody reads the caller's standard output any more; what is lost of standard error is lost.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        fds: tuple[int, int, int],
        *,
        tty: bool,
        reader_gone: Callable[[], None],
    ) -> None:
        self._sockets = sockets
        self._stack = contextlib.ExitStack()
        self._terminal = fds[0] if tty else None
        self._input = Input(fds[0], sockets[0])
        self._outputs = [Output(sockets[1], fds[1], reader_gone)]
        if not tty:
            self._outputs.append(Output(sockets[2], fds[2], lambda: None))

    def __enter__(self) -> JoinedStreams:
        if self._terminal is not None:
            self._stack.enter_context(RawTerminal(self._terminal))
        self._stack.callback(self._input.close)
        self._stack.callback(self._cut)
        for thread in (self._input, *self._outputs):
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _cut(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @property
    def received(self) -> int:
        """Bytes of output that have come so far."""
        return sum(output.received for output in self._outputs)

    @property
    def waiting(self) -> bool:
        """Whether QEMU has sent output that was not taken yet: its reader is slow."""
        return any(output.waiting() for output in self._outputs)

    def finished(self, seconds: float) -> bool:
        """Whether all output is with its readers, QEMU having ended; waits that long for one that is not."""
        for output in self._outputs:
            output.join(seconds)
            if output.is_alive():
                return False
        return True
