# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from rootvisor.bench.report import HEAD, cells, value
from rootvisor.bench.targets import Row


def test_a_row_with_a_ratio() -> None:
    row = Row("one exit", "hypercall", "us", 80.04, "C loop", 40.0, 1.6, on_ratio=True)
    assert cells(row) == ("  hypercall", "80.0 us", "40.0 us", "C loop", "2.00", "<= 1.60 x", "miss")
    assert len(cells(row)) == len(HEAD)


def test_a_row_judged_by_itself() -> None:
    assert cells(Row("g", "exits", "", 399.0, "", None, 400, strict=True)) == (
        "  exits", "399", "", "", "", "< 400", "pass",
    )  # fmt: skip


def test_a_missing_side_shows_as_a_dash() -> None:
    row = Row("g", "to user space", "s", 1.0, "QEMU", None, 0.6, on_ratio=True)
    assert cells(row) == ("  to user space", "1.00 s", "-", "QEMU", "", "<= 0.60 x", "")


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (None, "s", "-"),
        (1.234, "s", "1.23 s"),
        (41.26, "us", "41.3 us"),
        (40e6, "B", "40 MB"),
        (487.0, "", "487"),
    ],
)
def test_value(number: float | None, unit: str, text: str) -> None:
    assert value(number, unit) == text
