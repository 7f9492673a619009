# SPDX-License-Identifier: Apache-2.0
"""rust-vmm's own tests of /dev/mshv pass in the root partition: the suite of mshv-ioctls, unmodified, in one boot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import cache

import pytest

from rootvisor.appliance import check
from tests.kvm.conftest import unusable
from tests.peers import rust_vmm

TIMEOUT_S = 900

LACKING = {
    "ioctls::device::tests::test_create_device": "Linux 7.3's driver has no MSHV_CREATE_DEVICE (ENOTTY)",
}
"""Tests of what no root kernel of today can do, whatever the hypervisor: they have to fail."""

pytestmark = [
    pytest.mark.boot,
    pytest.mark.timeout(TIMEOUT_S + 900),
    pytest.mark.skipif(
        not os.environ.get("ROOTVISOR_SOAK"), reason="long, part of make soak: ROOTVISOR_SOAK=1 runs it"
    ),
]


@cache
def suite() -> tuple[list[str], dict[str, str], str]:
    """Runs everything in one root partition: names of the tests, results by name, what was printed."""
    built = rust_vmm.program()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "rootvisor", "run", "--kernel", "mshv", "--memory", "2G", "--timeout", str(TIMEOUT_S),
            "--", str(built), "--test-threads", "1",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S + 120)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    return rust_vmm.names(built), rust_vmm.results(output), output


def test_every_test_of_mshv_ioctls_passes_in_the_root() -> None:
    problems = check() if unusable() else []
    if problems:
        pytest.skip(f"neither KVM nor the appliance works here: {[str(one) for one in problems]}")
    try:
        names, results, output = suite()
    except rust_vmm.Unavailable as error:
        pytest.skip(str(error))
    assert len(names) > 30
    wanted = {name: "FAILED" if name in LACKING else "ok" for name in names}
    wrong = {name: results.get(name, "did not run") for name in names if results.get(name) != wanted[name]}
    assert not wrong, f"{wrong}\n{output[-6000:]}"
