# SPDX-License-Identifier: Apache-2.0
"""The library in a real process: what reaches the kernel, what comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rootvisor.files import preload

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the library is for x86-64")

SCRIPT = """
import fcntl, os, sys
folder = os.open(sys.argv[1], os.O_RDONLY)
file = os.open("old", os.O_RDONLY | os.O_NOATIME | os.O_APPEND, dir_fd=folder)
flags = fcntl.fcntl(file, fcntl.F_GETFL)
print(bool(flags & os.O_NOATIME), bool(flags & os.O_APPEND), os.read(file, 100))
try:
    os.open("missing", os.O_RDONLY, dir_fd=folder)
except FileNotFoundError as error:
    print(error.errno)
os.umask(0)
new = os.open("new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640, dir_fd=folder)
print(oct(os.fstat(new).st_mode), os.write(new, b"there"))
"""


@pytest.mark.parametrize("loaded", [False, True])
def test_openat_only_loses_the_flag(tmp_path: Path, loaded: bool) -> None:
    (tmp_path / "old").write_text("content")
    path = preload.library()
    fd = int(path.rpartition("/")[2])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", SCRIPT, str(tmp_path)],
            env={"LD_PRELOAD": path} if loaded else {},
            pass_fds=[fd],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        os.close(fd)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{not loaded} True b'content'", "2", "0o100640 5"]
    assert (tmp_path / "new").read_text() == "there"
