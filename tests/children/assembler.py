# SPDX-License-Identifier: Apache-2.0
"""Assembles the guests of a group where the test starts: gcc inside the root partition would take minutes."""

from __future__ import annotations

import marshal
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.children.code import PRELUDE, Code

_SECTION = struct.Struct("<IIQQQQIIQQ")


def assemble(codes: Sequence[Code]) -> dict[str, bytes]:
    """The flat image of each piece, linked to its address, by its key; one run of the tools for all of them.

    The pieces are sections of one file that lie over each other.
    """
    source = PRELUDE + "".join(
        f'\n.section .piece{number}, "ax"\n.code{code.bits}\n{code.text}\n'
        for number, code in enumerate(codes)
    )
    script = "".join(
        f".piece{number} {code.base:#x} : {{ *(.piece{number}) }}\n" for number, code in enumerate(codes)
    )
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at / "code.S").write_text(source)
        (at / "script").write_text(f"SECTIONS {{ {script} /DISCARD/ : {{ *(.note*) }} }}")
        subprocess.run(["as", "-o", at / "code.o", at / "code.S"], check=True)
        subprocess.run(
            ["ld", "--no-check-sections", "-e", "0", "-T", at / "script", "-o", at / "code", at / "code.o"],
            check=True,
        )
        linked = (at / "code").read_bytes()
    sections = _sections(linked)
    return {code.key(): sections[f".piece{number}"] for number, code in enumerate(codes)}


def _sections(elf: bytes) -> dict[str, bytes]:
    """Name -> contents."""
    headers_at, size, count, names = *struct.unpack_from("<Q", elf, 40), *struct.unpack_from("<3H", elf, 58)
    headers = [_SECTION.unpack_from(elf, headers_at + number * size) for number in range(count)]
    names_at = headers[names][4]
    found = {}
    for name, _type, _flags, _address, offset, length, *_ in headers:
        start = names_at + name
        found[elf[start : elf.index(b"\0", start)].decode()] = elf[offset : offset + length]
    return found


def write_images(codes: Sequence[Code], path: Path) -> None:
    """A file with the images of ``codes``, for ``code.load``."""
    path.write_bytes(marshal.dumps(assemble(codes)))
