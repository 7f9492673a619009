# SPDX-License-Identifier: Apache-2.0
"""The remapping table alone, with a machine that only notes what it is told."""

from __future__ import annotations

import struct
from typing import cast

import pytest

from rootvisor.hypervisor.errors import HvError
from rootvisor.hypervisor.interrupt_remapping import InterruptRemapping, message_address, message_index
from rootvisor.kvm.vm import Vm
from rootvisor.tlfs import hypercalls, status

DISK = 1 << 62 | 0x10
IO_APIC = 2 << 62


class Machine:
    def __init__(self) -> None:
        self.raised: list[tuple[int, int]] = []
        self.ioapic = bytearray(520)

    def signal_msi(self, message: bytearray) -> None:
        address, _high, data = struct.unpack_from("<III", message)
        self.raised.append((address, data))

    def read_ioapic(self) -> bytearray:
        return bytearray(self.ioapic)

    def write_ioapic(self, state: bytearray) -> None:
        self.ioapic = state


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def table(machine: Machine) -> InterruptRemapping:
    made = InterruptRemapping(cast(Vm, machine))
    made.devices.update((DISK, IO_APIC))
    return made


@pytest.mark.parametrize("index", [0, 1, 4095, 0x7FFF, 0x8000, 0xFFFF])
def test_index_survives_the_message(index: int) -> None:
    assert message_index(message_address(index), 0) == index


@pytest.mark.parametrize(("address", "data"), [(0xFEE00000, 0), (0xFEC00010, 0), (0xFEE00010, 1), (0, 0)])
def test_other_messages_have_no_index(address: int, data: int) -> None:
    assert message_index(address, data) is None


def test_message_is_delivered_to_the_entry(table: InterruptRemapping, machine: Machine) -> None:
    _, _, low, high = table.map(DISK, 0x41, 3, 3)
    assert table.raise_message(DISK, low, high)
    assert machine.raised == [(0xFEE03000, 0x41)]


def test_stale_message_is_reported(table: InterruptRemapping, machine: Machine) -> None:
    seen: list[tuple[int, int, int]] = []
    table.report = lambda *what: seen.append(what)
    _, _, low, high = table.map(DISK, 0x41, 0, 0)
    table.unmap(DISK, hypercalls.INTERRUPT_SOURCE_MSI, low, high)
    assert not table.raise_message(DISK, low, high)
    assert (table.blocked, table.delivered, seen, machine.raised) == (1, 0, [(DISK, low, high)], [])


def test_freed_index_is_used_again(table: InterruptRemapping) -> None:
    first = table.map(DISK, 0x41, 0, 0)
    table.unmap(DISK, first[0], first[2], first[3])
    assert table.map(DISK, 0x42, 0, 0)[2] == first[2]


def test_entry_mapped_twice_lives_until_it_is_unmapped_twice(table: InterruptRemapping) -> None:
    """A kernel maps the new place before it unmaps the old one, and they may be the same."""
    entry = table.map(DISK, 0x41, 0, 0)
    assert table.map(DISK, 0x41, 0, 0) == entry
    table.unmap(DISK, *_named(entry))
    assert table.raise_message(DISK, entry[2], entry[3])
    table.unmap(DISK, *_named(entry))
    assert not table.raise_message(DISK, entry[2], entry[3])


def test_changes_are_announced(table: InterruptRemapping) -> None:
    seen: list[int] = []
    table.changed.append(seen.append)
    entry = table.map(DISK, 0x41, 0, 0)
    table.retarget(table.find(DISK, *_named(entry)), 0x42, 1, 1)
    table.unmap(DISK, *_named(entry))
    assert seen == [0, 0, 0]


def _named(answer: tuple[int, int, int, int]) -> tuple[int, int, int]:
    return answer[0], answer[2], answer[3]


def test_retarget_rewrites_the_io_apic(table: InterruptRemapping, machine: Machine) -> None:
    entry = table.map(IO_APIC, 0x31, 0, 0)
    struct.pack_into("<Q", machine.ioapic, 32 + 8 * 9, 0xA031)
    table.retarget(table.find(IO_APIC, *_named(entry)), 0x32, 2, 2)
    assert struct.unpack_from("<Q", machine.ioapic, 32 + 8 * 9) == (2 << 56 | 0xA032,)


def test_retarget_onto_another_entry_is_refused(table: InterruptRemapping) -> None:
    entry = table.map(DISK, 0x41, 0, 0)
    table.map(DISK, 0x42, 0, 0)
    with pytest.raises(HvError) as refused:
        table.retarget(table.find(DISK, *_named(entry)), 0x42, 0, 0)
    assert refused.value.status == status.INVALID_PARAMETER
