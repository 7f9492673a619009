# SPDX-License-Identifier: Apache-2.0
"""Statistics pages: memory is asked for, given, and given back."""

from __future__ import annotations

import struct

import pytest

from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import statistics as tlfs
from rootvisor.tlfs import status
from tests.kvm import guest as g
from tests.kvm.guest import Guest
from tests.kvm.parent import Parent
from tests.kvm.test_memory_pool import PAGE, deposit, total, withdraw

HYPERVISOR = (hv.STATS_HYPERVISOR, bytes(16))
LP0 = (hv.STATS_LOGICAL_PROCESSOR, bytes(16))
PARTITION = (hv.STATS_PARTITION, struct.pack("<QQ", 1, 0))
VP0 = (hv.STATS_VP, struct.pack("<QIHBB", 1, 0, 0, 0, hv.STATS_AREA_SELF))
VP0_PARENT = (hv.STATS_VP, struct.pack("<QIHBB", 1, 0, 0, 0, hv.STATS_AREA_PARENT))


def map_page(guest: Guest, kind: int, identity: bytes) -> tuple[int, int]:
    answer = guest.call(hv.MAP_STATS_PAGE, hv.MAP_STATS_PAGE_INPUT.pack(kind, identity), output=8)
    return answer.status, int.from_bytes(answer.output, "little")


def unmap_page(guest: Guest, kind: int, identity: bytes) -> int:
    return guest.call(hv.UNMAP_STATS_PAGE, hv.MAP_STATS_PAGE_INPUT.pack(kind, identity)).status


@pytest.mark.parametrize("which", [HYPERVISOR, LP0, PARTITION, VP0, VP0_PARENT])
def test_map_asks_for_memory_then_succeeds(guest: Guest, which: tuple[int, bytes]) -> None:
    assert map_page(guest, *which)[0] == status.INSUFFICIENT_MEMORY
    guest.ram[g.SPARE : g.SPARE + 4096] = b"\xaa" * 4096
    deposit(guest, PAGE)
    assert map_page(guest, *which) == (0, PAGE)
    assert total(guest) == 1
    assert bytes(guest.ram[g.SPARE + 4088 : g.SPARE + 4096]) == bytes(8)


def test_map_again_is_the_same_page(guest: Guest) -> None:
    deposit(guest, PAGE, PAGE + 1)
    first = map_page(guest, *VP0)
    assert map_page(guest, *VP0) == first
    assert map_page(guest, *VP0_PARENT)[1] != first[1]
    assert len(guest.partition.deposits.used) == 2


def test_hypervisor_page_counts_logical_processors(guest2: Guest) -> None:
    deposit(guest2, PAGE)
    map_page(guest2, *HYPERVISOR)
    assert struct.unpack_from("<Q", guest2.ram, g.SPARE + 8) == (2,)


def test_unmap_gives_the_page_back(guest: Guest) -> None:
    deposit(guest, PAGE)
    map_page(guest, *VP0)
    assert withdraw(guest, 1)[0].status == status.NO_RESOURCES
    assert unmap_page(guest, *VP0) == 0
    assert unmap_page(guest, *VP0) == status.INVALID_PARAMETER
    assert withdraw(guest, 1)[1] == [PAGE]


@pytest.mark.parametrize(
    ("kind", "identity", "wanted"),
    [
        (0, bytes(16), status.INVALID_PARAMETER),
        (77, bytes(16), status.INVALID_PARAMETER),
        (hv.STATS_HYPERVISOR, bytes(15) + b"\x02", status.INVALID_PARAMETER),
        (hv.STATS_LOGICAL_PROCESSOR, struct.pack("<IIQ", 9, 0, 0), status.INVALID_LP_INDEX),
        (hv.STATS_PARTITION, struct.pack("<QQ", 9, 0), status.INVALID_PARTITION_ID),
        (hv.STATS_VP, struct.pack("<QIHBB", 9, 0, 0, 0, 0), status.INVALID_PARTITION_ID),
        (hv.STATS_VP, struct.pack("<QIHBB", 1, 5, 0, 0, 0), status.INVALID_VP_INDEX),
    ],
)
def test_map_of_what_does_not_exist(guest: Guest, kind: int, identity: bytes, wanted: int) -> None:
    deposit(guest, PAGE)
    assert map_page(guest, kind, identity)[0] == wanted
    assert not guest.partition.deposits.used


