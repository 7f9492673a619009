# SPDX-License-Identifier: Apache-2.0
"""The bench's rows as cells of a table; the caller draws it."""

from __future__ import annotations

from rootvisor.bench.targets import Row

HEAD = ("", "rootvisor", "other", "", "ratio", "target", "")
RIGHT = frozenset({1, 2, 4, 5})


def cells(row: Row) -> tuple[str, str, str, str, str, str, str]:
    """One row: name, ours, theirs, what theirs is, ratio, target, pass or miss."""
    known = row.ratio
    verdict = {True: "pass", False: "miss", None: ""}[row.passed]
    return (
        f"  {row.name}",
        value(row.ours, row.unit),
        value(row.theirs, row.unit) if row.other else "",
        row.other,
        "" if known is None else f"{known:.2f}",
        target(row),
        verdict,
    )


def target(row: Row) -> str:
    """The target in words of the table: `<= 0.60 x`, `<= 40 MB`, `< 400`."""
    if row.limit is None:
        return ""
    sign = ">=" if row.more else "<" if row.strict else "<="
    if row.on_ratio:
        return f"{sign} {row.limit:.2f} x"
    return f"{sign} {value(row.limit, row.unit)}"


def value(number: float | None, unit: str) -> str:
    """A value with its unit (B and kB both hold bytes); a dash where there is none."""
    if number is None:
        return "-"
    if unit == "s":
        return f"{number:.2f} s"
    if unit in ("us", "ms"):
        return f"{number:.1f} {unit}"
    if unit == "B":
        return f"{number / 1e6:.0f} MB"
    if unit == "kB":
        return f"{number / 1e3:.0f} kB"
    if unit == "MB/s":
        return f"{number / 1e6:.1f} MB/s"
    if unit == ".2":
        return f"{number:.2f}"
    return f"{number:.0f}{unit}"
