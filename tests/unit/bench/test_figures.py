# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from rootvisor.bench.figures import median, parse_marks, ratio, spans, summary


def test_median() -> None:
    assert median([3.0]) == 3.0
    assert median([5.0, 1.0, 3.0]) == 3.0
    assert median([4.0, 1.0, 3.0, 2.0]) == 2.5
    with pytest.raises(ValueError):
        median([])


def test_summary_keeps_every_value() -> None:
    assert summary([1.23456, 3.0, 2.0]) == {
        "min": 1.235,
        "median": 2.0,
        "max": 3.0,
        "values": [1.235, 3.0, 2.0],
    }
    assert summary([]) is None


def test_spans_are_microseconds_per_exit_and_count_the_closing_mark() -> None:
    marks = [
        (0, 0),
        (1, 2_000_000),
        (2, 5_000_000),
        (0, 6_000_000),
        (1, 10_000_000),
        (2, 10_001_000),
        (255, 0),
    ]
    assert spans(marks, ("io", "msr"), 999) == {"io": [2.0, 4.0], "msr": [3.0, 0.001]}


def test_spans_skip_marks_out_of_order() -> None:
    assert spans([(1, 0), (0, 10), (2, 20)], ("io", "msr"), 9) == {"io": [], "msr": []}


def test_parse_marks() -> None:
    assert parse_marks("0 17\n255 18\n") == [(0, 17), (255, 18)]
    with pytest.raises(ValueError):
        parse_marks("KVM_RUN: Invalid argument")


def test_ratio_needs_both_sides() -> None:
    assert ratio(1.0, 2.0) == 0.5
    assert ratio(None, 2.0) is None
    assert ratio(1.0, None) is None
    assert ratio(1.0, 0.0) is None
