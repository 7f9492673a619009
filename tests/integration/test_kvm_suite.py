# SPDX-License-Identifier: Apache-2.0
"""Runs tests/kvm on a real /dev/kvm: this machine's, or in one boot of the appliance where it has none that works.

ROOTVISOR_KVM_TESTS names files or folders to run instead of all of tests/kvm.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from rootvisor import kernels
from rootvisor.appliance import check
from tests.kvm.conftest import unusable

PROJECT = Path(__file__).resolve().parents[2]
DEADLINE_S = 7200
APPLIANCE_MEMORY_MIB = 4096


def suite_command(shared: Path) -> list[str]:
    """pytest on tests/kvm; the appliance around it when KVM cannot be used here."""
    pytest_command = [
        sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--color=no", "-o", "junit_family=xunit1",
        f"--junitxml={shared / 'results.xml'}",
        *os.environ.get("ROOTVISOR_KVM_TESTS", "tests/kvm").split(),
    ]  # fmt: skip
    if not unusable():
        return pytest_command
    kernels.ensure("stock")
    return [
        sys.executable, "-m", "rootvisor.appliance", "--memory", str(APPLIANCE_MEMORY_MIB),
        "--timeout", str(DEADLINE_S), "--writable", str(shared), "--", *pytest_command,
    ]  # fmt: skip


@pytest.mark.boot
@pytest.mark.timeout(DEADLINE_S + 120)
def test_kvm_suite_passes_on_a_real_kvm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The inner tests' lines appear as they come; the outcome is read from their report."""
    problems = check() if unusable() else []
    if problems:
        pytest.skip(f"neither KVM nor the appliance works here: {[str(one) for one in problems]}")
    environment = {
        **os.environ,
        "PYTHONPATH": str(PROJECT / "src"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "ROOTVISOR_KVM_REQUIRED": "1",
    }
    with capfd.disabled():
        print(flush=True)
        process = subprocess.Popen(
            suite_command(tmp_path),
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(DEADLINE_S + 60)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    report = tmp_path / "results.xml"
    assert report.exists(), f"the inner run left no report (status {status})"
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    ran = int(suite.get("tests", "0")) - int(suite.get("skipped", "0"))
    assert status == 0, f"{suite.get('failures')} failures and {suite.get('errors')} errors in {ran} tests"
    assert ran > 0, "no test ran"
