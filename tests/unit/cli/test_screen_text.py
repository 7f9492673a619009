# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from pathlib import Path

import pytest

from rootvisor.cli.png import PngError, read_png
from rootvisor.cli.screen_text import UNKNOWN, Font, read_text
from tests.unit.cli.pictures import FONT, HEIGHT, draw, png


def test_every_filter_gives_the_pixels_back(tmp_path: Path) -> None:
    made = random.Random(1)
    picture = [made.randbytes(3 * 16) for _ in range(25)]
    path = tmp_path / "a.png"
    path.write_bytes(png(picture))
    assert read_png(path) == picture


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"GIF89a" + data, "is no PNG file"),
        (lambda data: data[:40], "is damaged"),
        (lambda data: data.replace(b"IDAT", b"IDXT"), "is damaged"),
        (lambda data: data[:16] + b"\0\0\0\7" + data[20:], "is damaged: .* bytes for 7 x 8 pixels"),
        (lambda data: png(draw(["ab"], 2), (16, 2, 0)), "is no picture of 8 bits a channel"),
        (lambda data: data[:8], "is damaged"),
    ],
)
def test_what_is_no_such_picture_is_one_line(tmp_path: Path, change: object, words: str) -> None:
    path = tmp_path / "a.png"
    assert callable(change)
    path.write_bytes(change(png(draw(["ab", "cd"], 2))))
    with pytest.raises(PngError, match=words):
        read_png(path)


def test_text_is_read_in_any_colours() -> None:
    screen = ["[ 0.1] Hello, root!", "", "  x = {~}"]
    assert read_text(draw(screen, 24), FONT) == screen
    assert read_text(draw(screen, 24, b"\0\0\xaa", b"\xff\xff\x55"), FONT) == screen


def test_what_is_no_character_is_marked_and_hides_nothing_else() -> None:
    picture = draw(["abc"], 3)
    picture[2] = picture[2][:24] + b"\xff" * 3 + picture[2][27:]
    assert read_text(picture, FONT) == [f"a{UNKNOWN}c"]
    assert read_text([], FONT) == []


def test_a_font_is_parsed_as_it_is_printed() -> None:
    assert Font.parse(f"{HEIGHT} {FONT.glyphs.hex()}") == FONT


@pytest.mark.parametrize("text", ["", "16", "16 zz", "0 00", "16 0011", "a b c"])
def test_what_is_no_font_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Font.parse(text)
