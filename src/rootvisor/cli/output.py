# SPDX-License-Identifier: Apache-2.0
"""What commands print: JSON documents, tables, marks and progress. Reports go to stdout, everything else to
stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

import click

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

    On a terminal one line is rewritten; elsewhere each new step is one line, so that logs stay short. Nothing
    is shown when `quiet`. Usable as the progress callback of `kernels` and `appliance`: `progress(step,
    fraction)`.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self._step = ""
        self._shown = False

    def __call__(self, step: str, fraction: float | None = None) -> None:
        """Show a step, and how much of it is done (0 to 1, None when nobody knows)."""
        if self._quiet:
            return
        if self._live:
            self._rewrite(step, fraction)
        elif step != self._step:
            print(f"rootvisor: {step}", file=self._stream, flush=True)
        self._step = step

    def _rewrite(self, step: str, fraction: float | None) -> None:
        columns = _columns(self._stream)
        bar = ""
        if fraction is not None:
            done = round(min(max(fraction, 0.0), 1.0) * 24)
            bar = f" [{'#' * done}{'.' * (24 - done)}] {fraction:4.0%}"
        text = f"rootvisor: {step}"[: max(columns - len(bar) - 1, 10)] + bar
        self._stream.write(f"\r\033[K{text}")
        self._stream.flush()
        self._shown = True

    def clear(self) -> None:
        """Take the progress line away."""
        if self._shown:
            self._stream.write("\r\033[K")
            self._stream.flush()
            self._shown = False

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
