# SPDX-License-Identifier: Apache-2.0
"""The thread of a device: waits on file descriptors and calls back with the device's lock held."""

from __future__ import annotations

import os
import select
from _thread import RLock, allocate_lock, get_ident, start_new_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Worker:
    """A poll loop.

    `watch` and `unwatch` may be called from any thread that holds `lock`; `post` from anywhere, a signal handler
    included. The thread starts with the first `start` and is a daemon: it never keeps the process alive.

    Arguments:
        name: of the thread.
        failed: called with the lock held when a callback raised; the loop goes on.
    """

    def __init__(self, name: str, failed: Callable[[Exception], None]) -> None:
        self.name = name
        self.lock = RLock()
        self._failed = failed
        self._poll = select.poll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._posted: list[Callable[[], None]] = []
        self._thread = 0
        #: held while the thread lives
        self._alive = allocate_lock()
        self._wake_fd = -1
        self._stopping = False

    def start(self) -> None:
        """Start the thread unless it runs."""
        with self.lock:
            if not self._thread and not self._stopping:
                self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._poll.register(self._wake_fd, select.POLLIN)
                if self._posted:
                    self._wake()
                self._alive.acquire()
                try:
                    self._thread = start_new_thread(self._thread_body, ())
                except RuntimeError:  # no more threads on this machine
                    self._alive.release()
                    raise

    def stop(self) -> None:
        """End the thread and wait for it. The worker cannot be started again."""
        self._stopping = True
        self._wake()
        if self._thread != get_ident():
            with self._alive:
                pass
        with self.lock:
            self._callbacks.clear()
            self._posted.clear()
            fd, self._wake_fd = self._wake_fd, -1
        if fd >= 0:
            os.close(fd)

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(revents)` while `events` (or an error) are pending on `fd`; replaces an earlier watch."""
        self._poll.register(fd, events)
        self._callbacks[fd] = callback
        if get_ident() != self._thread:
            self._wake()

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`; no harm if nobody watches it."""
        if self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)
            if get_ident() != self._thread:
                self._wake()

    def post(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the worker's thread, with the lock held, when it runs."""
        self._posted.append(callback)
        self._wake()

    def _wake(self) -> None:
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def _thread_body(self) -> None:
        try:
            self._run()
        finally:
            self._alive.release()

    def _run(self) -> None:
        while True:
            # Registered descriptors may have been replaced since: callbacks are looked up under the lock, and each
            # of them copes with being called for nothing.
            ready = self._poll.poll()
            with self.lock:
                if self._stopping:
                    return
                for fd, events in ready:
                    if fd == self._wake_fd:
                        self._run_posted()
                        continue
                    callback = self._callbacks.get(fd)
                    if callback is None:
                        continue
                    if events & select.POLLNVAL:
                        self.unwatch(fd)
                    try:
                        callback(events)
                    except Exception as error:  # a defect of ours ends this device, not the guest
                        self._failed(error)

    def _run_posted(self) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass
        while self._posted:
            callback = self._posted.pop(0)
            try:
                callback()
            except Exception as error:  # as above
                self._failed(error)
