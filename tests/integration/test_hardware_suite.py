# SPDX-License-Identifier: Apache-2.0
"""Runs tests/hardware in an appliance that emulates the devices which these tests give to root partitions.

ROOTVISOR_HARDWARE_TESTS names some of them, ROOTVISOR_HARDWARE_KILLS how often the hypervisor is killed under I/O (2).
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rootvisor import kernels
from rootvisor.appliance import check
from rootvisor.cli.png import read_png
from rootvisor.cli.screen_text import Font, read_text
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
    assert ran >= (1 if "ROOTVISOR_HARDWARE_TESTS" in os.environ else 9)


#: Runs in the root partition: a field of every colour that a text console has, and a line, on its screen.
SCREEN = r"""
readlink /sys/bus/pci/devices/0000:00:04.0/driver
for one in /sys/class/vtconsole/*; do [ "$(cat $one/bind)" = 0 ] || cat $one/name; done
cat /sys/module/vt/parameters/default_red /sys/module/vt/parameters/default_grn /sys/module/vt/parameters/default_blu
{ printf '\033[?25l'; for n in 0 1 2 3 4 5 6 7; do printf '\033[4%dm        ' $n; done; printf '\033[0m\n'
echo "$1"; } >/dev/tty0
"""


@pytest.mark.boot
@pytest.mark.timeout(600)
def test_the_roots_console_is_seen_on_its_display_from_outside(tmp_path: Path) -> None:
    """The kernel's own driver has its console on the display: log, what a program writes there, its colours."""
    problems = check()
    if problems:
        pytest.skip(f"the appliance does not work here: {[str(one) for one in problems]}")
    picture = tmp_path / "display.png"
    words = f"written by the root partition {random.randbytes(8).hex()}"
    font = f"{sys.executable} -I -S {PROJECT / 'src/rootvisor/cli/console_font.py'}"
    command = [
        sys.executable, "-m", "rootvisor", "run", "--engine", "appliance", "--timeout", "400", "--memory", "256M",
        "--device", "emulated:display", "--screenshot", str(picture), "--", "sh", "-c", SCREEN + font, "sh", words,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, stdin=subprocess.DEVNULL, timeout=550)
    assert done.returncode == 0, done.stderr.decode()
    driver, console, red, green, blue, glyphs = done.stdout.decode().splitlines()
    assert driver.endswith("/bochs-drm") and "frame buffer device" in console
    lines = read_png(picture)
    text = read_text(lines, Font.parse(glyphs))
    shown = "\n".join(text)
    assert words in text, shown
    log = [line for line in text if re.match(r"\[ *\d+\.\d{6}\] \S", line)]
    assert len(log) >= 20, shown
    palette = list(zip(*(map(int, one.split(",")) for one in (red, green, blue)), strict=True))[:8]
    assert len(set(palette)) == 8
    fields = lines[(text.index(words) - 1) * 16 + 8]  # in the middle of the line above
    for number, colour in enumerate(palette):
        assert fields[number * 8 * 24 : (number + 1) * 8 * 24] == bytes(colour) * 64, (number, colour)
