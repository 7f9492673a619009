# SPDX-License-Identifier: Apache-2.0
"""Reads pictures as QEMU writes them: PNG, 8 bits a channel, red, green and blue, not interlaced."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path


def pixels(path: Path) -> list[list[bytes]]:
    """Lines of pixels, each of three bytes (PNG specification, sections 7 and 9)."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, compressed, width = 8, b"", 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IHDR":
            width, _, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, at + 8)
            assert (depth, colour, interlaced) == (8, 2, 0)
        elif kind == b"IDAT":
            compressed += data[at + 8 : at + 8 + size]
        at += size + 12
    raw = zlib.decompress(compressed)
    above = bytearray(3 * width)
    lines = []
    for start in range(0, len(raw), 3 * width + 1):
        line = bytearray(raw[start + 1 : start + 1 + 3 * width])
        _restore(raw[start], line, above)
        lines.append([bytes(line[at : at + 3]) for at in range(0, 3 * width, 3)])
        above = line
    return lines


def _restore(kind: int, line: bytearray, above: bytearray) -> None:
    for at, value in enumerate(line):
        left = line[at - 3] if at >= 3 else 0
        corner = above[at - 3] if at >= 3 else 0
        guess = (0, left, above[at], (left + above[at]) // 2, _nearest(left, above[at], corner))[kind]
        line[at] = value + guess & 0xFF


def _nearest(left: int, above: int, corner: int) -> int:
    estimate = left + above - corner
    return min((left, above, corner), key=lambda one: abs(estimate - one))
