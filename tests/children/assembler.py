# SPDX-License-Identifier: Apache-2.0
"""Assembles the guests of a group on the host: gcc inside the root partition would take minutes."""

from __future__ import annotations

import marshal
import subprocess
import tempfile
from pathlib import Path

from tests.children.code import Code


def assemble(code: Code) -> bytes:
    """The flat image of one piece of code, linked to its address."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "code.S"
        target = Path(folder) / "code"
        source.write_text(code.source())
        subprocess.run(
            [
                "gcc", "-nostdlib", "-static", f"-Wl,-Ttext={code.base:#x},--oformat=binary,--build-id=none",
                "-Wl,--no-warn-rwx-segments", "-o", str(target), str(source),
            ],
            check=True,
        )  # fmt: skip
        return target.read_bytes()


def write_images(codes: list[Code], path: Path) -> None:
    """A file with the images of ``codes``, for ``code.load``."""
    path.write_bytes(marshal.dumps({code.key(): assemble(code) for code in codes}))
