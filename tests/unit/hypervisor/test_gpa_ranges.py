# SPDX-License-Identifier: Apache-2.0
"""Ranges of guest page numbers against a dictionary of pages."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from rootvisor.hypervisor.gpa_ranges import NO_ACCESS, READ_ONLY, UNMAPPED, WRITABLE, GpaRanges

SPACE = 64


def check(ranges: GpaRanges, model: dict[int, tuple[int, int]]) -> None:
    for gfn in range(SPACE):
        assert ranges.find(gfn) == model.get(gfn, (UNMAPPED, -1))
        assert ranges.state(gfn) == ranges.find(gfn)[0]
    pieces = ranges.pieces(0, SPACE)
    assert len(pieces) == len(ranges)
    for before, after in itertools.pairwise(pieces):
        assert before[1] <= after[0]
        following = before[3] + before[1] - before[0] if before[3] >= 0 else -1
        assert (before[1], before[2], following) != (after[0], after[2], after[3]), "not merged"


@pytest.mark.parametrize("seed", range(20))
def test_random_changes_agree_with_a_dictionary(seed: int) -> None:
    chance = random.Random(seed)
    ranges = GpaRanges()
    model: dict[int, tuple[int, int]] = {}
    for _ in range(400):
        start = chance.randrange(SPACE)
        end = chance.randrange(start, SPACE) + 1
        state = chance.choice((UNMAPPED, NO_ACCESS, READ_ONLY, WRITABLE, WRITABLE))
        # Few page numbers, so that neighbours often continue each other.
        page = start + chance.choice((0, 0, 100)) if state >= READ_ONLY else -1
        if chance.random() < 0.3 and end - start > 2:
            middle = chance.randrange(start + 1, end)
            ranges.replace(start, end, [(start, middle, WRITABLE, 7), (middle, end, NO_ACCESS, -1)])
            model.update({gfn: (WRITABLE, 7 + gfn - start) for gfn in range(start, middle)})
            model.update(dict.fromkeys(range(middle, end), (NO_ACCESS, -1)))
        else:
            ranges.set(start, end, state, page)
            for gfn in range(start, end):
                model[gfn] = (state, page + gfn - start if page >= 0 else -1)
                if state == UNMAPPED:
                    del model[gfn]
        check(ranges, model)
        low, high = sorted((chance.randrange(SPACE), chance.randrange(SPACE)))
        cut = ranges.pieces(low, high + 1)
        assert sorted(gfn for first, last, _, _ in cut for gfn in range(first, last)) == [
            gfn for gfn in range(low, high + 1) if gfn in model
        ]
        whole = ranges.whole(low, high + 1)
        assert whole[0] <= low and whole[1] > high
        for edge in whole:
            inside = [piece for piece in ranges.pieces(0, SPACE) if piece[0] < edge < piece[1]]
            assert not inside
        wanted = sorted({chance.randrange(SPACE + 100) for _ in range(chance.randrange(4))})
        assert ranges.uses(wanted) == any(page in wanted for _, page in model.values() if page >= 0)


def test_a_large_region_in_many_calls_is_one_range() -> None:
    ranges = GpaRanges()
    started = time.process_time()
    at = 0
    while at < 8 << 18:
        ranges.set(at, at + 509, NO_ACCESS)
        at += 509
    assert len(ranges) == 1
    assert time.process_time() - started < 10, "its cost grows with the number of calls"


def test_clear_forgets_everything() -> None:
    ranges = GpaRanges()
    ranges.set(1, 5, WRITABLE, 9)
    ranges.clear()
    assert len(ranges) == 0
    assert ranges.find(2) == (UNMAPPED, -1)
