# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.vmm.client import Client

Start = Callable[..., subprocess.Popen[str]]
FAKE_VMM = Path(__file__).with_name("fake_vmm.py")
GUEST = ("--kernel", "vmlinux", "--console", "off")


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `rootvisor vmm` with a fake machine; whatever runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str, **settings: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(FAKE_VMM), *arguments], stderr=subprocess.PIPE, text=True, **settings
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def events(path: Path) -> list[str]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [f"{event['source']} {event['event']}" for event in map(json.loads, lines)]


def test_guest_that_powers_off_ends_the_vmm(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "events"
    process = start(*GUEST, "--event-monitor", str(log))
    wait_for(lambda: "vm booted" in events(log))
    process.send_signal(signal.SIGRTMAX)
    wait_for(lambda: "vm rebooted" in events(log))
    process.send_signal(signal.SIGRTMIN)
    assert process.wait(20) == 0
    assert events(log) == [
        "vmm starting", "vm booting", "vm booted", "guest reboot", "vm rebooting", "vm rebooted", "guest shutdown",
        "vm shutdown", "vm deleted",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_guest_and_vmm(
    start: Start, tmp_path: Path, socket_path: str, number: signal.Signals
) -> None:
    log = tmp_path / "events"
    process = start(*GUEST, "--event-monitor", str(log), "--api-socket", socket_path)
    wait_for(lambda: "vm booted" in events(log))
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert "vm shutdown" in events(log)
    assert not os.path.exists(socket_path)


def test_api_from_an_empty_vmm_to_its_end(start: Start, socket_path: str) -> None:
    process = start("--api-socket", f"path={socket_path}", "--no-shutdown")
    wait_for(lambda: os.path.exists(socket_path))
    with Client(socket_path) as client:
        assert client.call("GET", "vm.info")[0] == 404
        assert client.call("PUT", "vm.create", {"payload": {"kernel": "vmlinux"}})[0] == 204
        assert client.call("PUT", "vm.boot")[0] == 204
        process.send_signal(signal.SIGRTMIN)
        wait_for(lambda: client.call("GET", "vm.info")[1]["state"] == "Shutdown")
        assert client.call("PUT", "vm.boot")[0] == 204
        assert client.call("PUT", "vmm.shutdown") == (204, None)
    assert process.wait(20) == 0
    assert not os.path.exists(socket_path)


def test_api_on_an_inherited_socket(start: Start, socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()
        process = start("--api-socket", f"fd={listener.fileno()}", pass_fds=[listener.fileno()])
    with Client(socket_path) as client:
        assert client.call("GET", "vmm.ping")[1]["pid"] == process.pid
        client.call("PUT", "vmm.shutdown")
    assert process.wait(20) == 0


def test_events_on_an_inherited_descriptor(start: Start) -> None:
    read, write = os.pipe()
    process = start(*GUEST, "--event-monitor", f"fd={write}", pass_fds=[write])
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as stream:
        assert json.loads(stream.readline())["event"] == "starting"
        while json.loads(stream.readline())["event"] != "booted":
            pass
        process.send_signal(signal.SIGTERM)
        assert json.loads(stream.read().splitlines()[-1])["event"] == "deleted"
    assert process.wait(20) == 128 + signal.SIGTERM


def test_restore_without_api_goes_on_at_once(start: Start, tmp_path: Path, socket_path: str) -> None:
    process = start(*GUEST, "--api-socket", socket_path)
    wait_for(lambda: os.path.exists(socket_path))
    with Client(socket_path) as client:
        wait_for(lambda: client.call("PUT", "vm.pause")[0] == 204)
        assert client.call("PUT", "vm.snapshot", {"destination_url": str(tmp_path / "s")})[0] == 204
        client.call("PUT", "vmm.shutdown")
    assert process.wait(20) == 0
    log = tmp_path / "events"
    process = start("--restore", f"source_url=file://{tmp_path}/s", "--event-monitor", str(log))
    wait_for(lambda: "vm resumed" in events(log))
    process.send_signal(signal.SIGRTMIN)
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*GUEST, "--api-socket", "/no/such/s"), "cannot listen at /no/such/s: No such file or directory"),
        ((*GUEST, "--api-socket", "fd=77"), "file descriptor 77 is no socket: Bad file descriptor"),
        (
            (*GUEST, "--event-monitor", "/no/such/e"),
            "cannot write events to /no/such/e: No such file or directory",
        ),
        (
            (*GUEST, "--event-monitor", "fd=77"),
            "cannot write events to file descriptor 77: Bad file descriptor",
        ),
        (("--restore", "/no/such"), "there is no snapshot in /no/such: /no/such/config.json: No such file"),
        (
            (*GUEST, "--fail"),
            "the virtual machine cannot be started: internal error: ZeroDivisionError: zork",
        ),
    ],
)
def test_failure_is_one_line_and_status_1(start: Start, arguments: tuple[str, ...], message: str) -> None:
    process = start(*arguments)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err.startswith(f"rootvisor: {message}")
    assert err.count("\n") == 1


def test_failure_with_debug_shows_where(start: Start) -> None:
    process = start(*GUEST, "--fail", "--debug")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Traceback" in err
    assert "raise cls.failing[name]" in err


def test_missing_decoder_is_told_before_the_guest_starts() -> None:
    """A Python without site packages has no iced-x86."""
    source = str(Path(__file__).parents[3] / "src")
    program = (
        f"import sys; sys.path.insert(0, {source!r})\n"
        "from rootvisor.vmm.main import run\n"
        "from rootvisor.vmm.options import parse_command_line\n"
        "sys.exit(run(parse_command_line(sys.argv[1:])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, *GUEST],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "rootvisor: the virtual machine cannot be made: the Python package iced-x86 is missing, which decodes the "
        "instructions of child partitions; python3 -m pip install iced-x86\n"
    )
