# SPDX-License-Identifier: Apache-2.0
"""Export for the Perfetto UI and chrome://tracing: the JSON trace event format.

A partition becomes a process, a VP a thread; hypercalls are complete events ("X"), everything else instant
events ("i"). Times are microseconds, as the format asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from rootvisor.trace.lines import TraceLines, integer, text

_NO_VP = 1 << 16
"""Thread id of what belongs to no VP."""


def export(source: Iterable[bytes], target: TextIO) -> tuple[int, int]:
    """Write the trace as one JSON document; the numbers of events and of malformed lines."""
    lines = TraceLines(source)
    count = 0
    target.write('{"displayTimeUnit":"ns","traceEvents":[')
    for event in events(lines):
        target.write((",\n" if count else "\n") + json.dumps(event, separators=(",", ":")))
        count += 1
    target.write("\n]}\n")
    return count, lines.malformed


def events(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The trace events of trace lines; a partition and a VP are named before their first event."""
    named: set[tuple[int, int]] = set()
    for line in lines:
        if line["kind"] == "trace":
            continue
        partition = integer(line.get("partition"), 1)
        vp = integer(line.get("vp"), _NO_VP)
        if (partition, -1) not in named:
            named.add((partition, -1))
            yield _name("process_name", partition, 0, f"partition {partition}")
        if (partition, vp) not in named:
            named.add((partition, vp))
            yield _name("thread_name", partition, vp, f"VP {vp}" if vp != _NO_VP else "machine")
        yield _event(line, partition, vp)


def _name(kind: str, partition: int, vp: int, label: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": partition, "tid": vp, "args": {"name": label}}


def _event(line: dict[str, Any], partition: int, vp: int) -> dict[str, Any]:
    kind = line["kind"]
    event: dict[str, Any] = {"cat": kind, "pid": partition, "tid": vp, "ts": line["t"] / 1000}
    if kind == "hypercall":
        fields = ("input", "status", "reps", "rep_count")
        event |= {"ph": "X", "name": text(line.get("call")), "dur": integer(line.get("ns")) / 1000}
        return event | {"args": {name: line[name] for name in fields if name in line}}
    names = {
        "msr": f"{text(line.get('access'))} {text(line.get('msr'))}",
        "intercept": text(line.get("message")),
        "event": text(line.get("name")),
    }
    details = {name: line[name] for name in ("value", "fault", "detail") if name in line}
    return event | {"ph": "i", "s": "t", "name": names.get(kind, kind), "args": details}
