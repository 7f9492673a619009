# SPDX-License-Identifier: Apache-2.0
"""Runs tests/hardware in an appliance that emulates the devices which these tests give to root partitions.

ROOTVISOR_HARDWARE_TESTS names some of them, ROOTVISOR_HARDWARE_KILLS how often the hypervisor is killed under I/O (2).
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rootvisor import kernels
from rootvisor.appliance import check
from tests.hardware.draw import COLOURS, HEIGHT, WIDTH
from tests.hardware.png import pixels
from tests.integration.inner_suite import PROJECT, run_suite

DEADLINE_S = 3600
SENT = random.Random(1).randbytes(4 << 20)


@pytest.fixture
def echo() -> Iterator[int]:
    """A server on this machine: it sends a file, and then back what it gets. QEMU's network card reaches it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.sendall(SENT)
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


@pytest.mark.boot
@pytest.mark.timeout(DEADLINE_S + 120)
def test_hardware_suite_passes_with_emulated_devices(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], echo: int
) -> None:
    problems = check()
    if problems:
        pytest.skip(f"the appliance does not work here: {[str(one) for one in problems]}")
    kernels.ensure("stock")
    image = tmp_path / "nvme.img"
    with image.open("wb") as file:
        file.truncate(256 << 20)
    results = tmp_path / "results"
    results.mkdir()
    command = [
        sys.executable, "-m", "rootvisor.appliance", "--memory", "2560", "--timeout", str(DEADLINE_S),
        "--writable", str(results), "--device", f"nvme,path={image}", "--device", "nic", "--device", "dma", "--",
        sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--color=no", "-o", "junit_family=xunit1",
        f"--junitxml={results / 'results.xml'}",
        *os.environ.get("ROOTVISOR_HARDWARE_TESTS", "tests/hardware").split(),
    ]  # fmt: skip
    variables = {
        "ROOTVISOR_HARDWARE_PORT": str(echo),
        "ROOTVISOR_HARDWARE_SHA256": hashlib.sha256(SENT).hexdigest(),
    }
    ran = run_suite(command, results / "results.xml", variables, DEADLINE_S, capfd)
    assert ran >= (1 if "ROOTVISOR_HARDWARE_TESTS" in os.environ else 7)


@pytest.mark.boot
@pytest.mark.timeout(600)
def test_the_picture_of_the_roots_display_is_taken_from_outside(tmp_path: Path) -> None:
    """What the root wrote to the display's memory and registers is what somebody in front of its screen sees."""
    problems = check()
    if problems:
        pytest.skip(f"the appliance does not work here: {[str(one) for one in problems]}")
    picture = tmp_path / "display.png"
    command = [
        sys.executable, "-m", "rootvisor", "run", "--engine", "appliance", "--timeout", "400", "--memory", "256M",
        "--device", "emulated:display", "--screenshot", str(picture),
        "--", "python3", str(PROJECT / "tests/hardware/draw.py"), "0000:00:04.0",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, stdin=subprocess.DEVNULL, timeout=550)
    assert done.returncode == 0 and done.stdout == b"drawn\n", done.stderr.decode()
    lines = pixels(picture)
    assert (len(lines[0]), len(lines)) == (WIDTH, HEIGHT)
    for colour, x, y in zip(COLOURS, (0, 1, 0, 1), (0, 0, 1, 1), strict=True):
        field = {
            pixel
            for line in lines[y * HEIGHT // 2 : (y + 1) * HEIGHT // 2]
            for pixel in line[x * WIDTH // 2 : (x + 1) * WIDTH // 2]
        }
        assert field == {colour[2::-1]}
