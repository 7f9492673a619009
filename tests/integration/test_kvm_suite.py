# SPDX-License-Identifier: Apache-2.0
"""Runs tests/kvm on a real /dev/kvm: this machine's, or in one boot of the appliance where it has none that works.

ROOTVISOR_KVM_TESTS names files or folders to run instead of all of tests/kvm.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rootvisor import kernels
from rootvisor.appliance import check
from tests.integration.inner_suite import run_suite
from tests.kvm.conftest import unusable

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
    variables = {"ROOTVISOR_KVM_REQUIRED": "1"}
    ran = run_suite(suite_command(tmp_path), tmp_path / "results.xml", variables, DEADLINE_S, capfd)
    assert ran > 0, "no test ran"
