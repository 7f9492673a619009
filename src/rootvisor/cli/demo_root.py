# SPDX-License-Identifier: Apache-2.0
"""The demo's part in the root partition: runs as `python -I -S demo_root.py DEMO`, as the root's command.

DEMO is a JSON document of the demo's: `script`, what shows the root partition; `argv`, the `rootvisor vmm` command;
`api`, its API's socket; `page` and `port` of the web server at 127.0.0.1; `timeout_s` for the guest.

What is seen goes to standard output as it happens, in parts that begin with a line `==rootvisor== NAME`. The guest's
console is one of them, `guest`. The guest ends with a line `demo: end` and waits for a line: until then its VMM can be
asked for its counters.
"""

from __future__ import annotations

import os
import sys
from select import POLLIN, poll
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MARK = "==rootvisor== "
LAST_LINE = b"demo: end"
_REQUEST = b"GET /api/v1/vm.counters HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_ANSWER_SECONDS = 20.0
_MAX_HEAD = 8192


def part(name: str) -> None:
    """Begin a part of the output."""
    put(f"{MARK}{name}\n".encode())


def put(data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[os.write(1, data) :]


def run_script(script: str) -> None:
    """What the root partition shows of itself."""
    pid = os.posix_spawn("/bin/sh", ["/bin/sh", "-c", script], os.environ)
    os.waitpid(pid, 0)


class WebServer:
    """A server with one page at 127.0.0.1, one request after the other; `handle` when `fd` is readable."""

    def __init__(self, port: int, page: bytes) -> None:
        import _socket  # the module behind socket, a tenth of its import time

        self._listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        self._listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen(8)
        self._page = page
        self.requests = 0

    @property
    def fd(self) -> int:
        """The listening socket."""
        return self._listener.fileno()

    def handle(self) -> None:
        """Answer one request."""
        import _socket

        fd, _address = self._listener._accept()  # type: ignore[attr-defined]
        connection = _socket.socket(fileno=fd)
        try:
            connection.settimeout(_ANSWER_SECONDS)
            request = b""
            while b"\r\n\r\n" not in request and len(request) < _MAX_HEAD:
                data = connection.recv(4096)
                if not data:
                    return
                request += data
            head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(self._page)}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode() + self._page)
            self.requests += 1
        except OSError:
            pass  # the guest went away
        finally:
            connection.close()


def counters(path: str) -> bytes:
    """What the VMM's API says of its guest's devices and exits, as JSON; empty when it says nothing."""
    import _socket

    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.settimeout(_ANSWER_SECONDS)
        connection.connect(path)
        connection.sendall(_REQUEST)
        answer = b""
        while data := connection.recv(65536):
            answer += data
    except OSError:
        return b""
    finally:
        connection.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return body if head.startswith(b"HTTP/1.1 200") else b""


def run_guest(demo: dict[str, Any]) -> None:
    """Start the VMM, pass on what its guest prints, and say how it ended."""
    server = WebServer(demo["port"], demo["page"].encode())
    console_in, console_write = os.pipe2(os.O_CLOEXEC)
    console_read, console_out = os.pipe2(os.O_CLOEXEC)
    part("guest")
    started = monotonic()
    pid = os.posix_spawn(
        demo["argv"][0],
        demo["argv"],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, console_in, 0),
            (os.POSIX_SPAWN_DUP2, console_out, 1),
            (os.POSIX_SPAWN_DUP2, console_out, 2),
        ],
        setpgroup=0,
    )
    os.close(console_in)
    os.close(console_out)
    first, counted, line, in_time = 0.0, b"", b"", True
    deadline = started + demo["timeout_s"]
    waiting = poll()
    waiting.register(console_read, POLLIN)
    waiting.register(server.fd, POLLIN)
    while True:
        ready = waiting.poll(max(0.0, deadline - monotonic()) * 1000)
        if not ready:
            in_time = False
            break
        fds = [fd for fd, _events in ready]
        if server.fd in fds:
            server.handle()
        if console_read not in fds:
            continue
        data = os.read(console_read, 65536)
        if not data:
            break
        first = first or monotonic() - started
        put(data)
        *lines, line = (line + data).replace(b"\r", b"").split(b"\n")
        if LAST_LINE in lines:
            counted = counters(demo["api"])
            try:
                os.write(console_write, b"\n")
            except OSError:
                pass
    if not in_time:
        os.killpg(pid, 9)
    _, ended = os.waitpid(pid, 0)
    seconds = monotonic() - started
    part("vmm")
    put(
        f"status {os.waitstatus_to_exitcode(ended)}\nin-time {int(in_time)}\nrequests {server.requests}\n"
        f"first-output-s {first:.3f}\ntotal-s {seconds:.3f}\n".encode()
    )
    part("counters")
    put(counted + b"\n")


def main() -> int:
    """Show the root partition, then the guest."""
    import json

    with open(sys.argv[1], encoding="utf-8") as file:
        demo = json.load(file)
    run_script(demo["script"])
    if demo["argv"]:
        run_guest(demo)
    part("end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
