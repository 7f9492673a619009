# SPDX-License-Identifier: Apache-2.0
"""The rows of the guest interface (rows.txt), and the tests that are marked with them.

A test says ``@pytest.mark.row("SYN-04", "SYN-05")``. Marks are read from the source, so that nothing has to be run or
imported to know what is covered.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
SUITE = FOLDER.parent / "kvm"
STATUSES = ("implemented", "partial", "refused")


class Row(NamedTuple):
    """One row: ``status`` is one of :data:`STATUSES`."""

    id: str
    status: str
    feature: str
    note: str


def rows() -> list[Row]:
    """All rows, in the order of the file."""
    found = []
    for line in (FOLDER / "rows.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            row, status, feature, note = (field.strip() for field in line.split("|"))
            found.append(Row(row, status, feature, note))
    return found


def marks() -> dict[str, list[str]]:
    """Row id to the tests that are marked with it, as ``file::function``."""
    found: dict[str, list[str]] = {}
    for path in sorted(SUITE.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for decorator in node.decorator_list:
                    for row in _ids(decorator):
                        found.setdefault(row, []).append(f"{path.name}::{node.name}")
    return found


def _ids(decorator: ast.expr) -> list[str]:
    """The ids of every ``row(...)`` or ``pytest.mark.row(...)`` in a decorator, parameters included."""
    ids = []
    for node in ast.walk(decorator):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "row":
                ids += [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
    return [str(one) for one in ids]


def page(results: dict[str, str] | None = None) -> str:
    """docs/reference/conformance.md. ValueError when by ``results`` (test to outcome) a row has no passed test."""
    tests = marks()
    everything = rows()
    if results is not None:
        unproved = [
            row.id
            for row in everything
            if not any(results.get(test) == "passed" for test in tests.get(row.id, ()))
        ]
        failed = [test for test, outcome in results.items() if outcome == "failed"]
        if unproved or failed:
            raise ValueError(f"rows without a passed test: {unproved}; failed tests: {failed}")
    counts = {status: sum(row.status == status for row in everything) for status in STATUSES}
    lines = [
        "# The guest interface: what is there",
        "",
        "What an ordinary partition (`rootvisor run --as guest`) observes of the hypervisor: a row for each feature",
        "of the TLFS, and the tests in `tests/kvm` that show it. Rows, notes and statuses are those of",
        "`tests/conformance/rows.txt`.",
        "",
        f"{len(everything)} rows: {counts['implemented']} implemented, {counts['partial']} implemented with a limit, "
        f"{counts['refused']} refused as the",
        "TLFS says for a feature that is not offered.",
        "",
        "| id | feature | status | limit or reason | tests |",
        "|---|---|---|---|---|",
    ]
    for row in everything:
        names = "<br>".join(f"`{test.replace('.py::', ': ')}`" for test in tests.get(row.id, ()))
        lines.append(f"| {row.id} | {row.feature} | {row.status} | {row.note} | {names} |")
    return "\n".join(lines) + "\n"