# --- what is counted --------------------------------------------------------------------------------------------------
def read(guest: Guest, page: int) -> memoryview:
    """The counters of a page, refreshed."""
    guest.hypervisor.statistics._due = 0
    guest.hypervisor.statistics.tick()
    return guest.ram[page << 12 : (page + 1) << 12].cast("Q")


def identity(partition: int, vp: int = 0, area: int = hv.STATS_AREA_SELF) -> bytes:
    return struct.pack("<QIHBB", partition, vp, 0, 0, area)


def test_counters_of_the_root(guest2: Guest) -> None:
    guest = guest2
    deposit(guest, *range(PAGE, PAGE + 6))
    pages = [map_page(guest, *which)[1] for which in (HYPERVISOR, LP0, PARTITION, VP0, VP0_PARENT)]
    before = [read(guest, page).tolist() for page in pages]
    for _ in range(20):
        guest.rdmsr(0x40000002)
    guest.call(hv.NOTIFY_LONG_SPIN_WAIT, bytes(8))
    after = [read(guest, page).tolist() for page in pages]
    hypervisor, lp, partition, vp, parent = after
    assert hypervisor[1:5] == [2, 1, 6, 2]
    assert lp[tlfs.LP_GLOBAL_TIME] > before[1][tlfs.LP_GLOBAL_TIME] > 0
    assert lp[tlfs.LP_TOTAL_RUN_TIME] > before[1][tlfs.LP_TOTAL_RUN_TIME] > 0
    assert partition[tlfs.PT_VIRTUAL_PROCESSORS] == 2
    assert partition[tlfs.PT_DEPOSITED_PAGES] == 6
    assert partition[tlfs.PT_PARTITION_ID] == 1
    assert partition[tlfs.PT_GPA_PAGES] == g.RAM >> 12
    assert vp[tlfs.VP_MSR_ACCESSES] - before[3][tlfs.VP_MSR_ACCESSES] == 20
    assert vp[tlfs.VP_LONG_SPIN_WAIT_HYPERCALLS] - before[3][tlfs.VP_LONG_SPIN_WAIT_HYPERCALLS] == 1
    assert vp[tlfs.VP_HYPERCALLS] == sum(vp[index] for index in (*range(62, 70), tlfs.VP_DEPOSIT_HYPERCALLS))
    assert vp[tlfs.VP_ROOT_DISPATCH_THREAD_BLOCKED] == 0
    assert not any(parent)


def test_counters_of_a_child(guest: Guest) -> None:
    parent = Parent(guest)
    child = parent.initialized(vps=2)
    assert parent.deposit(1, 5) == 0
    partition = map_page(guest, hv.STATS_PARTITION, identity(child.id))[1]
    vp = map_page(guest, hv.STATS_VP, identity(child.id))[1]
    hypervisor = map_page(guest, *HYPERVISOR)[1]
    child.load(b"\xe6\x80\xe6\x80")
    for _ in range(2):
        child.skip(0, child.run()[1])
    counters = read(guest, vp)
    assert counters[tlfs.VP_IO_INTERCEPT_MESSAGES] == 2
    assert counters[tlfs.VP_IO_INSTRUCTIONS] == 2
    assert counters[tlfs.VP_TOTAL_RUN_TIME] > 0
    assert counters[tlfs.VP_MEMORY_INTERCEPT_MESSAGES] == counters[tlfs.VP_OTHER_MESSAGES] == 0
    counters = read(guest, partition)
    assert counters[tlfs.PT_VIRTUAL_PROCESSORS] == 2
    assert counters[tlfs.PT_DEPOSITED_PAGES] == 208 + 8
    assert counters[tlfs.PT_GPA_PAGES] == 16
    assert counters[tlfs.PT_PARTITION_ID] == child.id
    assert read(guest, hypervisor)[tlfs.HV_PARTITIONS] == 2
    # pages outlive the objects, until they are unmapped
    assert child.finalize() == 0
    assert child.delete() == 0
    assert read(guest, hypervisor)[tlfs.HV_PARTITIONS] == 1
    assert unmap_page(guest, hv.STATS_VP, identity(child.id)) == 0
    assert unmap_page(guest, hv.STATS_PARTITION, identity(child.id)) == 0
    assert map_page(guest, hv.STATS_VP, identity(child.id))[0] == status.INVALID_PARTITION_ID
    parent.check_accounts()
