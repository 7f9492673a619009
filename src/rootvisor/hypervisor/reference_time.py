# SPDX-License-Identifier: Apache-2.0
"""The partition's clock: 100 ns units since creation, derived from the guest's TSC (TLFS "Partition Reference Time").

The MSR and the TSC page use one scale and one offset, so they agree to the tick:
``time = ((tsc * scale) >> 64) + offset``.
"""

from __future__ import annotations

from struct import Struct

_PAGE = Struct("<IIQq")
_SEQUENCES_SKIPPED = (0, 0xFFFFFFFF)


class ReferenceTime:
    """``tsc_hz`` is the guest's TSC frequency, ``tsc_at_creation`` its value when time is 0."""

    __slots__ = ("offset", "scale", "sequence", "tsc_hz")

    def __init__(self, tsc_hz: int, tsc_at_creation: int) -> None:
        self.tsc_hz = tsc_hz
        self.scale = (10_000_000 << 64) // tsc_hz
        self.offset = -((tsc_at_creation * self.scale) >> 64)
        self.sequence = 1

    def at(self, tsc: int) -> int:
        """Reference time for a TSC value of the guest."""
        return max(((tsc * self.scale) >> 64) + self.offset, 0)

    def write_page(self, page: memoryview) -> None:
        """Fills the TSC page: sequence 0 while the values change, then a new sequence."""
        _PAGE.pack_into(page, 0, 0, 0, self.scale, self.offset)
        while self.sequence in _SEQUENCES_SKIPPED:
            self.sequence = (self.sequence + 1) & 0xFFFFFFFF
        page[0:4] = self.sequence.to_bytes(4, "little")
