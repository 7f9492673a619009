# SPDX-License-Identifier: Apache-2.0
"""The caller's terminal: raw while the appliance has it, and given back whatever happens."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import termios
import tty

_WINDOW = struct.Struct("HHHH")  # struct winsize: rows, columns, and two fields nobody uses

#: Waits for the end of its standard input, that is of our process, and restores the terminal on descriptor $1.
#: A background process may do that only while it ignores SIGTTOU.
_GUARD = 'trap "" INT HUP TERM TTOU TTIN; read -r x || stty "$1" <&"$2"'


def window_size(fd: int) -> tuple[int, int] | None:
    """Rows and columns of the terminal ``fd``, None when it is no terminal or does not know."""
    try:
        rows, columns, _, _ = _WINDOW.unpack(fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(_WINDOW.size)))
    except OSError:
        return None
    return (rows, columns) if rows and columns else None


class RawTerminal:
    """Context manager: the terminal ``fd`` is raw inside. A small guard process restores it should we be killed
    with SIGKILL. Does nothing when ``fd`` is no terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[object] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RawTerminal:
        if not os.isatty(self._fd):
            return self
        saved = subprocess.run(["stty", "-g"], stdin=self._fd, capture_output=True, check=False)
        self._saved = termios.tcgetattr(self._fd)
        if saved.returncode == 0:
            words = ["sh", "-c", _GUARD, "sh", saved.stdout.decode().strip(), str(self._fd)]
            self._guard = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=(self._fd,))
        tty.setraw(self._fd, termios.TCSANOW)
        return self

    def __exit__(self, *error: object) -> None:
        if self._saved is not None:
            try:
                termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)  # type: ignore[arg-type]
            except termios.error:
                pass  # the terminal has hung up
        if self._guard is not None and self._guard.stdin is not None:
            try:
                self._guard.stdin.write(b"done\n")
                self._guard.stdin.close()
            except OSError:
                pass
            self._guard.wait()
