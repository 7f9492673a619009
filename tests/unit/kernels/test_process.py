# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rootvisor.kernels.process import CommandFailed, clean_environment, read, run

DEADLINE_S = 20


def wait_gone(pid: int) -> bool:
    """Polls until a process has ended (a zombie counts as ended)."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_run_gives_lines_as_they_come_and_the_output() -> None:
    seen: list[str] = []
    assert run(["sh", "-c", "echo one; echo two >&2"], on_line=seen.append) == "one\ntwo"
    assert seen == ["one", "two"]


def test_run_failure_carries_status_and_output() -> None:
    with pytest.raises(CommandFailed) as caught:
        run(["sh", "-c", "echo reason; exit 3"])
    assert (caught.value.status, caught.value.output) == (3, "reason")


def test_run_error_in_on_line_ends_the_whole_group(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(["sh", "-c", f"sleep 1000 & echo $! $$ > {pids}; echo ready; wait"], on_line=stop)
    for pid in pids.read_text().split():
        assert wait_gone(int(pid))


def test_run_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = f"from rootvisor.kernels.process import run\nrun(['sh', '-c', 'echo $$ > {pid_file}; exec sleep 1000'])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment)
    try:
        end = time.monotonic() + DEADLINE_S
        while not (pid_file.exists() and pid_file.read_text().strip()) and time.monotonic() < end:
            time.sleep(0.01)
        pid = int(pid_file.read_text())
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_gone(pid)


def test_read_keeps_error_output_apart() -> None:
    assert read(["sh", "-c", "echo out; echo err >&2"]) == "out\n"
    with pytest.raises(CommandFailed) as caught:
        read(["sh", "-c", "echo out; echo err >&2; exit 1"])
    assert caught.value.output == "err\n"


def test_clean_environment_drops_what_changes_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAKEFLAGS", "KBUILD_OUTPUT", "ARCH", "LC_MESSAGES", "KCFLAGS", "O"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("HTTP_PROXY", "kept")
    environment = clean_environment()
    assert environment["LC_ALL"] == "C"
    assert environment["HTTP_PROXY"] == "kept"
    assert not {"MAKEFLAGS", "KBUILD_OUTPUT", "ARCH", "LC_MESSAGES", "KCFLAGS", "O"} & environment.keys()
