# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from rootvisor.bench.child_code import END_MARK, KINDS
from rootvisor.bench.children import _in_root
from rootvisor.bench.children_inner import Reader, SideError, run, warm
from rootvisor.bench.children_rows import document, idle_bytes, rows, spans
from rootvisor.bench.targets import Row

COUNT = 10


def marks(us: float, fault_in_s: float) -> list[list[int]]:
    """One guest: every event takes `us` microseconds."""
    step = round(us * 1000) * COUNT
    found = [[number, number * step] for number in range(len(KINDS))]
    return [*found, [END_MARK, found[-1][1] + round(fault_in_s * 1e9)]]


def results() -> dict[str, Any]:
    boots = {
        machine: {
            "mshv": [
                {"up_s": 6.0, "total_s": 8.0},
                {"up_s": 9.0, "total_s": 12.0},
                {"up_s": 5.0, "total_s": 7.0},
            ],
            "kvm": [{"up_s": 2.0, "total_s": 3.0}],
        }
        for machine in ("microvm", "q35")
    }
    idle = {
        "mshv": [
            {"children": 1, "used_bytes": 100, "engine_used_bytes": 1000, "resident_bytes": 50},
            {"children": 11, "used_bytes": 100 + 10_000_000, "engine_used_bytes": 1000 + 50_000_000,
             "resident_bytes": 50 + 5_000_000},
        ],
        "kvm": [{"children": 1, "used_bytes": 0}, {"children": 11, "used_bytes": 1_000_000}],
    }  # fmt: skip
    loops = {
        "mshv": {"create_ns": [9_000_000, 8_000_000], "delete_ns": [4_000_000], "marks": marks(900, 1.5) * 2},
        "kvm": {"create_ns": [2_000_000], "delete_ns": [1_000_000], "marks": marks(40, 0.5)},
    }
    return {"boots": boots, "idle": idle, "loops": loops, "problems": [], "qemu": None}


def by_name(found: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row.group, row.name): row for row in found}


def test_spans_are_per_event_and_seconds_for_memory() -> None:
    found = spans(marks(40, 0.5) + marks(60, 0.25), COUNT)
    assert found["port"] == [40.0, 60.0]
    assert found["irqfd"] == [40.0, 60.0]
    assert found["fault_in"] == [0.5, 0.25]


def test_spans_of_a_guest_that_ended_early_have_what_it_did() -> None:
    found = spans(marks(40, 0.5)[:3] + marks(60, 0.25), COUNT)
    assert found["port"] == [40.0, 60.0]
    assert found["mmio"] == [60.0]


def test_microvm_is_judged_by_the_ratio_of_medians_and_q35_is_not() -> None:
    found = by_name(rows(results(), COUNT))
    row = found["Linux under QEMU, microvm", "to user space"]
    assert (row.ours, row.theirs, row.ratio, row.passed) == (6.0, 2.0, 3.0, True)
    assert found["Linux under QEMU, q35", "to user space"].passed is None


def test_intercepts_are_judged_against_the_bare_exit() -> None:
    found = by_name(rows(results(), COUNT))
    assert found["one event", "port"].passed is False
    assert found["one event", "port"].ratio == 22.5
    assert found["one event", "port, RIP by hypercall"].theirs == 40.0
    assert found["one event", "irqfd, taken"].passed is None


def test_memory_is_judged_by_itself() -> None:
    found = by_name(rows(results(), COUNT))
    assert found["memory", "256 MiB touched first"].passed is True
    idle = found["an idle child", "hypervisor and KVM"]
    assert (idle.ours, idle.theirs, idle.passed) == (5_000_000, 100_000, False)
    assert found["an idle child", "children per GiB"].ours == pytest.approx((1 << 30) / 6_000_000)


def test_one_look_at_memory_gives_no_number() -> None:
    assert idle_bytes([{"children": 0, "used_bytes": 5}], "used_bytes") is None
    assert idle_bytes([], "used_bytes") is None


def test_nothing_measured_gives_rows_without_verdict() -> None:
    assert all(row.passed is None for row in rows({"problems": []}, COUNT))


def test_document_is_json_with_a_verdict_for_each_target() -> None:
    found = json.loads(json.dumps(document(results(), COUNT)))
    verdicts = {(one["group"], one["name"]): one["passed"] for one in found["targets"]}
    assert verdicts["one event", "port"] is False
    assert verdicts["memory", "256 MiB touched first"] is True
    assert found["events"]["mshv"]["create_ms"]["min"] == 8.0


def empty() -> dict[str, Any]:
    return {"loops": {}, "idle": {}, "boots": {}, "problems": []}


def test_reader_sorts_lines_and_waits_at_idle() -> None:
    found = empty()
    reader = Reader("kvm", found)
    boot = {"name": "microvm mshv 1 VP", "ok": True, "problems": [], "times": {"up": 1.5}, "total_s": 2.5}
    lines = ("create 5", "mark 0 7", "delete 9", json.dumps({"boot": boot}), "open: No such device")
    assert not any(reader.take(line) for line in lines)
    assert reader.take("idle 4 100")
    assert found["loops"]["kvm"] == {"create_ns": [5], "delete_ns": [9], "marks": [[0, 7]]}
    assert found["boots"] == {"microvm": {"mshv": [], "kvm": [{"up_s": 1.5, "total_s": 2.5}]}}
    assert found["idle"]["kvm"] == [{"children": 4, "used_bytes": 102400}]
    assert found["problems"] == ["kvm: open: No such device"]


def test_reader_keeps_the_reason_of_a_failed_boot() -> None:
    found = empty()
    boot = {"name": "q35 mshv 1 VP", "ok": False, "problems": ["no disk"], "times": {}, "total_s": 2.5}
    Reader("mshv", found).take(json.dumps({"boot": boot}))
    assert found["problems"] == ["q35 mshv 1 VP, mshv: no disk"]
    assert found["boots"] == {}


def test_the_first_boot_of_each_series_is_not_counted() -> None:
    boots: dict[str, Any] = {"q35": {"mshv": [], "kvm": [1, 2]}}
    known: dict[tuple[str, str], int] = {}
    warm(boots, known)
    boots["q35"]["kvm"] += [3, 4]
    boots["q35"]["mshv"] += [5, 6]
    warm(boots, known)
    assert boots == {"q35": {"mshv": [6], "kvm": [2, 4]}}


def test_commands_in_root_run_one_after_the_other_whatever_becomes_of_each() -> None:
    argv = _in_root(["sh", "-c", "echo 'a b'; exit 3"], None, ["echo", "$HOME", "c"])
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (0, "a b\n$HOME c\n")


def test_a_program_that_fails_is_a_line() -> None:
    with pytest.raises(SideError, match="sh for kvm ended with status 3"):
        run(["sh", "-c", "exit 3"], Reader("kvm", empty()))


def test_a_program_that_waits_gets_its_byte() -> None:
    found = empty()
    run(["sh", "-c", "echo idle 0 1; read x; echo idle 2 3; read x"], Reader("kvm", found))
    assert [one["children"] for one in found["idle"]["kvm"]] == [0, 2]
