# SPDX-License-Identifier: Apache-2.0
"""Reads the text off the picture of a text console, by the font that its kernel draws with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_PIXEL = 3
#: What of a console font is ASCII, whatever its other characters are.
_ASCII = range(0x20, 0x7F)
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Stands for a cell that holds none of the font's ASCII characters."""


@dataclass(frozen=True, slots=True)
class Font:
    """Characters of 8 x `height` pixels; `glyphs` has a byte for each line, its highest bit at the left."""

    height: int
    glyphs: bytes

    @classmethod
    def parse(cls, text: str) -> Font:
        """From what `console_font.py` printed: `HEIGHT GLYPHS-IN-HEXADECIMAL`. Raises `ValueError`."""
        height, glyphs = text.split()
        font = cls(int(height), bytes.fromhex(glyphs))
        if not 1 <= font.height <= 32 or len(font.glyphs) < font.height * _ASCII.stop:
            raise ValueError("a font that lacks characters")
        return font

    def character(self, code: int) -> bytes:
        """The lines of one."""
        return self.glyphs[code * self.height : (code + 1) * self.height]


def read_text(picture: Sequence[bytes], font: Font) -> list[str]:
    """The lines of text on a screen, from the top, without spaces at their ends. Whatever differs from a cell's first
    pixel belongs to the character."""
    names = {font.character(code): chr(code) for code in reversed(_ASCII)}
    columns = len(picture[0]) // (8 * _PIXEL) if picture else 0
    lines = []
    for top in range(0, len(picture) - font.height + 1, font.height):
        rows = picture[top : top + font.height]
        line = [
            names.get(bytes(_bits(row, column * 8 * _PIXEL, rows[0]) for row in rows), UNKNOWN)
            for column in range(columns)
        ]
        lines.append("".join(line).rstrip())
    return lines


def _bits(row: bytes, start: int, first: bytes) -> int:
    """Eight pixels of a line as a font has them."""
    ground = first[start : start + _PIXEL]
    if row[start : start + 8 * _PIXEL] == ground * 8:
        return 0
    bits = 0
    for at in range(start, start + 8 * _PIXEL, _PIXEL):
        bits = bits << 1 | (row[at : at + _PIXEL] != ground)
    return bits
