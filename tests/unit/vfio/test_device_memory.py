# SPDX-License-Identifier: Apache-2.0
"""Memory by pages: what is withheld is unmapped, what comes back is mapped as it was, the limit is respected."""

from __future__ import annotations

import pytest

from rootvisor.vfio.device_memory import DeviceMemory
from rootvisor.vfio.errors import VfioError

PAGE = 4096
#: 16 pages from 0, 8 pages from 1 MiB.
RANGES = [(0, 16 * PAGE, 0x7F0000000000), (1 << 20, 8 * PAGE, 0x7F0000020000)]


class Type1:
    """A container as type 1 version 2 has it: no mapping over another one, none undone in part."""

    def __init__(self, left: int | None = 65535) -> None:
        self.left = left
        self.mapped: dict[int, tuple[int, int]] = {}

    def map(self, iova: int, address: int, size: int) -> None:
        assert all(iova >= at + length or at >= iova + size for at, (_, length) in self.mapped.items())
        self.mapped[iova] = (address, size)

    def unmap(self, iova: int, size: int) -> None:
        for at, (_, length) in list(self.mapped.items()):
            if at < iova + size and iova < at + length:
                assert iova <= at and at + length <= iova + size, "a part of a mapping"
                del self.mapped[at]

    def mappings_left(self) -> int | None:
        return self.left


def test_without_the_watch_each_range_is_one_mapping() -> None:
    container = Type1(left=2)
    DeviceMemory(container, RANGES, by_page=False)  # type: ignore[arg-type]
    assert container.mapped == {gpa: (address, size) for gpa, size, address in RANGES}


def test_withheld_pages_are_out_of_reach_until_they_are_restored_their_neighbours_are_not() -> None:
    container = Type1(left=24)
    memory = DeviceMemory(container, RANGES, by_page=True)  # type: ignore[arg-type]
    whole = dict(container.mapped)
    assert len(whole) == 24
    memory.withhold(14, 2)
    memory.withhold(256, 3)
    assert memory.withheld == {14, 15, 256, 257, 258}
    assert container.mapped == {
        gpa: where for gpa, where in whole.items() if gpa // PAGE not in memory.withheld
    }
    memory.restore(256, 8)  # some of which were never withheld
    memory.restore(14, 1)
    assert memory.withheld == {15} and 15 * PAGE not in container.mapped
    memory.withhold(15, 1)
    memory.restore(15, 1)
    assert container.mapped == whole and not memory.withheld


def test_more_pages_than_the_kernel_allows_mappings_are_refused_with_the_mend() -> None:
    container = Type1(left=23)
    with pytest.raises(
        VfioError, match="each of 24 pages needs a mapping, and the kernel allows 23; .*dma_entry_limit"
    ):
        DeviceMemory(container, RANGES, by_page=True)  # type: ignore[arg-type]
    assert not container.mapped
    DeviceMemory(Type1(left=None), RANGES, by_page=True)  # type: ignore[arg-type]
