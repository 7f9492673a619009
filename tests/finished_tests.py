# SPDX-License-Identifier: Apache-2.0
"""A suite in the appliance goes on where it was when the appliance dies: tests that have passed are not run again.

QEMU's TCG loses a kernel under load now and then ("int3", "double fault" in the outer kernel, in code that nobody here
runs). ROOTVISOR_FINISHED_TESTS names a file, which gets the node id of each test as it passes; a run that finds some
there leaves those out. A test that kills the appliance by itself is run again, and kills it again; one that failed
before gets no second chance.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "ROOTVISOR_FINISHED_TESTS"
#: Before the node id of a test that failed.
FAILED = "failed "


def finished(path: Path) -> set[str]:
    """Node ids of the tests that have passed; those that failed with a word before it. The last may be half a one."""
    return (
        set(path.read_text(encoding="utf-8", errors="replace").split("\n")) - {""} if path.exists() else set()
    )


class FinishedTests:
    """The pytest plugin."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves out what has passed."""
        done = finished(self._path)
        old = [item for item in items if item.nodeid in done]
        if old:
            items[:] = [item for item in items if item.nodeid not in done]
            config.hook.pytest_deselected(items=old)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Writes it down, before anything else can happen."""
        if report.failed or (report.when == "call" and report.passed):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{FAILED if report.failed else ''}{report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    """Only where the variable is set."""
    path = os.environ.get(VARIABLE)
    if path:
        config.pluginmanager.register(FinishedTests(Path(path)))
