# SPDX-License-Identifier: Apache-2.0
"""A thread that starts processes and never ends.

The kernel sends the parent death signal when the *thread* that started a process ends (prctl(2), PR_SET_PDEATHSIG), and
a device may be added by a thread that lives as long as its request.
"""

from __future__ import annotations

import os
from _thread import allocate_lock, start_new_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Order:
    __slots__ = ("actions", "argv", "done", "error", "pid")

    def __init__(self, argv: list[str], actions: list[Any]) -> None:
        self.argv = argv
        self.actions = actions
        self.done = allocate_lock()
        self.done.acquire()
        self.error: OSError | None = None
        self.pid = 0


class _Spawner:
    __slots__ = ("_lock", "_order", "_owner", "_wake")

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._wake = allocate_lock()
        self._order: _Order | None = None
        self._owner = 0

    def spawn(self, argv: list[str], actions: list[Any]) -> int:
        order = _Order(argv, actions)
        with self._lock:
            if self._owner != os.getpid():  # the first time, or after a fork
                self._wake = allocate_lock()
                self._wake.acquire()
                start_new_thread(self._run, (self._wake,))
                self._owner = os.getpid()
            self._order = order
            self._wake.release()
            order.done.acquire()
        if order.error is not None:
            raise order.error
        return order.pid

    def _run(self, wake: Any) -> None:
        while True:
            wake.acquire()
            order, self._order = self._order, None
            assert order is not None
            try:
                # A group of its own: Ctrl-C at the terminal is for us alone.
                order.pid = os.posix_spawn(
                    order.argv[0], order.argv, os.environ, file_actions=order.actions, setpgroup=0
                )
            except OSError as error:
                order.error = error
            order.done.release()


_SPAWNER = _Spawner()


def spawn(argv: list[str], actions: list[Any]) -> int:
    """os.posix_spawn in a process group of its own, by the thread; returns the process id. Raises `OSError`."""
    return _SPAWNER.spawn(argv, actions)
