# SPDX-License-Identifier: Apache-2.0
"""From measured values to rows: ours, theirs, ratio, target, verdict. Pure functions over plain data.

Boots are judged by medians (interleaved runs), exits by the minimum over the rounds: what other programs on the machine
add can only make a round longer, and a round is short enough to be free of it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rootvisor.bench.figures import median, ratio, summary

BOOT_RATIO = 0.6
RESIDENT_BYTES = 40_000_000
EXIT_RATIO = 1.3
HYPERCALL_RATIO = 1.6
QUIET_EXITS = {"no PCI device": 400, "four virtio devices": 1000}
"""Fewer exits than this for a quiet boot."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report. Values are in `unit` (s, ms, us, bytes as B or kB, nothing for a count, .2 for one with
    decimals); `limit` is the target for `judged` (the ratio where there is one, else our value), None for a row without
    target; `strict` means less than, not at most; `more` at least: MB/s, or a rate (/s). `other` says what `theirs`
    is."""

    group: str
    name: str
    unit: str
    ours: float | None
    other: str
    theirs: float | None
    limit: float | None = None
    on_ratio: bool = False
    strict: bool = False
    more: bool = False

    @property
    def ratio(self) -> float | None:
        """ours / theirs, None where one is missing."""
        return ratio(self.ours, self.theirs)

    @property
    def judged(self) -> float | None:
        """The number that is held against the limit."""
        return self.ratio if self.on_ratio else self.ours

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None without target, or without the numbers."""
        if self.limit is None or self.judged is None:
            return None
        if self.more:
            return self.judged >= self.limit
        return self.judged < self.limit if self.strict else self.judged <= self.limit


def target_document(found: list[Row]) -> list[dict[str, Any]]:
    """The targets with their verdicts, for machines."""
    return [
        {
            "group": row.group,
            "name": row.name,
            "value": None if row.judged is None else round(row.judged, 3),
            "of": "ratio" if row.on_ratio else row.unit or "count",
            "limit": row.limit,
            "passed": row.passed,
        }
        for row in found
        if row.limit is not None
    ]


def rows(results: dict[str, Any]) -> list[Row]:
    """All rows of a bench, boots first."""
    found = []
    for name, sides in (results.get("boots") or {}).items():
        found += _boot_rows(name, sides)
    found += _exit_rows(results.get("exits") or {})
    return found


def _boot_rows(name: str, sides: dict[str, list[dict[str, Any]]]) -> list[Row]:
    def middle(side: str, fact: str) -> float | None:
        values = [run[fact] for run in sides.get(side, []) if run.get(fact) is not None]
        return median(values) if values else None

    def both(fact: str) -> tuple[float | None, str, float | None]:
        return middle("rootvisor", fact), "QEMU", middle("qemu", fact)

    counts = [sum(run["exits"].values()) for run in sides.get("rootvisor", []) if run.get("exits")]
    return [
        Row(name, "to user space", "s", *both("user_space_s"), BOOT_RATIO, True),
        Row(name, "to exit", "s", *both("exit_s")),
        Row(name, "resident", "B", *both("resident_bytes"), RESIDENT_BYTES),
        Row(
            name,
            "exits",
            "",
            median(counts) if counts else None,
            "",
            None,
            QUIET_EXITS.get(name),
            False,
            True,
        ),
    ]


_EXIT_NAMES = {"io": "I/O (OUT)", "msr": "MSR (RDMSR)", "hypercall": "hypercall"}


def _exit_rows(sides: dict[str, dict[str, list[float]]]) -> list[Row]:
    def least(side: str, kind: str) -> float | None:
        values = sides.get(side, {}).get(kind)
        return min(values) if values else None

    if not sides:
        return []
    judged = [
        Row(
            "one exit",
            name,
            "us",
            least("rootvisor", kind),
            "C loop",
            least("c", kind),
            HYPERCALL_RATIO if kind == "hypercall" else EXIT_RATIO,
            True,
        )
        for kind, name in _EXIT_NAMES.items()
    ]
    if "python" not in sides:
        return judged
    barest = [
        Row("one exit", f"{name}, barest Python", "us", least("python", kind), "C loop", least("c", kind))
        for kind, name in _EXIT_NAMES.items()
    ]
    return judged + barest


def document(results: dict[str, Any]) -> dict[str, Any]:
    """The results for machines: summaries instead of bare runs, and the targets with their verdicts."""
    boots: dict[str, Any] = {}
    for name, sides in (results.get("boots") or {}).items():
        boots[name] = {side: _summaries(runs) for side, runs in sides.items()}
    exits = {
        side: {kind: summary(values, 2) for kind, values in kinds.items()}
        for side, kinds in (results.get("exits") or {}).items()
    }
    return {
        "boots": boots,
        "exits_us": exits,
        "qemu_image": results.get("qemu_image"),
        "qemu_images_s": results.get("qemu_images"),
        "missing": {name: results.get(name) for name in ("qemu", "gcc")},
        "problems": results.get("problems", []),
        "targets": target_document(rows(results)),
    }


def _summaries(runs: list[dict[str, Any]]) -> dict[str, Any]:
    facts: dict[str, Any] = {"runs": len(runs)}
    for name in ("user_space_s", "exit_s", "resident_bytes"):
        facts[name] = summary([run[name] for run in runs if run.get(name) is not None])
    counted = [run["exits"] for run in runs if run.get("exits")]
    if counted:
        facts["exits"] = summary([sum(run.values()) for run in counted])
        facts["exits_by_reason"] = counted[-1]
    return facts
