# SPDX-License-Identifier: Apache-2.0
"""tests/integration/inner_suite.py: what is told of the tests that failed, and what is done when the appliance dies."""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.finished_tests import finished
from tests.integration.inner_suite import MESSAGE_LIMIT, PROJECT, failures, run_suite


def test_failures_and_errors_have_name_and_the_end_of_their_message() -> None:
    long = "x" * MESSAGE_LIMIT
    suite = ET.fromstring(
        f"""<testsuite>
        <testcase classname="a.b" name="passes"/>
        <testcase classname="a.b" name="skipped"><skipped message="no"/></testcase>
        <testcase classname="a.b" name="test_c[1]">
        <failure message="AssertionError: lost{long}end">...</failure></testcase>
        <testcase classname="a.d" name="test_e"><error/></testcase>
        </testsuite>"""
    )
    first, second = failures(suite)
    assert first == f"a.b::test_c[1]: {long[3:]}end"
    assert second == "a.d::test_e: "


INNER = """
import os, pathlib
def test_a(): pass
def test_b():
    mark = pathlib.Path(os.environ["MARK"])
    if os.environ["DIES"] == "always" or not mark.exists():
        mark.touch()
        os._exit(125)
def test_c(): print("c runs")
"""


def suite(
    tmp_path: Path, tests: str, capfd: pytest.CaptureFixture[str], **variables: str
) -> tuple[int, str, set[str]]:
    """Runs ``tests``: how many ran, the report, and what is remembered; AssertionError as :func:`run_suite`."""
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "test_inner.py").write_text(tests)
    (folder / "conftest.py").write_text(
        "from tests.finished_tests import pytest_configure as pytest_configure\n"
    )
    report = tmp_path / "report.xml"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}",
        f"--junitxml={report}", str(folder),
    ]  # fmt: skip
    variables["MARK"] = str(tmp_path / "mark")
    variables["PYTHONPATH"] = os.pathsep.join((str(PROJECT / "src"), str(PROJECT)))
    ran = run_suite(command, report, variables, 60, capfd)
    return ran, report.read_text(), finished(tmp_path / "finished")


def ids(*names: str) -> set[str]:
    return {f"test_inner.py::{name}" for name in names}


def test_when_the_appliance_dies_another_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Only the tests that had not passed are run again."""
    ran, report, done = suite(tmp_path, INNER, capfd, DIES="once")
    assert ran == 3
    assert 'name="test_a"' not in report, "it had passed"
    assert done == ids("test_a", "test_b", "test_c")


def test_when_it_dies_again_that_is_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match=r"left no report \(status 125\)"):
        suite(tmp_path, INNER, capfd, DIES="always")
    assert finished(tmp_path / "finished") == ids("test_a")


def test_what_failed_before_it_died_gets_no_second_chance(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tests = INNER.replace(
        "def test_a(): pass", "def test_a(): assert pathlib.Path(os.environ['MARK']).exists()"
    )
    with pytest.raises(
        AssertionError, match="the appliance died, and before it\nfailed test_inner.py::test_a"
    ):
        suite(tmp_path, tests, capfd, DIES="once")
