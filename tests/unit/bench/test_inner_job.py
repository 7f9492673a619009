# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rootvisor.bench import inner_job


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a job wants its results, with its path as the program's argument."""
    job, results = tmp_path / "job.json", tmp_path / "results.json"
    job.write_text(json.dumps({"number": 3, "results": str(results)}))
    monkeypatch.setattr("sys.argv", ["inner.py", str(job)])
    return results


def test_results_of_the_job_go_where_it_says(results: Path) -> None:
    assert inner_job.run(lambda job: {"double": job["number"] * 2}) == 0
    assert json.loads(results.read_text()) == {"double": 6}


def test_expected_failure_is_one_line_and_no_results(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(_job: dict[str, Any]) -> dict[str, Any]:
        raise OSError("no room")

    assert inner_job.run(measure, (OSError, ValueError)) == 1
    assert capsys.readouterr() == ("", "rootvisor: no room\n")
    assert not results.exists()


def test_failure_that_nobody_expects_is_shown_whole(results: Path) -> None:
    with pytest.raises(KeyError):
        inner_job.run(lambda job: {"it": job["absent"]}, (OSError,))
