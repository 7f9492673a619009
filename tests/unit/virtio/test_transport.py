# SPDX-License-Identifier: Apache-2.0
"""Status, features, queues and the PCI form of them, as a driver sees it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest

from rootvisor.pci import registers as pci
from rootvisor.virtio.device import RING_FEATURES
from rootvisor.virtio.pci_function import VirtioPciFunction
from rootvisor.virtio.registers import (
    F_RING_PACKED,
    F_VERSION_1,
    NO_VECTOR,
    STATUS_DRIVER_OK,
    STATUS_FEATURES_OK,
    STATUS_NEEDS_RESET,
)
from rootvisor.virtio.rng import Rng
from tests.unit.virtio.guest_side import RAM_BASE, Guest, wait_until


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest(Rng())
    yield guest
    guest.close()


def start(guest: Guest, features: int = F_VERSION_1) -> None:
    guest.start(features, [8])


def fill(guest: Guest) -> bytes:
    room = guest.memory.allocate(64)
    count = guest.request(0, [(room, 64, True)])
    return guest.memory.read(room, count)


def windows(guest: Guest) -> dict[int, tuple[int, int]]:
    """Virtio structures by type, as the capabilities describe them: offset in BAR 0 and length."""
    found = {}
    offset = guest.config_read(pci.CAPABILITY_POINTER, 1)
    while offset:
        if guest.config_read(offset, 1) == pci.CAP_VENDOR:
            assert guest.config_read(offset + 2, 1) >= 16
            place = guest.config_read(offset + 8, 4), guest.config_read(offset + 12, 4)
            found[guest.config_read(offset + 3, 1)] = place
        offset = guest.config_read(offset + 1, 1)
    return found


def test_capabilities_describe_the_windows(guest: Guest) -> None:
    assert windows(guest) == {1: (0, 0x40), 3: (0x80, 4), 4: (0x100, 0xF00), 2: (0x1000, 0x1000), 5: (0, 0)}
    assert guest.config_read(0, 4) == 0x1044 << 16 | 0x1AF4


def test_offered_features_are_the_devices(guest: Guest) -> None:
    assert guest.offered() == RING_FEATURES
    guest.write(0, 4, 2)
    assert guest.read(4, 4) == 0


def test_features_without_version_1_are_refused(guest: Guest) -> None:
    assert not guest.negotiate(0)
    assert guest.negotiate(F_VERSION_1)


def test_features_not_offered_are_refused(guest: Guest) -> None:
    assert not guest.negotiate(F_VERSION_1 | 1)


def test_features_are_frozen_once_accepted(guest: Guest) -> None:
    assert guest.negotiate(F_VERSION_1)
    guest.write(8, 4, 0)
    guest.write(12, 4, 0xFFFFFFFF)
    assert guest.function.transport.driver_features == F_VERSION_1


def test_driver_ok_before_features_ok_is_refused(guest: Guest) -> None:
    guest.write(20, 1, 7)
    assert not guest.status & STATUS_DRIVER_OK


def test_device_works_and_interrupts(guest: Guest) -> None:
    start(guest)
    assert fill(guest) != bytes(64)
    assert guest.vectors[1].count == 1
    assert guest.read(0x80, 1) == 1
    assert guest.read(0x80, 1) == 0


def test_packed_ring_works(guest: Guest) -> None:
    start(guest, F_VERSION_1 | F_RING_PACKED)
    assert len(fill(guest)) == 64


def test_notification_without_ioeventfd_works(guest: Guest) -> None:
    start(guest)
    guest.rings[0].add([(guest.memory.allocate(64), 64, True)])
    guest.write(0x1000, 2, 0)
    wait_until(lambda: bool(guest.rings[0].used()))


def test_ioeventfds_follow_the_bar(guest: Guest) -> None:
    start(guest)
    assert list(guest.platform.ioeventfds) == [guest.bar + 0x1000]
    guest.config_write(pci.COMMAND, 2, pci.COMMAND_BUS_MASTER)
    assert not guest.platform.ioeventfds
    guest.config_write(pci.BAR_0, 4, (guest.bar & 0xFFFFFFFF) + 0x100000)
    guest.config_write(pci.COMMAND, 2, pci.COMMAND_BUS_MASTER | pci.COMMAND_MEMORY)
    assert list(guest.platform.ioeventfds) == [guest.bar + 0x101000]
    guest.bar += 0x100000
    assert len(fill(guest)) == 64


def test_reset_forgets_everything(guest: Guest) -> None:
    start(guest)
    guest.write(20, 1, 0)
    assert guest.status == 0
    assert not guest.platform.ioeventfds
    assert guest.read(16, 2) == NO_VECTOR
    guest.write(22, 2, 0)
    assert (guest.read(24, 2), guest.read(28, 2), guest.read(32, 8)) == (8, 0, 0)
    start(guest)
    assert len(fill(guest)) == 64


def test_requests_made_before_driver_ok_are_served(guest: Guest) -> None:
    assert guest.negotiate(F_VERSION_1)
    ring = guest.set_queue(0, 8, vector=NO_VECTOR)
    ring.add([(guest.memory.allocate(16), 16, True)])
    guest.write(20, 1, 15)
    wait_until(lambda: bool(ring.used()))


def test_nothing_is_served_without_bus_master(guest: Guest) -> None:
    start(guest)
    guest.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    ring = guest.rings[0]
    ring.add([(guest.memory.allocate(16), 16, True)])
    guest.kick(0)
    wait_until(lambda: guest.device.counters[0].kicks >= 2)
    assert not ring.used()
    guest.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
    wait_until(lambda: bool(ring.used()))


def test_queue_registers_keep_what_is_written(guest: Guest) -> None:
    guest.write(22, 2, 0)
    guest.write(32, 8, 0x1122334455667788)
    guest.write(44, 4, 0xAABBCCDD)
    assert guest.read(36, 4) == 0x11223344
    assert guest.read(40, 8) == 0xAABBCCDD00000000
    for size in (3, 16, 0):  # no power of two, too large, none
        guest.write(24, 2, size)
        assert guest.read(24, 2) == 8
    guest.write(24, 2, 4)
    assert guest.read(24, 2) == 4
    guest.write(26, 2, 2)
    assert guest.read(26, 2) == NO_VECTOR
    assert guest.read(30, 2) == 0


def test_absent_queue_reads_size_zero(guest: Guest) -> None:
    guest.write(22, 2, 1)
    assert guest.read(24, 2) == 0
    guest.write(28, 2, 1)
    assert guest.read(28, 2) == 0


def test_queue_outside_ram_needs_reset(guest: Guest) -> None:
    reasons: list[str] = []
    guest.device.on_failure = reasons.append
    assert guest.negotiate(F_VERSION_1)
    guest.write(22, 2, 0)
    guest.write(28, 2, 1)
    assert guest.status & STATUS_NEEDS_RESET
    guest.write(20, 1, 15)
    assert len(reasons) == 1 and "outside guest RAM" in reasons[0]
    start(guest)
    assert len(fill(guest)) == 64


def test_malformed_request_needs_reset_and_says_so_by_config_interrupt(guest: Guest) -> None:
    start(guest)
    guest.rings[0].add([(0, 64, True)])
    guest.kick(0)
    wait_until(lambda: bool(guest.status & STATUS_NEEDS_RESET))
    wait_until(lambda: guest.vectors[0].count == 1)
    guest.write(20, 1, 0)
    start(guest)
    assert len(fill(guest)) == 64


def test_queue_reset_lets_the_queue_be_set_up_again(guest: Guest) -> None:
    start(guest, RING_FEATURES & ~F_RING_PACKED)
    assert len(fill(guest)) == 64
    guest.write(22, 2, 0)
    guest.write(58, 2, 1)
    assert guest.read(58, 2) == 0
    assert guest.read(28, 2) == 0
    assert not guest.platform.ioeventfds
    guest.set_queue(0, 4, event_idx=True)
    assert guest.read(28, 2) == 1
    assert len(fill(guest)) == 64


def test_pci_window_reaches_the_bar_without_decoding(guest: Guest) -> None:
    guest.config_write(pci.COMMAND, 2, 0)
    offset = guest.config_read(pci.CAPABILITY_POINTER, 1)
    while guest.config_read(offset, 1) != pci.CAP_VENDOR or guest.config_read(offset + 3, 1) != 5:
        offset = guest.config_read(offset + 1, 1)
    guest.config_write(offset + 4, 1, 0)
    guest.config_write(offset + 8, 4, 20)
    guest.config_write(offset + 12, 4, 1)
    guest.config_write(offset + 16, 1, 1)
    assert guest.function.transport.status == 1
    assert guest.config_read(offset + 16, 1) == 1
    guest.config_write(offset + 12, 4, 3)
    guest.config_write(offset + 16, 1, 0)
    assert guest.function.transport.status == 1


def test_function_reset_stops_the_device(guest: Guest) -> None:
    start(guest)
    guest.root.reset()
    assert not guest.platform.ioeventfds
    assert guest.function.transport.status == 0
    guest.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
    guest.platform.vectors.clear()
    assert guest.negotiate(F_VERSION_1)
    guest.set_queue(0, 8, vector=NO_VECTOR)
    guest.write(20, 1, 15)
    assert len(fill(guest)) == 64


def test_close_releases_threads_and_descriptors() -> None:
    gc.collect()
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        guest = Guest(Rng())
        start(guest)
        assert len(fill(guest)) == 64
        guest.close()
    del guest
    gc.collect()  # `mmap` keeps a duplicate of the memfd
    assert len(os.listdir("/proc/self/fd")) <= before
    assert threads == threading.active_count()


def test_counters_tell_what_happened(guest: Guest) -> None:
    start(guest)
    for _ in range(3):
        fill(guest)
    counters = guest.device.counters[0]
    assert (counters.completions, counters.bytes) == (3, 192)
    assert counters.kicks >= 3
    assert counters.interrupts == guest.vectors[1].count == 3


def test_status_keeps_features_ok_on_later_writes(guest: Guest) -> None:
    assert guest.negotiate(F_VERSION_1)
    guest.write(20, 1, 3)
    assert guest.status & STATUS_FEATURES_OK
    assert guest.memory.read(RAM_BASE, 1) == b"\0"


def test_function_removed_while_it_works_lets_go_of_everything(guest: Guest) -> None:
    start(guest)
    ring = guest.rings[0]
    for _ in range(8):
        ring.add([(guest.memory.allocate(64), 64, True)])
    guest.kick(0)
    bar = guest.bar
    assert guest.root.remove(guest.bdf) is guest.function
    guest.function.close()
    assert not guest.platform.ioeventfds and not guest.platform.mmio.ranges
    assert guest.config_read(0, 4) == 0xFFFFFFFF
    assert all(vector.masked for vector in guest.platform.vectors)
    done = len(ring.used())
    guest.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
    assert guest.platform.mmio.read(bar, 4) == 0xFFFFFFFF
    assert done + len(ring.used()) <= 8


def test_function_added_while_the_guest_runs_works_in_the_place_of_another(guest: Guest) -> None:
    start(guest)
    place, bar = guest.bdf, guest.bar
    guest.root.remove(place)
    guest.function.close()
    again = Guest.__new__(Guest)
    again.__dict__.update(guest.__dict__)
    again.device = Rng()
    again.function = VirtioPciFunction(again.device, guest.platform)
    assert guest.root.add(again.function, place >> 3) == place
    again.platform.vectors.clear()
    # The guest gives the address; nothing is decoded before it does.
    assert not guest.platform.mmio.ranges
    again.config_write(pci.BAR_0, 4, bar & 0xFFFFFFFF)
    again.config_write(pci.BAR_0 + 4, 4, bar >> 32)
    again.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
    start(again)
    assert len(fill(again)) == 64
    again.function.close()


def test_removing_nothing_is_a_key_error(guest: Guest) -> None:
    with pytest.raises(KeyError):
        guest.root.remove(31 << 3)
