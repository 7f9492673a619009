# SPDX-License-Identifier: Apache-2.0
"""``rootvisor run`` on this machine's KVM, as tests start it; kernels of a few instructions; processes that boot."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

#: A boot takes 5 s in the appliance on a quiet machine; a loaded one has been seen at 30.
DEADLINE_S = 240
_RUN = (sys.executable, "-m", "rootvisor", "run")
RUN = (*_RUN, "--engine", "kvm")


def run_root(
    arguments: Sequence[str], *, stdin: bytes = b"", timeout_s: float = DEADLINE_S, engine: str = "kvm"
) -> subprocess.CompletedProcess[bytes]:
    """``rootvisor run`` on this machine's KVM, or with another engine."""
    command = [*_RUN, "--engine", engine, "--timeout", str(timeout_s), *arguments]
    return run_group(command, stdin, timeout_s + 60)


def run_group(command: Sequence[str], stdin: bytes, deadline_s: float) -> subprocess.CompletedProcess[bytes]:
    """A command in a process group of its own, which is killed, and the test failed, when the deadline passes."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(stdin, timeout=deadline_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{command} did not end; stderr: {err.decode(errors='replace')[-2000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def shell(
    kernel: str, vps: int, script: str, *options: str, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Runs a shell script in the root partition of ``kernel``."""
    return run_root(["--kernel", kernel, "--vps", str(vps), *options, "--", "sh", "-c", script], stdin=stdin)


def bare_kernel(path: Path, code: bytes) -> Path:
    """An ELF-64 "kernel" of a few instructions at 1 MiB, where it is entered in long mode."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 2, 62, 1, 0x100000, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0x1000, 0x100000, 0x100000, len(code), len(code), 0x1000)
    path.write_bytes((header + segment).ljust(0x1000, b"\0") + code)
    return path


def descriptors(pid: int) -> list[str]:
    """What a process's file descriptors point to."""
    links = []
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            try:
                links.append(os.readlink(entry.path))
            except OSError:
                continue
    except OSError:
        pass
    return links


def await_processor(process: subprocess.Popen[bytes]) -> None:
    """Until the machine runs: a processor of KVM is among the process's descriptors."""
    deadline = time.monotonic() + DEADLINE_S
    while not any("kvm-vcpu" in link for link in descriptors(process.pid)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
