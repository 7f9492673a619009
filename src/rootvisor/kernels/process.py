# SPDX-License-Identifier: Apache-2.0
"""Runs a program in a process group of its own, reads its output by lines, and leaves nothing running behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_KEPT_LINES = 200
_KILL_AFTER_S = 5.0


class CommandFailed(Exception):
    """A program ended with a status other than 0; `output` is the end of what it printed."""

    def __init__(self, argv: Sequence[str], status: int, output: str) -> None:
        super().__init__(f"{argv[0]} ended with status {status}")
        self.argv = tuple(argv)
        self.status = status
        self.output = output


def clean_environment() -> dict[str, str]:
    """The environment less what would change a build or a message: make's, kbuild's, the language."""
    keep = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KBUILD_", "KCONFIG_", "LC_", "MAKE"))
        and name
        not in {"MFLAGS", "ARCH", "CROSS_COMPILE", "LOCALVERSION", "KCFLAGS", "CDPATH", "LANGUAGE", "O", "V"}
    }
    return {**keep, "LC_ALL": "C", "LANG": "C"}


def popen(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.STDOUT,
) -> subprocess.Popen[bytes]:
    """Start a program in its own process group; it is told to end when this process dies, however that happens."""
    command = [*argv]
    if shutil.which("setpriv"):
        command = ["setpriv", "--pdeathsig", "TERM", "--", *argv]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(env) if env is not None else clean_environment(),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        process_group=0,
    )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a program and everything that it started: politely, then by force. Nothing to do if it has ended."""
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            try:
                stream.close()
            except OSError:
                pass  # a pipe whose reader has gone
    for number, patience in ((signal.SIGTERM, _KILL_AFTER_S), (signal.SIGKILL, None)):
        if process.poll() is None:
            _signal_group(process.pid, number)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
    process.wait()


def run(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Run a program to its end; `on_line` sees each line of its output as it comes.

    Returns the end of its output (the last 200 lines). Raises `CommandFailed`; whatever else happens meanwhile
    (Ctrl-C, an error in `on_line`) ends the program's process group.
    """
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    process = popen(argv, cwd=cwd, env=env)
    assert process.stdout is not None
    try:
        for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            kept.append(line)
            if on_line is not None:
                on_line(line)
        status = process.wait()
    finally:
        kill_group(process)
    output = "\n".join(kept)
    if status != 0:
        raise CommandFailed(argv, status, output)
    return output


def read(argv: Sequence[str], *, cwd: Path | None = None) -> str:
    """All that a program prints on its standard output. Raises `CommandFailed` with its error output."""
    done = subprocess.run(
        argv, cwd=cwd, env=clean_environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode != 0:
        raise CommandFailed(argv, done.returncode, done.stderr.decode(errors="replace"))
    return done.stdout.decode(errors="replace")


@contextmanager
def captured() -> Iterator[BinaryIO]:
    """A file in memory for a program's messages: what it says about a full disk must not be lost on that disk."""
    with os.fdopen(os.memfd_create("messages", os.MFD_CLOEXEC), "r+b") as file:
        yield file


def text_of(file: BinaryIO) -> str:
    """All that has been written to a file of `captured`."""
    file.seek(0)
    return file.read().decode(errors="replace")


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass
