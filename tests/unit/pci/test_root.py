# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random

import pytest

from rootvisor.pci import registers as reg
from rootvisor.pci.bar import Bar
from rootvisor.pci.function import PciFunction
from rootvisor.pci.root import PciRoot
from tests.unit.virtio.guest_side import ECAM, MMIO32, MMIO64, Platform

FUZZ = 2000


class Echo:
    """Registers that read as their own offset."""

    def read(self, offset: int, size: int) -> int:
        return offset

    def write(self, offset: int, size: int, value: int) -> None:
        pass


class Setup:
    def __init__(self) -> None:
        self.platform = Platform()
        self.root = PciRoot(self.platform, ECAM, MMIO32, MMIO64)

    def add(
        self, size: int = 0x4000, *, wide: bool = False, io: bool = False
    ) -> tuple[PciFunction, Bar, int]:
        function = PciFunction(0x1AF4, 0x1041, 0x020000)
        bar = function.add_bar(0, size, wide=wide, io=io)
        bar.add_region(0, size // 2, Echo())
        return function, bar, self.root.add(function)

    def command(self, bdf: int, value: int) -> None:
        self.root.config_write(bdf, reg.COMMAND, 2, value)


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_ecam_reads_functions_and_all_ones_elsewhere(setup: Setup) -> None:
    _, _, bdf = setup.add()
    assert bdf == 1 << 3
    assert setup.root.read(0, 4) == 0x00F01414
    assert setup.root.read(bdf << 12, 4) == 0x10411AF4
    assert setup.root.read(bdf << 12 | 2, 2) == 0x1041
    assert setup.root.read((bdf | 1) << 12, 4) == 0xFFFFFFFF
    assert setup.root.read(2 << 15, 2) == 0xFFFF
    assert setup.root.read(bdf << 12 | 0xFFE, 4) == 0xFFFFFFFF
    assert setup.root.read(bdf << 12 | 0x100, 4) == 0


def test_assign_bars_aligns_inside_windows_and_enables_nothing(setup: Setup) -> None:
    bars = [setup.add(1 << shift, wide=shift & 1 == 0) for shift in range(12, 24)]
    setup.root.assign_bars()
    taken: list[tuple[int, int]] = []
    for function, bar, _ in bars:
        address = function.bar_address(bar)
        window = MMIO64 if bar.wide else MMIO32
        assert window[0] <= address and address + bar.size <= window[0] + window[1]
        assert address % bar.size == 0
        assert all(end <= address or address + bar.size <= start for start, end in taken)
        taken.append((address, address + bar.size))
        assert bar.mapped_at is None
    assert not setup.platform.mmio.ranges


def test_assign_bars_without_room_is_value_error(setup: Setup) -> None:
    setup.add(1 << 29)
    with pytest.raises(ValueError, match="too small"):
        setup.root.assign_bars()


def test_memory_decode_maps_and_unmaps(setup: Setup) -> None:
    function, bar, bdf = setup.add()
    setup.root.assign_bars()
    address = function.bar_address(bar)
    setup.command(bdf, reg.COMMAND_MEMORY)
    assert setup.platform.mmio.read(address + 8, 4) == 8
    assert setup.platform.mmio.read(address + bar.size // 2, 4) == 0xFFFFFFFF
    setup.command(bdf, 0)
    assert setup.platform.mmio.read(address + 8, 4) == 0xFFFFFFFF


def test_io_decode_uses_ports(setup: Setup) -> None:
    function, bar, bdf = setup.add(0x40, io=True)
    setup.root.assign_bars()
    setup.command(bdf, reg.COMMAND_MEMORY)
    assert not setup.platform.ports.ranges
    setup.command(bdf, reg.COMMAND_IO)
    assert setup.platform.ports.read(function.bar_address(bar) + 4, 2) == 4


def test_bar_moved_while_decoding_follows(setup: Setup) -> None:
    function, bar, bdf = setup.add()
    setup.root.assign_bars()
    setup.command(bdf, reg.COMMAND_MEMORY)
    old = function.bar_address(bar)
    setup.root.config_write(bdf, bar.register, 4, 0xFFFFFFFF)
    assert bar.mapped_at is None
    setup.root.config_write(bdf, bar.register, 4, MMIO32[0] + 0x80000)
    assert bar.mapped_at == MMIO32[0] + 0x80000 != old


def test_bar_on_top_of_another_waits_for_it(setup: Setup) -> None:
    first, bar, bdf = setup.add()
    _, other_bar, other = setup.add()
    setup.root.assign_bars()
    address = first.bar_address(bar)
    setup.command(bdf, reg.COMMAND_MEMORY)
    setup.root.config_write(other, other_bar.register, 4, address)
    setup.command(other, reg.COMMAND_MEMORY)
    assert (bar.mapped_at, other_bar.mapped_at) == (address, None)
    setup.command(bdf, 0)
    assert (bar.mapped_at, other_bar.mapped_at) == (None, address)


def test_bar_where_the_platform_has_something_is_not_decoded(setup: Setup) -> None:
    function, bar, bdf = setup.add()
    setup.root.assign_bars()
    setup.platform.mmio.add(function.bar_address(bar) + 0x1000, 0x10, Echo())
    setup.command(bdf, reg.COMMAND_MEMORY)
    assert bar.mapped_at is None
    assert len(setup.platform.mmio.ranges) == 1


def test_device_number_taken_or_bus_full_is_value_error(setup: Setup) -> None:
    with pytest.raises(ValueError, match="no free place"):
        setup.root.add(PciFunction(1, 2, 3), 0)
    for _ in range(31):
        setup.add()
    with pytest.raises(ValueError, match="no free place"):
        setup.add()


def test_reset_takes_everything_back(setup: Setup) -> None:
    function, bar, bdf = setup.add()
    setup.root.assign_bars()
    address = function.bar_address(bar)
    setup.command(bdf, 0x7)
    setup.root.reset()
    assert function.command == 0
    assert bar.mapped_at is None
    assert function.bar_address(bar) == address


def test_random_config_writes_leave_identity_and_mappings_sound(setup: Setup) -> None:
    rng = random.Random(7)
    parts = [setup.add(0x4000), setup.add(0x1000, wide=True), setup.add(0x20, io=True)]
    setup.root.assign_bars()
    for _ in range(FUZZ):
        size = rng.choice((1, 2, 4, 8))
        offset = rng.choice((rng.randrange(0x40), rng.randrange(4096)))
        bdf = rng.choice((0, 8, 16, 24, 32))
        setup.root.write(
            bdf << 12 | offset, size, rng.choice((0, (1 << 8 * size) - 1, rng.getrandbits(8 * size)))
        )
        setup.root.read(bdf << 12 | rng.randrange(4096), size)
    for function, bar, bdf in parts:
        assert setup.root.read(bdf << 12, 4) == 0x10411AF4
        space = setup.platform.ports if bar.io else setup.platform.mmio
        assert (bar.mapped_at in space.ranges) == (bar.mapped_at is not None)
        setup.command(bdf, 0)
        assert function.command == 0
    assert not setup.platform.mmio.ranges and not setup.platform.ports.ranges
