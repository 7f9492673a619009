# SPDX-License-Identifier: Apache-2.0
"""MAP, UNMAP and RETARGET_DEVICE_INTERRUPT, and what becomes of the messages that a device raises."""

from __future__ import annotations

import struct

import pytest

from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import status
from tests.kvm.guest import Guest, Result

DISK = 1 << 62 | 0x10
NET = 1 << 62 | 0x18
IO_APIC = 2 << 62
Entry = tuple[int, int, int, int]


@pytest.fixture(autouse=True)
def devices(guest2: Guest) -> None:
    guest2.partition.interrupts.devices.update((DISK, NET, IO_APIC))


def map_interrupt(
    guest: Guest, device: int, vector: int, vp: int = 0, *, partition: int = hv.SELF, kind: int = 0, count: int = 1,
    trigger: int = 0, banks: bytes | None = None, variable: int | None = None, flags: int = 2, set_format: int = 0,
) -> Result:  # fmt: skip
    tail = struct.pack("<QQ", 1, 1 << vp) if banks is None else banks
    data = hv.MAP_DEVICE_INTERRUPT_INPUT.pack(
        partition, device, 0, bytes(16), kind, trigger, count, vector, flags, set_format
    )
    units = len(tail) // 8 if variable is None else variable
    return guest.call(hv.MAP_DEVICE_INTERRUPT, data + tail, variable=units, output=20)


def mapped(guest: Guest, device: int, vector: int, vp: int = 0) -> Entry:
    answer = map_interrupt(guest, device, vector, vp)
    assert answer.status == 0
    assert answer.output[16:] == b"\xee" * 4
    source, reserved, low, high = struct.unpack("<4I", answer.output[:16])
    return source, reserved, low, high


def unmap(guest: Guest, device: int, entry: Entry) -> int:
    data = hv.UNMAP_DEVICE_INTERRUPT_INPUT.pack(hv.SELF, device, *entry)
    return guest.call(hv.UNMAP_DEVICE_INTERRUPT, data).status


def retarget(guest: Guest, device: int, entry: Entry, vector: int, vp: int, *, as_set: bool = False) -> int:
    data = hv.RETARGET_DEVICE_INTERRUPT_INPUT.pack(
        hv.SELF, device, *entry, 0, vector, 2 if as_set else 0, 0 if as_set else 1 << vp
    )
    if not as_set:
        return guest.call(hv.RETARGET_DEVICE_INTERRUPT, data).status
    return guest.call(hv.RETARGET_DEVICE_INTERRUPT, data + struct.pack("<QQ", 1, 1 << vp), variable=2).status


def raised(guest: Guest, device: int, entry: Entry) -> bool:
    return guest.partition.interrupts.raise_message(device, entry[2], entry[3])


@pytest.mark.parametrize("vp", [0, 1])
def test_message_reaches_its_vp_and_vector(guest2: Guest, vp: int) -> None:
    entry = mapped(guest2, DISK, 0x41, vp)
    assert entry[0] == hv.INTERRUPT_SOURCE_MSI
    assert raised(guest2, DISK, entry)
    assert guest2.take(0x41, vp) == 1
    assert guest2.interrupts(0x41, 1 - vp) == 0
    assert guest2.partition.interrupts.delivered == 1


def test_map_is_idempotent(guest2: Guest) -> None:
    assert mapped(guest2, DISK, 0x41) == mapped(guest2, DISK, 0x41)
    assert mapped(guest2, DISK, 0x42) != mapped(guest2, DISK, 0x41)
    assert mapped(guest2, NET, 0x41) != mapped(guest2, DISK, 0x41)


def test_entry_mapped_twice_lives_until_it_is_unmapped_twice(guest2: Guest) -> None:
    """Linux maps each vector of a device to one placeholder; unmapping one must not take the other's entry away."""
    first = mapped(guest2, DISK, 0xEF)
    second = mapped(guest2, DISK, 0xEF)
    assert unmap(guest2, DISK, first) == 0
    moved = mapped(guest2, DISK, 0x55, 1)
    assert unmap(guest2, DISK, second) == 0
    assert mapped(guest2, DISK, 0x56, 1) != moved
    assert raised(guest2, DISK, moved)
    assert guest2.take(0x55, 1) == 1


def test_map_unmap_map_as_a_kernel_does_at_start(guest2: Guest) -> None:
    placeholder = mapped(guest2, DISK, 0xEF)
    assert unmap(guest2, DISK, placeholder) == 0
    entry = mapped(guest2, DISK, 0x55, 1)
    assert raised(guest2, DISK, entry)
    assert guest2.take(0x55, 1) == 1
    assert guest2.interrupts(0xEF) == 0


def test_map_hundreds_of_times_does_not_leak(guest2: Guest) -> None:
    for n in range(300):
        assert unmap(guest2, DISK, mapped(guest2, DISK, 0x40 + n % 100, n % 2)) == 0
    assert len(guest2.partition.interrupts.entries) == 1


def test_unmapped_entry_is_blocked_and_counted(guest2: Guest) -> None:
    entry = mapped(guest2, DISK, 0x41)
    assert unmap(guest2, DISK, entry) == 0
    assert not raised(guest2, DISK, entry)
    assert guest2.partition.interrupts.blocked == 1
    assert guest2.take(0x41, turns=1000) == 0
    assert unmap(guest2, DISK, entry) == status.INVALID_PARAMETER


