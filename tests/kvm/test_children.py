# SPDX-License-Identifier: Apache-2.0
"""Children through /dev/mshv, from inside a real root kernel: each test of tests/children/groups is one here.

A group has a root partition of its own, for each scheduler that it names. The groups run there without pytest, by
tests/children/runner.py; the guests' code is assembled here.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.children import code
from tests.children.assembler import write_images
from tests.kvm.command import run_root
from tests.kvm.runner_output import RunnerOutput

CHILDREN = Path(__file__).resolve().parents[1] / "children"
GROUPS = sorted(path.stem for path in (CHILDREN / "groups").glob("[a-z]*.py"))
SCHEDULERS = ("hypervisor", "root")
#: Seconds for a whole group, where each test may take a minute.
LIMIT_S = 480
_PYTHON = getattr(sys, "_base_executable", sys.executable)


def module(group: str) -> ModuleType:
    return importlib.import_module(f"tests.children.groups.{group}")


def names(group: str) -> list[str]:
    """The group's tests."""
    return [name for name in vars(module(group)) if name.startswith("test_")]


CASES = [
    (group, scheduler, name)
    for group in GROUPS
    for scheduler in getattr(module(group), "SCHEDULERS", SCHEDULERS)
    for name in names(group)
]


@functools.cache
def outcome(group: str, scheduler: str) -> tuple[RunnerOutput, dict[str, Any]]:
    """Boots a root partition and runs the group in it; what it said, and its report."""
    options = getattr(module(group), "OPTIONS", ("--vps", "2"))
    with tempfile.TemporaryDirectory() as folder:
        images, report = Path(folder) / "images", Path(folder) / "report"
        write_images(code.ALL, images)
        process = run_root(
            [
                *("--kernel", "mshv", "--scheduler", scheduler, *options, "--report", str(report), "--"),
                *(_PYTHON, "-I", "-S", str(CHILDREN / "runner.py"), str(images), group),
                *(os.environ.get("ROOTVISOR_CHILDREN_TESTS", "").split() or names(group)),
            ],
            timeout_s=getattr(module(group), "LIMIT_S", LIMIT_S),
        )
        return RunnerOutput(process), json.loads(report.read_text()) if report.exists() else {}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("group", "scheduler", "name"), CASES)
def test_child(
    group: str, scheduler: str, name: str, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    done, _facts = outcome(group, scheduler)
    wanted = os.environ.get("ROOTVISOR_CHILDREN_TESTS", "").split()
    if wanted and name not in wanted:
        pytest.skip("not asked for")
    done.judge(name, record_property, capsys)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("group", "scheduler"), dict.fromkeys(case[:2] for case in CASES))
def test_root_partition_of_a_group_ends_well_and_has_its_memory_back(group: str, scheduler: str) -> None:
    done, facts = outcome(group, scheduler)
    done.ended_well()
    assert facts["ended"] == "poweroff"
    deposits = facts["deposits"]
    assert deposits["in_use"] == 0 and deposits.get("lost", 0) == 0, deposits


@pytest.mark.row(
    "EOI-01", "EOI-02", "SYN-18", "TMR-01", "TMR-02", "TMR-06", "TMR-07", "TMR-08", "TMR-13", "PRV-03"
)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_timers_eois_and_inits_of_children(scheduler: str) -> None:
    """What rows of the guest interface the group shows in children: tests/children/groups/timers.py."""
    assert outcome("timers", scheduler)[0].failures == {name: [] for name in names("timers")}
