# SPDX-License-Identifier: Apache-2.0
"""A guest in a folder: ``memory`` is its RAM, with holes where there is nothing, ``state`` the rest (marshal)."""

from __future__ import annotations

import errno
import marshal
import os
from _thread import allocate_lock, start_new_thread

from .controller import MachineError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from .guest_ram import GuestRam

VERSION = 1
_MEMORY, _STATE = "memory", "state"
_MAX_STATE_BYTES = 256 << 20
_PIECE = 64 << 20


def write_snapshot(folder: str, ram: GuestRam, state: dict[str, Any]) -> None:
    """Writes both files; OSError when that fails, and then neither is there."""
    memory, rest = os.path.join(folder, _MEMORY), os.path.join(folder, _STATE)
    try:
        _write_memory(memory, ram)
        with open(rest, "wb", opener=_private) as file:
            file.write(marshal.dumps({"version": VERSION, "memory_bytes": len(ram.view), **state}))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        for path in (memory, rest):
            try:
                os.unlink(path)
            except OSError:
                pass
        raise


def read_state(folder: str) -> dict[str, Any]:
    """What :func:`write_snapshot` was given. MachineError for a file that is none of those."""
    path = os.path.join(folder, _STATE)
    with open(path, "rb") as file:
        data = file.read(_MAX_STATE_BYTES)
    try:
        state = marshal.loads(data)
    except (ValueError, EOFError, TypeError) as error:
        raise MachineError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise MachineError(f"{path} is of another version; it can be restored by the Rootvisor that wrote it")
    return state


class MemoryReader:
    """Fills the guest's RAM, which is still empty, on a thread of its own while the rest of the machine is made."""

    __slots__ = ("_error", "_running", "_stop")

    def __init__(self, folder: str, ram: GuestRam) -> None:
        self._error: Exception | None = None
        self._stop = False
        self._running = allocate_lock()
        self._running.acquire()
        try:
            start_new_thread(self._read, (folder, ram))
        except RuntimeError:  # no more threads
            self._read(folder, ram)

    def _read(self, folder: str, ram: GuestRam) -> None:
        try:
            _read_memory(folder, ram, lambda: self._stop)
        except Exception as error:  # raised again where it is waited for
            self._error = error
        finally:
            self._running.release()

    def wait(self) -> None:
        """Waits until all is there. OSError when it cannot be read, MachineError when the file is not of its size."""
        with self._running:
            pass
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Nothing is written into the RAM any more."""
        self._stop = True
        with self._running:
            pass


def _read_memory(folder: str, ram: GuestRam, stopped: Callable[[], bool]) -> None:
    path = os.path.join(folder, _MEMORY)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size != len(ram.view):
            raise MachineError(f"{path} has {size} bytes, the guest's memory {len(ram.view)}")
        for start, end in _data(fd, size):
            # From file to file: pages that nobody has touched yet need no place in this process for that.
            os.lseek(ram.fd, start, os.SEEK_SET)
            while start < end and not stopped():
                count = os.sendfile(ram.fd, fd, start, min(end - start, _PIECE))
                if not count:
                    raise MachineError(f"{path} became shorter while it was read")
                start += count
    finally:
        os.close(fd)


def _write_memory(path: str, ram: GuestRam) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = ram.view
        os.ftruncate(fd, len(view))
        for start, end in _data(ram.fd, len(view)):
            while start < end:
                start += os.pwrite(fd, view[start : min(end, start + _PIECE)], start)
        os.fsync(fd)
    finally:
        os.close(fd)


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The pieces of a file that are no holes."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, min(at, size)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
