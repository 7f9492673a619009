# SPDX-License-Identifier: Apache-2.0
"""What a bench shows: a table for people with what the table cannot say, or a document for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from rootvisor.bench.report import HEAD, RIGHT, cells
from rootvisor.bench.targets import Row
from rootvisor.cli.engine import EngineChoice
from rootvisor.cli.output import print_json, table

_COLOURS = {"pass": "green", "miss": "red"}


@dataclass(frozen=True, slots=True)
class Measured:
    """A bench that ran: where, what it gave (`problems` are in it), and name and version of the kernel, None where the
    measured kernel is our own."""

    engine: EngineChoice
    results: dict[str, Any]
    kernel: str | None = None


def report(
    measured: Measured,
    rows: Sequence[Row],
    document: Mapping[str, Any],
    *,
    setting: str,
    missing: Mapping[str, str],
    notes: Sequence[str],
    as_json: bool,
) -> None:
    """Print `document`, or the rows.

    `setting` says what ran. `missing` maps a name in the results, under which there is None or why something was not
    measured, to words for what that is. `notes` are lines below the table.
    """
    engine, results = measured.engine, measured.results
    if as_json:
        kernel = {} if measured.kernel is None else {"kernel": measured.kernel}
        print_json({"engine": {"name": engine.name, "reason": engine.reason}, **kernel, **document})
        return
    click.echo(f"engine {engine.name} ({engine.reason}); {setting}\n")
    _show(rows)
    click.echo("")
    for name, words in missing.items():
        if results.get(name):
            click.echo(f"{words}: {results[name]}")
    for note in notes:
        click.echo(note)
    for problem in results.get("problems", []):
        click.echo(f"Failed: {problem}")


def _show(rows: Sequence[Row]) -> None:
    """The table, a line for each group above its rows."""
    lines: list[tuple[str, ...]] = []
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append((group, *[""] * (len(HEAD) - 1)))
        lines.append(cells(row))
    for line in table(lines, HEAD, RIGHT).splitlines():
        word = line.rsplit(" ", 1)[-1]
        colour = _COLOURS.get(word)
        click.echo(line.removesuffix(word) + click.style(word, fg=colour) if colour else line)
