# SPDX-License-Identifier: Apache-2.0
"""Programs of the host: where they are, and what they say of themselves. Cheap to import: VMs start with this."""

from __future__ import annotations

import os
import select
import time

# More than any `--help`.
_MAX_OUTPUT = 1 << 20


def find_on_path(name: str) -> str | None:
    """The program of this name that a shell would run."""
    for folder in os.get_exec_path():
        path = os.path.join(folder or ".", name)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    return None


def output_of(argv: list[str], seconds: float = 10.0) -> tuple[int, bytes] | None:
    """Exit status (negative: a signal) and everything the program wrote to its standard streams; `None` when it cannot
    be run or does not end in time."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    streams = [
        (os.POSIX_SPAWN_DUP2, null, 0),
        (os.POSIX_SPAWN_DUP2, writer, 1),
        (os.POSIX_SPAWN_DUP2, writer, 2),
    ]
    try:
        child = os.posix_spawn(argv[0], argv, os.environ, file_actions=streams, setpgroup=0)
    except OSError:
        os.close(reader)
        return None
    finally:
        os.close(null)
        os.close(writer)
    deadline = time.monotonic() + seconds
    output = b""
    ended = False
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    # The streams close when the program ends, unless a child of its own keeps them.
    while len(output) < _MAX_OUTPUT and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        part = os.read(reader, 1 << 16)
        if not part:
            ended = True
            break
        output += part
    os.close(reader)
    if not ended or not _ends(child, deadline):
        ended = False
        _kill(child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (status, output) if ended else None


def _ends(child: int, deadline: float) -> bool:
    fd = os.pidfd_open(child)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    try:
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    finally:
        os.close(fd)


def _kill(group: int) -> None:
    from _signal import SIGKILL  # type: ignore[import-not-found, unused-ignore]

    try:
        os.killpg(group, SIGKILL)
    except ProcessLookupError:
        pass
