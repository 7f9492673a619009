# SPDX-License-Identifier: Apache-2.0
"""The API's server: HTTP/1.1 on a Unix socket to which only the user can connect.

One thread waits for connections and on those that are idle; a request gets a thread while it is read and carried out,
so that a slow client or a long call holds up nobody. Idle connections cost nothing and stay for as long as the client
likes; when there are too many, the one idle for longest is closed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
from _socket import AF_UNIX, SHUT_WR, SO_ACCEPTCONN, SOCK_STREAM, SOL_SOCKET, socket
from _thread import allocate_lock, start_new_thread
from time import monotonic

from .api_http import CONTINUE, HttpError, head_end, parse_head, response

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .schema import Document

    #: Carries out a call: method, path and body to status, body (None: none) and more headers.
    Answer = Callable[[str, str, bytes], tuple[int, object, tuple[tuple[str, str], ...]]]

MAX_CONNECTIONS = 256
MAX_REQUESTS = 16
"""Requests that are read or carried out at one time; others wait."""
REQUEST_SECONDS = 10.0
"""For a request to arrive whole, and for its response to be taken."""
_LINGER_SECONDS = 1.0
_STOP_SECONDS = 2.0
_ACCEPT_AGAIN_SECONDS = 0.2
_READ_BYTES = 64 << 10
_BACKLOG = 64
_MAX_SOCKET_PATH = 107
"""Bytes that struct sockaddr_un has room for."""


class ApiError(Exception):
    """The API cannot be served; one line with the reason and what mends it."""


class Listener:
    """A Unix socket that listens, and the file that it is known by; ``path`` is empty when it was inherited."""

    __slots__ = ("_inode", "path", "socket")

    def __init__(self, target: Document) -> None:
        """Listen at ``{"path": ...}``, or on the socket ``{"fd": ...}``. ApiError."""
        self.path = ""
        self._inode = (0, 0)
        if "fd" in target:
            self.socket = _inherited(target["fd"])
        else:
            self.path = target["path"]
            self.socket = _bound(self.path)
            found = os.stat(self.path)
            self._inode = (found.st_dev, found.st_ino)
        self.socket.setblocking(False)

    def close(self) -> None:
        """Stop listening, and remove the file unless it is another's by now."""
        self.socket.close()
        if self.path:
            try:
                found = os.stat(self.path)
                if (found.st_dev, found.st_ino) == self._inode:
                    os.unlink(self.path)
            except OSError:
                pass


def _inherited(fd: int) -> socket:
    try:
        made = socket(fileno=os.dup(fd))
    except OSError as error:
        raise ApiError(f"file descriptor {fd} is no socket: {os.strerror(error.errno or 0)}") from error
    try:
        listens = made.family == AF_UNIX and made.getsockopt(SOL_SOCKET, SO_ACCEPTCONN)
    except OSError:
        listens = 0
    if not listens:
        made.close()
        raise ApiError(f"file descriptor {fd} is no Unix socket that listens")
    return made


