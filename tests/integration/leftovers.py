# SPDX-License-Identifier: Apache-2.0
"""What a command leaves behind: processes that carry a token in their environment, files and mounts of ours."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

TOKEN = "ROOTVISOR_TEST_TOKEN"


def processes_with(token: str) -> list[str]:
    """Command lines of the processes whose environment has ``TOKEN=token``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{TOKEN}={token}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has just ended
    return found


def files_of_ours() -> set[str]:
    """Names with ours in them where programs put what is temporary."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "/tmp")
    return {
        entry
        for folder in ("/tmp", "/dev/shm", runtime)
        for entry in os.listdir(folder)
        if "rootvisor" in entry
    }


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether ``condition`` came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
