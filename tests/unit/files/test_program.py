# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rootvisor.files.program import find_on_path, output_of


def test_find_on_path_takes_the_first_that_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "tool").mkdir()
    (tmp_path / "two" / "tool").touch()
    (tmp_path / "three" / "tool").touch(mode=0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in ("one", "two", "three")))
    assert find_on_path("tool") == str(tmp_path / "three" / "tool")
    assert find_on_path("nothing") is None


def test_output_of_gives_status_and_both_streams() -> None:
    assert output_of(["/bin/sh", "-c", "echo out; echo err >&2; exit 3"]) == (3, b"out\nerr\n")
    assert output_of(["/nothing/there"]) is None


def test_output_of_program_that_does_not_end_is_none_in_time() -> None:
    began = time.monotonic()
    assert output_of(["/bin/sh", "-c", "sleep 60 & sleep 60"], seconds=0.1) is None
    assert time.monotonic() - began < 10
