# SPDX-License-Identifier: Apache-2.0
"""What lies at which guest page number, as sorted ranges: 8 GiB without access are one entry."""

from __future__ import annotations

from bisect import bisect_right

#: What a child may do with a page. UNMAPPED: nothing was ever mapped; NO_ACCESS: mapped without access.
UNMAPPED, NO_ACCESS, READ_ONLY, WRITABLE = range(4)


class GpaRanges:
    """Ranges [start, end) of guest page numbers with a state and, for READ_ONLY and WRITABLE, the root's page number of
    the first page. Neighbours that continue each other are one range."""

    __slots__ = ("_ends", "_pages", "_starts", "_states")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._states: list[int] = []
        self._pages: list[int] = []

    def __len__(self) -> int:
        return len(self._starts)

    def find(self, gfn: int) -> tuple[int, int]:
        """(state, root page number or -1) of one page."""
        index = bisect_right(self._starts, gfn) - 1
        if index < 0 or gfn >= self._ends[index]:
            return UNMAPPED, -1
        page = self._pages[index]
        return self._states[index], page + gfn - self._starts[index] if page >= 0 else -1

    def state(self, gfn: int) -> int:
        """The state of one page. May be called while another thread changes the ranges; then either is the answer."""
        starts, ends, states = self._starts, self._ends, self._states
        index = bisect_right(starts, gfn) - 1
        if index < 0:
            return UNMAPPED
        try:
            return states[index] if starts[index] <= gfn < ends[index] else UNMAPPED
        except IndexError:
            return UNMAPPED

    def pieces(self, start: int, end: int) -> list[tuple[int, int, int, int]]:
        """(start, end, state, root page) of every range inside [start, end), cut to it; UNMAPPED ones are left out."""
        found = []
        index = max(bisect_right(self._starts, start) - 1, 0)
        while index < len(self._starts) and self._starts[index] < end:
            first, last = max(self._starts[index], start), min(self._ends[index], end)
            if first < last:
                page = self._pages[index]
                found.append(
                    (
                        first,
                        last,
                        self._states[index],
                        page + first - self._starts[index] if page >= 0 else -1,
                    )
                )
            index += 1
        return found

    def set(self, start: int, end: int, state: int, page: int = -1) -> None:
        """Replaces [start, end). UNMAPPED removes."""
        starts, ends, states, pages = self._starts, self._ends, self._states, self._pages
        # The common case: a range grows at its end, as a large region arrives in many calls.
        if starts and start == ends[-1] and state == states[-1] and state == NO_ACCESS:
            ends[-1] = end
            return
        low = bisect_right(starts, start) - 1
        if low < 0 or ends[low] <= start:
            low += 1
        high = low
        while high < len(starts) and starts[high] < end:
            high += 1
        new: list[tuple[int, int, int, int]] = []
        if low < high and starts[low] < start:
            new.append((starts[low], start, states[low], pages[low]))
        if state != UNMAPPED:
            new.append((start, end, state, page))
        if low < high and ends[high - 1] > end:
            last = high - 1
            rest = pages[last] + end - starts[last] if pages[last] >= 0 else -1
            new.append((end, ends[last], states[last], rest))
        # Neighbours take part, so that ranges that continue each other become one.
        if low > 0 and ends[low - 1] == start:
            low -= 1
            new.insert(0, (starts[low], ends[low], states[low], pages[low]))
        if high < len(starts) and starts[high] == end:
            new.append((starts[high], ends[high], states[high], pages[high]))
            high += 1
        merged: list[tuple[int, int, int, int]] = []
        for item in new:
            if merged:
                first, last, kind, base = merged[-1]
                continues = base < 0 if item[3] < 0 else base >= 0 and base + last - first == item[3]
                if last == item[0] and kind == item[2] and continues:
                    merged[-1] = (first, item[1], kind, base)
                    continue
            merged.append(item)
        starts[low:high] = [item[0] for item in merged]
        ends[low:high] = [item[1] for item in merged]
        states[low:high] = [item[2] for item in merged]
        pages[low:high] = [item[3] for item in merged]

    def clear(self) -> None:
        """Forgets everything."""
        for column in (self._starts, self._ends, self._states, self._pages):
            column.clear()