def test_entry_of_another_device_is_blocked(guest2: Guest) -> None:
    entry = mapped(guest2, DISK, 0x41)
    assert not raised(guest2, NET, entry)
    assert unmap(guest2, NET, entry) == status.INVALID_PARAMETER
    assert raised(guest2, DISK, entry)


@pytest.mark.parametrize(
    ("address", "data"), [(0xFEE00000, 0x41), (0xFEE01000, 0x41), (0xFEE00010, 1), (0, 0)]
)
def test_message_that_names_a_processor_directly_is_blocked(guest2: Guest, address: int, data: int) -> None:
    mapped(guest2, DISK, 0x41)
    assert not guest2.partition.interrupts.raise_message(DISK, address, data)
    assert guest2.take(0x41, turns=1000) == 0


@pytest.mark.parametrize("as_set", [False, True])
def test_retarget_moves_the_interrupt_not_the_message(guest2: Guest, as_set: bool) -> None:
    entry = mapped(guest2, DISK, 0x41, 0)
    assert retarget(guest2, DISK, entry, 0x42, 1, as_set=as_set) == 0
    assert raised(guest2, DISK, entry)
    assert guest2.take(0x42, 1) == 1
    assert guest2.interrupts(0x41, 0) == 0
    assert unmap(guest2, DISK, entry) == 0


def test_retarget_errors(guest2: Guest) -> None:
    entry = mapped(guest2, DISK, 0x41)
    assert retarget(guest2, DISK, entry, 5, 0) == status.INVALID_PARAMETER
    assert retarget(guest2, DISK, entry, 0x41, 60) == status.INVALID_VP_INDEX
    assert retarget(guest2, 99, entry, 0x41, 0) == status.INVALID_DEVICE_ID
    assert retarget(guest2, NET, entry, 0x41, 0) == status.INVALID_PARAMETER
    assert raised(guest2, DISK, entry)
    assert guest2.take(0x41) == 1


def test_io_apic_entry_names_vector_and_processor(guest2: Guest) -> None:
    assert mapped(guest2, IO_APIC, 0x31, 1) == (hv.INTERRUPT_SOURCE_IO_APIC, 0, 0x31, 1 << 24)
    same_vector = mapped(guest2, IO_APIC, 0x31, 0)
    assert same_vector == (hv.INTERRUPT_SOURCE_IO_APIC, 0, 0x31, 0)
    assert unmap(guest2, IO_APIC, same_vector) == 0
    assert unmap(guest2, IO_APIC, (hv.INTERRUPT_SOURCE_IO_APIC, 0, 0x31, 1 << 24)) == 0


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"device": 1 << 62 | 0x99}, status.INVALID_DEVICE_ID),
        ({"device": 0}, status.INVALID_DEVICE_ID),
        ({"vector": 15}, status.INVALID_PARAMETER),
        ({"vector": 256}, status.INVALID_PARAMETER),
        ({"kind": 4}, status.INVALID_PARAMETER),
        ({"trigger": 2}, status.INVALID_PARAMETER),
        ({"count": 0}, status.INVALID_PARAMETER),
        ({"count": 2}, status.INVALID_PARAMETER),
        ({"vp": 2}, status.INVALID_VP_INDEX),
        ({"banks": struct.pack("<QQ", 1, 0)}, status.INVALID_VP_INDEX),
        ({"banks": struct.pack("<Q", 0)}, status.INVALID_VP_INDEX),
        ({"banks": struct.pack("<Q", 1)}, status.INVALID_PARAMETER),
        ({"banks": struct.pack("<QQQ", 1, 1, 1)}, status.INVALID_PARAMETER),
        ({"set_format": 7}, status.INVALID_PARAMETER),
        ({"banks": b""}, status.INVALID_HYPERCALL_INPUT),
        ({"partition": 5}, status.INVALID_PARTITION_ID),
    ],
)
def test_map_errors(guest2: Guest, fields: dict[str, int], wanted: int) -> None:
    arguments = {"device": DISK, "vector": 0x41, **fields}
    assert map_interrupt(guest2, **arguments).status == wanted  # type: ignore[arg-type]
    assert not guest2.partition.interrupts.entries


def test_map_takes_all_banks_up_to_the_vps(guest2: Guest) -> None:
    """6.12 and 7.3 may name more banks than one; exactly one VP is set."""
    answer = map_interrupt(guest2, DISK, 0x41, banks=struct.pack("<3Q", 3, 2, 0))
    assert answer.status == 0
    _, _, low, high = struct.unpack("<4I", answer.output[:16])
    assert guest2.partition.interrupts.raise_message(DISK, low, high)
    assert guest2.take(0x41, 1) == 1


def test_table_full_is_no_resources(guest2: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rootvisor.hypervisor.interrupt_remapping.ENTRY_LIMIT", 2)
    mapped(guest2, DISK, 0x41)
    entry = mapped(guest2, DISK, 0x42)
    assert map_interrupt(guest2, DISK, 0x43).status == status.NO_RESOURCES
    assert unmap(guest2, DISK, entry) == 0
    mapped(guest2, DISK, 0x43)
