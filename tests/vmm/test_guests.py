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


class Outcome:
    """What the root partition said: ``failures`` has the lines behind each test that ended."""

    def __init__(self, status: int, text: str, errors: str) -> None:
        self.status, self.text, self.errors = status, text, errors
        self.failures: dict[str, list[str]] = {}
        self.figures: dict[str, list[str]] = {}
        self.ended = False
        #: why there is no Debian for those tests that need it
        self.no_debian = ""
        lines: list[str] = []
        notes: list[str] = []
        for line in text.splitlines():
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


@functools.cache
def outcome() -> Outcome:
    """Boots a root partition and runs everything in it."""
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
                *("--kernel", "mshv", "--vps", "2", "--memory", MEMORY, "--"),
                *("env", *keep, _PYTHON, "-I", "-S", str(HERE / "runner.py"), str(path), *cases),
            ],
            timeout_s=LIMIT_S,
            engine="auto",
        )
    found = Outcome(
        done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    )
    found.no_debian = no_debian
    return found


@pytest.mark.parametrize("name", CASES)
def test_guest(name: str, record_property: Any, capsys: pytest.CaptureFixture[str]) -> None:
    done = outcome()
    if done.no_debian and name.startswith("debian:"):
        pytest.skip(done.no_debian)
    if name not in done.failures:
        pytest.fail(f"the test did not end; {done}")
    for figure in done.figures[name]:
        record_property("figure", figure)
        with capsys.disabled():
            print(f" {figure}", end="", flush=True)
    if done.failures[name]:
        pytest.fail("\n".join(done.failures[name]))


def test_root_partition_ends_well() -> None:
    done = outcome()
    assert done.ended and done.status == (1 if any(done.failures.values()) else 0), str(done)
    assert done.errors == "", done.errors
