# SPDX-License-Identifier: Apache-2.0
"""Reads pictures as QEMU writes them: PNG, 8 bits a channel, red, green and blue, not interlaced."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Bits of a channel, the colour type (red, green, blue), and the interlace method that are read.
_FORM = (8, 2, 0)
#: Bytes of a pixel.
_PIXEL = 3


class PngError(Exception):
    """The file is no such picture; one line."""


def read_png(path: Path) -> list[bytes]:
    """The lines of the picture from the top, three bytes a pixel (PNG specification, sections 7 and 9).

    Raises `PngError`, `OSError`.
    """
    data = path.read_bytes()
    if not data.startswith(_SIGNATURE):
        raise PngError(f"{path} is no PNG file")
    at, compressed, width, height = len(_SIGNATURE), b"", 0, 0
    try:
        while at < len(data):
            size, kind = struct.unpack_from(">I4s", data, at)
            if kind == b"IHDR":
                width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", data, at + 8)
                if (depth, colour, interlace) != _FORM:
                    raise PngError(f"{path} is no picture of 8 bits a channel without transparency")
            elif kind == b"IDAT":
                compressed += data[at + 8 : at + 8 + size]
            at += size + 12
        raw = zlib.decompress(compressed)
    except (struct.error, zlib.error) as error:
        raise PngError(f"{path} is damaged: {error}") from error
    line_bytes = _PIXEL * width
    if not width or len(raw) != height * (line_bytes + 1):
        raise PngError(f"{path} is damaged: {len(raw)} bytes for {width} x {height} pixels")
    above = bytes(line_bytes)
    lines = []
    for start in range(0, len(raw), line_bytes + 1):
        kind = raw[start]
        if kind > 4:
            raise PngError(f"{path} is damaged: filter {kind}")
        above = _restored(kind, raw[start + 1 : start + 1 + line_bytes], above)
        lines.append(above)
    return lines


def _restored(kind: int, line: bytes, above: bytes) -> bytes:
    """A line before it was filtered."""
    if kind == 0:
        return line
    if kind == 2:
        return bytes([value + up & 0xFF for value, up in zip(line, above, strict=True)])
    # What lies left of the first pixel counts as zero.
    out = bytearray(_PIXEL) + line
    corners = bytes(_PIXEL) + above
    for at in range(_PIXEL, len(out)):
        left, up = out[at - _PIXEL], corners[at]
        if kind == 1:
            guess = left
        elif kind == 3:
            guess = left + up >> 1
        else:
            guess = _nearest(left, up, corners[at - _PIXEL])
        out[at] = out[at] + guess & 0xFF
    return bytes(out[_PIXEL:])


def _nearest(left: int, up: int, corner: int) -> int:
    """The Paeth predictor."""
    estimate = left + up - corner
    return min((left, up, corner), key=lambda one: abs(estimate - one))
