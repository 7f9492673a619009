# SPDX-License-Identifier: Apache-2.0
"""Pictures of text consoles, made up: PNG files with each of the format's filters, and a font of a kind."""

from __future__ import annotations

import struct
import zlib

from rootvisor.cli.screen_text import Font

HEIGHT = 4
#: No two characters alike, a blank space.
FONT = Font(
    HEIGHT,
    b"".join(bytes([code if code != 0x20 else 0, 0, 0, 0]) for code in range(128)) + bytes(128 * HEIGHT),
)


def draw(
    lines: list[str], columns: int, ground: bytes = b"\0\0\0", ink: bytes = b"\xaa\xaa\xaa"
) -> list[bytes]:
    """The lines of pixels of such a screen."""
    picture = []
    for line in lines:
        for row in range(HEIGHT):
            bits = b"".join(
                f"{FONT.character(ord(character))[row]:08b}".encode() for character in line.ljust(columns)
            )
            picture.append(b"".join(ink if bit == ord("1") else ground for bit in bits))
    return picture


def png(picture: list[bytes], form: tuple[int, int, int] = (8, 2, 0)) -> bytes:
    """The file, its lines filtered in turn by each filter of the PNG specification."""
    width = len(picture[0]) // 3
    above = bytes(3 * width)
    raw = b""
    for number, line in enumerate(picture):
        kind = number % 5
        filtered = bytearray()
        for at, value in enumerate(line):
            left = line[at - 3] if at >= 3 else 0
            corner = above[at - 3] if at >= 3 else 0
            estimate = left + above[at] - corner
            nearest = min((left, above[at], corner), key=lambda one: abs(estimate - one))
            filtered.append(value - (0, left, above[at], (left + above[at]) // 2, nearest)[kind] & 0xFF)
        raw += bytes([kind]) + filtered
        above = line
    depth, colour, interlace = form
    head = struct.pack(">IIBBBBB", width, len(picture), depth, colour, 0, 0, interlace)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
