# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]

_LINES = (
    '{"t":0,"kind":"trace","version":1}\n'
    '{"t":5,"vp":0,"partition":1,"kind":"hypercall","call":"CREATE_VP","code":78,"status":"SUCCESS","ns":41000}\n'
    '{"t":9,"vp":0,"partition":1,"kind":"msr","msr":"HYPERCALL","access":"write","value":1}\n'
    '{"t":11,"partition":1,"kind":"event","name":"ready","detail":""}\n'
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "a.trace"
    path.write_text(_LINES)
    return path


def test_report_shows_tables(rootvisor: Run, trace: Path) -> None:
    status, out, err = rootvisor("trace", "report", str(trace))
    assert (status, err) == (0, "")
    for text in ("CREATE_VP", "41.0 us", "HYPERCALL", "ready"):
        assert text in out


def test_report_json(rootvisor: Run, trace: Path) -> None:
    status, out, _ = rootvisor("trace", "report", "--json", str(trace))
    assert status == 0
    assert json.loads(out)["hypercalls"][0]["count"] == 1


def test_report_counts_malformed_lines_on_stderr(rootvisor: Run, trace: Path) -> None:
    with trace.open("a") as file:
        file.write("{damaged\n")
    status, _, err = rootvisor("trace", "report", str(trace))
    assert status == 0
    assert "1 malformed line left out, the first is line 5" in err


def test_export_writes_trace_events(rootvisor: Run, trace: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    status, out, _ = rootvisor("trace", "export", str(trace), "-o", str(target))
    assert (status, out) == (0, "")
    assert json.loads(target.read_text())["traceEvents"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.trace", "out.json"]


def test_export_to_stdout(rootvisor: Run, trace: Path) -> None:
    status, out, _ = rootvisor("trace", "export", str(trace))
    assert status == 0
    assert json.loads(out)["displayTimeUnit"] == "ns"


@pytest.mark.parametrize("command", ["report", "export"])
@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("", "empty"), ("root:x:0:0\n", "not a trace")]
)
def test_other_files_are_refused_in_one_line(
    rootvisor: Run, tmp_path: Path, command: str, content: str | None, message: str
) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    status, _, err = rootvisor("trace", command, str(path))
    assert status == 2
    assert err.count("\n") == 1
    assert message in err


def test_export_onto_the_trace_is_refused(rootvisor: Run, trace: Path) -> None:
    status, _, _ = rootvisor("trace", "export", str(trace), "-o", str(trace))
    assert status == 2
    assert trace.read_text() == _LINES


def test_export_into_a_missing_folder_leaves_nothing(rootvisor: Run, trace: Path, tmp_path: Path) -> None:
    status, _, err = rootvisor("trace", "export", str(trace), "-o", str(tmp_path / "no" / "out.json"))
    assert status == 125
    assert "give another --output" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.trace"]
