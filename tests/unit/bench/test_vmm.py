# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from rootvisor.bench import report, vmm, vmm_inner
from rootvisor.bench.outer import compile_program
from rootvisor.bench.targets import Row
from rootvisor.bench.vmm_rows import LOADS, document, rows
from rootvisor.peers.inner import Boot


def results() -> dict[str, Any]:
    return {
        "boots": {
            "rootvisor": [{"up_s": 4.0, "exit_s": 5.0, "resident_bytes": 40_000_000}],
            "qemu": [
                {"up_s": 5.0, "exit_s": 6.0, "resident_bytes": 60_000_000},
                {"up_s": 3.0, "exit_s": 6.0, "resident_bytes": None},
            ],
        },
        "loads": {
            "rootvisor": [dict.fromkeys(LOADS, 80.0) | {"echo": 71.0}],
            "qemu": [dict.fromkeys(LOADS, 100.0)],
        },
        "restores": {
            "rootvisor": [{"boot_s": 4.0, "snapshot_s": 1.0, "restore_s": 0.8, "waiting_restore_s": 0.5}]
        },
        "problems": [],
        "qemu": None,
    }


def by_name(found: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in found}


def test_rows_are_judged_by_ratios() -> None:
    found = by_name(rows(results()))
    assert found["to user space"].ratio == 1.0 and found["to user space"].passed
    assert found["resident"].theirs == 60_000_000 and found["resident"].passed
    assert found["restore, until it goes on"].passed is False
    assert found["the same in a VMM that waits"].passed is True
    assert found["1 MiB, sequential read"].passed is False  # 0.8, of at least 0.9
    assert found["4 KiB, random read"].passed and found["round trips of a byte"].passed
    assert report.cells(found["1 MiB, sequential read"])[1:] == (
        "83.9 MB/s", "104.9 MB/s", "QEMU", "0.80", ">= 0.90 x", "miss",
    )  # fmt: skip
    assert report.value(71.0, "/s") == "71/s"


def test_rows_without_qemu_have_no_verdict() -> None:
    bare = results() | {"boots": {}, "loads": {}, "restores": {}}
    assert all(row.passed is None for row in rows(bare))
    assert document(bare)["boots"] == {}


def test_document_has_every_value() -> None:
    found = document(results())
    assert found["boots"]["qemu"]["up_s"]["values"] == [5.0, 3.0]
    assert found["loads"]["rootvisor"]["echo"]["median"] == 71.0
    assert len(found["targets"]) == 4 + len(LOADS)
    json.dumps(found)


def test_lines_of_the_root_become_results(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "guest: serving 8097\n",
        json.dumps({"kind": "warm", "side": "qemu", "value": {"up_s": 9.0}}) + "\n",
        json.dumps({"kind": "boots", "side": "qemu", "value": {"up_s": 3.0}}) + "\n",
        json.dumps({"problem": "loads, qemu: it failed"}) + "\n",
        "no JSON\n",
    ]
    found = vmm_inner.collect(lines)
    assert found["boots"] == {"qemu": [{"up_s": 3.0}]} and found["loads"] == {}
    assert found["problems"] == ["loads, qemu: it failed", "no JSON"]
    assert capsys.readouterr().out.splitlines() == ["vmm: warm, qemu", "vmm: boots, qemu"]


def guest(script: str, *, timeout_s: float = 30.0) -> Boot:
    argv = [sys.executable, "-c", script]
    return Boot({"name": "side", "vmm": "the VMM", "argv": argv, "expected": {}, "timeout_s": timeout_s})


def test_guest_is_followed_to_a_word_and_to_its_end() -> None:
    boot = guest("print('guest: up 1', flush=True); print('guest: send 12.5'); print('guest: end')")
    vmm_inner.follow(boot, "up")
    assert "up" in boot.times
    result = vmm_inner.ended(boot)
    assert ("send", "12.5") in result["said"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("raise SystemExit('no memory')", r"side: the VMM ended with status 1"),
        ("print('guest: end')", r"side: ended and had not said `up`"),
        ("print('guest: problem no disk'); print('guest: end')", r"side: no disk"),
    ],
)
def test_guest_that_fails_is_one_line(script: str, reason: str) -> None:
    with pytest.raises(vmm_inner.GuestError, match=reason) as caught:
        vmm_inner.follow(guest(script), "up")
    assert "\n" not in str(caught.value)


def test_load_program_measures_disk_and_network(tmp_path: Path) -> None:
    program, problem = compile_program(tmp_path, "guest_load")
    if program is None:
        pytest.skip(str(problem))
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(1 << 20))
    boot = Boot(
        {"name": "load", "argv": [program, "disk", str(disk), "read", "4096", "0.05", "random"],
         "expected": {}, "timeout_s": 30.0}
    )  # fmt: skip
    vmm_inner.follow(boot, "random-read4096")
    vmm_inner.follow(boot)
    said = dict(boot.close()["said"])
    assert float(said["random-read4096"]) > 0


def test_both_sides_get_the_same_guest() -> None:
    ours, theirs = vmm.vmm_options("/k", "/i"), vmm.qemu_argv("/q", "/k", "/i")
    for argv in (ours, theirs):
        assert vmm_inner.COMMAND_LINE in argv and "/k" in argv and "/i" in argv
    assert theirs[theirs.index("-m") + 1] in " ".join(ours)
