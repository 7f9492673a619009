# SPDX-License-Identifier: Apache-2.0
"""A client that others wrote for Cloud Hypervisor's API, unmodified (the crate cloud-hypervisor-client, generated from
Cloud Hypervisor's own description), drives the VMM through its life.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.api_client import CannotBuild, api_client

FAKE_VMM = Path(__file__).parents[1] / "unit" / "vmm" / "fake_vmm.py"
BUILD_SECONDS = 1500

STEPS = {
    *(
        "ping",
        "create",
        "boot",
        "info",
        "pause",
        "resume",
        "add-disk",
        "add-net",
        "counters",
        "remove-device",
    ),
    *("resize", "power-button", "reboot", "snapshot", "delete", "restore", "shutdown", "shutdown-vmm"),
}
"""What the program says it did, among other things."""


@pytest.fixture(scope="session")
def client() -> Path:
    try:
        return api_client()
    except CannotBuild as error:
        pytest.skip(str(error))


@pytest.fixture
def fake_vmm(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The VMM with a machine that is none: what is tried here is the API."""
    process = subprocess.Popen([sys.executable, str(FAKE_VMM), "--api-socket", str(tmp_path / "s")])
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()


@pytest.mark.timeout(BUILD_SECONDS + 300)
def test_client_drives_a_virtual_machine_through_its_life(
    client: Path, fake_vmm: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    done = subprocess.run(
        [client, tmp_path / "s", tmp_path, "/boot/vmlinuz"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1] == "all done"
    assert set(lines) >= STEPS
    assert fake_vmm.wait(20) == 0
