# SPDX-License-Identifier: Apache-2.0
"""Overlay pages of a child against a stand-in for its memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rootvisor.hypervisor.child_overlay import PAGE_LIMIT, OverlayPages


class Memory:
    """Which page of which file is visible where."""

    width = 36

    def __init__(self) -> None:
        self.shown: dict[int, tuple[int, bool]] = {}
        self.fd = -1

    def put_overlay(self, gpn: int, fd: int, offset: int, writable: bool = True) -> None:
        self.fd = fd
        self.shown[gpn] = (offset, writable)

    def remove_overlay(self, gpn: int) -> None:
        del self.shown[gpn]


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def pages(memory: Memory) -> Iterator[OverlayPages]:
    child: Any = SimpleNamespace(memory=memory, hypervisor=SimpleNamespace(lock=threading.RLock()))
    made = OverlayPages(child)
    yield made
    made.close()


def test_page_begins_nowhere_and_zero(pages: OverlayPages, memory: Memory) -> None:
    page = pages.allocate()
    assert (page.value, page.enabled, bytes(page.view)) == (0, False, bytes(4096))
    assert not memory.shown


def test_enable_move_disable(pages: OverlayPages, memory: Memory) -> None:
    pages.allocate()
    page = pages.allocate()
    page.write(0x5FF1)
    assert memory.shown == {5: (4096, True)}
    assert page.value == 0x5FF1
    page.write(0x7001)
    assert memory.shown == {7: (4096, True)}
    page.write(0x8000)
    assert not memory.shown
    page.write(0x9001)
    page.disable()
    assert (page.value, memory.shown) == (0x9000, {})


def test_same_value_again_changes_nothing(pages: OverlayPages, memory: Memory) -> None:
    page = pages.allocate()
    page.write(0x5001)
    memory.shown[5] = (-1, False)
    page.write(0x5003)
    assert memory.shown[5] == (-1, False)
    assert page.value == 0x5003


def test_contents_are_those_of_the_memory_file(pages: OverlayPages, memory: Memory) -> None:
    page = pages.allocate(writable=False)
    page.write(0x1001)
    page.view[:4] = b"here"
    offset, writable = memory.shown[1]
    assert os.pread(memory.fd, 4, offset) == b"here"
    assert not writable


@pytest.mark.parametrize("value", [1 << 36 | 1, 1 << 51 | 1, 0xFEE00001, (1 << 64) - 1])
def test_place_that_no_page_can_have(pages: OverlayPages, memory: Memory, value: int) -> None:
    page = pages.allocate()
    page.write(value)
    assert (page.value, memory.shown) == (value, {})
    page.write(0x3001)
    assert memory.shown == {3: (0, True)}


def test_can_move_within_the_address_space(pages: OverlayPages) -> None:
    page = pages.allocate()
    assert page.can_move((1 << 36) - 1)
    assert not page.can_move(1 << 36)


def test_pages_at_one_place_uncover_each_other(pages: OverlayPages, memory: Memory) -> None:
    first, second, third = (pages.allocate() for _ in range(3))
    for page in (first, second, third):
        page.write(0x5001)
    assert memory.shown[5][0] == third.offset
    second.write(0)
    assert memory.shown[5][0] == third.offset
    third.write(0x6001)
    assert memory.shown == {5: (first.offset, True), 6: (third.offset, True)}
    first.write(0)
    assert memory.shown == {6: (third.offset, True)}


def test_freed_page_is_used_again_zeroed(pages: OverlayPages, memory: Memory) -> None:
    page = pages.allocate()
    page.write(0x5001)
    page.view[:] = b"x" * 4096
    pages.free(page)
    assert not memory.shown
    again = pages.allocate()
    assert again.offset == page.offset
    assert bytes(again.view) == bytes(4096)


def test_pages_have_an_end(pages: OverlayPages) -> None:
    kept = [pages.allocate() for _ in range(PAGE_LIMIT)]
    with pytest.raises(MemoryError):
        pages.allocate()
    pages.free(kept[7])
    assert pages.allocate().offset == kept[7].offset


def test_close_while_somebody_looks_at_a_page(memory: Memory) -> None:
    child: Any = SimpleNamespace(memory=memory, hypervisor=SimpleNamespace(lock=threading.RLock()))
    pages = OverlayPages(child)
    view = pages.allocate().view[:8]
    pages.close()
    view[0] = 1
    assert view[0] == 1
