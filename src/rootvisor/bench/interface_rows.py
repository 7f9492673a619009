# SPDX-License-Identifier: Apache-2.0
"""From what the guest of the bench of the interface prints to microseconds and rows. Pure functions over plain data."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from rootvisor.bench.targets import Row

#: As in guest_interface.c: calls of a round, and how far ahead its timers are armed (100 ns).
CALLS, DELAY = 200, 20_000
KINDS = {
    "fast": "hypercall, in registers",
    "memory": "hypercall, in memory",
    "message": "SynIC message and back",
    "event": "SynIC event and back",
    "ipi": "IPI to 4 VPs, taken",
    "flush": "flush of 4 VPs",
}
TIMER_RATIO = 6.0
_TENTHS = (50, 90, 99)


def parse(text: str) -> dict[str, list[float]]:
    """Kind -> microseconds a call, one for each round; `timer`: microseconds after the deadline, one for each timer.

    ValueError for anything that the guest does not print when it has done everything.
    """
    lines = {words[0]: words[1:] for words in (line.split() for line in text.splitlines()) if words}
    if "end" not in lines or not {*KINDS, "timer", "clock"} <= lines.keys():
        raise ValueError(f"the guest did not come to its end: {text.strip()[-80:]!r}")
    numbers = {kind: [int(word, 16) for word in words] for kind, words in lines.items() if kind != "end"}
    cycles, units = numbers["clock"]
    per_us = cycles / units * 10
    found = {kind: [value / per_us / CALLS for value in numbers[kind]] for kind in KINDS}
    found["timer"] = [value / per_us - DELAY / 10 for value in numbers["timer"]]
    return found


def percentile(values: list[float], hundredth: int) -> float:
    """The value that so many per cent are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) * hundredth // 100, len(ordered) - 1)]


def rows(results: dict[str, Any]) -> list[Row]:
    """All rows: the minimum over the rounds, and how late timers are."""
    from rootvisor.bench.targets import Row

    ours, theirs = (results["sides"].get(side, {}) for side in ("rootvisor", "kvm"))

    def least(side: dict[str, list[float]], kind: str) -> float | None:
        return min(side[kind]) if side.get(kind) else None

    def late(side: dict[str, list[float]], hundredth: int) -> float | None:
        return percentile(side["timer"], hundredth) if side.get("timer") else None

    found = [
        Row("one call", name, "us", least(ours, kind), "QEMU, KVM", least(theirs, kind))
        for kind, name in KINDS.items()
    ]
    for hundredth in _TENTHS:
        name = "median" if hundredth == 50 else f"{hundredth} %"
        limit = TIMER_RATIO if hundredth == 50 else None
        found.append(
            Row(
                "timer after its time", name, "us", late(ours, hundredth), "QEMU, KVM", late(theirs, hundredth),
                limit, limit is not None,
            )
        )  # fmt: skip
    return found


def document(results: dict[str, Any]) -> dict[str, Any]:
    """The results for machines: summaries, and the targets with their verdicts."""
    from rootvisor.bench.figures import summary
    from rootvisor.bench.targets import target_document

    return {
        "us": {
            side: {kind: summary(values, 2) for kind, values in kinds.items()}
            for side, kinds in results["sides"].items()
        },
        "missing": {"qemu": results.get("qemu")},
        "problems": results.get("problems", []),
        "targets": target_document(rows(results)),
    }
