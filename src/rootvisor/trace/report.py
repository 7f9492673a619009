# SPDX-License-Identifier: Apache-2.0
"""What a trace says in numbers: per hypercall counts, times and statuses; per MSR reads and writes;
intercepts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import Any

from rootvisor.trace.lines import TraceLines, integer, text


class _Call:
    """What is known of one hypercall."""

    def __init__(self) -> None:
        self.times_ns: list[int] = []
        self.statuses: Counter[str] = Counter()
        self.reps = 0
        self.vps: set[int] = set()


class _Msr:
    """What is known of one MSR."""

    def __init__(self) -> None:
        self.reads = 0
        self.writes = 0
        self.faults = 0
        self.last: int | None = None


def summarise(source: Iterable[bytes]) -> dict[str, Any]:
    """The report on a trace as JSON-able data; the most frequent call, MSR or intercept comes first."""
    lines = TraceLines(source)
    calls: dict[str, _Call] = {}
    registers: dict[str, _Msr] = {}
    intercepts: Counter[str] = Counter()
    events: list[dict[str, Any]] = []
    total = 0
    last_ns: float = 0
    for line in lines:
        total += 1
        last_ns = max(last_ns, line["t"])
        kind = line["kind"]
        if kind == "hypercall":
            call = calls.setdefault(text(line.get("call")), _Call())
            call.times_ns.append(integer(line.get("ns")))
            call.statuses[text(line.get("status"))] += 1
            call.reps += integer(line.get("reps"))
            call.vps.add(integer(line.get("vp"), -1))
        elif kind == "msr":
            register = registers.setdefault(text(line.get("msr")), _Msr())
            if line.get("access") == "write":
                register.writes += 1
            else:
                register.reads += 1
            register.faults += "fault" in line
            register.last = integer(line.get("value"))
        elif kind == "intercept":
            intercepts[text(line.get("message"))] += 1
        elif kind == "event":
            events.append(
                {"t": line["t"], "name": text(line.get("name")), "detail": text(line.get("detail"), "")}
            )
    return {
        "lines": total,
        "malformed": lines.malformed,
        "first_malformed": lines.first_malformed or None,
        "duration_ns": last_ns,
        "hypercalls": [_call_row(name, call) for name, call in _by_count(calls)],
        "msrs": [_msr_row(name, register) for name, register in _by_use(registers)],
        "intercepts": dict(intercepts.most_common()),
        "events": events,
    }


def _by_count(calls: dict[str, _Call]) -> list[tuple[str, _Call]]:
    return sorted(calls.items(), key=lambda item: (-len(item[1].times_ns), item[0]))


def _by_use(registers: dict[str, _Msr]) -> list[tuple[str, _Msr]]:
    return sorted(registers.items(), key=lambda item: (-item[1].reads - item[1].writes, item[0]))


def _call_row(name: str, call: _Call) -> dict[str, Any]:
    return {
        "call": name,
        "count": len(call.times_ns),
        "reps": call.reps,
        "total_ns": sum(call.times_ns),
        "median_ns": median(call.times_ns),
        "max_ns": max(call.times_ns),
        "statuses": dict(call.statuses.most_common()),
        "vps": sorted(call.vps),
    }


def _msr_row(name: str, register: _Msr) -> dict[str, Any]:
    return {
        "msr": name,
        "reads": register.reads,
        "writes": register.writes,
        "faults": register.faults,
        "last": register.last,
    }
