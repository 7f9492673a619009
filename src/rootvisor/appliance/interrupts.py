# SPDX-License-Identifier: Apache-2.0
"""Signals to the outer process, turned into bytes on a socket that the event loop watches."""

from __future__ import annotations

import signal
import socket
import threading
from types import FrameType

#: Signals that end a program and are passed on to the inner one.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CAUGHT = (*ENDING, signal.SIGPWR, signal.SIGWINCH)


class Interrupts:
    """Context manager: inside, signals do nothing but appear on :attr:`socket`, one byte each. Outside the main
    thread, where Python has no signals, it stays silent."""

    def __init__(self) -> None:
        self.socket, self._write = socket.socketpair()
        self.socket.setblocking(False)
        self._write.setblocking(False)
        self._old: dict[int, object] = {}
        self._old_wakeup = -1
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interrupts:
        if self._active:
            self._old_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            for number in _CAUGHT:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._old[number] = signal.signal(number, _nothing)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._active:
            signal.set_wakeup_fd(self._old_wakeup)
        self.socket.close()
        self._write.close()

    def received(self) -> list[signal.Signals]:
        """The signals since the last call."""
        try:
            data = self.socket.recv(256)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in data if number in _CAUGHT]


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Handle a signal whose byte says everything."""
