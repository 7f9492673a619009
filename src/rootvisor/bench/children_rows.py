# SPDX-License-Identifier: Apache-2.0
"""From the measured values of the bench of children to rows and verdicts. Pure functions over plain data."""

from __future__ import annotations

from typing import Any

from rootvisor.bench.child_code import END_MARK, KINDS
from rootvisor.bench.figures import median, summary
from rootvisor.bench.targets import Row, target_document

BOOT_RATIO = 4.0
INTERCEPT_RATIO = 20.0
FAULT_IN_S = 2.0
IDLE_BYTES = 4 << 20

_GIB = 1 << 30
_NAMES = {
    "port": "port",
    "port_hypercall": "port, RIP by hypercall",
    "mmio": "MMIO",
    "doorbell": "doorbell, seen",
    "irqfd": "irqfd, taken",
}
#: The two whose answer is an intercept; the others have no message.
_INTERCEPTS = ("port", "port_hypercall", "mmio")


def spans(marks: list[list[int]], count: int) -> dict[str, list[float]]:
    """Kind -> one value per guest: microseconds per event, seconds for `fault_in`.

    `marks` are [mark, nanoseconds] in the order in which they came. Mark n opens kind n, mark n + 1 closes it.
    """
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    before: list[int] | None = None
    for one in marks:
        if before is not None and one[0] == before[0] + 1 <= END_MARK:
            kind = KINDS[before[0]]
            ns = one[1] - before[1]
            found[kind].append(ns / 1e9 if kind == "fault_in" else ns / 1000 / count)
        before = one
    return found


def idle_bytes(idle: list[dict[str, Any]], fact: str) -> float | None:
    """Bytes per idle child by two looks, at few and at many; None where one is missing."""
    more = idle[-1]["children"] - idle[0]["children"] if idle else 0
    if more <= 0:
        return None
    first, last = idle[0].get(fact), idle[-1].get(fact)
    if first is None or last is None:
        return None
    return float(last - first) / int(more)


def rows(results: dict[str, Any], count: int) -> list[Row]:
    """All rows; `count` is the events of each kind per guest."""
    return [*_boot_rows(results), *_event_rows(results, count), *_life_rows(results), *_memory_rows(results)]


def _boot_rows(results: dict[str, Any]) -> list[Row]:
    found = []
    for machine, sides in (results.get("boots") or {}).items():

        def middle(side: str, fact: str, sides: dict[str, Any] = sides) -> float | None:
            values = [run[fact] for run in sides.get(side, [])]
            return median(values) if values else None

        limit = BOOT_RATIO if machine == "microvm" else None
        for name, fact in (("to user space", "up_s"), ("all its work, to exit", "total_s")):
            found.append(
                Row(
                    f"Linux under QEMU, {machine}", name, "s",
                    middle("mshv", fact), "KVM", middle("kvm", fact), limit, limit is not None,
                )
            )  # fmt: skip
    return found


def _loops(results: dict[str, Any], side: str) -> dict[str, Any]:
    found: dict[str, Any] = (results.get("loops") or {}).get(side) or {}
    return found


def _event_rows(results: dict[str, Any], count: int) -> list[Row]:
    ours = spans(_loops(results, "mshv").get("marks", []), count)
    theirs = spans(_loops(results, "kvm").get("marks", []), count)

    def least(values: list[float]) -> float | None:
        return min(values) if values else None

    found = []
    for kind, name in _NAMES.items():
        limit = INTERCEPT_RATIO if kind in _INTERCEPTS else None
        floor = least(theirs["port" if kind == "port_hypercall" else kind])
        found.append(
            Row("one event", name, "us", least(ours[kind]), "C on KVM", floor, limit, limit is not None)
        )
    fault_in = Row(
        "memory", "256 MiB touched first", "s",
        least(ours["fault_in"]), "C on KVM", least(theirs["fault_in"]), FAULT_IN_S,
    )  # fmt: skip
    return [*found, fault_in]


def _life_rows(results: dict[str, Any]) -> list[Row]:
    def least(side: str, fact: str) -> float | None:
        values = _loops(results, side).get(fact) or []
        return min(values) / 1e6 if values else None

    return [
        Row("a child's life", name, "ms", least("mshv", fact), "C on KVM", least("kvm", fact))
        for name, fact in (("create to first instruction", "create_ns"), ("delete", "delete_ns"))
    ]


def _memory_rows(results: dict[str, Any]) -> list[Row]:
    idle = results.get("idle") or {}
    ours = idle.get("mshv") or []
    hypervisor = idle_bytes(ours, "engine_used_bytes")
    root = idle_bytes(ours, "used_bytes")
    floor = idle_bytes(idle.get("kvm") or [], "used_bytes")
    both = hypervisor + root if hypervisor is not None and root is not None else None
    return [
        Row("an idle child", "hypervisor and KVM", "kB", hypervisor, "C on KVM", floor, IDLE_BYTES),
        Row("an idle child", "the hypervisor's process", "kB", idle_bytes(ours, "resident_bytes"), "", None),
        Row("an idle child", "root partition", "kB", root, "", None),
        Row(
            "an idle child", "children per GiB", "",
            _GIB / both if both else None, "C on KVM", _GIB / floor if floor else None,
        ),
    ]  # fmt: skip


def document(results: dict[str, Any], count: int) -> dict[str, Any]:
    """The results for machines: every value, and the targets with their verdicts."""
    events: dict[str, Any] = {}
    for side in ("mshv", "kvm"):
        loops = _loops(results, side)
        kinds = spans(loops.get("marks", []), count)
        events[side] = {kind: summary(values) for kind, values in kinds.items()}
        for fact in ("create_ns", "delete_ns"):
            events[side][fact.replace("_ns", "_ms")] = summary([ns / 1e6 for ns in loops.get(fact) or []])
    boots = {
        machine: {
            side: {fact: summary([run[fact] for run in runs]) for fact in ("up_s", "total_s")}
            for side, runs in sides.items()
        }
        for machine, sides in (results.get("boots") or {}).items()
    }
    return {
        "boots": boots,
        "events": events,
        "idle": results.get("idle"),
        "missing": {"qemu": results.get("qemu")},
        "problems": results.get("problems", []),
        "targets": target_document(rows(results, count)),
    }
