# SPDX-License-Identifier: Apache-2.0
"""Events of the VMM and its guest, one JSON document on a line each, for whoever watches.

A document has ``timestamp`` (``secs`` and ``nanos`` since the monitor was opened), ``source``, ``event`` and
``properties`` (text to text, or null): the fields of Cloud Hypervisor's event monitor. A thread writes them: whoever
reports an event never waits for the reader. Of a reader that does not keep up events are dropped, and the next one that
it gets says how many: source ``event-monitor``, event ``dropped``.
"""

from __future__ import annotations

import os
import stat
from _queue import SimpleQueue
from _thread import allocate_lock, start_new_thread
from time import monotonic_ns

from .json_text import quoted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .schema import Document

_MOST_WAITING = 1000
_CLOSE_SECONDS = 1.0


class EventMonitor:
    """Writes events to a file descriptor, which it owns from now on."""

    __slots__ = ("_done", "_dropped", "_fd", "_queue", "_start")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._start = monotonic_ns()
        self._dropped = 0
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._done = allocate_lock()
        self._done.acquire()
        start_new_thread(self._write_all, ())

    @classmethod
    def open(cls, target: Document) -> EventMonitor:
        """A monitor for ``{"path": ...}`` or ``{"fd": ...}``. OSError when that cannot be written."""
        if "fd" in target:
            fd = os.dup(target["fd"])
        else:
            fd = _open(target["path"])
        return cls(fd)

    def report(self, source: str, event: str, properties: dict[str, str] | None = None) -> None:
        """Report an event; never waits, from any thread, signal handlers included."""
        nanoseconds = monotonic_ns() - self._start
        if self._queue.qsize() >= _MOST_WAITING:
            self._dropped += 1
            return
        self._say_what_was_dropped(nanoseconds)
        self._queue.put(_line(nanoseconds, source, event, properties))

    def _say_what_was_dropped(self, nanoseconds: int) -> None:
        if self._dropped:
            count, self._dropped = self._dropped, 0
            self._queue.put(_line(nanoseconds, "event-monitor", "dropped", {"count": str(count)}))

    def close(self) -> None:
        """Write what waits, for a second at most, and end the thread."""
        self._say_what_was_dropped(monotonic_ns() - self._start)
        self._queue.put(None)
        self._done.acquire(timeout=_CLOSE_SECONDS)

    def _write_all(self) -> None:
        try:
            while (line := self._queue.get()) is not None:
                while line:
                    line = line[os.write(self._fd, line) :]
        except OSError:  # the reader is gone: so are its events, and nobody is there to be told
            while self._queue.get() is not None:
                pass
        finally:
            os.close(self._fd)
            self._done.release()


def _open(path: str) -> int:
    """A file descriptor that events can be written to. Does not wait for the reader of a FIFO."""
    try:
        is_fifo = stat.S_ISFIFO(os.stat(path).st_mode)
    except FileNotFoundError:
        is_fifo = False
    if is_fifo:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY | os.O_CLOEXEC, 0o600)


def _line(nanoseconds: int, source: str, event: str, properties: dict[str, str] | None) -> bytes:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    pairs = (
        "null"
        if not properties
        else "{" + ", ".join(f"{quoted(name)}: {quoted(value)}" for name, value in properties.items()) + "}"
    )
    return (
        f'{{"timestamp": {{"secs": {seconds}, "nanos": {rest}}}, "source": {quoted(source)}, '
        f'"event": {quoted(event)}, "properties": {pairs}}}\n'
    ).encode()
