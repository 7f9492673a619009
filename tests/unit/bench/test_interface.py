# SPDX-License-Identifier: Apache-2.0
"""Bench of the guest interface: what its guest prints, and the rows that come of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rootvisor.bench import guest_code, interface_rows
from rootvisor.bench.interface_rows import CALLS, DELAY, KINDS, document, parse, percentile, rows

#: A TSC of 1 GHz: 1,000 cycles are a microsecond.
CLOCK = f"clock {1_000_000_000:x} {10_000_000:x}"


def output(call_us: int = 3, late_us: int = 7) -> str:
    lines = [f"{kind} {call_us * 1000 * CALLS:x} {call_us * 2000 * CALLS:x}" for kind in KINDS]
    lines.append("timer" + f" {DELAY * 100 + late_us * 1000:x}" * 4)
    return "\n".join((*lines, CLOCK, "end", ""))


def test_parse_gives_microseconds_a_call_and_after_the_deadline() -> None:
    found = parse(output())
    assert set(found) == {*KINDS, "timer"}
    assert found["fast"] == pytest.approx([3, 6])
    assert found["timer"] == pytest.approx([7] * 4)


@pytest.mark.parametrize(
    "text", ["", "failed ipi 5\n", output().replace("end", ""), output().replace("flush", "x")]
)
def test_parse_of_a_guest_that_failed_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="did not come to its end"):
        parse(text)


def test_rows_hold_medians_of_timers_against_their_target() -> None:
    results = {"sides": {"rootvisor": parse(output(6, 50)), "kvm": parse(output(2, 10))}, "problems": []}
    found = {row.name: row for row in rows(results)}
    assert found[KINDS["ipi"]].ratio == pytest.approx(3)
    assert found["median"].ratio == pytest.approx(5)
    assert found["median"].passed
    assert document(results)["targets"][0]["passed"]


def test_rows_without_qemu_have_no_ratio() -> None:
    found = rows({"sides": {"rootvisor": parse(output())}, "problems": []})
    assert {row.ratio for row in found} == {None}


def test_percentile_of_few_values() -> None:
    assert [percentile([3.0, 1.0, 2.0], part) for part in (0, 50, 99, 100)] == [1.0, 2.0, 3.0, 3.0]


def test_the_guest_agrees_about_calls_delay_and_names() -> None:
    source = Path(guest_code.__file__).with_name("guest_interface.c").read_text()
    constants = dict(re.findall(r"^#define (CALLS|DELAY)\s+(\d+)", source, re.MULTILINE))
    assert (int(constants["CALLS"]), int(constants["DELAY"])) == (CALLS, DELAY)
    assert re.findall(r'measure\("(\w+)"', source) == list(interface_rows.KINDS)


def test_the_guest_compiles(tmp_path: Path) -> None:
    from rootvisor.bench.interface import _FLAGS
    from rootvisor.bench.outer import compile_program

    kernel, problem = compile_program(tmp_path, "guest_interface", _FLAGS)
    assert kernel is not None, problem
    assert Path(kernel).read_bytes()[:5] == b"\x7fELF\x01"
    assert b"\x02\xb0\xad\x1b" in Path(kernel).read_bytes()[:8192], "the multiboot header"
