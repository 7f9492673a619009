# SPDX-License-Identifier: Apache-2.0
"""Few numbers out of many: minimum, median, and the ratio of two series."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones. ValueError for no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def summary(values: Sequence[float], digits: int = 3) -> dict[str, object] | None:
    """Minimum, median, maximum and the values themselves; None for no values."""
    if not values:
        return None
    return {
        "min": round(min(values), digits),
        "median": round(median(values), digits),
        "max": round(max(values), digits),
        "values": [round(value, digits) for value in values],
    }


def spans(marks: Iterable[tuple[int, int]], kinds: Sequence[str], count: int) -> dict[str, list[float]]:
    """Microseconds per exit, one value for each round, from a guest's marks (mark, nanoseconds).

    Mark n opens the exits of `kinds[n]`, the mark after it closes them (it is itself an exit, hence `count` + 1).
    """
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    before: tuple[int, int] | None = None
    for mark, ns in marks:
        if before is not None and before[0] < len(kinds) and mark == before[0] + 1:
            found[kinds[before[0]]].append((ns - before[1]) / (count + 1) / 1000)
        before = (mark, ns)
    return found


def parse_marks(text: str) -> list[tuple[int, int]]:
    """Lines "mark nanoseconds" of an exit loop; ValueError for anything else."""
    marks = []
    for line in text.splitlines():
        mark, ns = line.split()
        marks.append((int(mark), int(ns)))
    return marks


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """ours / theirs, None where either is missing or zero."""
    if not ours or not theirs:
        return None
    return ours / theirs
