# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from rootvisor.pci import registers as reg
from rootvisor.pci.bar import Bar
from rootvisor.pci.config import ConfigSpace
from rootvisor.pci.function import PciFunction


def capabilities(function: PciFunction) -> list[int]:
    found = []
    offset = function.config.get(reg.CAPABILITY_POINTER, 1)
    while offset:
        found.append(function.config.get(offset, 1))
        offset = function.config.get(offset + 1, 1)
    return found


def test_write_outside_mask_is_dropped() -> None:
    config = ConfigSpace()
    config.set(0x40, 4, 0x12345678)
    config.set_mask(0x40, 4, 0x00FF0F00)
    config.write(0x40, 4, 0xFFFFFFFF)
    assert config.get(0x40, 4) == 0x12FF5F78
    config.write(0x41, 1, 0)
    assert config.get(0x40, 4) == 0x12FF5078


def test_capabilities_form_a_list_in_order() -> None:
    function = PciFunction(0x1AF4, 0x1041, 0x020000)
    bar = function.add_bar(0, 0x4000, wide=True)
    function.add_msix(3, bar, 0, 0x1000)
    assert capabilities(function) == [reg.CAP_EXPRESS, reg.CAP_MSIX]
    assert function.config.get(reg.STATUS, 2) & reg.STATUS_CAPABILITY_LIST


def test_capability_list_full_is_value_error() -> None:
    config = ConfigSpace()
    config.add_capability(reg.CAP_VENDOR, bytes(150))
    with pytest.raises(ValueError, match="no room"):
        config.add_capability(reg.CAP_VENDOR, bytes(60))


@pytest.mark.parametrize(
    ("size", "io", "wide", "low", "high"),
    [
        (0x4000, False, False, 0xFFFFC000, None),
        (0x4000, False, True, 0xFFFFC00C, 0xFFFFFFFF),
        (1 << 33, False, True, 0x0000000C, 0xFFFFFFFE),
        (0x20, True, False, 0xFFFFFFE1, None),
    ],
)
def test_bar_sizing_shows_size_and_type(size: int, io: bool, wide: bool, low: int, high: int | None) -> None:
    function = PciFunction(1, 2, 3)
    bar = function.add_bar(2, size, io=io, wide=wide, prefetchable=wide)
    function.config_write(bar.register, 4, 0xFFFFFFFF)
    function.config_write(bar.register + 4, 4, 0xFFFFFFFF)
    assert function.config_read(bar.register, 4) == low
    assert function.config_read(bar.register + 4, 4) == (high or 0)


@pytest.mark.parametrize("size", [0, 3, 8, 1 << 32])
def test_bar_of_impossible_size_is_value_error(size: int) -> None:
    with pytest.raises(ValueError, match="cannot be expressed"):
        Bar(0, size)


def test_bar_overlapping_wide_neighbour_is_value_error() -> None:
    function = PciFunction(1, 2, 3)
    function.add_bar(0, 0x1000, wide=True)
    with pytest.raises(ValueError, match="taken"):
        function.add_bar(1, 0x1000)
    with pytest.raises(ValueError, match="no BAR"):
        function.add_bar(5, 0x1000, wide=True)


def test_identity_is_read_only() -> None:
    function = PciFunction(0x1234, 0x5678, 0x020000, revision=7)
    for offset in range(0, 0x40, 4):
        function.config_write(offset, 4, 0xFFFFFFFF)
    assert function.config_read(0, 4) == 0x56781234
    assert function.config_read(reg.REVISION_ID, 4) == 0x02000007
    assert function.config_read(reg.INTERRUPT_PIN, 1) == 0
    assert function.command == reg.COMMAND_WRITABLE
