# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import pytest

from rootvisor.pci.msix import MsixTable
from tests.unit.virtio.guest_side import Vector

ADDRESS, DATA = 0xFEE01000, 0x41


class Table:
    """A table of two vectors whose platform side records."""

    def __init__(self) -> None:
        self.msix = MsixTable(2)
        self.vectors: list[Vector] = []
        self.msix.attach(self._make)

    def _make(self) -> Vector:
        self.vectors.append(Vector(0x10))
        return self.vectors[-1]

    def enable(self, *, enabled: bool = True, function_masked: bool = False, bus_master: bool = True) -> None:
        self.msix.set_control(enabled=enabled, function_masked=function_masked, bus_master=bus_master)

    def program(self, index: int = 0, *, masked: bool = False) -> None:
        self.msix.write_table(16 * index, 4, ADDRESS)
        self.msix.write_table(16 * index + 4, 4, 0)
        self.msix.write_table(16 * index + 8, 4, DATA)
        self.msix.write_table(16 * index + 12, 4, masked)


@pytest.fixture
def table() -> Table:
    return Table()


def test_vector_goes_live_once_unmasked_and_is_programmed_before(table: Table) -> None:
    table.enable()
    table.program()
    assert [vector.calls for vector in table.vectors] == [[("program", ADDRESS, DATA), ("mask", False)]]


def test_unchanged_writes_are_not_passed_on(table: Table) -> None:
    table.enable()
    table.program()
    table.program()
    table.enable()
    assert len(table.vectors[0].calls) == 2


def test_mask_and_unmask_do_not_program_again(table: Table) -> None:
    table.enable()
    table.program()
    table.msix.write_table(12, 4, 1)
    table.msix.write_table(12, 4, 0)
    assert table.vectors[0].calls[2:] == [("mask", True), ("mask", False)]


def test_message_changed_while_live_is_passed_on(table: Table) -> None:
    table.enable()
    table.program()
    table.msix.write_table(8, 4, 0x55)
    assert table.vectors[0].calls[-1] == ("program", ADDRESS, 0x55)


def test_eight_byte_write_sets_two_words(table: Table) -> None:
    table.enable()
    table.msix.write_table(0, 8, ADDRESS)
    table.msix.write_table(8, 8, DATA)
    assert table.vectors[0].calls == [("program", ADDRESS, DATA), ("mask", False)]


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (2, 4), (4, 8), (32, 4), (28, 8), (-4, 4)])
def test_odd_table_access_is_dropped(table: Table, offset: int, size: int) -> None:
    before = table.msix.read_table(0, 8), table.msix.read_table(24, 8)
    table.msix.write_table(offset, size, 0)
    assert (table.msix.read_table(0, 8), table.msix.read_table(24, 8)) == before


def test_trigger_while_masked_is_pending_until_unmasked(table: Table) -> None:
    table.enable()
    table.program(1, masked=True)
    table.msix.trigger(1)
    assert table.msix.read_pending(0, 8) == 2
    table.msix.write_table(28, 4, 0)
    assert table.msix.read_pending(0, 8) == 0
    assert table.vectors[0].count == 1


def test_function_mask_holds_all_vectors_back(table: Table) -> None:
    table.enable(function_masked=True)
    table.program()
    table.msix.trigger(0)
    assert table.msix.read_pending(0, 4) == 1
    table.enable()
    assert table.vectors[0].count == 1


def test_trigger_without_bus_master_or_msix_is_lost(table: Table) -> None:
    table.program()
    table.enable(bus_master=False)
    table.msix.trigger(0)
    table.enable(enabled=False)
    table.msix.trigger(0)
    table.enable()
    assert table.vectors[0].count == 0
    assert table.msix.read_pending(0, 8) == 0


def test_eventfd_of_masked_vector_shows_as_pending(table: Table) -> None:
    table.enable()
    table.program(masked=True)
    fd = table.msix.eventfd(0)
    assert table.msix.eventfd(0) == fd
    assert table.msix.read_pending(0, 8) == 0
    os.eventfd_write(fd, 1)
    assert table.msix.read_pending(0, 8) == 1
    os.close(fd)


def test_reset_masks_and_forgets_messages(table: Table) -> None:
    table.enable()
    table.program()
    table.msix.reset()
    assert table.vectors[0].calls[-2:] == [("mask", True), ("program", 0, 0)]
    assert table.msix.read_table(12, 4) == 1
    assert table.msix.read_table(0, 8) == 0
