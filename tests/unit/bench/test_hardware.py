# SPDX-License-Identifier: Apache-2.0
"""The bench of direct hardware: both sides get the same devices and work, figures become rows, exits are counted."""

from __future__ import annotations

import json
import marshal
import sys
from pathlib import Path
from typing import Any

import pytest

from rootvisor.bench import hardware_inner, report
from rootvisor.bench.hardware_rows import document, rows
from rootvisor.bench.targets import Row


def results() -> dict[str, Any]:
    def run(factor: float) -> dict[str, float]:
        return {
            "read1048576": 100 * factor,
            "random-read4096": 2000 * factor,
            "random-read4096-us": 500 / factor,
            "receive": 40.0 * factor,
            "echo": 1000 * factor,
            "echo-us": 1000 / factor,
        }

    return {
        "loads": {"rootvisor": [run(0.9), run(1.0), run(1.1)], "qemu": [run(1.0), run(1.0), run(1.0)]},
        "kvm_exits": {
            "rootvisor": [{"read:4096:random": 16000, "echo": 9000}] * 3,
            "qemu": [{"read:4096:random": 8000}] * 3,
        },
        "hypervisor_exits": {"idle": (0.0, 700), "read:4096:random": (8000.0, 1100), "echo": (0.0, 5)},
        "load_s": 4,
        "problems": [],
    }


def named(found: list[Row], group: str, name: str) -> Row:
    return next(row for row in found if (row.group, row.name) == (group, name))


def test_rows_hold_medians_against_qemus() -> None:
    found = rows(results())
    read = named(found, "NVMe, 1 VP", "sequential read")
    assert read.ours == read.theirs == 100 * (1 << 20) and read.passed
    assert named(found, "NVMe, 1 VP", "sequential write").passed is None
    latency = named(found, "time of one, median", "one read of 4 KiB")
    assert (latency.ours, latency.ratio, latency.passed) == (500, 1.0, True)
    assert named(found, "NIC, 1 VP", "TCP in").ours == 40e6
    slow = results()
    slow["loads"]["rootvisor"] = [{"random-read4096": 1880.0, "random-read4096-us": 601.0}]
    slow["kvm_exits"]["rootvisor"] = [{}]
    found = rows(slow)
    assert named(found, "NVMe, 1 VP", "random reads of 4 KiB").passed is False
    assert named(found, "time of one, median", "one read of 4 KiB").passed is False


def test_exits_are_told_for_each_thing_done() -> None:
    found = rows(results())
    row = named(found, "exits to KVM, each", "read of 4 KiB")
    assert row.ours == pytest.approx(2.0, rel=0.1) and row.theirs == 1.0
    assert report.cells(row)[1:3] == ("2.00", "1.00")
    assert named(found, "exits to the hypervisor, each", "read of 4 KiB").ours == 0.05
    assert named(found, "exits to the hypervisor, each", "round trip of a byte").ours is None


def test_document_has_every_value_and_empty_results_are_rows_without_figures() -> None:
    found = document(results())
    assert found["loads"]["rootvisor"]["echo"]["values"] == [900.0, 1000.0, 1100.0]
    assert found["hypervisor_exits"]["idle"] == {"count": 0.0, "exits": 700}
    assert len(found["targets"]) == 8
    json.dumps(found)
    nothing = {"loads": {}, "kvm_exits": {}, "hypervisor_exits": {}, "load_s": 4, "problems": []}
    assert all(row.ours is None and row.passed is None for row in rows(nothing))


JOB: dict[str, Any] = {
    "kernel": "/k", "initramfs": "/i", "machine_argv": ["machine"], "qemu": "/qemu", "memory_mib": 512,
    "devices": ["0000:00:10.0", "0000:00:11.0"], "port": 8097, "load_s": 4, "runs": 1,
}  # fmt: skip


def test_both_sides_have_the_same_kernel_devices_and_work(tmp_path: Path) -> None:
    argv = hardware_inner.ours(JOB, str(tmp_path))
    description = marshal.loads(Path(argv[-1]).read_bytes())
    theirs = hardware_inner.theirs(JOB, "host")
    assert description["assigned"] == JOB["devices"]
    assert [word for word in theirs if word.startswith("vfio-pci")] == [
        f"vfio-pci,host={address},addr={number},rombar=0" for number, address in enumerate(JOB["devices"], 4)
    ]
    assert theirs[theirs.index("-append") + 1].endswith(description["append"])
    assert "guest.port=8097" in description["append"] and "guest.only" not in description["append"]


def test_exits_are_those_between_begin_and_done(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter((100, 350, 1000, 1001))
    monkeypatch.setattr(hardware_inner, "kvm_exits", lambda _pid: next(counted))
    said = ("up", "begin echo", "echo 7.5", "done echo", "begin idle", "done idle", "interrupts 1 2", "end")
    script = f"for words in {said}: print('guest:', words, flush=True)"
    measured = hardware_inner.run("side", [sys.executable, "-c", script])
    assert measured == ({"echo": 7.5}, {"echo": 250, "idle": 1}, None)


def test_a_guest_that_fails_leaves_what_it_had_measured_and_a_reason() -> None:
    script = "print('guest: begin echo'); print('guest: echo 7.5'); print('guest: begin send'); raise SystemExit(3)"
    values, _, problem = hardware_inner.run("side", [sys.executable, "-c", script])
    assert values == {"echo": 7.5}
    assert problem is not None and "side ended with status 3" in problem and problem.endswith(" send")
