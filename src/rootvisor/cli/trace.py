# SPDX-License-Identifier: Apache-2.0
"""`rootvisor trace`: what a trace file says, and its export for the Perfetto UI."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, TextIO

import click

from rootvisor.cli import options as types
from rootvisor.cli.errors import OWN_FAILURE, UserError, usage_error
from rootvisor.cli.help import DocumentedCommand, DocumentedGroup, debug_option, json_option, option
from rootvisor.cli.output import format_ns, print_json, say, table

if TYPE_CHECKING:
    from collections.abc import Iterator

_REPORT_EXAMPLES = (
    (
        "Trace a boot, then look at it",
        "rootvisor run --trace boot.trace -- true; rootvisor trace report boot.trace",
    ),
    (
        "The names of all calls that failed",
        "rootvisor trace report --json boot.trace | jq '.hypercalls[] | select(.statuses | keys != [\"SUCCESS\"])'",
    ),
)
_EXPORT_EXAMPLES = (
    ("For ui.perfetto.dev or chrome://tracing", "rootvisor trace export boot.trace -o boot.json"),
)


@click.group(cls=DocumentedGroup)
def trace() -> None:
    """Look at files that `rootvisor run --trace FILE` wrote.

    FILE is `-` for stdin. Damaged lines are counted and reported, the rest is used.
    """


@trace.command(cls=DocumentedCommand, examples=_REPORT_EXAMPLES)
@click.argument("file", type=types.FILE)
@json_option
@debug_option
def report(file: str, as_json: bool) -> None:
    """Count and time the hypercalls of a trace, and list MSRs, intercepts and events."""
    from rootvisor.trace.report import summarise

    with _open(file) as source:
        summary = summarise(source)
    _refuse_other_files(file, summary["lines"], summary["malformed"])
    if as_json:
        print_json(summary)
        return
    _show(summary)
    _warn(file, summary["malformed"], summary["first_malformed"])


@trace.command(cls=DocumentedCommand, examples=_EXPORT_EXAMPLES)
@click.argument("file", type=types.FILE)
@option("-o", "--output", type=types.FILE, default="-", help="Where to write; stdout when left out.")
@debug_option
def export(file: str, output: str) -> None:
    """Convert a trace for the Perfetto UI (JSON trace event format)."""
    from rootvisor.trace.perfetto import export as write_events

    if output != "-" and os.path.abspath(output) == os.path.abspath(file):
        raise usage_error("--output is the trace itself", "give another file")
    with _open(file) as source, _create(output) as target:
        count, malformed = write_events(source, target)
    _refuse_other_files(file, count, malformed)
    _warn(file, malformed, None)
    if output != "-":
        say(f"rootvisor: {count} events in {output}; open it at ui.perfetto.dev or chrome://tracing")


def _show(summary: dict[str, Any]) -> None:
    """The report for people."""
    click.echo(f"{summary['lines']} lines, {format_ns(summary['duration_ns'])}")
    if summary["hypercalls"]:
        rows = [
            (
                row["call"],
                row["count"],
                row["reps"] or "",
                format_ns(row["total_ns"]),
                format_ns(row["median_ns"]),
                format_ns(row["max_ns"]),
                ", ".join(f"{name} {count}" for name, count in row["statuses"].items()),
            )
            for row in summary["hypercalls"]
        ]
        head = ("hypercall", "count", "reps", "total", "median", "max", "status")
        click.echo("\n" + table(rows, head, frozenset({1, 2, 3, 4, 5})))
    if summary["msrs"]:
        msrs = [
            (row["msr"], row["reads"], row["writes"], row["faults"] or "", f"{row['last'] or 0:#x}")
            for row in summary["msrs"]
        ]
        click.echo(
            "\n" + table(msrs, ("MSR", "reads", "writes", "#GP", "last value"), frozenset({1, 2, 3, 4}))
        )
    if summary["intercepts"]:
        click.echo("\n" + table(list(summary["intercepts"].items()), ("intercept", "count"), frozenset({1})))
    if summary["events"]:
        click.echo(
            "\n"
            + table(_events(summary["events"]), ("event", "count", "first at", "last"), frozenset({1, 2}))
        )


def _events(events: list[dict[str, Any]]) -> list[tuple[str, int, str, str]]:
    """One row for each kind of event: how often, when first, and what the last one said."""
    rows: dict[str, tuple[str, int, str, str]] = {}
    for event in events:
        name, detail = event["name"], event["detail"].partition("\n")[0][:80]
        known = rows.get(name)
        rows[name] = (
            name,
            known[1] + 1 if known else 1,
            known[2] if known else format_ns(event["t"]),
            detail,
        )
    return list(rows.values())


def _refuse_other_files(file: str, good: int, malformed: int) -> None:
    """A file without one good line is no trace."""
    if not good and malformed:
        raise usage_error(f"{file}: not a trace", "give a file that rootvisor run --trace wrote")
    if not good:
        raise usage_error(f"{file}: the trace is empty", "was the run started with --trace?")


def _warn(file: str, malformed: int, first: int | None) -> None:
    if malformed:
        where = f", the first is line {first}" if first else ""
        say(f"rootvisor: {file}: {malformed} malformed line{'s' if malformed > 1 else ''} left out{where}")


@contextmanager
def _open(file: str) -> Iterator[IO[bytes]]:
    """The trace as a binary file."""
    if file == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = open(file, "rb")
        if os.path.isdir(file):
            raise IsADirectoryError(21, "is a folder")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise usage_error(f"{file}: {reason}", "give a file that rootvisor run --trace wrote") from error
    with stream:
        yield stream


@contextmanager
def _create(file: str) -> Iterator[TextIO]:
    """The output as a text file; nothing half-written stays when the export fails."""
    if file == "-":
        yield sys.stdout
        return
    temporary = f"{file}.{os.getpid()}.part"
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            yield stream
        os.replace(temporary, file)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot write {file}: {reason}", "give another --output", OWN_FAILURE) from error
    finally:
        try:
            os.unlink(temporary)
        except OSError:
            pass
