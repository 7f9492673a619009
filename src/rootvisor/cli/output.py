# SPDX-License-Identifier: Apache-2.0
"""What commands print: JSON documents, tables, marks and progress. Reports go to stdout, everything else to
stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

import click

_BAR_CELLS = 24
_GREEN, _RED, _YELLOW = "green", "red", "yellow"
_MARKS = {"ok": ("✓", "ok", _GREEN), "missing": ("✗", "no", _RED), "warning": ("!", "!!", _YELLOW)}


def print_json(document: object) -> None:
    """One JSON document on stdout, indented, keys in the order given."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def say(text: str) -> None:
    """One line for the person, on stderr."""
    click.echo(text, err=True)


def mark(state: str) -> str:
    """A coloured mark for `ok`, `missing` or `warning`; plain letters where the terminal has no UTF-8."""
    sign, plain, colour = _MARKS[state]
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    return click.style(sign if encoding.startswith("utf") else plain, fg=colour, bold=True)


def table(
    rows: Sequence[Sequence[object]], head: Sequence[str] = (), right: frozenset[int] = frozenset()
) -> str:
    """Rows as aligned columns, two blanks apart; columns in `right` are aligned to the right."""
    lines = [[str(cell) for cell in row] for row in ([head] if head else []) + list(rows)]
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [
            cell.rjust(widths[column]) if column in right else cell.ljust(widths[column])
            for column, cell in enumerate(line)
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def format_bytes(count: float) -> str:
    """A byte count for people: 3.2 GiB, 640 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit in ("B", "KiB") or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_ns(ns: float) -> str:
    """A duration for people: 41 us, 3.2 ms, 1.25 s."""
    if ns < 1e3:
        return f"{ns:.0f} ns"
    if ns < 1e6:
        return f"{ns / 1e3:.1f} us"
    if ns < 1e9:
        return f"{ns / 1e6:.1f} ms"
    return f"{ns / 1e9:.2f} s"


class Progress:
    """Progress of something that takes more than a second or two, on stderr.

    On a terminal one line is rewritten; elsewhere each new stage is one line, so that logs stay short.
    Nothing is shown when `quiet`. It is a `rootvisor.kernels.kernel.Progress`: called with a stage, what is
    done and the total.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self._stage = ""
        self._shown = ""
        self._started = time.monotonic()

    def __call__(self, stage: str, done: int = 0, total: int | None = None) -> None:
        """Show a stage; with a total also how much of it is done."""
        if self._quiet:
            return
        if stage != self._stage:
            self._stage = stage
            self._started = time.monotonic()
            if not self._live:
                print(f"rootvisor: {stage}", file=self._stream, flush=True)
        if self._live:
            self._rewrite(self._line(done, total))

    def _line(self, done: int, total: int | None) -> str:
        seconds = int(time.monotonic() - self._started)
        tail = f" {seconds // 60}:{seconds % 60:02}" if seconds >= 2 else ""
        if total:
            part = min(max(done / total, 0.0), 1.0)
            full = round(part * _BAR_CELLS)
            tail = f" [{'#' * full}{'.' * (_BAR_CELLS - full)}] {part:4.0%}{tail}"
        return f"rootvisor: {self._stage}"[: max(_columns(self._stream) - len(tail) - 1, 10)] + tail

    def _rewrite(self, line: str) -> None:
        if line != self._shown:
            self._stream.write(f"\r\033[K{line}")
            self._stream.flush()
            self._shown = line

    def clear(self) -> None:
        """Take the progress line away."""
        if self._shown:
            self._stream.write("\r\033[K")
            self._stream.flush()
            self._shown = ""

    def __enter__(self) -> Progress:
        """Use as a context: the line disappears at the end."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the progress line away, also when something failed."""
        self.clear()


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 80
