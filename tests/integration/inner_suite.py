# SPDX-License-Identifier: Apache-2.0
"""A pytest that runs in the appliance, or beside this one: its lines as they come, its outcome from its report."""

from __future__ import annotations

import os
import signal
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.finished_tests import FAILED, VARIABLE, finished

PROJECT = Path(__file__).resolve().parents[2]
#: Characters of a failed test's message.
MESSAGE_LIMIT = 1000
#: The appliance's exit status when it died, or could not start.
_DIED = 125


def run_suite(
    command: Sequence[str],
    report: Path,
    variables: Mapping[str, str],
    deadline_s: float,
    capfd: pytest.CaptureFixture[str],
) -> int:
    """Runs it with more environment variables; how many tests ran and were not skipped. Fails if one of them did.

    When the appliance dies under the tests and none has failed, another one has those that have not passed; once.
    """
    passed = report.with_name("finished")
    environment = {
        **os.environ,
        "PYTHONPATH": str(PROJECT / "src"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        VARIABLE: str(passed),
        **variables,
    }
    status = _run(command, environment, deadline_s, capfd)
    earlier = 0
    if status == _DIED and not report.exists() and (done := finished(passed)):
        failed = sorted(line for line in done if line.startswith(FAILED))
        assert not failed, "\n".join(("the appliance died, and before it", *failed))
        earlier = len(done)
        with capfd.disabled():
            print(f"\nthe appliance died after {earlier} tests had passed; another one goes on", flush=True)
        status = _run(command, environment, deadline_s, capfd)
    assert report.exists(), f"the inner run left no report (status {status})"
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    ran = earlier + int(suite.get("tests", "0")) - int(suite.get("skipped", "0"))
    assert status == 0, "\n".join(
        (
            f"{suite.get('failures')} failures and {suite.get('errors')} errors in {ran} tests",
            *failures(suite),
        )
    )
    return ran


def _run(
    command: Sequence[str],
    environment: Mapping[str, str],
    deadline_s: float,
    capfd: pytest.CaptureFixture[str],
) -> int:
    """Its exit status."""
    with capfd.disabled():
        print(flush=True)
        process = subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            return process.wait(deadline_s + 60)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise


def failures(suite: ET.Element) -> list[str]:
    """The tests of a report that failed, each with the end of what it said: its own lines are far above by then."""
    told = []
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            for found in case.findall(kind):
                message = found.get("message") or ""
                told.append(f"{case.get('classname')}::{case.get('name')}: {message[-MESSAGE_LIMIT:]}")
    return told
