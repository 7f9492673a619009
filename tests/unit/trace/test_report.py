# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json
from typing import Any

import pytest

from rootvisor.trace.lines import TraceLines
from rootvisor.trace.perfetto import export
from rootvisor.trace.report import summarise


def _trace(*lines: dict[str, Any]) -> list[bytes]:
    return [json.dumps(line).encode() + b"\n" for line in lines]


_CALL = {
    "t": 10,
    "vp": 0,
    "partition": 1,
    "kind": "hypercall",
    "call": "CREATE_VP",
    "code": 78,
    "status": "SUCCESS",
}
_MSR = {"t": 30, "vp": 1, "partition": 1, "kind": "msr", "msr": "VP_INDEX", "access": "read", "value": 1}


def test_calls_are_counted_timed_and_sorted() -> None:
    summary = summarise(
        _trace(
            {"t": 0, "kind": "trace", "version": 1},
            {**_CALL, "ns": 100},
            {**_CALL, "ns": 300, "status": "INSUFFICIENT_MEMORY"},
            {**_CALL, "ns": 200, "vp": 3},
            {**_CALL, "call": "GET_PARTITION_ID", "ns": 7, "t": 99},
        )
    )
    first, second = summary["hypercalls"]
    assert (first["call"], first["count"], first["total_ns"], first["median_ns"], first["max_ns"]) == (
        "CREATE_VP", 3, 600, 200, 300,
    )  # fmt: skip
    assert first["statuses"] == {"SUCCESS": 2, "INSUFFICIENT_MEMORY": 1}
    assert first["vps"] == [0, 3]
    assert second["call"] == "GET_PARTITION_ID"
    assert summary["duration_ns"] == 99


def test_msr_accesses_are_counted_by_direction() -> None:
    summary = summarise(_trace(_MSR, {**_MSR, "access": "write", "value": 9, "fault": "#GP"}))
    assert summary["msrs"] == [{"msr": "VP_INDEX", "reads": 1, "writes": 1, "faults": 1, "last": 9}]


@pytest.mark.parametrize(
    "damage",
    [
        b"{", b"[1,2]", b"null", b'"text"', b"\xff\xfe\n", b'{"t":1}', b'{"kind":"msr"}', b'{"t":"x","kind":"msr"}',
        b'{"t":true,"kind":"msr"}', b"[" * 100000, b'{"t":1,"kind":5}',
    ],
)  # fmt: skip
def test_malformed_line_is_counted_and_the_rest_used(damage: bytes) -> None:
    summary = summarise([*_trace(_CALL), damage + b"\n", *_trace(_MSR)])
    assert (summary["lines"], summary["malformed"], summary["first_malformed"]) == (2, 1, 2)


def test_fields_of_any_type_are_survived() -> None:
    odd: list[Any] = [None, [], {}, "x", -1, 1.5, True, "9" * 100]
    lines = [
        {
            "t": 1,
            "kind": kind,
            **dict.fromkeys(("vp", "call", "ns", "status", "msr", "value", "name", "message"), value),
        }
        for kind in ("hypercall", "msr", "intercept", "event", "other")
        for value in odd
    ]
    summary = summarise(_trace(*lines))
    assert summary["malformed"] == 0
    json.dumps(summary)
    target = io.StringIO()
    export(_trace(*lines), target)
    json.loads(target.getvalue())


def test_blank_lines_are_nothing() -> None:
    lines = TraceLines([b"\n", b"  \n"])
    assert list(lines) == []
    assert lines.malformed == 0


def test_export_names_processes_and_threads_once() -> None:
    target = io.StringIO()
    count, malformed = export([*_trace(_CALL, {**_CALL, "ns": 5000}, _MSR), b"{"], target)
    events = json.loads(target.getvalue())["traceEvents"]
    assert (len(events), malformed) == (count, 1)
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == [
        "partition 1",
        "VP 0",
        "VP 1",
    ]
    calls = [event for event in events if event["ph"] == "X"]
    assert [call["dur"] for call in calls] == [0, 5.0]
    assert calls[0]["ts"] == 0.01
    assert [event["name"] for event in events if event["ph"] == "i"] == ["read VP_INDEX"]


def test_empty_trace_exports_an_empty_document() -> None:
    target = io.StringIO()
    assert export([], target) == (0, 0)
    assert json.loads(target.getvalue())["traceEvents"] == []