def _bound(path: str) -> socket:
    """A socket that listens at a path, which appears when it does. One that nobody listens at any more is replaced."""
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise ApiError(f"cannot listen at {path}: the path is too long for a socket")
    made = socket(AF_UNIX, SOCK_STREAM)
    folder = -1
    draft = f".rootvisor-{os.getpid()}"
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Two that find the same old socket: the lock keeps the second from replacing the first one's new one.
        fcntl.flock(folder, fcntl.LOCK_EX)
        if os.path.lexists(path):
            _refuse_unless_stale(path)
        try:
            os.unlink(draft, dir_fd=folder)  # of a process that had our number and was killed
        except FileNotFoundError:
            pass
        made.bind(f"/proc/self/fd/{folder}/{draft}")
        try:
            os.chmod(draft, 0o600, dir_fd=folder)
            made.listen(_BACKLOG)
            os.rename(draft, os.path.basename(path), src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            os.unlink(draft, dir_fd=folder)
            raise
    except OSError as error:
        made.close()
        raise ApiError(f"cannot listen at {path}: {os.strerror(error.errno or 0)}") from error
    except ApiError:
        made.close()
        raise
    finally:
        if folder >= 0:
            os.close(folder)
    return made


def _refuse_unless_stale(path: str) -> None:
    """ApiError when a path is no socket, or somebody listens at it."""
    if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
        raise ApiError(f"cannot listen at {path}: there is a file that is no socket; choose another path")
    probe = socket(AF_UNIX, SOCK_STREAM)
    probe.settimeout(1)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        return
    finally:
        probe.close()
    raise ApiError(f"cannot listen at {path}: another process does; choose another path")


class _Connection:
    """A client: its socket, and what it has sent beyond the request that is served."""

    __slots__ = ("data", "socket")

    def __init__(self, fd: int) -> None:
        self.socket = socket(fileno=fd)
        self.data = bytearray()

    def close(self) -> None:
        self.socket.close()


class ApiServer:
    """Serves requests on a listener, which it closes in the end. `start`, then `stop`, from any thread."""

    def __init__(
        self, listener: Listener, answer: Answer, *, request_seconds: float = REQUEST_SECONDS
    ) -> None:
        self._listener = listener
        self._answer = answer
        self._request_seconds = request_seconds
        self._poll = select.poll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = allocate_lock()
        self._idle: dict[int, _Connection] = {}
        """By file descriptor, longest idle first; the waiting thread's own."""
        self._returned: list[_Connection] = []
        self._pending: list[_Connection] = []
        self._active: set[_Connection] = set()
        self._stopping = False
        self._thread_lives = allocate_lock()

    def start(self) -> None:
        """Start the thread that waits."""
        self._poll.register(self._listener.socket.fileno(), select.POLLIN)
        self._poll.register(self._wake_fd, select.POLLIN)
        self._thread_lives.acquire()
        start_new_thread(self._wait, ())

    def stop(self) -> None:
        """End: requests that are served now may be finished, for two seconds at most."""
        self._stopping = True
        os.eventfd_write(self._wake_fd, 1)
        with self._thread_lives:
            pass
        deadline = monotonic() + _STOP_SECONDS
        done = select.poll()
        while monotonic() < deadline:
            with self._lock:
                if not self._active:
                    break
            done.poll(10)
        os.close(self._wake_fd)

    # --- the waiting thread ---------------------------------------------------------------------------------------
    def _wait(self) -> None:
        accepts_from = 0.0
        try:
            while not self._stopping:
                timeout = None
                if accepts_from:
                    timeout = max(0, int((accepts_from - monotonic()) * 1000) + 1)
                    if accepts_from <= monotonic():
                        self._poll.register(self._listener.socket.fileno(), select.POLLIN)
                        accepts_from, timeout = 0.0, None
                for fd, _ in self._poll.poll(timeout):
                    if fd == self._wake_fd:
                        os.eventfd_read(self._wake_fd)
                        self._take_back()
                    elif fd in self._idle:
                        self._poll.unregister(fd)
                        self._hand_out(self._idle.pop(fd))
                    elif not self._accept():
                        self._poll.unregister(self._listener.socket.fileno())
                        accepts_from = monotonic() + _ACCEPT_AGAIN_SECONDS
        finally:
            self._listener.close()
            with self._lock:
                waiting, self._pending = self._pending, []
                waiting += self._returned
            for connection in [*self._idle.values(), *waiting]:
                connection.close()
            self._thread_lives.release()

    def _accept(self) -> bool:
        """Take one new connection. False: there is no file descriptor for it, try later."""
        try:
            fd, _ = self._listener.socket._accept()  # type: ignore[attr-defined]
        except OSError as error:
            return error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
        connection = _Connection(fd)
        with self._lock:
            count = len(self._idle) + len(self._active) + len(self._pending) + len(self._returned)
        if count >= MAX_CONNECTIONS:
            if not self._idle:
                _send_and_close(connection, 503, "there are too many connections")
                return True
            oldest = next(iter(self._idle))
            self._poll.unregister(oldest)
            self._idle.pop(oldest).close()
        self._idle[fd] = connection
        self._poll.register(fd, select.POLLIN)
        return True

    def _take_back(self) -> None:
        """Wait on the connections whose requests have been served."""
        with self._lock:
            returned, self._returned = self._returned, []
        for connection in returned:
            fd = connection.socket.fileno()
            self._idle[fd] = connection
            self._poll.register(fd, select.POLLIN)

    def _hand_out(self, connection: _Connection) -> None:
        """A thread for a connection that has something to say, or a place among those that wait for one."""
        with self._lock:
            if len(self._active) >= MAX_REQUESTS:
                self._pending.append(connection)
                return
            self._active.add(connection)
        try:
            start_new_thread(self._work, (connection,))
        except RuntimeError:  # no more threads on this machine
            with self._lock:
                self._active.discard(connection)
            _send_and_close(connection, 503, "there are no more threads on this machine")

    # --- the threads of requests ----------------------------------------------------------------------------------
    def _work(self, connection: _Connection | None) -> None:
        while connection is not None:
            keep = False
            try:
                keep = self._serve(connection)
            except OSError:
                pass  # the client went away, or takes nothing
            finally:
                if not keep:
                    connection.close()
                connection = self._next(connection, keep)

    def _next(self, served: _Connection, keep: bool) -> _Connection | None:
        with self._lock:
            self._active.discard(served)
            if keep and not self._stopping:
                self._returned.append(served)
                os.eventfd_write(self._wake_fd, 1)
            elif keep:
                served.close()
            if not self._pending:
                return None
            following = self._pending.pop(0)
            self._active.add(following)
            return following

    def _serve(self, connection: _Connection) -> bool:
        """Serve the requests that a connection has sent; whether it stays open. OSError: it is gone."""
        while True:
            try:
                request = self._read(connection)
            except HttpError as error:
                _send(connection, response(error.status, [str(error)], keep_alive=False))
                _linger(connection)
                return False
            if request is None:
                return False
            method, path, body, keep_alive = request
            status, document, headers = self._answered(method, path, body)
            keep_alive = keep_alive and not self._stopping
            _send(connection, response(status, document, keep_alive=keep_alive, headers=headers))
            if not keep_alive:
                _linger(connection)
                return False
            if not connection.data:
                return True

    def _read(self, connection: _Connection) -> tuple[str, str, bytes, bool] | None:
        """The next request: method, path, body, whether the connection stays. None: the client has ended it."""
        deadline = monotonic() + self._request_seconds
        data = connection.data
        while not (start := head_end(data)):
            if not self._more(connection, deadline):
                return None
        request = parse_head(bytes(data[:start]))
        end = start + request.length
        if request.expects_continue and len(data) < end:
            _send(connection, CONTINUE)
        while len(data) < end:
            if not self._more(connection, deadline):
                return None
        body = bytes(data[start:end])
        del data[:end]
        return request.method, request.path, body, request.keep_alive

    def _more(self, connection: _Connection, deadline: float) -> bool:
        """Receive something; False: the client has ended the connection. HttpError 408 when it takes too long."""
        left = deadline - monotonic()
        received = None
        if left > 0:
            connection.socket.settimeout(left)
            try:
                received = connection.socket.recv(_READ_BYTES)
            except TimeoutError:
                pass
        if received is None:
            raise HttpError(408, f"the request did not arrive within {self._request_seconds:g} seconds")
        connection.data += received
        return bool(received)

    def _answered(
        self, method: str, path: str, body: bytes
    ) -> tuple[int, object, tuple[tuple[str, str], ...]]:
        try:
            return self._answer(method, path, body)
        except Exception as error:  # an error of the program: said, and the server goes on
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return 500, [f"internal error: {text}"], ()


def _send(connection: _Connection, data: bytes) -> None:
    connection.socket.settimeout(REQUEST_SECONDS)
    connection.socket.sendall(data)


def _linger(connection: _Connection) -> None:
    """Let a client that still sends see the response before the connection ends."""
    deadline = monotonic() + _LINGER_SECONDS
    try:
        connection.socket.shutdown(SHUT_WR)
        while (left := deadline - monotonic()) > 0:
            connection.socket.settimeout(left)
            if not connection.socket.recv(_READ_BYTES):
                return
    except OSError:
        return


def _send_and_close(connection: _Connection, status: int, message: str) -> None:
    """A short response that is not waited for."""
    try:
        connection.socket.setblocking(False)
        connection.socket.send(response(status, [message], keep_alive=False))
    except OSError:
        pass
    connection.close()
