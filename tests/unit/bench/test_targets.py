# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import Any

from rootvisor.bench.targets import Row, document, rows


def run(seconds: float, resident: int | None, exits: int | None = None) -> dict[str, Any]:
    facts: dict[str, Any] = {"user_space_s": seconds, "exit_s": seconds + 1, "resident_bytes": resident}
    if exits is not None:
        facts["exits"] = {"io": exits - 10, "mmio": 10}
    return facts


def results(qemu: bool = True, c_loop: bool = True) -> dict[str, Any]:
    exits = {"rootvisor": {"io": [44.0, 41.6], "msr": [60.0], "hypercall": [90.0]}}
    if c_loop:
        exits["c"] = {"io": [32.0, 40.0], "msr": [40.0], "hypercall": [50.0]}
        exits["python"] = {"io": [36.0, 38.0], "msr": [50.0], "hypercall": [60.0]}
    return {
        "boots": {
            "no PCI device": {
                "rootvisor": [run(1.0, 30_000_000, 399), run(9.0, None, 401), run(1.2, 41_000_000, 399)],
                "qemu": [run(2.0, 60_000_000)] if qemu else [],
            }
        },
        "exits": exits,
        "problems": [],
        "qemu": None if qemu else "missing",
        "gcc": None if c_loop else "missing",
    }


def by_name(found: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in found}


def test_boots_are_judged_by_the_ratio_of_medians() -> None:
    row = by_name(rows(results()))["to user space"]
    assert row.ours == 1.2
    assert row.ratio == 0.6
    assert row.passed is True


def test_resident_memory_is_judged_by_itself_and_skips_runs_without_it() -> None:
    row = by_name(rows(results()))["resident"]
    assert row.ours == 35_500_000
    assert row.passed is True


def test_number_of_exits_must_be_below_the_limit() -> None:
    row = by_name(rows(results()))["exits"]
    assert row.ours == 399
    assert row.passed is True
    assert Row("g", "n", "", 400, "", None, 400, strict=True).passed is False
    assert Row("g", "n", "", 400, "", None, 400).passed is True


def test_barest_python_has_a_ratio_and_no_target() -> None:
    row = by_name(rows(results()))["I/O (OUT), barest Python"]
    assert (row.ratio, row.limit) == (36.0 / 32.0, None)


def test_exits_are_judged_by_the_ratio_of_minima() -> None:
    found = by_name(rows(results()))
    assert found["I/O (OUT)"].ratio == 41.6 / 32.0
    assert found["I/O (OUT)"].passed is True
    assert found["MSR (RDMSR)"].passed is False
    assert found["hypercall"].passed is False
    assert found["hypercall"].limit == 1.6


def test_without_the_other_side_there_is_no_verdict() -> None:
    found = by_name(rows(results(qemu=False, c_loop=False)))
    assert found["to user space"].passed is None
    assert found["I/O (OUT)"].passed is None
    assert found["resident"].passed is True


def test_nothing_measured_gives_no_rows() -> None:
    assert rows({"boots": None, "exits": None}) == []


def test_document_is_json_with_a_verdict_for_each_target() -> None:
    found = json.loads(json.dumps(document(results())))
    assert found["boots"]["no PCI device"]["rootvisor"]["runs"] == 3
    assert found["boots"]["no PCI device"]["rootvisor"]["exits"]["median"] == 399
    assert found["exits_us"]["c"]["io"]["min"] == 32.0
    verdicts = {target["name"]: target["passed"] for target in found["targets"]}
    assert verdicts["to user space"] is True
    assert verdicts["hypercall"] is False
    assert "to exit" not in verdicts
