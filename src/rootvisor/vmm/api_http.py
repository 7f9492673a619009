# SPDX-License-Identifier: Apache-2.0
"""As much of HTTP/1.1 (RFC 9112) as the API needs: requests with Content-Length, responses with JSON.

`http.server` would cost half a second to import in a root partition, and answers in a way that hides what is wrong.
"""

from __future__ import annotations

from .json_text import encoded

MAX_HEAD_BYTES = 16 << 10
MAX_BODY_BYTES = 4 << 20
_MAX_HEADERS = 100
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_REASONS = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    417: "Expectation Failed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class HttpError(Exception):
    """A request that is none, or is not to be had: ``status`` and one line. The connection ends with it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Request:
    """The head of a request: method, path without query, bytes of the body that follows."""

    __slots__ = ("expects_continue", "keep_alive", "length", "method", "path")

    def __init__(
        self, method: str, path: str, length: int, *, keep_alive: bool, expects_continue: bool
    ) -> None:
        self.method = method
        self.path = path
        self.length = length
        self.keep_alive = keep_alive
        self.expects_continue = expects_continue


def head_end(data: bytearray) -> int:
    """Where the body begins; 0: the head is not complete. HttpError 431 when it is too long.

    Empty lines before the request line are taken away, as RFC 9112 wants it.
    """
    while data.startswith(b"\r\n"):
        del data[:2]
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
    if end < 0 and len(data) >= MAX_HEAD_BYTES:
        raise HttpError(431, f"the head of the request is longer than {MAX_HEAD_BYTES} bytes")
    return end + 4 if end >= 0 else 0


def parse_head(head: bytes) -> Request:
    """A request's head, up to and including the empty line. HttpError."""
    lines = head.decode("latin-1").split("\r\n")[:-2]
    parts = lines[0].split(" ")
    if len(parts) != 3 or not _is_token(parts[0]) or not parts[1]:
        raise HttpError(400, "the request line is none")
    method, target, version = parts
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise HttpError(505 if version.startswith("HTTP/") else 400, "the protocol is HTTP/1.1")
    headers = _headers(lines[1:])
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise HttpError(400, "Transfer-Encoding and Content-Length exclude each other")
        raise HttpError(411, "send the body with Content-Length, not in chunks")
    connection = [word.strip() for word in headers.get("connection", "").lower().split(",")]
    expect = headers.get("expect", "").lower()
    if expect not in ("", "100-continue"):
        raise HttpError(417, "nothing but 100-continue can be expected")
    return Request(
        method,
        _path(target),
        _length(headers.get("content-length", "0")),
        keep_alive="close" not in connection and (version == "HTTP/1.1" or "keep-alive" in connection),
        expects_continue=bool(expect) and version == "HTTP/1.1",
    )


def response(
    status: int, document: object, *, keep_alive: bool, headers: tuple[tuple[str, str], ...] = ()
) -> bytes:
    """A response; ``document`` becomes its JSON body, None: it has none."""
    lines = [
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}",
        "Server: Rootvisor API",
        f"Connection: {'keep-alive' if keep_alive else 'close'}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    body = b""
    if document is not None:
        body = encoded(document)
        lines.append("Content-Type: application/json")
    if status != 204:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _headers(lines: list[str]) -> dict[str, str]:
    """Names in small letters to values. HttpError."""
    if len(lines) > _MAX_HEADERS:
        raise HttpError(431, f"the request has more than {_MAX_HEADERS} header fields")
    headers: dict[str, str] = {}
    for line in lines:
        name, separator, value = line.partition(":")
        if (
            not separator
            or not _is_token(name)
            or any(ord(letter) < 32 and letter != "\t" for letter in value)
        ):
            raise HttpError(400, "a header field is none")
        name = name.lower()
        if name in headers and name in ("content-length", "transfer-encoding", "host"):
            raise HttpError(400, f"{name} is given twice")
        headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
    return headers


def _length(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise HttpError(400, "Content-Length is no number")
    if len(text) > 18 or int(text) > MAX_BODY_BYTES:
        raise HttpError(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
    return int(text)


def _path(target: str) -> str:
    """The path of a request target in origin or absolute form, without query."""
    if target.lower().startswith("http://"):
        target = "/" + target[7:].partition("/")[2]
    return target.partition("?")[0]


def _is_token(text: str) -> bool:
    return bool(text) and _TOKEN.issuperset(text)
