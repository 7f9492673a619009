# SPDX-License-Identifier: Apache-2.0
"""--watch-deposits: an access of the root to a page that it has deposited is told, and the root goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from rootvisor.tlfs import vp_state
from tests.kvm import guest as g
from tests.kvm.guest import Guest
from tests.kvm.parent import Parent


@pytest.fixture
def parent(usable_kvm: None) -> Iterator[Parent]:
    with Guest() as guest:
        guest.partition.watch_deposits()
        guest.enable_hypercalls()
        yield Parent(guest)
        assert guest.partition.defect is None


def touch(parent: Parent, kind: int, page: int, value: int = 0) -> int:
    op = parent.guest.one(kind, rcx=(page << 12) + 0x28, rax=value)
    assert op.fault == 0
    return op.rax


@pytest.mark.parametrize(("kind", "verb"), [(g.LOAD, "read"), (g.STORE, "wrote to")])
def test_access_is_told_with_vp_rip_gpa_and_owner(
    parent: Parent, capfd: pytest.CaptureFixture[str], kind: int, verb: str
) -> None:
    child = parent.create()
    page = parent.free[-1]
    assert child.deposit(3) == 0
    touch(parent, kind, page)
    watch = parent.guest.hypervisor.deposited.watch
    assert watch is not None and watch.found == 1
    text = capfd.readouterr().err
    assert re.search(
        rf"VP 0 of the root {verb} deposited memory at GPA {(page << 12) + 0x28:#x} "
        rf"\(GVA 0x[0-9a-f]+\), RIP 0x1[0-9a-f]+; the root gave the page to partition {child.id} at \d+\.\d+ s",
        text,
    ), text
    touch(parent, kind, page)  # told once, then let go
    assert watch.found == 1
    touch(parent, kind, page + 1)
    assert watch.found == 2


def test_what_is_stored_there_arrives(parent: Parent) -> None:
    page = parent.free[-1]
    assert parent.deposit(1, 1) == 0
    touch(parent, g.STORE, page, 0x1122334455667788)
    assert parent.guest.ram[(page << 12) + 0x28 : (page << 12) + 0x30] == bytes.fromhex("8877665544332211")


def test_withdrawn_page_is_the_roots_again(parent: Parent) -> None:
    child = parent.create()
    page = parent.free[-1]
    assert child.deposit(2) == 0
    _, pages = child.withdraw(2)
    assert page in pages
    touch(parent, g.STORE, page)
    watch = parent.guest.hypervisor.deposited.watch
    assert watch is not None and (watch.found, watch.watched) == (0, set())


def test_pages_that_the_hypervisor_hands_back_may_be_touched_until_they_are_unmapped(parent: Parent) -> None:
    child = parent.initialized(1)
    page = child.state_pages[0, vp_state.PAGE_REGISTERS]
    watch = parent.guest.hypervisor.deposited.watch
    assert watch is not None
    touch(parent, g.LOAD, page)
    assert watch.found == 0
    assert child.unmap_state_page(0, vp_state.PAGE_REGISTERS) == 0
    touch(parent, g.LOAD, page)
    assert watch.found == 1


def test_operands_of_calls_and_neighbours_are_no_accesses(parent: Parent) -> None:
    child = parent.create()
    first = parent.free[-1]
    assert child.deposit(8) == 0
    for page in (first - 1, first + 8):
        touch(parent, g.STORE, page, 5)
    watch = parent.guest.hypervisor.deposited.watch
    assert watch is not None and watch.found == 0


def test_without_the_option_nothing_is_watched(guest: Guest) -> None:
    parent = Parent(guest)
    page = parent.free[-1]
    assert parent.create().deposit(1) == 0
    touch(parent, g.STORE, page)
    assert guest.hypervisor.deposited.watch is None
