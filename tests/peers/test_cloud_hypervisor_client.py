# SPDX-License-Identifier: Apache-2.0
"""A client that others wrote for Cloud Hypervisor's API, unmodified (the crate cloud-hypervisor-client, generated from
Cloud Hypervisor's own description), drives the VMM through its life.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rootvisor.appliance import check
from rootvisor.boot.cpio import CpioWriter
from tests.kvm.conftest import unusable
from tests.peers.api_client import CannotBuild, api_client

FAKE_VMM = Path(__file__).parents[1] / "unit" / "vmm" / "fake_vmm.py"
BUILD_SECONDS = 1500
RUN_SECONDS = 1200

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


INIT = """#!/bin/busybox sh
/bin/busybox mount -t sysfs sys /sys
while :; do /bin/busybox sleep 1; done
"""
JOB = """
mkdir /tmp/client && cp {folder}/disk.img /tmp/client/ || exit 9
{python} -m rootvisor vmm --api-socket /tmp/client/s &
{client} /tmp/client/s /tmp/client {kernel} {folder}/initrd "console=ttyS0 quiet"
status=$?
echo client $status
[ $status = 0 ] || kill $!
wait $!
echo vmm $?
"""


def initrd() -> bytes:
    """A guest that does nothing but be there."""
    archive = CpioWriter()
    archive.directory("/dev")
    archive.directory("/sys")
    archive.character_device("/dev/console", 5, 1)
    archive.file("/init", INIT.encode(), 0o755)
    archive.file("/bin/busybox", Path(shutil.which("busybox") or "/bin/busybox").read_bytes(), 0o755)
    return archive.finish()


@pytest.mark.skipif(
    not os.environ.get("ROOTVISOR_SOAK"), reason="long, part of make soak: ROOTVISOR_SOAK=1 runs it"
)
@pytest.mark.boot
@pytest.mark.timeout(BUILD_SECONDS + RUN_SECONDS + 300)
def test_client_drives_a_guest_in_the_root_partition(client: Path, tmp_path: Path) -> None:
    problems = check() if unusable() else []
    if problems:
        pytest.skip(f"neither KVM nor the appliance works here: {[str(one) for one in problems]}")
    kernel = subprocess.run(
        [sys.executable, "-m", "rootvisor", "kernel", "path", "mshv"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    (tmp_path / "initrd").write_bytes(initrd())
    job = JOB.format(folder=tmp_path, python=sys.executable, client=client, kernel=kernel)
    process = subprocess.Popen(
        [sys.executable, "-m", "rootvisor", "run", "--memory", "3G", "--", "sh", "-c", job],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=RUN_SECONDS)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    lines = output.splitlines()
    assert set(lines) >= STEPS | {"all done", "client 0", "vmm 0"}, output
    assert process.returncode == 0
