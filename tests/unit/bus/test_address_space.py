# SPDX-License-Identifier: Apache-2.0
"""Ports, device memory and RAM of a partition."""

from __future__ import annotations

import pytest

from rootvisor.bus.address_space import AddressError, GuestMemory, MemoryRegion, MmioSpace, PortSpace


class Registers:
    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return self.value + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


def test_port_offsets_are_relative_to_the_base() -> None:
    ports = PortSpace()
    device = Registers(0x10)
    ports.add(0x3F8, 8, device)
    assert ports.read(0x3FD, 1) == 0x15
    ports.write(0x3FF, 1, 7)
    assert device.written == [(7, 1, 7)]


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF)])
def test_nobody_answers_with_ones(size: int, ones: int) -> None:
    ports, mmio = PortSpace(), MmioSpace()
    assert ports.read(0x1234, size) == mmio.read(0x1234, size) == ones
    ports.write(0x1234, size, 1)
    mmio.write(0x1234, size, 1)


def test_port_remove() -> None:
    ports = PortSpace()
    ports.add(0x70, 2, Registers())
    ports.remove(0x70)
    assert ports.read(0x71, 1) == 0xFF


def test_mmio_finds_the_range_around() -> None:
    mmio = MmioSpace()
    low, high = Registers(0), Registers(0x100)
    mmio.add(0x2000, 0x1000, high)
    mmio.add(0x1000, 0x1000, low)
    assert (mmio.read(0x1008, 4), mmio.read(0x2008, 4)) == (8, 0x108)
    assert mmio.read(0x3000, 4) == mmio.read(0xFFF, 1) | 0xFFFFFF00


def test_mmio_access_across_the_end_is_nobodys() -> None:
    mmio = MmioSpace()
    device = Registers()
    mmio.add(0x1000, 0x10, device)
    assert mmio.read(0x100C, 8) == (1 << 64) - 1
    mmio.write(0x100C, 8, 1)
    assert device.written == []


def test_mmio_add_again_replaces_and_remove_ends() -> None:
    mmio = MmioSpace()
    mmio.add(0x1000, 0x10, Registers(1))
    mmio.add(0x1000, 0x10, Registers(2))
    assert mmio.read(0x1000, 1) == 2
    mmio.remove(0x1000)
    assert mmio.find(0x1000) is None


@pytest.fixture
def memory() -> GuestMemory:
    low, high = bytearray(0x2000), bytearray(0x1000)
    return GuestMemory(
        (
            MemoryRegion(0, 0x2000, memoryview(low), -1, 0),
            MemoryRegion(1 << 32, 0x1000, memoryview(high), -1, 0x2000),
        )
    )


def test_memory_views_write_through(memory: GuestMemory) -> None:
    memory.view(0x1FF8, 8)[:] = b"abcdefgh"
    assert bytes(memory.view(0x1FFC, 4)) == b"efgh"
    memory.view((1 << 32) + 0xFFF, 1)[0] = 9
    assert memory.size == 0x3000


@pytest.mark.parametrize(
    ("gpa", "length"),
    [(0x1FF9, 8), (0x2000, 1), (-1, 1), ((1 << 32) - 1, 2), (1 << 32, 0x1001), (1 << 63, 1), (0, 1 << 64)],
)
def test_memory_outside_is_an_error(memory: GuestMemory, gpa: int, length: int) -> None:
    with pytest.raises(AddressError):
        memory.view(gpa, length)
