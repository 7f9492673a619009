# SPDX-License-Identifier: Apache-2.0
"""``rootvisor run --watch-deposits``: accesses of the root to memory that it has deposited are caught and told.

Deposited pages are the hypervisor's until they are withdrawn; a kernel that still uses one has a bug that shows much
later, somewhere else. With the watch, KVM shows the root its memory through a mapping of its own, where deposited pages
have no access, except for those that the hypervisor hands back visibly (statistics, VP state). The first access to a
page is told with VP, RIP, GPA, and who has the page since when; then the page is let go, so that the root runs on and
meets its next bug. Physical devices of the root lose those pages, too, until the root has them back: the IOMMU refuses
the access, and it is not let go.

Without the option there is no second mapping, and nothing to look at.
"""

from __future__ import annotations

import sys

from ..bus.address_space import AddressError
from ..kvm.reservation import Reservation
from ..tlfs import intercepts
from . import memory_access
from .gpa_ranges import NO_ACCESS, UNMAPPED, WRITABLE
from .vp_view import VpView

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from typing import Protocol

    from ..bus.address_space import MemoryRegion
    from .computer_vp import ComputerVp
    from .root_partition import RootPartition

    class Devices(Protocol):
        """Devices that reach the root's memory past KVM. Neither method raises."""

        def withhold(self, first: int, count: int) -> None:
            """They do not reach these pages any more."""
            ...

        def restore(self, first: int, count: int) -> None:
            """They do again."""
            ...


PAGE = 4096
_VERBS = {
    intercepts.ACCESS_READ: "read",
    intercepts.ACCESS_WRITE: "wrote to",
    intercepts.ACCESS_EXECUTE: "executed",
}
#: How often a VP may fail in a row without a page to blame: another VP was quicker with the same page.
_UNEXPLAINED_LIMIT = 64


class DepositWatch:
    """The root's memory as KVM shows it, in a mapping of its own. Everything under Hypervisor.lock.

    ``found`` counts the accesses that were told. ``devices``, if any, are told of every page that comes and goes.
    """

    __slots__ = ("_alias", "_regions", "_root", "_unexplained", "devices", "found", "watched")

    def __init__(self, root: RootPartition) -> None:
        """Gives KVM the other mapping; no VP is in the guest. Memory slot n is region n of the root's memory."""
        self._root = root
        self._regions = root.memory.regions
        self.watched: set[int] = set()
        self.found = 0
        self.devices: Devices | None = None
        self._unexplained = 0
        self._alias = [Reservation(region.size) for region in self._regions]
        for slot, (alias, region) in enumerate(zip(self._alias, self._regions, strict=True)):
            alias.map_file(0, region.size, region.fd, region.fd_offset, True)
            root.vm.set_memory(slot, region.gpa, 0, 0)
            root.vm.set_memory(slot, region.gpa, region.size, alias.address)

    def _place(self, gpn: int) -> tuple[Reservation, MemoryRegion, int]:
        """The mapping, its region, and the offset of a page in both."""
        for alias, region in zip(self._alias, self._regions, strict=True):
            offset = (gpn << 12) - region.gpa
            if 0 <= offset < region.size:
                return alias, region, offset
        raise AssertionError(f"page {gpn:#x} is not the root's")

    def protect(self, pages: Collection[int]) -> None:
        """The root may touch these pages no longer."""
        for first, count in _runs(pages):
            if self.devices is not None:
                self.devices.withhold(first, count)
            alias, _region, offset = self._place(first)
            try:
                alias.clear(offset, count * PAGE)
            except OSError:  # vm.max_map_count: watch what can be watched
                continue
            self.watched.update(range(first, first + count))

    def release(self, pages: Collection[int]) -> None:
        """The root may touch them again."""
        if self.devices is not None:
            for first, count in _runs(pages):
                self.devices.restore(first, count)
        self._let_go(pages)

    def _let_go(self, pages: Collection[int]) -> None:
        for first, count in _runs(self.watched.intersection(pages)):
            alias, region, offset = self._place(first)
            alias.map_file(offset, count * PAGE, region.fd, region.fd_offset + offset, True)
            self.watched.difference_update(range(first, first + count))

    def caught(self, vp: ComputerVp) -> bool:
        """KVM_RUN of a VP failed with EFAULT; whether it may go on, because a deposited page was to blame."""
        view = VpView(vp, _Memory(self, vp.partition.hypervisor.root))
        try:
            access = memory_access.find(view)  # type: ignore[arg-type]
        except AddressError:
            access = None
        gpn = access.gpa >> 12 if access is not None else -1
        if access is None or gpn not in self.watched:
            self._unexplained += 1
            return self._unexplained < _UNEXPLAINED_LIMIT
        self._unexplained = 0
        self.found += 1
        partition_id, time = self._root.hypervisor.deposited.given[gpn]
        whose = "itself" if partition_id == self._root.id else f"partition {partition_id}"
        text = (
            f"VP {vp.index} of the root {_VERBS[access.access]} deposited memory at GPA {access.gpa:#x} "
            f"(GVA {access.gva:#x}), RIP {vp.u64[memory_access.RIP]:#x}; the root gave the page to {whose} "
            f"at {time / 10_000_000:.3f} s of its time"
        )
        sys.stderr.write(f"rootvisor: {text}\n")
        if vp.trace is not None:
            vp.trace.event("deposit-access", text)
        self._let_go((gpn,))
        return True

    def close(self) -> None:
        """The root's machine is gone."""
        for alias in self._alias:
            alias.close()


def _runs(pages: Iterable[int]) -> list[tuple[int, int]]:
    """(first, count) of consecutive page numbers."""
    runs: list[tuple[int, int]] = []
    for gpn in sorted(pages):
        if runs and gpn == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((gpn, 1))
    return runs


class _Memory:
    """The root's memory with the states that children's has, for :mod:`.memory_access`."""

    __slots__ = ("_root", "_watch")

    def __init__(self, watch: DepositWatch, root: RootPartition) -> None:
        self._watch = watch
        self._root = root

    def state(self, gpa: int) -> int:
        if gpa >> 12 in self._watch.watched:
            return NO_ACCESS
        return WRITABLE if self._root.memory.contains(gpa & ~0xFFF, PAGE) else UNMAPPED

    def page(self, gpn: int) -> memoryview | None:
        if gpn in self._watch.watched:
            return None
        try:
            return self._root.memory.view(gpn << 12, PAGE)
        except AddressError:
            return None
