# SPDX-License-Identifier: Apache-2.0
"""A folder for the files of one run, which disappears with the run, also when this process is killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rootvisor.cli.errors import UserError
from rootvisor.cli.paths import make_cache_dir


@contextmanager
def run_folder() -> Iterator[Path]:
    """A new, private folder below the cache (the appliance sees it at the same path).

    A child process waits for our end and removes the folder if we could not: it holds a pipe that ends with us.
    """
    parent = make_cache_dir("runs")
    try:
        folder = Path(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        raise UserError(
            f"cannot create a folder in {parent}: {(error.strerror or str(error)).lower()}",
            "make room there, or set ROOTVISOR_CACHE to another folder",
        ) from error
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        _guard(folder, read_end, write_end)
    os.close(read_end)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(write_end)
        os.waitpid(child, 0)


def _guard(folder: Path, read_end: int, write_end: int) -> None:
    """The child: wait until the pipe ends, remove the folder, end."""
    try:
        os.setsid()  # what ends our parent's process group must not end us
        os.close(write_end)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)  # who reads our parent's output must see its end
        while os.read(read_end, 1):
            pass
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(0)
