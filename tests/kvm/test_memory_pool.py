# SPDX-License-Identifier: Apache-2.0
"""Deposits and withdrawals are exact: all of a list or nothing, no page twice."""

from __future__ import annotations

import struct

import pytest

from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import status
from tests.kvm import guest as g
from tests.kvm.guest import Guest, Result

PAGE = g.SPARE >> 12
OWNED_PAGE = g.OWNED >> 12


def deposit(guest: Guest, *pages: int, partition: int = hv.SELF, start: int = 0) -> Result:
    data = hv.DEPOSIT_MEMORY_INPUT.pack(partition) + struct.pack(f"<{len(pages)}Q", *pages)
    return guest.call(hv.DEPOSIT_MEMORY, data, count=len(pages), start=start)


def withdraw(guest: Guest, count: int, start: int = 0) -> tuple[Result, list[int]]:
    data = hv.WITHDRAW_MEMORY_INPUT.pack(hv.SELF, 0)
    answer = guest.call(hv.WITHDRAW_MEMORY, data, count=count, start=start, output=count * 8)
    return answer, [page for (page,) in struct.iter_unpack("<Q", answer.output)]


def total(guest: Guest) -> int:
    return guest.partition.deposits.total


@pytest.mark.parametrize("partition", [hv.SELF, 1])
def test_deposit_is_counted(guest: Guest, partition: int) -> None:
    answer = deposit(guest, PAGE, PAGE + 1, PAGE + 2, partition=partition)
    assert (answer.status, answer.reps) == (0, 3)
    assert total(guest) == 3


def test_deposit_of_the_largest_list(guest: Guest) -> None:
    answer = deposit(guest, *range(PAGE, PAGE + 511))
    assert (answer.status, answer.reps) == (0, 511)
    assert total(guest) == 511


def test_deposit_from_start_skips_elements(guest: Guest) -> None:
    answer = deposit(guest, 1 << 50, PAGE, start=1)
    assert (answer.status, answer.reps) == (0, 2)
    assert total(guest) == 1


@pytest.mark.parametrize("partition", [0, 2, 1 << 40])
def test_deposit_to_an_unknown_partition(guest: Guest, partition: int) -> None:
    assert deposit(guest, PAGE, partition=partition).status == status.INVALID_PARTITION_ID
    assert total(guest) == 0


@pytest.mark.parametrize(
    "bad",
    [OWNED_PAGE, OWNED_PAGE + 1, g.RAM >> 12, 0xFEE00, 1 << 40, 1 << 52, (1 << 64) - 1, PAGE],
    ids=["own", "own2", "hole", "apic", "width", "overflow", "ones", "twice"],
)
def test_deposit_with_a_bad_page_is_nothing_at_all(guest: Guest, bad: int) -> None:
    answer = deposit(guest, PAGE, PAGE + 1, bad)
    assert (answer.status, answer.reps) == (status.INVALID_PARAMETER, 0)
    assert total(guest) == 0


def test_deposit_of_a_deposited_page(guest: Guest) -> None:
    assert deposit(guest, PAGE).status == 0
    assert deposit(guest, PAGE + 1, PAGE).status == status.INVALID_PARAMETER
    assert total(guest) == 1


def test_withdraw_gives_back_what_was_deposited(guest: Guest) -> None:
    deposit(guest, *range(PAGE, PAGE + 8))
    answer, pages = withdraw(guest, 8)
    assert (answer.status, answer.reps) == (0, 8)
    assert sorted(pages) == list(range(PAGE, PAGE + 8))
    assert total(guest) == 0
    assert deposit(guest, *pages).status == 0, "withdrawn pages can be deposited again"


def test_withdraw_more_than_there_is(guest: Guest) -> None:
    deposit(guest, PAGE, PAGE + 1)
    answer, pages = withdraw(guest, 5)
    assert (answer.status, answer.reps) == (status.NO_RESOURCES, 2)
    assert sorted(pages[:2]) == [PAGE, PAGE + 1]
    assert pages[2:] == [0xEEEEEEEE_EEEEEEEE] * 3
    assert total(guest) == 0


def test_withdraw_from_an_empty_pool(guest: Guest) -> None:
    answer, _ = withdraw(guest, 1)
    assert (answer.status, answer.reps) == (status.NO_RESOURCES, 0)


def test_withdraw_does_not_give_pages_in_use(guest: Guest) -> None:
    deposit(guest, PAGE)
    guest.partition.deposits.allocate()
    answer, _ = withdraw(guest, 1)
    assert answer.status == status.NO_RESOURCES
    assert total(guest) == 1
    assert deposit(guest, PAGE).status == status.INVALID_PARAMETER


def test_withdraw_into_a_bad_place_changes_nothing(guest: Guest) -> None:
    deposit(guest, PAGE)
    data = hv.WITHDRAW_MEMORY_INPUT.pack(hv.SELF, 0)
    answer = guest.call(hv.WITHDRAW_MEMORY, data, count=1, output_gpa=g.RAM)
    assert answer.status == status.INVALID_ALIGNMENT
    assert total(guest) == 1
