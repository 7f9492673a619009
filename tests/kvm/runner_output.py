# SPDX-License-Identifier: Apache-2.0
"""What tests/children/runner.py and tests/vmm/runner.py say from inside a root partition, test by test."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest


class RunnerOutput:
    """``failures`` has the lines behind each test that ended, none for one that passed; ``figures`` what each noted.

    Lines: ``begin NAME``, ``note FIGURE``, ``pass NAME SECONDS``, ``fail NAME SECONDS`` with the reason behind it, and
    ``end``.
    """

    def __init__(self, process: subprocess.CompletedProcess[bytes]) -> None:
        self.status = process.returncode
        self.errors = process.stderr.decode(errors="replace")
        self.text = process.stdout.decode(errors="replace")
        self.failures: dict[str, list[str]] = {}
        self.figures: dict[str, list[str]] = {}
        self.ended = False
        lines: list[str] = []
        notes: list[str] = []
        for line in self.text.splitlines():
            word, _, rest = line.partition(" ")
            if word in ("pass", "fail"):
                name, seconds = rest.split()
                lines = self.failures[name] = [f"failed after {seconds} s"] if word == "fail" else []
                self.figures[name], notes = notes, []
            elif word == "note":
                notes.append(rest)
            elif line == "end":
                self.ended = True
            elif word != "begin":
                lines.append(line)

    def __str__(self) -> str:
        return f"root partition: status {self.status}\n{self.text[-3000:]}\n{self.errors[-3000:]}"

    def judge(self, name: str, record_property: Any, capsys: pytest.CaptureFixture[str]) -> None:
        """Fails where that test failed, or did not end; its figures are shown and recorded."""
        if name not in self.failures:
            pytest.fail(f"the test did not end; {self}")
        for figure in self.figures[name]:
            record_property("figure", figure)
            with capsys.disabled():
                print(f" {figure}", end="", flush=True)
        if self.failures[name]:
            pytest.fail("\n".join(self.failures[name]))

    def ended_well(self) -> None:
        """Fails unless the runner came to its end, with the status that its tests give it, and nobody complained."""
        assert self.ended, str(self)
        assert self.status == (1 if any(self.failures.values()) else 0), str(self)
        assert self.errors == "", self.errors
