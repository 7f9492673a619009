# SPDX-License-Identifier: Apache-2.0
"""Pages that the hypervisor owns, and what becomes of the memory under them."""

from __future__ import annotations

import pytest

from rootvisor.bus.address_space import GuestMemory, MemoryRegion
from rootvisor.hypervisor.overlay import OverlayPage, OwnedPages

HOME = 0x8000


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory((MemoryRegion(0, 0x10000, memoryview(bytearray(0x10000)), -1, 0),))


@pytest.fixture
def page(memory: GuestMemory) -> OverlayPage:
    made = OwnedPages(memory, HOME, 2).allocate()
    made.view[:] = b"\xaa" * 4096
    return made


def test_page_msr_shows_the_home_before_it_is_enabled(page: OverlayPage) -> None:
    assert (page.value, page.enabled) == (HOME, False)


def test_page_moves_with_its_contents_and_uncovers_what_was_below(
    memory: GuestMemory, page: OverlayPage
) -> None:
    memory.view(0x1000, 4096)[:] = b"\x55" * 4096
    page.write(0x1000 | 1)
    assert bytes(memory.view(0x1000, 4096)) == b"\xaa" * 4096
    page.view[0] = 1
    page.write(0x2000 | 1)
    assert bytes(memory.view(0x1000, 4096)) == b"\x55" * 4096
    assert memory.view(0x2000, 1)[0] == 1
    page.write(HOME)
    assert (memory.view(HOME, 1)[0], bytes(memory.view(0x2000, 4096))) == (1, bytes(4096))


def test_page_outside_memory_is_nowhere_and_comes_back(memory: GuestMemory, page: OverlayPage) -> None:
    assert not page.can_move(1 << 40)
    page.write(1 << 40 | 1)
    assert page.enabled
    page.view[0] = 2
    page.write(HOME | 1)
    assert memory.view(HOME, 1)[0] == 2


def test_disable_keeps_page_and_reserved_bits(page: OverlayPage) -> None:
    page.write(HOME | 0xABD)
    page.disable()
    assert page.value == HOME | 0xABC


def test_owned_block_ends(memory: GuestMemory) -> None:
    owned = OwnedPages(memory, HOME, 2)
    assert [owned.allocate().gpn, owned.allocate().gpn] == [8, 9]
    assert [owned.contains(n) for n in (7, 8, 9, 10)] == [False, True, True, False]
    with pytest.raises(MemoryError):
        owned.allocate()
