# SPDX-License-Identifier: Apache-2.0
"""What lies at which guest page number, as sorted ranges: 8 GiB without access are one entry."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from time import sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    #: (start, end, state, the root's number of the page at start or -1)
    Piece = tuple[int, int, int, int]

#: What a child may do with a page. UNMAPPED: nothing was ever mapped; NO_ACCESS: mapped without access.
UNMAPPED, NO_ACCESS, READ_ONLY, WRITABLE = range(4)


class GpaRanges:
    """Ranges [start, end) of guest page numbers with a state and, for READ_ONLY and WRITABLE, the root's page number of
    the first page. Neighbours that continue each other are one range."""

    __slots__ = ("_ends", "_pages", "_starts", "_states", "changes")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._states: list[int] = []
        self._pages: list[int] = []
        #: counts twice per change; odd while one is half made
        self.changes = 0

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
        """The state of one page. May be called while another thread changes the ranges: either is the answer then."""
        starts, ends, states = self._starts, self._ends, self._states
        while True:
            changes = self.changes
            index = bisect_right(starts, gfn) - 1
            try:
                state = states[index] if index >= 0 and gfn < ends[index] else UNMAPPED
            except IndexError:
                state = -1
            if changes == self.changes and not changes & 1:
                return state
            sleep(0)

    def pieces(self, start: int, end: int) -> list[Piece]:
        """(start, end, state, root page) of every range inside [start, end), cut to it; UNMAPPED ones are left out."""
        starts, ends = self._starts, self._ends
        index = bisect_right(starts, start) - 1
        if index < 0 or ends[index] <= start:
            index += 1
        found = []
        while index < len(starts) and starts[index] < end:
            first, last, page = starts[index], ends[index], self._pages[index]
            if first < start:
                if page >= 0:
                    page += start - first
                first = start
            found.append((first, min(last, end), self._states[index], page))
            index += 1
        return found

    def whole(self, start: int, end: int) -> tuple[int, int]:
        """[start, end) made larger, so that it cuts no range in two."""
        index = bisect_right(self._starts, start) - 1
        if index >= 0 and self._ends[index] > start:
            start = self._starts[index]
        index = bisect_right(self._starts, end - 1) - 1
        if index >= 0:
            end = max(end, self._ends[index])
        return start, end

    def uses(self, pages: Sequence[int]) -> bool:
        """Whether one of the root's ``pages``, in ascending order, lies anywhere."""
        if not pages:
            return False
        lowest, highest = pages[0], pages[-1]
        for page, start, end in zip(self._pages, self._starts, self._ends, strict=True):
            if page <= highest and page + end - start > lowest and page >= 0:
                at = bisect_left(pages, page)
                if at < len(pages) and pages[at] < page + end - start:
                    return True
        return False

    def set(self, start: int, end: int, state: int, page: int = -1) -> None:
        """Replaces [start, end). UNMAPPED removes."""
        ends = self._ends
        # The common case: a range grows at its end, as a large region arrives in many calls.
        if state == NO_ACCESS and ends and start == ends[-1] and state == self._states[-1]:
            ends[-1] = end
            return
        self.replace(start, end, ((start, end, state, page),) if state != UNMAPPED else ())

    def replace(self, start: int, end: int, pieces: Iterable[Piece]) -> None:
        """Replaces [start, end) by ``pieces``: sorted, inside it, none of them UNMAPPED; the rest becomes UNMAPPED."""
        starts, ends, states, pages = self._starts, self._ends, self._states, self._pages
        low = bisect_left(starts, start) - 1
        if low < 0 or ends[low] < start:  # one that ends at the start is a neighbour, and takes part
            low += 1
        high = bisect_right(starts, end, low)  # so is one that begins at the end
        new: list[Piece] = []
        if low < high and starts[low] < start:
            new.append((starts[low], min(ends[low], start), states[low], pages[low]))
        new += pieces
        if low < high and ends[high - 1] > end:
            last = high - 1
            first = max(starts[last], end)
            new.append(
                (
                    first,
                    ends[last],
                    states[last],
                    pages[last] + first - starts[last] if pages[last] >= 0 else -1,
                )
            )
        merged_starts: list[int] = []
        merged_ends: list[int] = []
        merged_states: list[int] = []
        merged_pages: list[int] = []
        previous_end = previous_state = following = -2
        for first, last, state, page in new:
            if first == previous_end and state == previous_state and page == following:
                merged_ends[-1] = last
            else:
                merged_starts.append(first)
                merged_ends.append(last)
                merged_states.append(state)
                merged_pages.append(page)
            previous_end, previous_state = last, state
            following = page + last - first if page >= 0 else -1
        self.changes += 1
        starts[low:high] = merged_starts
        ends[low:high] = merged_ends
        states[low:high] = merged_states
        pages[low:high] = merged_pages
        self.changes += 1

    def clear(self) -> None:
        """Forgets everything."""
        self.changes += 1
        for column in (self._starts, self._ends, self._states, self._pages):
            column.clear()
        self.changes += 1
