# SPDX-License-Identifier: Apache-2.0
"""These tests need KVM that runs ring-0 code. Elsewhere tests/integration/test_kvm_suite.py runs them in the appliance.

With ROOTVISOR_KVM_REQUIRED set, a machine without usable KVM is a failure instead of a reason to skip.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rootvisor.kvm import abi
from rootvisor.kvm.system import Kvm
from tests.kvm.child import Driver
from tests.kvm.guest import Guest, driven
from tests.kvm.ordinary import Ordinary

_APIC_ENABLED = 1 << 11


def unusable() -> str:
    """Why KVM cannot be used here, or an empty string."""
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-m", "rootvisor.kvm.selftest"],
            capture_output=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        verdict = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        return f"the processor test gives no verdict: {error}"
    return "" if verdict["usable"] else str(verdict["reason"])


#: Test (file::function, all its parameters together) to the worst outcome.
_outcomes: dict[str, str] = {}
_RANKS = ("passed", "skipped", "failed")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keeps outcomes of tests for docs/reference/conformance.md."""
    name = report.nodeid.rpartition("/")[2].partition("[")[0]
    if report.when == "call" or report.outcome != "passed":
        _outcomes[name] = max(_outcomes.get(name, "passed"), report.outcome, key=_RANKS.index)


def pytest_sessionfinish() -> None:
    """Writes them where ROOTVISOR_CONFORMANCE says."""
    path = os.environ.get("ROOTVISOR_CONFORMANCE")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(_outcomes, file, indent=1)


@pytest.fixture(scope="session", autouse=True)
def usable_kvm() -> None:
    reason = unusable()
    if reason and os.environ.get("ROOTVISOR_KVM_REQUIRED"):
        pytest.fail(f"KVM is not usable: {reason}")
    if reason:
        pytest.skip(f"KVM is not usable: {reason}; run tests/integration/test_kvm_suite.py")


@pytest.fixture(scope="session", autouse=True)
def resting_machine(usable_kvm: None) -> Iterator[None]:
    """A machine that does nothing, for the whole session.

    The first and the last machine of a host, and processors whose APIC goes on and off, make the kernel patch its own
    code (``preempt_notifier_inc``, ``apic_sw_disabled``, ``apic_hw_disabled``). QEMU's TCG with several threads loses
    that race now and then, and hundreds of machines come and go here: "Oops: int3" in ``__schedule``.
    """
    kvm = Kvm()
    vm = kvm.create_vm()
    vm.create_irqchip()
    vcpu = vm.create_vcpu(0)
    base = struct.unpack_from("<Q", vcpu.get_sregs(), abi.SREGS_APIC_BASE)[0]
    vcpu.set_sregs(apic_base=base & ~_APIC_ENABLED)
    yield
    vm.close()
    kvm.close()


@pytest.fixture
def guest(usable_kvm: None) -> Iterator[Guest]:
    """A root partition with one VP."""
    yield from driven(Guest())


@pytest.fixture
def guest2(usable_kvm: None) -> Iterator[Guest]:
    """One with two VPs, announced as a kernel does."""
    yield from driven(Guest(vps=2))


@pytest.fixture
def ordinary(usable_kvm: None) -> Iterator[Ordinary]:
    """A guest partition with one VP."""
    yield from driven(Ordinary())


@pytest.fixture
def ordinary2(usable_kvm: None) -> Iterator[Ordinary]:
    """One with two VPs."""
    yield from driven(Ordinary(vps=2))


@pytest.fixture
def driver(guest: Guest) -> Driver:
    """A root partition with one VP, from above its children."""
    return Driver(guest)
