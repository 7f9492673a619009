# SPDX-License-Identifier: Apache-2.0
"""A client that says exactly what a test wants, and reads one response after the other."""

from __future__ import annotations

import json
import socket
from types import TracebackType
from typing import Any, Self


class Client:
    def __init__(self, path: str, timeout: float = 20) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.data = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def response(self) -> tuple[int, dict[str, str], Any]:
        """Status, headers (names in small letters), document (None: no body)."""
        while b"\r\n\r\n" not in self.data:
            self._more()
        head, _, self.data = self.data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        version, status, _reason = lines[0].split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
        length = int(headers.get("content-length", "0"))
        assert status != "204" or "content-length" not in headers
        while len(self.data) < length:
            self._more()
        body, self.data = self.data[:length], self.data[length:]
        return int(status), headers, json.loads(body) if body else None

    def _more(self) -> None:
        received = self.socket.recv(65536)
        if not received:
            raise EOFError
        self.data += received

    def call(self, method: str, name: str, body: object = None) -> tuple[int, Any]:
        """Status and document of `/api/v1/NAME`; a body is bytes, or becomes JSON."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send(
            f"{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        status, _, document = self.response()
        return status, document

    def is_closed(self) -> bool:
        """Whether the server has ended the connection, with nothing more to say."""
        try:
            return not self.data and not self.socket.recv(1)
        except ConnectionResetError:
            return True
