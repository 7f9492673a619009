# SPDX-License-Identifier: Apache-2.0
"""Every row of the guest interface has a test, and every mark names a row."""

from __future__ import annotations

import pytest

from tests.conformance import table


def test_rows_are_well_formed_and_unique() -> None:
    rows = table.rows()
    assert len({row.id for row in rows}) == len(rows) == 208
    assert {row.status for row in rows} <= set(table.STATUSES)
    assert all(row.feature for row in rows)
    assert all(row.note for row in rows if row.status == "partial"), "a limit is named"


def test_every_row_has_a_test() -> None:
    marked = table.marks()
    assert [row.id for row in table.rows() if row.id not in marked] == []


def test_every_mark_names_a_row() -> None:
    known = {row.id for row in table.rows()}
    assert {mark: tests for mark, tests in table.marks().items() if mark not in known} == {}


def test_page_is_refused_when_a_row_has_no_passed_test() -> None:
    passed = {test: "passed" for tests in table.marks().values() for test in tests}
    assert "208 rows" in table.page(passed)
    for test in table.marks()["SYN-12"]:
        passed[test] = "skipped"
    with pytest.raises(ValueError, match="SYN-12"):
        table.page(passed)
    with pytest.raises(ValueError, match="test_x"):
        table.page({"test_x": "failed"})
