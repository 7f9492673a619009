# SPDX-License-Identifier: Apache-2.0
"""The judge with programs in place of QEMU."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from typing import Any

import pytest

from rootvisor.peers import inner

EXPECTED = {"up": "7.3"}
GOOD = "print('guest: up 7.3'); print('guest: end')"


def guest(code: str, name: str = "g", timeout_s: float = 20.0) -> dict[str, Any]:
    return {
        "name": name,
        "argv": [sys.executable, "-I", "-S", "-u", "-c", code],
        "expected": EXPECTED,
        "timeout_s": timeout_s,
    }


def boot(*guests: dict[str, Any], parallel: int = 1) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    inner.boot_all(list(guests), parallel, results.append)
    return results


def test_boot_good_guest_passes_with_its_times() -> None:
    (result,) = boot(guest(GOOD))
    assert result["ok"]
    assert 0 < result["times"]["up"] <= result["total_s"]


def test_boot_status_of_the_vmm_counts() -> None:
    (result,) = boot(guest(GOOD + "; raise SystemExit(3)"))
    assert result["problems"] == ["QEMU ended with status 3"]


def test_boot_panic_ends_the_wait_and_shows_the_console() -> None:
    code = "import time; print('[ 1.0] Kernel panic - not syncing: no init'); time.sleep(60)"
    (result,) = boot(guest(code))
    assert result["problems"] == ["Kernel panic - not syncing: no init"]
    assert result["total_s"] < 20
    assert "no init" in result["console"]


def test_boot_deadline_names_the_last_word() -> None:
    code = "import time; print('guest: up 7.3'); time.sleep(60)"
    (result,) = boot(guest(code, timeout_s=1.0))
    assert result["problems"] == ["did not end within 1 s (last word: up)"]


def test_boot_several_at_once() -> None:
    code = "import time; time.sleep(0.5); " + GOOD
    results = boot(*(guest(code, str(number)) for number in range(4)), parallel=4)
    assert sorted(result["name"] for result in results) == ["0", "1", "2", "3"]
    assert all(result["ok"] for result in results)


def test_boot_with_a_policy_lets_a_thread_of_the_vmm_run_until_it_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, _param: asked.append((pid, policy)))
    results: list[dict[str, Any]] = []
    says_its_id = "import os; print(f'guest: id {os.getpid()}'); " + GOOD
    inner.boot_all([guest(says_its_id)], 1, results.append, "SCHED_FIFO")
    assert asked == [(int(dict(results[0]["said"])["id"]), os.SCHED_FIFO)]
    inner.boot_all([guest(GOOD)], 1, results.append)
    assert len(asked) == 1


def test_serve_gives_the_page() -> None:
    import signal

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = inner.serve(b"content", port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/page", timeout=10) as answer:
            assert answer.read() == b"content"
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
