# SPDX-License-Identifier: Apache-2.0
"""``rootvisor vmm`` in a real root partition: each test of tests/vmm/cases is one here. One root boot for all guests.

What runs is the short selection below, with ROOTVISOR_SOAK=1 everything. ROOTVISOR_VMM_TESTS takes others (``boots
disks:test_...``, with blanks); _REBOOTS, _CYCLES, _KILLS and _LOAD_S (seconds) set how long the long ones are;
ROOTVISOR_TEST_PATIENCE multiplies deadlines where the machine is slow.
"""

from __future__ import annotations

import ast
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from rootvisor.appliance import check
from tests.kvm.command import run_root
from tests.kvm.conftest import unusable
from tests.kvm.runner_output import RunnerOutput
from tests.vmm import debian, job

HERE = Path(__file__).resolve().parent
WANTED = os.environ.get("ROOTVISOR_VMM_TESTS", "").split()
LIMIT_S = int(os.environ.get("ROOTVISOR_VMM_LIMIT", "3600"))
MEMORY = os.environ.get("ROOTVISOR_VMM_ROOT_MEMORY", "2G")
_PYTHON = getattr(sys, "_base_executable", sys.executable)

pytestmark = [pytest.mark.boot, pytest.mark.timeout(LIMIT_S + 300)]


def cases() -> list[str]:
    """Group and name of every test."""
    found = []
    for path in sorted((HERE / "cases").glob("[a-z]*.py")):
        if path.stem == "bench" and "bench" not in WANTED:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.append(f"{path.stem}:{node.name}")
    return found


#: A guest of each kind: what `make test` has minutes for.
SHORT = (
    "boots:test_mshv_kernel_on_two_processors",
    "devices:test_net_fetches_a_page_from_the_root",
    "devices:test_shared_folder_is_read_and_written",
    "disks:test_raw_disk_is_read_and_written",
    "life:test_disk_and_net_come_and_go",
    "life:test_power_button_reaches_the_guest_which_powers_off",
    "snapshots:test_restored_guest_goes_on_where_it_was",
)
_ALL = cases()
assert set(SHORT) <= set(_ALL)
_CHOSEN = WANTED or (_ALL if os.environ.get("ROOTVISOR_SOAK") else SHORT)
CASES = [name for name in _ALL if name in _CHOSEN or name.partition(":")[0] in _CHOSEN]


@pytest.fixture(autouse=True)
def engine() -> None:
    problems = check() if unusable() else []
    if problems:
        pytest.skip(f"neither KVM nor the appliance works here: {[str(one) for one in problems]}")


@functools.cache
def outcome() -> tuple[RunnerOutput, str]:
    """Boots a root partition and runs everything in it; what it said, and why Debian's tests are left out."""
    with tempfile.TemporaryDirectory() as folder:
        cases, no_debian = CASES, ""
        try:
            path = job.write(Path(folder), {name.partition(":")[0] for name in cases})
        except debian.Unavailable as problem:
            no_debian = str(problem)
            cases = [name for name in cases if not name.startswith("debian:")]
            path = job.write(Path(folder))
        keep = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("ROOTVISOR_")]
        done = run_root(
            [
                *("--kernel", "mshv", "--vps", "2", "--memory", MEMORY, "--child-timers", "--"),
                *("env", *keep, _PYTHON, "-I", "-S", str(HERE / "runner.py"), str(path), *cases),
            ],
            timeout_s=LIMIT_S,
            engine="auto",
        )
    return RunnerOutput(done), no_debian


@pytest.mark.parametrize("name", CASES)
def test_guest(name: str, record_property: Any, capsys: pytest.CaptureFixture[str]) -> None:
    done, no_debian = outcome()
    if no_debian and name.startswith("debian:"):
        pytest.skip(no_debian)
    done.judge(name, record_property, capsys)


def test_root_partition_ends_well() -> None:
    outcome()[0].ended_well()
